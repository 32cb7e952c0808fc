"""`r1 verify` without processes: the verb, its rows, and that each broken property ends with exit 1."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from rich.console import Console

from pipelines import verify_subject
from pipelines.cli import main
from pipelines.config import load_recipe
from pipelines.verify_engine import Gaps, accepted, gaps_of, without_ties
from pipelines.verify_rows import OF_THE_ENGINE, PROPERTIES, Finding, measured, unmeasured
from pipelines.verify_samples import (
    as_groups,
    before_tied_choices,
    choose_stage,
    cut_sample,
    demonstrations,
    questions,
    ragged_samples,
    random_completions,
)
from pipelines.verify_service import VerifyService
from pipelines.verify_verb import figure, print_answer
from policy.batch import Sample, samples_from_groups
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.learner import Learner
from policy.loading import load_policy
from policy.scorer import TokenScorer
from policy.tokenizer import build_tokenizer
from rollout.types import Completion, FinishReason, pack_experts
from tests.unit.test_learner import dense
from tests.unit.test_learner_service import SMALL

DATA = {
    "source": "reasoning_gym:chain_sum",
    "params": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "size": 50,
    "rewrite": "pipelines.recipes.chain_sum:compact",
}
GRPO = {
    "kind": "grpo", "name": "rl", "data": DATA, "rewards": {"functions": [{"path": "random"}]}, "steps": 3,
    "problems_per_step": 4, "mini_batches": 2, "sampling": {"max_tokens": 10}, "optimizer": {"lr": 1e-3},
    "learner": {"threads": 1},
}  # fmt: skip
SFT = {
    "kind": "sft", "name": "cold", "data": DATA, "target": "pipelines.recipes.chain_sum:running_sums", "steps": 3,
    "batch_size": 4, "learner": {"threads": 1},
}  # fmt: skip
EVAL = {
    "kind": "eval", "name": "after",
    "sets": [{"name": "short", "data": {**DATA, "seed": 1}, "rewards": {"functions": [{"path": "random"}]},
              "sampling": {"temperature": 0.0, "max_tokens": 7}}],
}  # fmt: skip
CUTS = "micro_batch,packing,neighbours,order,logprob_chunk,step"


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """A service sets what holds for its whole process; other tests run in this one."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def write(folder: Path, *stages: dict[str, Any], **more: Any) -> str:
    content = {"name": "small", "model": {"preset": "tiny", "overrides": SMALL}, "engine": {"max_model_len": 64},
               "run": {"cpus": 1}, "stages": list(stages), **more}  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the object of `r1 verify … --json`."""
    status = main(["verify", *arguments, "--samples", "4", "--json"])
    return status, json.loads(capsys.readouterr().out)


def rows_of(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["property"]: row for row in answer["rows"]}


# -- the verb --------------------------------------------------------------------------------------------------------


def test_what_holds_is_said_with_exit_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = verify(capsys, write(tmp_path, GRPO), "--only", f"{CUTS},save-load")
    assert status == 0 and answer["ok"] is True, answer
    assert list(rows_of(answer)) == [name for name in PROPERTIES if name in f"{CUTS},save_load".split(",")]
    for row in answer["rows"]:
        assert row["ok"] is True and 0 <= row["worst"] <= row["tolerance"] <= 1e-9 and row["reason"]
    assert answer["stage"] == "rl" and answer["samples"].startswith("4 random tokens after its prompts")


def test_a_recipe_of_sft_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = verify(capsys, write(tmp_path, SFT), "--only", "micro_batch,step,save_load,engine_decode,routing")
    rows = rows_of(answer)
    assert status == 0
    assert {name: rows[name]["ok"] for name in rows} == {
        "micro_batch": True, "step": True, "save_load": True, "engine_decode": None, "routing": None,
    }  # fmt: skip
    assert rows["engine_decode"]["reason"] == "not applicable: the recipe never samples"
    assert answer["samples"] == "4 demonstrations of stage cold"


def test_in_the_recipes_own_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GRPO)
    status, answer = verify(capsys, path, "--only", "micro_batch,neighbours", "--dtype", "recipe")
    rows = rows_of(answer)
    assert status == 0 and answer["dtype"] == "float32"
    assert 1e-6 < rows["micro_batch"]["tolerance"] < 1e-3 and "sqrt" in rows["micro_batch"]["reason"]
    status, answer = verify(capsys, path, "model.dtype=bfloat16", "--only", "order", "--dtype", "recipe")
    [row] = answer["rows"]
    assert status == 0 and row["ok"] is None and "as good as ties" in row["reason"]


def losing(key: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A learner that forgets its first or second moments when it is restored."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = Learner.load_state_dict

        def forgetful(self: Learner, state: Any) -> None:
            original(self, state)
            moments = self._optimizer._adamw.state
            next(iter(moments.values()))[key].zero_()

        patch.setattr(Learner, "load_state_dict", forgetful)

    return apply


def losing_the_random_state(patch: pytest.MonkeyPatch) -> None:
    original = Learner.load_state_dict

    def forgetful(self: Learner, state: Any) -> None:
        before = torch.get_rng_state()
        original(self, state)
        torch.set_rng_state(before)

    patch.setattr(Learner, "load_state_dict", forgetful)


def losing_the_schedule(patch: pytest.MonkeyPatch) -> None:
    original = Learner.load_state_dict

    def forgetful(self: Learner, state: Any) -> None:
        original(self, state)
        self._optimizer.move_to(0)

    patch.setattr(Learner, "load_state_dict", forgetful)


def losing_a_bit_of_a_weight(patch: pytest.MonkeyPatch) -> None:
    original = VerifyService.restore

    def rounded(self: VerifyService, folder: str) -> Any:
        extra = original(self, folder)
        weight = next(self.model.parameters())
        weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(9.0))
        return extra

    patch.setattr(VerifyService, "restore", rounded)


@pytest.mark.parametrize(
    "breaks",
    [losing("exp_avg"), losing("exp_avg_sq"), losing_the_random_state, losing_the_schedule, losing_a_bit_of_a_weight],
    ids=["exp_avg", "exp_avg_sq", "random state", "schedule", "a bit of a weight"],
)
def test_a_state_that_loses_something_fails(
    breaks: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    breaks(monkeypatch)
    status, answer = verify(capsys, write(tmp_path, GRPO), "--only", "save_load")
    [row] = answer["rows"]
    assert status == 1 and answer["ok"] is False
    assert row["ok"] is False and row["worst"] >= 1 and row["tolerance"] == 0 and row["where"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-recipe"], "there is no shipped recipe 'no-such-recipe'"),
        (["RECIPE", "--only", "micro_batches"], "--only: there is no property 'micro_batches'; there are micro_batch,"),
        (["RECIPE", "--only="], "--only names no property: leave it out to measure all, or name some of micro_batch,"),
        (["RECIPE", "--only", ","], "--only names no property"),
        (["RECIPE", "--only", "micro_batch,"], "--only: there is no property ''"),
        (["RECIPE", "--samples", "1"], "--samples must be >= 2, got 1"),
        (["RECIPE", "--max-tokens", "0"], "--max-tokens must be >= 1, got 0"),
        (["RECIPE", "--stage", "cold"], "--stage cold: the recipe has no training stage of that name (there are: rl)"),
        (["RECIPE", "--model", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["RECIPE", "stages.rl.step=5"], "unknown key stages.0.step; did you mean 'steps'?"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, GRPO)
    assert main(["verify", *(path if word == "RECIPE" else word for word in arguments)]) == 1
    shown = capsys.readouterr()
    assert words in shown.err.splitlines()[-1] and shown.out == ""


def test_a_recipe_that_trains_nothing_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", write(tmp_path, EVAL)]) == 1
    assert "has no stage that trains" in capsys.readouterr().err


# -- engine and learner ----------------------------------------------------------------------------------------------


class Engine:
    """An engine that computes with a model of its own, read from the folder that it was given."""

    off: ClassVar[float] = 0.0  # nats, on every token that it draws
    deaf: ClassVar[bool] = False  # takes over no weights
    garbles: ClassVar[bool] = False  # receives other bytes
    wanders: ClassVar[bool] = False  # sends tokens to other experts than it says
    source: ClassVar[Any] = None  # the service whose weights are published

    def __init__(self, recipe: Any, folder: Path, *, experts: bool = False) -> None:
        self.model, _ = load_policy(ModelConfig(path=str(folder)), 0)
        self.experts = experts

    def scores(self, sequences: Any, temperature: float = 1.0) -> list[list[float]]:
        return TokenScorer(self.model, chunk=64).sequence_logprobs(sequences, temperature)

    def draw(self, asked: Any) -> list[Completion]:
        drawn = random_completions(asked, 300, 7)
        sequences = [(*c.prompt_token_ids, *c.token_ids) for c in drawn]
        rows = self.scores(sequences, asked.sampling.temperature)
        return [
            replace(
                c, rollout_logprobs=tuple(x + self.off for x in row[len(c.prompt_token_ids) - 1 :]),
                routed_experts=self.routing(ids) if self.experts else None,
            )
            for c, row, ids in zip(drawn, rows, sequences, strict=True)
        ]  # fmt: skip

    def routing(self, ids: Sequence[int]) -> str:
        with torch.no_grad():
            found: Any = self.model
            layers = found.hidden_states(torch.tensor([ids[:-1]]), segment_lengths=[len(ids) - 1]).routed_experts
        rows = torch.stack(layers, dim=1)
        rows = (rows + 1) % 4 if self.wanders else rows
        return pack_experts(bytes(rows.flatten().tolist()), tuple(rows.shape), 1)  # type: ignore[arg-type]

    def read(self, sequences: Any) -> list[list[float]]:
        return self.scores(sequences)

    def take_over(self, update: Any) -> str:
        if not self.deaf:
            self.model.load_state_dict(Engine.source.model.state_dict())
        return "0" * 32 if self.garbles else update.checksum

    def canary(self, prompts: Any, new_tokens: int) -> list[tuple[list[int], list[float]]]:
        rows = [[*prompt, *range(40, 40 + new_tokens)] for prompt in prompts]
        return list(zip(rows, self.scores(rows), strict=True))

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    original = VerifyService.publish

    def publish(self: VerifyService, *args: Any) -> Any:
        monkeypatch.setattr(Engine, "source", self)
        return original(self, *args)

    monkeypatch.setattr(VerifyService, "publish", publish)
    monkeypatch.setattr(verify_subject, "EngineProbe", Engine)
    return monkeypatch


def test_an_engine_that_agrees(engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, answer = verify(capsys, write(tmp_path, GRPO), "--only", f"micro_batch,{','.join(OF_THE_ENGINE)}")
    rows = rows_of(answer)
    assert status == 0, answer
    assert answer["samples"].startswith("4 completions of the recipe's prompts by its engine")
    assert rows["engine_decode"]["worst"] < 1e-5 and rows["engine_decode"]["unit"] == "nats"
    assert [bucket["from"] for bucket in rows["engine_prefill"]["by_position"]][:4] == [1, 2, 4, 8]
    assert rows["routing"]["by_layer"] == {"0": 1.0, "1": 1.0} and rows["routing"]["worst"] == 0
    assert rows["weight_sync"]["sent"] > 20 and rows["micro_batch"]["ok"]


@pytest.mark.parametrize(
    ("fault", "value", "fails"),
    [
        ("off", 1e-3, ["engine_decode"]),
        ("off", math.nan, ["engine_decode"]),
        ("wanders", True, ["routing"]),
        ("deaf", True, ["weight_sync"]),
        ("garbles", True, ["weight_sync"]),
    ],
)
def test_an_engine_that_differs_fails(
    fault: str, value: Any, fails: list[str], engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.setattr(Engine, fault, value)
    status, answer = verify(capsys, write(tmp_path, GRPO), "--only", ",".join(OF_THE_ENGINE))
    assert status == 1
    assert [row["property"] for row in answer["rows"] if row["ok"] is False] == fails
    [row] = [row for row in answer["rows"] if row["ok"] is False]
    assert row["where"] and (row["worst"] is None) == (isinstance(value, float) and math.isnan(value))


def test_an_sft_recipe_with_an_evaluation_asks_the_engine_what_the_evaluation_asks(
    engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer = verify(capsys, write(tmp_path, SFT, EVAL), "--only", "order,engine_decode,engine_prefill")
    assert status == 0 and all(row["ok"] for row in answer["rows"])
    assert answer["samples"] == "4 demonstrations of stage cold"


def test_a_dense_model_of_transformers_has_no_rows_about_experts(
    engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(dense("llama"), build_tokenizer(), tmp_path / "llama")
    only = f"micro_batch,packing,checkpointing,step,expert_parallel,save_load,{','.join(OF_THE_ENGINE)}"
    status, answer = verify(capsys, write(tmp_path, GRPO, model={"path": str(tmp_path / "llama")}), "--only", only)
    rows = rows_of(answer)
    assert status == 0, [(name, row["worst"], row["where"]) for name, row in rows.items() if row["ok"] is False]
    for name, row in rows.items():
        if name in ("routing", "expert_parallel"):
            assert row["ok"] is None and row["reason"].startswith("not applicable: the model has no mixture"), name
        else:
            assert row["ok"] is True, name
    assert rows["micro_batch"]["tolerance"] == 1e-6 and "float32" in rows["micro_batch"]["reason"]


def test_gaps_by_position_by_hand() -> None:
    gaps = gaps_of([[-1.0, -2.0, -3.0, -4.0], [-1.0]], [[-9.0, -1.5, -2.0, -3.0, -4.0], [-1.25]], skip=[1, 0])
    assert gaps.rows == ((0.5, 0.0, 0.0, 0.0), (0.25,))
    assert gaps.by_position() == [
        {"from": 1, "to": 1, "tokens": 2, "mean": 0.375, "max": 0.5},
        {"from": 2, "to": 3, "tokens": 2, "mean": 0.0, "max": 0.0},
        {"from": 4, "to": 4, "tokens": 1, "mean": 0.0, "max": 0.0},
    ]
    assert (gaps.worst, gaps.mean, gaps.tokens) == (0.5, 0.15, 5)
    assert Gaps(rows=((math.nan,),)).worst == math.inf


def test_tokens_behind_a_tie_are_left_out_unless_most_are() -> None:
    gaps = Gaps(rows=((0.0, 0.0, 0.3), (0.0, 0.0, 0.0)))
    safe = [0.1, 0.1, 0.1, 0.1]
    kept = without_ties(gaps, [[0.1, 0.1, 0.1, 1e-6], safe], "float32", skip=[1, 1])
    assert kept.rows == ((0.0, 0.0), (0.0, 0.0, 0.0)) and kept.left_out == 1
    assert without_ties(gaps, [[1e-6] * 4, [0.1, 1e-6, 0.1, 0.1]], "float32", skip=[1, 1]) == gaps
    assert without_ties(gaps, [safe, safe], "float32", skip=[1, 1]) == gaps


def test_what_is_accepted_of_an_engine() -> None:
    flat = Gaps(rows=((4e-4, *[0.0] * 99),))
    assert accepted(flat, "float32", 0.0)[:2] == (True, 5e-4)
    assert not accepted(Gaps(rows=((1e-4,) * 100,)), "float32", 0.0)[0], "the mean is bounded too"
    assert accepted(Gaps(rows=((1e-4,) * 100,)), "float32", 2e-4)[0], "the recipe's own tolerance"
    assert not accepted(Gaps(rows=((3e-4,),)), "float32", 2e-4)[0]
    assert accepted(Gaps(rows=((0.3, *[0.0] * 99),)), "bfloat16", 0.0)[0]


# -- samples ---------------------------------------------------------------------------------------------------------


def completion(length: int, finish: FinishReason) -> Completion:
    tokens = tuple(range(100, 100 + length))
    experts = pack_experts(bytes(2 * (3 + length - 1)), (3 + length - 1, 1, 2), 1)
    return Completion(
        prompt_token_ids=(1, 2, 3), token_ids=tokens, text="", rollout_logprobs=tuple(-0.1 * t for t in tokens),
        finish_reason=finish, policy_version=0, routed_experts=experts,
    )  # fmt: skip


def test_truncated_completions_become_ragged_and_finished_ones_stay_whole() -> None:
    drawn = [completion(40, FinishReason.LENGTH) for _ in range(8)] + [completion(5, FinishReason.STOP)]
    samples = ragged_samples(drawn, seed=1)
    lengths = [len(sample.token_ids) - 3 for sample in samples]
    assert lengths[-1] == 5 and len(set(lengths)) > 4 and max(lengths) <= 40
    assert len({sample.advantage for sample in samples}) == 9
    for sample, length in zip(samples, lengths, strict=True):
        assert sample.token_ids == (1, 2, 3, *range(100, 100 + length))
        assert sample.rollout_logprobs is not None and len(sample.rollout_logprobs) == length
        assert sample.routed_experts is not None and len(sample.routed_experts) == 3 + length - 1
    assert [s.advantage for s in ragged_samples(drawn, seed=1)] == [s.advantage for s in samples]


def test_samples_are_cut_before_a_tie_by_hand() -> None:
    sample = Sample(token_ids=(1, 2, 3, 4, 5, 6), prompt_length=2, rollout_logprobs=(-1.0, -2.0, -3.0, -4.0))
    whole = [0.1] * 5
    cut, other = before_tied_choices([sample, sample], [[0.1, 0.1, 0.1, 1e-9, 0.1], whole], "float32")
    assert cut.token_ids == (1, 2, 3, 4), "token 3 is fed fourth and decides the fifth"
    assert cut == cut_sample(sample, 2) and other == sample
    assert before_tied_choices([sample, sample], [[1e-9] * 5, whole], "float32") == []
    in_prompt = [1e-9, *[0.1] * 4]
    assert before_tied_choices([sample] * 4, [in_prompt, whole, whole, whole], "float32") == [sample] * 3


def test_the_stage_that_is_verified(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SFT, EVAL, GRPO)).recipe
    assert choose_stage(recipe, None).name == "rl"
    assert choose_stage(recipe, "cold").name == choose_stage(recipe, "sft").name == "cold"


def test_questions_and_demonstrations_are_the_recipes(tmp_path: Path) -> None:
    recipe, tokenizer = load_recipe(write(tmp_path, SFT, EVAL, GRPO)).recipe, build_tokenizer()
    asked = questions(recipe, choose_stage(recipe, "rl"), tokenizer, count=5, max_tokens=6, experts=True)
    assert asked is not None and len(asked.requests) == 5 and asked.sampling.max_tokens == 6
    assert len({request.prompt_token_ids for request in asked.requests}) == 3, "two siblings to a problem"
    assert len({request.seed for request in asked.requests}) == 5 and all(r.routed_experts for r in asked.requests)
    of_eval = questions(recipe, choose_stage(recipe, "cold"), tokenizer, count=4, max_tokens=99, experts=False)
    assert of_eval is not None and (of_eval.sampling.temperature, of_eval.sampling.max_tokens) == (1.0, 7)
    stage: Any = choose_stage(recipe, "cold")
    shown = demonstrations(recipe, stage, tokenizer, 3)
    assert [sample.token_ids[-1] for sample in shown] == [tokenizer.eos_token_id] * 3
    assert all(sample.advantage == 1.0 and sample.rollout_logprobs is None for sample in shown)


def test_groups_give_the_samples_back() -> None:
    samples = [
        replace(sample, routed_experts=None) for sample in ragged_samples([completion(9, FinishReason.LENGTH)] * 3, 0)
    ]
    assert samples_from_groups(as_groups(samples), mask_truncated=True) == samples


# -- rows and table --------------------------------------------------------------------------------------------------


def test_a_row_holds_only_what_is_a_number_within_its_tolerance() -> None:
    for worst, ok in ((0.5, True), (1.0, True), (1.1, False), (math.inf, False), (math.nan, False)):
        row = measured("order", lambda worst=worst: Finding(worst=worst, tolerance=1.0, reason="because"))
        assert row.ok is ok
        assert json.loads(json.dumps(row.to_json(), allow_nan=False))["ok"] is ok
    assert unmeasured("order", "why").to_json()["worst"] is None


def test_a_digest_sees_one_bit_of_any_tensor(tmp_path: Path) -> None:
    service = VerifyService(ModelConfig(preset="tiny", overrides=SMALL), 0, 1)
    service.load()
    stage: Any = choose_stage(load_recipe(write(tmp_path, GRPO)).recipe, None)
    service.begin(optimizer=stage.optimizer, loss=stage.loss, config=stage.learner, total_steps=2)
    before = service.digests()
    assert service.digests() == before
    with torch.no_grad():
        weight = service.model.lm_head.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    changed = [name for name, value in service.digests().items() if value != before[name]]
    assert changed and all("lm_head" in name for name in changed)
    state = copy.deepcopy(service.model.state_dict())
    service.change_all()
    assert not any(torch.equal(value, state[name]) for name, value in service.model.state_dict().items())


def test_the_table_shows_worst_tolerance_verdict_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    del capsys
    rows = [
        measured("order", lambda: Finding(worst=2e-15, tolerance=1e-9, reason="sums in another order")),
        measured("step", lambda: Finding(worst=0.2, tolerance=1e-9, reason="sums in another order", where="b.weight")),
        unmeasured("expert_parallel", "not applicable: dense"),
    ]
    answer = {"recipe": "mine", "stage": "rl", "model": "preset tiny", "dtype": "float64", "engine_dtype": "float32",
              "samples": "12 completions", "rows": [row.to_json() for row in rows]}  # fmt: skip
    text = io.StringIO()
    print_answer(answer, Console(file=text, width=80))
    shown = text.getvalue()
    lines = shown.splitlines()
    [order] = [line for line in lines if "order of the samples" in line]
    assert order.split()[-4:] == ["2.0e-15", "1.0e-09", "holds", "a"]
    [step] = [line for line in lines if line.lstrip().startswith("a whole step") and "worst at" not in line]
    assert step.split()[-4:] == ["2.0e-01", "1.0e-09", "FAILS", "a"]
    assert shown.count("sums in another order") == 1 and "b  not applicable: dense" in shown
    assert "worst at b.weight" in shown
    assert "1 hold, 1 fail, 1 not measured" in shown


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (1.23e-7, "1.2e-07"), (math.inf, "∞"), (None, "∞")])
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text
