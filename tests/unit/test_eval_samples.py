"""Samples on disk: what a kill, a full disk, a power cut and a damaged disk leave, and what becomes of it."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evals.members import SampleFileError, members
from evals.samples import Sample, SampleStore, Status, read_samples
from tests.unit.eval_samples import sample

ROOT = Path(__file__).resolve().parents[2]

texts = st.text(st.characters(codec="utf-8") | st.sampled_from('\ud83d\udc00\n\r\u2028"\\'), max_size=30)
any_sample = st.builds(
    sample,
    number=st.integers(0, 3), index=st.integers(0, 99), status=st.sampled_from(list(Status)), text=texts,
    answer=st.none() | texts, gold=st.none() | texts | st.integers() | st.lists(st.floats(-1, 1)), detail=texts,
    score=st.none() | st.floats(0, 1), groups=st.dictionaries(texts, texts, max_size=2),
)  # fmt: skip


def unlike(found: list[Sample]) -> list[Sample]:
    """Those with keys of their own."""
    return list({each.key: each for each in found}.values())


def no_pairs(text: object) -> object:
    """Two halves of a surrogate pair, side by side, are one character to every JSON reader."""
    if isinstance(text, str):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(text, dict):
        return {no_pairs(key): no_pairs(value) for key, value in text.items()}
    return text


@given(st.lists(any_sample, max_size=5))
@settings(max_examples=60)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: list[Sample]) -> None:
    found = unlike(found)
    store = SampleStore(tmp_path_factory.mktemp("any"))
    for part in (found[:1], found[1:]):
        store.append(part)
    rows = [{key: no_pairs(value) for key, value in each.to_json().items()} for each in found]
    assert [each.to_json() for each in store.read()] == rows == [s.to_json() for s in read_samples(store.path)]
    text = gzip.decompress(store.path.read_bytes()).decode() if found else ""  # any gzip reader, valid UTF-8
    assert len(text.splitlines()) >= len(found) == len(store) == text.count("\n")


def filled(folder: Path, members_of: list[int]) -> tuple[SampleStore, list[int]]:
    """A store with members of so many samples, and where each member ends."""
    store, ends, number = SampleStore(folder), [0], 0
    for size in members_of:
        store.append([sample(number + i, text="x" * i + str(number)) for i in range(size)])
        number += size
        ends.append(store.path.stat().st_size)
    return store, ends


def test_a_file_cut_anywhere_in_its_last_member_loses_that_member_and_nothing_else(tmp_path: Path) -> None:
    store, ends = filled(tmp_path / "whole", [2, 1, 3])
    data, wanted = store.path.read_bytes(), store.read()[:3]
    extra = [sample(90), sample(91)]
    for cut in range(ends[-2], ends[-1]):
        folder = tmp_path / "cut"
        folder.mkdir(exist_ok=True)
        path = folder / store.path.name
        path.write_bytes(data[:cut])
        assert read_samples(folder) == wanted and path.stat().st_size == cut, "a reader changes nothing"
        opened = SampleStore(folder)
        assert opened.cut == cut - ends[-2] and opened.read() == wanted
        opened.append(extra)
        assert SampleStore(folder).read() == [*wanted, *extra]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_keeps_its_whole_members(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject
) -> None:
    store, ends = filled(tmp_path_factory.mktemp("cut"), sizes)
    cut = data.draw(st.integers(0, ends[-1]))
    zeros = data.draw(st.sampled_from([0, 0, 8, 4096]))  # what a power cut adds
    whole = max(i for i, end in enumerate(ends) if end <= cut)
    wanted = store.read()[: sum(sizes[:whole])]
    store.path.write_bytes(store.path.read_bytes()[:cut] + b"\0" * zeros)
    opened = SampleStore(store.path.parent)
    assert opened.read() == wanted and opened.path.stat().st_size == ends[whole]
    again = [sample(50, i) for i in range(2)]
    opened.append(again)
    assert SampleStore(store.path.parent).read() == [*wanted, *again]


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_wrong_byte_before_the_last_member_is_an_error_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, where: int, flip: int
) -> None:
    store, ends = filled(tmp_path_factory.mktemp("flip"), [2, 3, 1])
    before = store.read()
    data = bytearray(store.path.read_bytes())
    where %= ends[-2]
    data[where] ^= flip
    store.path.write_bytes(data)
    member = max(i for i, end in enumerate(ends) if end <= where)
    try:
        assert SampleStore(store.path.parent).read() == before  # a byte that means nothing: time, system
    except SampleFileError as error:
        text = str(error)
        assert str(store.path) in text and f"truncate -s {ends[member]} " in text and "\n" not in text
    assert store.path.read_bytes() == bytes(data), "nothing is cut off a damaged file"


def test_a_damaged_middle_says_where_it_is_and_how_to_mend_it(tmp_path: Path) -> None:
    store, ends = filled(tmp_path, [1, 2, 1])
    data = store.path.read_bytes()
    for broken in (
        data[: ends[1] + 30] + data[ends[2] :],  # bytes of the middle are gone
        data[: ends[1]] + b"\0" * (ends[2] - ends[1]) + data[ends[2] :],
        data[: ends[1]] + b"garbage" + data[ends[1] :],
        # a header that claims more than the file holds looks like a beginning; but a whole member follows
        data[: ends[1] + 3] + b"\x04" + data[ends[1] + 4 : ends[1] + 10] + b"\xff\xff" + data[ends[1] + 12 :],
    ):
        store.path.write_bytes(broken)
        with pytest.raises(SampleFileError, match=rf"damaged at byte {ends[1]} of {len(broken)}: restore it"):
            SampleStore(tmp_path)
        assert store.path.read_bytes() == broken
    os.truncate(store.path, ends[1])  # the mend that the message names
    assert len(SampleStore(tmp_path)) == 1


def test_a_last_member_that_was_whole_and_is_wrong_is_damage_not_a_kill(tmp_path: Path) -> None:
    store, ends = filled(tmp_path, [1, 2])
    data = bytearray(store.path.read_bytes())
    data[ends[1] + 40] ^= 0x55
    store.path.write_bytes(data)
    with pytest.raises(SampleFileError, match=f"damaged at byte {ends[1]}"):
        SampleStore(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "benchmark is missing"), ("[1]", "is no sample"), ("nothing", "Expecting value"),
        (json.dumps({**sample().to_json(), "index": "0"}), "index must be a whole number"),
        (json.dumps({**sample().to_json(), "text": 3}), "text must be a text"),
        (json.dumps({**sample().to_json(), "status": "fine"}), "'fine' is not a valid Status"),
        (json.dumps({**sample().to_json(), "colour": 1}), "colour is unknown"),
        (json.dumps(sample(0).to_json()), "sample 0 of problem 'p0' stands there twice, again at byte"),
    ],
)  # fmt: skip
def test_a_whole_member_that_holds_something_else_is_named(tmp_path: Path, line: str, said: str) -> None:
    store, ends = filled(tmp_path, [1])
    store.path.write_bytes(store.path.read_bytes() + gzip.compress(line.encode() + b"\n"))
    with pytest.raises(SampleFileError, match=said) as caught:
        SampleStore(tmp_path)
    assert f"truncate -s {ends[-1]} " in str(caught.value)


def test_a_file_that_a_person_packed_again_is_read(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, [2, 2])
    before = store.read()
    store.path.write_bytes(gzip.compress(gzip.decompress(store.path.read_bytes())))
    again = SampleStore(tmp_path)
    assert again.read() == before
    again.append([sample(9)])
    assert len(read_samples(tmp_path)) == 5


def test_nothing_is_there_twice(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    store.append([])
    assert not store.path.exists() and store.read() == [] and store.drawn() == {}
    store.append([sample(0, 0), sample(0, 1)])
    size = store.path.stat().st_size
    for more in ([sample(0, 1)], [sample(1), sample(1)]):
        with pytest.raises(ValueError, match=r"sample \d of problem 'p\d' is there already"):
            store.append(more)
        with pytest.raises(ValueError, match="is there already"):
            SampleStore(tmp_path).append(more)
    assert store.path.stat().st_size == size and len(store) == 2
    assert ("p0", 1) in store and ("p0", 2) not in store
    with pytest.raises(ValueError, match="is there already"):
        store.replace([sample(1), sample(1)])


class FullDisk:
    """Writes that stop after so many bytes, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int = errno.ENOSPC) -> None:
        self.room, self.code, self.write = room, code, os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        written = self.write(handle, data[: self.room], offset) if self.room else 0
        if not written:
            raise OSError(self.code, os.strerror(self.code))
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    store, _ = filled(tmp_path, [1, 1])
    before = store.path.read_bytes()
    FullDisk(monkeypatch, room)
    with pytest.raises(SampleFileError, match=r"the disk is full while writing .*: free some space") as e:
        store.append([sample(8)])
    assert "\n" not in str(e.value) and e.value.errno == errno.ENOSPC
    assert store.path.read_bytes() == before and ("p8", 0) not in store
    FullDisk(monkeypatch, room)
    with pytest.raises(SampleFileError, match=r"the disk is full while writing .*drawn\.jsonl"):
        store.draw("p9", 0, {"text": "long enough " * 9})
    assert store.drawn() == {}
    monkeypatch.undo()
    store.append([sample(8)])
    store.draw("p9", 0, {"text": "x"})
    assert len(SampleStore(tmp_path)) == 3 and list(store.drawn()) == [("p9", 0)]


def test_a_really_full_device_is_told_the_same_way(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "samples.jsonl.gz").symlink_to("/dev/full")
    with pytest.raises(SampleFileError, match="the disk is full while writing"):
        SampleStore(tmp_path).append([sample()])


def test_an_interrupted_append_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, [1])
    before = store.path.read_bytes()

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append([sample(5)])
    monkeypatch.undo()
    assert store.path.read_bytes() == before
    store.append([sample(5)])
    assert len(SampleStore(tmp_path)) == 2


def test_two_writers_are_found_out(tmp_path: Path) -> None:
    one, other = SampleStore(tmp_path), SampleStore(tmp_path)
    one.append([sample(0)])
    with pytest.raises(SampleFileError, match="was changed by another process"):
        other.append([sample(1)])
    assert [each.key for each in read_samples(tmp_path)] == [("p0", 0)]


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, [2, 1])
    before = store.path.read_bytes()
    new = [sample(i, status="wrong") for i in range(600)]

    def refused(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(SampleFileError, match="the disk is full"):
        store.replace(new)
    monkeypatch.undo()
    assert store.path.read_bytes() == before and os.listdir(tmp_path) == [store.path.name]
    store.replace(new)
    assert store.read() == new and len(list(members(store.path))) == 3
    store.append([sample(999)])
    assert len(SampleStore(tmp_path)) == 601


def test_drawn_completions_wait_until_they_are_graded(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    store.draw("p0", 0, {"text": "ü\n\ud83d", "tokens": 3})
    store.draw("p1", 2, {"text": "b"})
    with pytest.raises(ValueError, match="sample 0 of problem 'p0' was drawn already"):
        store.draw("p0", 0, {"text": "again"})
    store.append([sample(1, 2)])
    with pytest.raises(ValueError, match="was drawn already"):
        store.draw("p1", 2, {"text": "again"})
    for each in (store, SampleStore(tmp_path)):
        assert each.drawn() == {("p0", 0): {"text": "ü\n\ud83d", "tokens": 3}}
    store.finish()
    store.finish()
    assert SampleStore(tmp_path).drawn() == {} and not (tmp_path / "drawn.jsonl").exists()
    store.draw("p0", 0, {"text": "once more"})
    assert len(store.drawn()) == 1


def test_a_torn_line_of_drawn_completions_is_cut_off_and_a_damaged_one_named(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    path = tmp_path / "drawn.jsonl"
    store.draw("p0", 0, {"text": "a"})
    whole = path.read_bytes()
    store.draw("p0", 1, {"text": "b"})
    data = path.read_bytes()
    for cut in range(len(whole), len(data)):
        path.write_bytes(data[:cut])
        again = SampleStore(tmp_path)
        assert path.read_bytes() == whole
        again.draw("p0", 1, {"text": "c"})
        assert [row["text"] for row in again.drawn().values()] == ["a", "c"]
    path.write_bytes(b'{"problem": 1}\n' + whole)
    with pytest.raises(SampleFileError, match=r"line 1: no drawn completion; delete the line \(`sed -i 1d"):
        SampleStore(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleFileError, match="cannot be written: "):
        SampleStore(tmp_path / "file" / "folder")
    (tmp_path / "samples.jsonl.gz").mkdir()
    with pytest.raises(SampleFileError, match=r"samples\.jsonl\.gz: cannot be read: Is a directory"):
        read_samples(tmp_path)


_WRITER = """
import sys
from pathlib import Path
from evals.samples import SampleStore
from tests.unit.eval_samples import sample
store = SampleStore(Path(sys.argv[1]))
for number in range(100_000):
    store.draw(f"p{number}", 0, {"text": "x" * 500})
    store.append([sample(number, text=str(number) * 200), sample(number, 1)])
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_had_said(tmp_path: Path) -> None:
    begun = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert begun.stdout is not None
    said = [int(begun.stdout.readline()) for _ in range(20)][-1]
    time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    said = max([said, *map(int, begun.stdout.read().split())])
    assert begun.wait() == -signal.SIGKILL
    store = SampleStore(tmp_path)
    found = store.read()
    whole = len(found) // 2
    assert len(found) == 2 * whole and whole in (said + 1, said + 2), "both of an append, or none"
    assert [each.key for each in found] == [(f"p{n}", i) for n in range(whole) for i in (0, 1)]
    assert set(store.drawn()) <= {(f"p{whole}", 0)}
    store.append([sample(whole), sample(whole, 1)])
    assert len(SampleStore(tmp_path)) == len(found) + 2
