"""Functions written for TRL and verl, as they are published: named in YAML, they work unchanged in our processes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from rewards import RewardConfig, Rubric, RubricConfig
from rewards.trial import group_of
from rollout.types import Problem, Rollout

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")

PROBLEM = Problem(id="p", prompt="What is a third?", answer="$\\frac{1}{3}$", metadata={"data_source": "mine"})
VERL = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """As in verl's own graders: a dict with the score and what else is to be logged."""
    assert data_source == "mine"
    answer = solution_str.rpartition("####")[2].strip()
    return {"score": 1.0 if answer == ground_truth else 0.0, "acc": answer == ground_truth, "pred": answer}


def batch(data_sources, solution_strs, ground_truths, extra_infos, penalty=0.0):
    return [float(s.endswith(g)) - penalty for s, g in zip(solution_strs, ground_truths)]
'''


def score(texts: list[str], problem: Problem = PROBLEM, **config: Any) -> list[Rollout]:
    rubric_config = RubricConfig(functions=(RewardConfig(**config),), processes=1, max_error_rate=1.0)
    with Rubric(rubric_config) as rubric:
        (scored,) = rubric.score([group_of(problem, texts)])
    return list(scored.rollouts)


def rewards(texts: list[str], **config: Any) -> list[float | None]:
    return [rollout.reward for rollout in score(texts, **config)]


def test_trls_accuracy_reward_and_its_time_limits() -> None:
    """Its limits are signals: they work only in the main thread, where our workers call."""
    bomb = "\\boxed{(1+2)^{(3+4)^{(5+6)^{7}}}}"
    found = score(
        ["so \\boxed{\\frac{1}{3}}", "so \\boxed{\\frac{1}{2}}", "nothing", bomb, "so \\boxed{\\frac{2}{6}}"],
        path="trl.rewards:accuracy_reward", style="trl_chat", timeout_s=60,
    )  # fmt: skip
    assert [rollout.reward for rollout in found] == [1.0, 0.0, 0.0, 0.0, 1.0], [r.errors for r in found]


def test_trls_accuracy_reward_skips_a_gold_that_cannot_be_parsed() -> None:
    (found,) = score(
        ["\\boxed{1}"], Problem(id="q", prompt="?", answer=""), path="trl.rewards:accuracy_reward", style="trl_chat"
    )
    assert found.reward is None and found.errors == {}


def test_trls_format_reward() -> None:
    texts = ["<think>\na\n</think>\nb", "a</think>b", "<think>a"]
    assert rewards(texts, path="trl.rewards:think_format_reward", style="trl_chat") == [1.0, 0.0, 0.0]


def test_trls_factories_get_their_arguments_from_yaml() -> None:
    texts = ["x" * 4 * length for length in (80, 90, 100, 101)]
    found = rewards(
        texts, path="trl.rewards:get_soft_overlong_punishment", style="trl",
        factory={"max_completion_len": 100, "soft_punish_cache": 20},
    )  # fmt: skip
    # Eq. 13 of the DAPO paper (arXiv 2503.14476): 0 up to 80, then (80 - length) / 20, and -1 above 100.
    assert found == [0.0, -0.5, -1.0, -1.0]
    cosine = {"path": "trl.rewards:get_cosine_scaled_reward", "style": "trl_chat", "factory": {"max_len": 100}}
    assert rewards(["\\boxed{\\frac{1}{3}}".ljust(200)], **cosine) == [pytest.approx(0.75)]


def test_verls_compute_score(tmp_path: Any) -> None:
    (tmp_path / "graders.py").write_text(VERL)
    problem = Problem(id="v", prompt="?", answer="4", metadata={"data_source": "mine"})
    found = score(["so #### 4", "#### 5"], problem, path=f"{tmp_path}/graders.py:compute_score", style="verl")
    assert [rollout.reward for rollout in found] == [1.0, 0.0]
    assert [rollout.metrics for rollout in found] == [{"compute_score/acc": 1.0}, {"compute_score/acc": 0.0}]
    found = score(
        ["so 4", "5"], problem, path=f"{tmp_path}/graders.py:batch", style="verl_batch", params={"penalty": 0.25}
    )
    assert [rollout.reward for rollout in found] == [0.75, -0.25]


def test_only_the_processes_import_them() -> None:
    code = (
        "import sys\nfrom rewards import *\nfrom rewards.trial import DEFAULT_PROBLEM, group_of\n"
        "c = RewardConfig(path='trl.rewards:think_format_reward', style='trl_chat')\n"
        "with Rubric(RubricConfig(functions=(c,), processes=1)) as r:\n"
        "    (g,) = r.score([group_of(DEFAULT_PROBLEM, ['x'])])\n"
        "print(g.rollouts[0].reward, sorted({'trl', 'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0.0 []\n"
