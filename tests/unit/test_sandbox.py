"""Programs that want more than to answer: what they get, at the strongest level that this machine has."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rewards.code_judge import judge
from rewards.code_tasks import Task
from rewards.isolation import LEVELS, TooWeak, isolate
from rewards.probe import Probe, require
from rewards.processes import waited_for_a_core
from rewards.sandbox import Limits
from tests.unit.sandbox_programs import ADD, SUMS, levels, machine, verdict


@pytest.fixture(autouse=True)
def _needs_a_level():
    if not machine().level:
        pytest.skip(f"no level of isolation works here: {machine().missing}")


def needs(level: str) -> None:
    if level not in levels():
        pytest.skip(f"{level} does not work here: {machine().missing.get(level)}")


@pytest.mark.parametrize("level", LEVELS)
def test_right_and_wrong_programs_on_every_level(level):
    needs(level)
    assert verdict("def add(a, b):\n    return a + b", level=level).status == "passed"
    assert verdict("def add(a, b):\n    return 5", level=level).status == "wrong_answer"
    found = verdict("print(sum(map(int, input().split())))", SUMS, level=level)
    assert (found.status, found.tests, found.passed) == ("passed", 2, 2)


STATUSES = {
    "def add(a, b) return a": "syntax_error",
    "": "runtime_error",
    "import sys; sys.exit(0)": "runtime_error",
    "import os; os._exit(0)": "runtime_error",
    "def add(a, b):\n    import os; os._exit(0)": "runtime_error",
    "def add(a, b):\n    raise KeyError(a)": "runtime_error",
    "def add(a, b):\n    return bytearray(8 << 30)": "memory_limit",
    "def add(a, b):\n    return 'x' * (6 << 20)": "runtime_error",
    "import os; os.abort()": "killed",
    "def add(a, b):\n    return add": "wrong_answer",
}


@pytest.mark.parametrize("program", STATUSES)
def test_what_went_wrong_has_a_name(program):
    assert verdict(program).status == STATUSES[program]


FORGERIES = {
    "an int that equals everything": """
        class I(int):
            def __eq__(self, other): return True
        def add(a, b): return I(0)
    """,
    "an object that equals everything": """
        class E:
            def __eq__(self, other): return True
        def add(a, b): return E()
    """,
    "noise on every descriptor": """
        import os
        for fd in range(3, 64):
            try: os.write(fd, b"\\0\\0\\0\\6[null]" * 9)
            except OSError: pass
        def add(a, b): return 0
    """,
    "an answer that never ends": """
        import os
        def add(a, b):
            for fd in range(3, 64):
                try: os.write(fd, b"\\xff\\xff\\xff\\xff")
                except OSError: pass
    """,
    "another comparison": """
        import builtins
        builtins.AssertionError = type("AssertionError", (Exception,), {})
        builtins.all = builtins.isinstance = lambda *a: True
        def add(a, b): return -1
    """,
    "a nest": """
        def add(a, b):
            x = []
            for _ in range(10**5): x = [x]
            return x
    """,
    "itself": """
        def add(a, b):
            x = []
            x.append(x)
            return x
    """,
    "a generator": """
        def add(a, b):
            while True: yield 5
    """,
    "forked answers": """
        import os
        def add(a, b):
            os.fork()
            return -1
    """,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_verdict_is_forged(name):
    found = verdict(textwrap.dedent(FORGERIES[name]))
    assert (found.status == "passed", found.passed) == (False, 0)


def test_names_of_the_tests_are_not_the_candidates():
    task = Task(kind="asserts", asserts=("assert set(common([1, 2], [2, 1])) == set([1, 2])",))
    assert verdict("def set(x): return 1\ndef common(a, b): return []", task).status == "wrong_answer"
    assert verdict("def common(a, b): return a", task).status == "passed"
    task = Task(kind="asserts", asserts=("assert math.isclose(half(1), 0.5)",))
    fake = "class math:\n    isclose = lambda *a, **k: True\ndef half(x): return 3"
    assert verdict(fake, task).status == "wrong_answer"


def test_an_exception_cannot_end_the_tests_own_loops():
    task = Task(kind="asserts", asserts=("assert all(map(lambda x: f(x) == x, [1, 2]))",))
    assert verdict("def f(x): raise StopIteration", task).status == "runtime_error"
    assert verdict("def f(x): return x", task).status == "passed"


def test_a_result_that_blows_the_tests_up_costs_that_program_alone():
    task = Task(kind="asserts", entry_point="f", asserts=("assert len('x' * f()) == 3", "assert 2 ** f() == 8"))
    assert verdict("def f(): return 10 ** 12", task).status != "passed"
    assert verdict("def f(): return 3", task).status == "passed"


def test_time_is_bounded_whatever_a_program_does():
    ignores = (
        "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception:"
    )
    began = time.monotonic()
    found = verdict(ignores + " pass\ndef add(a, b):\n    while True: time.sleep(1)", test_s=0.5)
    assert (found.status, time.monotonic() - began < 5) == ("timeout", True)
    huge = "def add(a, b):\n    return str(7 ** (10 ** 8))"
    assert verdict(huge, test_s=0.5).status == "timeout"


def test_processes_and_memory_are_bounded():
    if not machine().own_uid and machine().level == "rlimits":
        pytest.skip("without a user id of its own per program the system counts processes by user")
    forks = "import os, time\nn = 0\ntry:\n    while n < 200:\n        n += 1\n        if os.fork() == 0:\n            "
    program = forks + "time.sleep(30); os._exit(0)\nexcept OSError: pass\ndef add(a, b): return n"
    task = Task(kind="asserts", entry_point="add", asserts=("assert add(0, 0) < 16",))
    assert verdict(program, task).status == "passed"
    shares = "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = bytearray(400 << 20)\n        "
    found = verdict(shares + "time.sleep(9); os._exit(0)\ntime.sleep(9)\ndef add(a, b): return a + b")
    assert found.status == "memory_limit"


LOOKS = {
    "the network": """
        import socket
        def look():
            try: socket.create_connection(("127.0.0.1", {port}), 1); return True
            except OSError: return False
    """,
    "files": """
        import os
        def look(): return [p for p in ("/etc/passwd", "/home", "{here}") if os.path.exists(p)]
    """,
    "processes": """
        import os
        def look(): return [p for p in os.listdir("/proc") if p.isdigit() and int(p) > 50]
    """,
    "the environment": """
        import os
        def look():
            pids = [p for p in os.listdir("/proc") if p.isdigit()]
            return [p for p in pids if b"R1_SECRET" in open(f"/proc/{p}/environ", "rb").read()] + [
                k for k in os.environ if k == "R1_SECRET"]
    """,
    "descriptors": """
        import os
        def look():
            folder = "/proc/self/fd/"
            found = [os.readlink(folder + f) for f in os.listdir(folder) if os.path.lexists(folder + f)]
            return [f for f in found if "socket" in f or "test_sandbox" in f]
    """,
    "namespaces": """
        import ctypes
        def look(): return ctypes.CDLL(None).unshare(0x10000000) == 0
    """,
    "other file systems": """
        def look():
            found = []
            for p in ("/", "/dev", "/usr", "/proc/sys/kernel"):
                try: open(p + "/planted", "w"); found.append(p)
                except OSError: pass
            return found
    """,
}


@pytest.mark.parametrize("what", LOOKS)
def test_nothing_of_the_machine_is_seen(what, monkeypatch):
    needs("bubblewrap")
    import socket

    monkeypatch.setenv("R1_SECRET", "secret")
    with socket.socket() as listener, open(__file__) as kept:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.set_inheritable(kept.fileno(), True)
        program = (
            textwrap.dedent(LOOKS[what]).replace("{port}", str(listener.getsockname()[1])).replace("{here}", __file__)
        )
        task = Task(kind="asserts", entry_point="look", asserts=("assert not look()",))
        found = verdict(program, task)
    assert found.status == "passed", found.detail


def test_numpy_is_there_where_it_is_installed():
    if "numpy" not in machine().packages:
        pytest.skip("numpy is not installed here")
    task = Task(kind="asserts", entry_point="f", asserts=("assert f([1, 2, 3]) == 6", "assert f([]) == 0"))
    assert verdict("import numpy as np\ndef f(x): return np.sum(np.array(x, dtype=int))", task).status == "passed"


def test_the_file_system_has_an_end():
    needs("bubblewrap")
    program = """
    import os
    def fill():
        written = 0
        for folder in ("/tmp", "/dev/shm"):
            try:
                for n in range(40):
                    with open(f"{folder}/{n}", "wb") as file:
                        for _ in range(8):
                            written += file.write(bytes(1 << 20))
            except OSError:
                pass
        return written >> 20
    """
    task = Task(kind="asserts", entry_point="fill", asserts=("assert 60 <= fill() <= 130",))
    assert verdict(textwrap.dedent(program), task).status == "passed"


KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.unit.sandbox_programs import verdict
print("begin", flush=True)
verdict({program!r}, level={level!r}, test_s=60, total_s=60)
"""
STAYS = """
import os, time
for _ in range(2):
    os.fork()
try:
    os.setsid()
except OSError:
    pass
time.sleep(60)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_survives_the_kill_of_the_process_that_asked(level):
    """As the reward pool does it: SIGKILL to the process group."""
    needs(level)
    root = str(Path(__file__).parents[2])
    code = KILLED.format(root=root, program=STAYS, level=level)
    asks = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert asks.stdout is not None and asks.stdout.readline() == b"begin\n"
        assert _until(lambda: len(_below(asks.pid)) >= 6)  # the judge, the sandbox, four of the program
        below = _below(asks.pid)
    finally:
        os.killpg(asks.pid, signal.SIGKILL)
        asks.wait()
    assert _until(lambda: not [pid for pid in below if _alive(pid)])


def _below(pid: int) -> list[int]:
    from rewards.processes import descendants

    return descendants(pid)


def _alive(pid: int) -> bool:
    from rewards.processes import alive

    return alive(pid)


def _until(condition, seconds: float = 5.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def test_a_run_refuses_to_start_below_the_level_asked_for(monkeypatch):
    weak = Probe(level="rlimits", missing={"bubblewrap": "bwrap is missing (Debian: apt install bubblewrap)"})
    monkeypatch.setattr("rewards.probe.probe", lambda packages: weak)
    with pytest.raises(TooWeak, match=r"gives rlimits: bwrap is missing \(Debian: apt install bubblewrap\)"):
        require("bubblewrap")
    assert require("rlimits") is weak
    with pytest.raises(ValueError, match="level must be one of rlimits, namespaces, bubblewrap, got 'docker'"):
        require("docker")


def test_limits_are_positive():
    with pytest.raises(ValueError, match="total_s must be > 0"):
        Limits(total_s=0)


def test_counting_goes_on_after_a_program_died():
    dies = "import os\ndef add(a, b):\n    if a == 2: os._exit(0)\n    return a + b"
    found = verdict(dies, ADD, stop_early=False)
    assert (found.status, found.tests, found.passed) == ("runtime_error", 2, 1)


@pytest.mark.parametrize(("others_had_the_core_s", "status"), [(0.0, "timeout"), (0.9, "passed"), (9.0, "passed")])
def test_time_in_which_others_had_the_core_does_not_count(others_had_the_core_s, status, monkeypatch):
    """The readings of the kernel are stood in for: 0 at first, then so many seconds more whenever they are read."""
    readings = iter(range(1_000_000))
    monkeypatch.setattr("rewards.sandbox.waited_for_a_core", lambda pids: next(readings) * others_had_the_core_s)
    slow = "import time\ndef add(a, b):\n    time.sleep(0.8)\n    return a + b"
    limits = Limits(test_s=0.5, total_s=2)
    assert judge(ADD, slow, isolate(machine().level), limits).status == status
    endless = "import time\ndef add(a, b):\n    time.sleep(60)"
    began = time.monotonic()
    assert judge(ADD, endless, isolate(machine().level), limits).status == "timeout"
    assert time.monotonic() - began < 20, "the time of all tests is by the clock"


def test_the_kernel_tells_who_waited_for_a_core():
    """A process that shares its one core with two others waits about as long as it runs, or longer."""
    [core, *_] = sorted(os.sched_getaffinity(0))
    busy = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", busy]) for _ in range(3)]
    try:
        assert _until(lambda: waited_for_a_core([spinners[0].pid]) > 0.2)
        assert waited_for_a_core([0]) == 0.0
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
