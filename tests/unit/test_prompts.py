"""Where problems come from, what is held out, and the cursor."""

import gzip
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import sources
from rollout.prompts import DataConfig, PromptStream, check_disjoint, fingerprint, load_problems
from rollout.types import Problem

COMPACT = "pipelines.recipes.chain_sum:compact"
SHORT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def table(source: str, **options) -> DataConfig:
    """The rows of the fixture below, from whatever file they lie in."""
    return DataConfig(source=source, prompt_field="question", answer_field="gold", **options)


def chain_sum(size: int, params: dict | None = None, **options) -> DataConfig:
    return DataConfig(source="reasoning_gym:chain_sum", params=params or SHORT, size=size, rewrite=COMPACT, **options)


def problems(n: int, prefix: str = "p") -> list[Problem]:
    return [Problem(id=f"{prefix}{i}", prompt=f"{prefix} {i}") for i in range(n)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"{i}+1", "gold": str(i + 1), "key": f"k{i}", "level": i % 3}) for i in range(6)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def drop_even(problem: Problem) -> Problem | None:
    return None if int(problem.prompt[0]) % 2 == 0 else problem


# ------------------------------------------------------------------------------------------------ files


def test_jsonl_by_column(rows):
    config = DataConfig(source=f"jsonl:{rows}", prompt_field="question", answer_field="gold", id_field="key")
    loaded = load_problems(config)
    assert [(p.id, p.prompt, p.answer) for p in loaded[:2]] == [("k0", "0+1", "1"), ("k1", "1+1", "2")]
    assert loaded[4].metadata == {"gold": "5", "level": 1}
    assert loaded[0].source == f"jsonl:{rows}"


def test_gzip_and_parquet_hold_the_same_rows(rows, tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    import pyarrow
    import pyarrow.parquet

    content = [json.loads(line) for line in rows.read_text().splitlines() if line]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "rows.parquet")
    plain, zipped, parquet = (
        load_problems(table(f"{kind}:{tmp_path / name}"))
        for kind, name in (("jsonl", "rows.jsonl"), ("jsonl", "rows.jsonl.gz"), ("parquet", "rows.parquet"))
    )
    assert [p.prompt for p in plain] == [p.prompt for p in zipped] == [p.prompt for p in parquet]
    assert (plain[0].id, zipped[0].id, parquet[0].id) == ("rows.jsonl:1", "rows.jsonl.gz:1", "rows.parquet:1")


def test_datasets_from_disk(tmp_path):
    import datasets

    data = datasets.Dataset.from_list([{"prompt": f"{i}+1", "answer": i + 1} for i in range(3)])
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "both"))
    loaded = load_problems(DataConfig(source=f"hf:{tmp_path / 'both'}:test"))
    assert [(p.prompt, p.answer) for p in loaded] == [("0+1", 1), ("1+1", 2), ("2+1", 3)]
    with pytest.raises(ValueError, match="no split 'train'"):
        load_problems(DataConfig(source=f"hf:{tmp_path / 'both'}"))
    with pytest.raises(ValueError, match=r"cannot load the data set .*nowhere"):
        load_problems(DataConfig(source=f"hf:{tmp_path / 'nowhere' / 'x'}"))


def test_a_smaller_size_chooses_rows_by_seed(rows):
    chosen = [
        tuple(p.prompt for p in load_problems(table(f"jsonl:{rows}", size=3, seed=seed))) for seed in (0, 0, 1, 2, 3)
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1
    assert all(list(each) == sorted(each) for each in chosen)
    with pytest.raises(ValueError, match=r"data\.size is 7, but .* has 6 usable rows"):
        load_problems(table(f"jsonl:{rows}", size=7))


def test_a_rewrite_may_drop_problems(rows):
    config = table(f"jsonl:{rows}", rewrite="tests.unit.test_prompts:drop_even")
    assert [p.prompt for p in load_problems(config)] == ["1+1", "3+1", "5+1"]


def test_values_that_json_cannot_hold_stay_out_of_the_metadata(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": "a", "answer": "b", "day": datetime.date(2026, 1, 1), "n": 3}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_problems(DataConfig(source=f"parquet:{tmp_path / 'a.parquet'}"))[0].metadata == {"answer": "b", "n": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "answer": 1}\n{oops', r"a.jsonl:2: not JSON"),
        ('["a"]', r"a.jsonl:1: a line must be an object of columns, got list"),
        ('{"question": "a", "answer": 1}', r"a.jsonl:1: no column 'prompt'; it has question, answer"),
        ('{"prompt": "a"}', r"a.jsonl:1: no column 'answer'"),
        ('{"prompt": "", "answer": 1}', "prompt must be a text, got ''"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', "prompt must be a text"),
        ('{"prompt": "a", "answer": null}', "'a.jsonl:1' has no answer in 'answer'"),
    ],
)
def test_bad_rows_end_in_one_clear_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(DataConfig(source=f"jsonl:{path}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_is_not_there(kind, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.here is not there"):
        load_problems(DataConfig(source=f"{kind}:{tmp_path / 'nothing.here'}"))


def test_files_of_another_format(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_problems(DataConfig(source=f"parquet:{path}"))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"prompt": "a", "answer": 1}\n' * 999)[:-9])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz cannot be read"):
        load_problems(DataConfig(source=f"jsonl:{torn}"))


def test_an_id_that_occurs_twice_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "k": 1}\n{"prompt": "b", "k": 1}')
    with pytest.raises(ValueError, match="the id '1' occurs twice"):
        load_problems(DataConfig(source=f"jsonl:{path}", id_field="k", answer_field=None))


@pytest.mark.parametrize("path", ["nothing", "no_such_module_at_all:f", "json:no_such_function"])
def test_a_rewrite_that_is_not_there(rows, path):
    with pytest.raises(ValueError, match=r"data\.rewrite"):
        load_problems(DataConfig(source=f"jsonl:{rows}", rewrite=path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of data.source and data.mixture"),
        ({"source": "csv:a"}, "data.source must be one of reasoning_gym:"),
        ({"source": "jsonl:"}, "names nothing after the colon"),
        ({"source": "jsonl:a", "size": -1}, "data.size"),
        ({"source": "jsonl:a", "weight": 0.0}, "data.weight"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


# ------------------------------------------------------------------------------------------------ reasoning-gym


def test_generated_problems_are_stable_and_have_unique_ids():
    first, again = load_problems(chain_sum(200)), load_problems(chain_sum(200))
    assert first == again
    assert len({p.id for p in first}) == 200
    assert load_problems(chain_sum(50)) == first[:50]


def test_neighbouring_seeds_share_nothing_but_chance():
    wide = {"min_terms": 5, "max_terms": 8, "min_digits": 3, "max_digits": 4}
    one, two = ({p.prompt for p in load_problems(chain_sum(200, wide, seed=seed))} for seed in (0, 1))
    assert not one & two


def test_one_module_alone_gives_what_the_whole_package_gives():
    code = """
import sys
from rollout.sources import reasoning_gym_entries
single = [e for *_, e in reasoning_gym_entries("chain_sum", {"min_terms": 3}, 4, 1)]
assert not any(m.partition(".")[0] in ("reasoning_gym", "sympy", "matplotlib") for m in sys.modules)
import reasoning_gym
whole = [e for *_, e in reasoning_gym_entries("chain_sum", {"min_terms": 3}, 4, 1)]
assert single == whole and len(reasoning_gym.factory.DATASETS) > 100
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_task_sets_that_lean_on_their_package_load_too():
    assert sources._single_module("number_sequence") is None
    assert load_problems(DataConfig(source="reasoning_gym:number_sequence", size=2))[1].prompt


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (chain_sum(1, {"min_termz": 3}), "refuses its params.*min_termz"),
        (chain_sum(1, {"min_terms": 5, "max_terms": 3}), "refuses its params.*max_terms must be >= min_terms"),
        (DataConfig(source="reasoning_gym:chain_sums", size=1), "no data set 'chain_sums'; it has .*chain_sum"),
        (DataConfig(source="reasoning_gym:chain_sum"), "data.size must be > 0"),
    ],
)
def test_generator_errors(config, message):
    with pytest.raises(ValueError, match=message):
        load_problems(config)


def test_distinct_sets_hold_each_prompt_once_or_say_that_they_cannot():
    assert len({p.prompt for p in load_problems(chain_sum(150, distinct=True))}) == 150
    with pytest.raises(ValueError, match=r"gave 200 usable problems in 10050 draws and data.size asks for 201"):
        load_problems(chain_sum(201, distinct=True))  # 10 x 10 pairs of digits, + and -


# ------------------------------------------------------------------------------------------------ mixtures


def mixture(size: int, *weights: float, **options) -> DataConfig:
    parts = tuple(
        DataConfig(source="reasoning_gym:chain_sum", params={**SHORT, "min_terms": n, "max_terms": n}, weight=weight)
        for n, weight in enumerate(weights, 2)
    )
    return DataConfig(mixture=parts, size=size, rewrite=COMPACT, **options)


def count_terms(problem: Problem) -> int:
    return problem.metadata["entry"]["metadata"]["num_terms"]


def test_a_mixture_keeps_its_shares():
    loaded = load_problems(mixture(1000, 97, 3))
    assert [sum(count_terms(p) == n for p in loaded) for n in (2, 3)] == [970, 30]
    assert len({p.id for p in loaded}) == 1000


@given(st.integers(1, 10**6), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_add_up_to_the_whole(size, weights):
    from rollout.prompts import _parts

    sizes = [part.size for part in _parts(mixture(size, *weights))]
    assert sum(sizes) == size
    if all(size * weight / sum(weights) > 1 for weight in weights):
        assert all(abs(part - size * weight / sum(weights)) <= 1 for part, weight in zip(sizes, weights, strict=True))


def test_equal_parts_of_a_mixture_draw_different_problems():
    part = DataConfig(source="reasoning_gym:chain_sum", params={"min_terms": 8, "max_terms": 8})
    loaded = load_problems(DataConfig(mixture=(part, part), size=100, rewrite=COMPACT))
    assert len({p.prompt for p in loaded}) == len({p.id for p in loaded}) == 100


def test_a_mixture_needs_a_size_and_flat_parts():
    with pytest.raises(ValueError, match=r"data\.size must be > 0 for a mixture"):
        load_problems(mixture(0, 1))
    with pytest.raises(ValueError, match="cannot be a mixture itself"):
        DataConfig(mixture=(mixture(5, 1),), size=5)


# ------------------------------------------------------------------------------------------------ held out


def test_the_fingerprint_sees_what_is_asked_and_not_how_it_is_set():
    def of(prompt):
        return fingerprint(prompt)

    assert of("What is  1+1?\n") == of("what is 1+1?") == of("What is １+１?")
    assert of("1+12") != of("1+1 2") and of("1+1") != of("1+2")


def test_held_out_problems_are_kept_out_and_replaced():
    held = load_problems(chain_sum(60, distinct=True, seed=9))
    prints = {fingerprint(p.prompt) for p in held}
    free = load_problems(chain_sum(500))
    train = load_problems(chain_sum(500), exclude=prints)
    assert len(train) == 500
    with pytest.raises(ValueError, match=r"training problem '.*' is also held-out problem"):
        check_disjoint(free, held)
    check_disjoint(train, held)


def test_the_check_names_the_first_shared_problem():
    train, held = problems(9), [Problem(id="h", prompt="P  5 "), *problems(3, "q")]
    with pytest.raises(ValueError, match=r"problem 'p5' is also hard problem 'h' \('p 5'\)"):
        check_disjoint(train, held, heldout_name="hard")


def test_a_file_whose_rows_are_all_held_out_is_empty(rows):
    config = DataConfig(source=f"jsonl:{rows}", prompt_field="question", answer_field="gold")
    prints = [fingerprint(p.prompt) for p in load_problems(config)]
    assert len(load_problems(config, exclude=prints[:4])) == 2
    with pytest.raises(ValueError, match=r"is empty \(6 rows were held out"):
        load_problems(config, exclude=prints)


# ------------------------------------------------------------------------------------------------ the cursor


def test_an_epoch_asks_every_problem_once_and_the_next_one_in_another_order():
    stream = PromptStream(problems(20), seed=1)
    epochs = [[p.id for _ in range(4) for p in stream.next(5)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in problems(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_unshuffled_is_the_order_of_the_data():
    stream = PromptStream(problems(6), seed=1, shuffle=False)
    assert [p.id for p in stream.next(4)] == ["p0", "p1", "p2", "p3"]
    assert [p.id for p in stream.next(4)] == ["p0", "p1", "p2", "p3"]  # two were left: not enough for four
    assert stream.epoch == 1


def test_the_order_depends_on_the_seed_alone():
    random.seed(123)
    one = [p.id for p in PromptStream(problems(30), seed=4).next(30)]
    random.seed(321)
    assert one == [p.id for p in PromptStream(problems(30), seed=4).next(30)]
    assert one != [p.id for p in PromptStream(problems(30), seed=5).next(30)]


@given(st.integers(1, 12), st.lists(st.integers(1, 12), max_size=20), st.lists(st.integers(1, 12), max_size=20))
def test_a_restored_cursor_goes_on_exactly(count, before, after):
    stream = PromptStream(problems(count), seed=3)
    for n in before:
        stream.next(min(n, count))
    state = json.loads(json.dumps(stream.state()))
    other = PromptStream(problems(count), seed=3)
    other.restore(state)
    for n in after:
        batch = stream.next(min(n, count))
        assert batch == other.next(min(n, count))
        assert len({p.id for p in batch}) == len(batch)
    assert stream.state() == other.state()


def test_a_cursor_of_other_data_is_refused():
    state = PromptStream(problems(5), seed=3).state()
    for other in (PromptStream(problems(6), seed=3), PromptStream(problems(5), seed=4)):
        with pytest.raises(ValueError, match="another data set or seed"):
            other.restore(state)


def test_a_stream_refuses_what_it_cannot_give():
    with pytest.raises(ValueError, match="data set is empty"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="asks for 6 problems and the data set has 5"):
        PromptStream(problems(5), seed=0).next(6)


def test_a_damaged_gz_is_one_line(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"prompt": "a", "answer": "b"}\n' * 500))
    whole[30:40] = b"\xff" * 10
    path.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_problems(DataConfig(source=f"jsonl:{path}"))
    assert "\n" not in str(caught.value)
