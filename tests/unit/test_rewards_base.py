"""Finding reward functions, and what their configuration may say."""

import subprocess
import sys
import time

import pytest

from rewards import BUILT_IN, RewardConfig, resolve
from rewards.base import check_problems, checks, preloads, random_coin
from rollout.types import Problem
from tests.unit.reward_groups import FUNCTIONS, completion


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_built_in_is_there(name):
    assert callable(resolve(name))


def test_import_of_rewards_is_light():
    heavy = ("torch", "numpy", "sympy", "reasoning_gym", "ray", "vllm")
    code = f"import sys, rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_function_by_module_and_by_file():
    by_module = resolve("tests.unit.reward_functions:length")
    by_file = resolve(f"{FUNCTIONS}:length")
    assert by_module(completion(tokens=5)) == by_file(completion(tokens=5)) == 5.0
    assert resolve(f"{FUNCTIONS}:length") is by_file  # loaded once
    assert resolve(f"{FUNCTIONS}:judge.later").__name__ == "later"


def test_files_and_modules_are_looked_for_in_the_given_folders(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def one(completion):\n    return 1.0\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve("my_own_rewards.py:one", [str(tmp_path)])(None) == 1.0
    assert resolve("my_own_rewards:one", [str(tmp_path)])(None) == 1.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_at_all:f", "no module 'no_such_module_at_all'; built in are accuracy"),
        ("rewards.nothing:f", "no module 'rewards.nothing'"),
        ("no_such_file.py:f", "the reward file no_such_file.py is not there"),
        (f"{FUNCTIONS}:nothing", "has no 'nothing'"),
        (f"{FUNCTIONS}:not_a_function", "is a int, not a function"),
        (f"{FUNCTIONS}:Judge", "is a type, not a function"),
    ],
)
def test_what_cannot_be_found_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        resolve(path)


def test_an_error_inside_a_module_is_not_taken_for_a_missing_one(tmp_path):
    (tmp_path / "broken_rewards.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve("broken_rewards.py:f", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):  # not half-loaded the second time
        resolve("broken_rewards.py:f", [str(tmp_path)])


def test_names_default_to_the_function():
    assert RewardConfig(path="accuracy").name == "accuracy"
    assert RewardConfig(path="a/b.py:concise").name == "concise"
    assert RewardConfig(path="my.rewards:concise", name="short").name == "short"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "acuracy"}, "reward path must be accuracy.* got 'acuracy'"),
        ({"path": ":f"}, "reward path"),
        ({"path": "m:"}, "reward path"),
        ({"style": "openrlhf"}, "style must be one of plain, trl, trl_chat, verl, verl_batch"),
        ({"weight": float("nan")}, "weight of reward 'accuracy' must be finite"),
        ({"timeout_s": 0}, "timeout_s of reward 'accuracy' must be > 0"),
        ({"retries": -1}, "retries"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**{"path": "accuracy", **options})


def test_preloads_leave_the_function_as_it_is():
    @preloads("json", "csv")
    def f(completion):
        return 1.0

    assert f(None) == 1.0 and f.__dict__["preloads"] == ("json", "csv")


def has_digits(problem: Problem) -> None:
    if problem.answer is None:
        raise KeyError("answer")
    if not any(character.isdigit() for character in str(problem.answer)):
        raise ValueError(f"the answer {problem.answer!r}\nhas no digit")


def problems(*answers: object) -> list[Problem]:
    return [Problem(id=f"p{i}", prompt="?", answer=answer, source="jsonl:d") for i, answer in enumerate(answers)]


@checks(has_digits)
def checked(completion):
    return 1.0


def test_problems_that_a_function_could_never_judge_are_named():
    check_problems(checked, problems("1", 2, "x3"))
    check_problems(random_coin, problems(None))  # demands nothing
    with pytest.raises(ValueError, match=r"^problem 'p1' \(jsonl:d\): the answer 'x' has no digit: mend these rows"):
        check_problems(checked, problems("1", "x"))
    with pytest.raises(ValueError, match=r"'p1' .* \(and 2 more\): mend these rows"):
        check_problems(checked, problems("1", "x", "y", None))
    with pytest.raises(ValueError, match=r"problem 'p0' \(jsonl:d\): KeyError: 'answer'"):
        check_problems(checked, problems(None))


def test_equal_answers_are_checked_once():
    asked = []

    @checks(lambda problem: asked.append(problem.id), by_answer=True)
    def judge(completion):
        return 1.0

    check_problems(judge, problems("1", "2", "1", 1, 1.0, True, "2"))
    assert asked == ["p0", "p1", "p3", "p4", "p5"]  # 1, 1.0 and True are equal and not the same


def test_a_check_of_many_problems_is_quick():
    many = problems(*(str(i % 100) for i in range(20_000)))

    @checks(has_digits, by_answer=True)
    def judge(completion):
        return 1.0

    start = time.process_time()
    check_problems(judge, many)
    assert time.process_time() - start < 0.5


def test_the_random_coin_is_fair_deterministic_and_blind():
    draws = [random_coin(completion(index=i)) for i in range(4000)]
    # Binomial with n = 4000: standard deviation .008.
    assert abs(sum(draws) / 4000 - 0.5) < 0.03
    assert draws == [random_coin(completion(index=i)) for i in range(4000)]
    assert abs(sum(random_coin(completion(index=i), probability=0.1) for i in range(4000)) / 4000 - 0.1) < 0.02
    assert [random_coin(completion(index=i), seed=1) for i in range(50)] != draws[:50]
    # The same text is not favoured for good: another sampling seed may show the other side.
    assert len({random_coin(completion(seed=seed)) for seed in range(50)}) == 2


def test_a_run_refuses_a_gold_answer_that_nobody_can_read_before_it_starts():
    from pipelines.run import _check_rewards
    from rewards import RubricConfig

    rubric = RubricConfig(functions=(RewardConfig(path="accuracy"),))
    _check_rewards("rl", rubric, problems("1", 2))
    with pytest.raises(ValueError, match=r"^stages\.rl\.data, for the reward 'accuracy': problem 'p1' \(jsonl:d\)"):
        _check_rewards("rl", rubric, problems("1", " "))
