"""Routers in training: fp32 whatever the model is, moving biases, what is counted, and replayed experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipelines.cli import main
from pipelines.learner_service import LearnerService
from policy.batch import Sample
from policy.config import LearnerConfig, LossConfig, ModelConfig, OptimizerConfig, RouterConfig
from policy.glossary import LEARNER_METRICS
from policy.learner import Learner
from policy.loading import load_policy
from policy.model import PolicyModel, checkpoint_tensors
from policy.moe import Router, RouterReport
from policy.routing import BiasBalancer, RouterCounts, check_routing
from tests.unit.test_learner import DENSE, batch, dense, policy

MINI = Path(__file__).parents[1] / "integration" / "support" / "mini.yaml"


def routers(model: torch.nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def biases(model: torch.nn.Module) -> Tensor:
    return torch.stack([router.e_score_correction_bias.clone() for router in routers(model)])


def learner(model: Any, router: RouterConfig | None = None, *, lr: float = 1e-3, **fields: Any) -> Learner:
    return Learner(
        model,
        optimizer=OptimizerConfig(lr=lr),
        loss=LossConfig(),
        config=LearnerConfig(threads=1, **fields),
        total_steps=20,
        router=router,
    )


@torch.no_grad()
def own_choice(model: PolicyModel, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the experts that the model itself would choose."""
    found = []
    for sample in samples:
        ids = torch.tensor([sample.token_ids[:-1]])
        experts = model.hidden_states(ids, segment_lengths=[ids.shape[1]]).routed_experts
        found.append(replace(sample, routed_experts=torch.stack(experts, dim=1).to(torch.uint8)))
    return found


# -- fp32 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _watch(model: PolicyModel) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(input, weight as computed with, gates, experts) of every call of a router."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def look(router: Router, arguments: tuple[Tensor, ...], out: tuple[Tensor, Tensor, RouterReport]) -> None:
        seen.append((arguments[0].detach(), router.weight.detach().clone(), out[0].detach(), out[1]))

    for router in routers(model):
        router.register_forward_hook(look)
    return seen


def _check_fp32(model: PolicyModel, seen: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """Gates are those of fp32 scores of what went in; bf16 scores would differ."""
    assert seen
    router = routers(model)[0]
    for x, weight, gates, experts in seen:
        assert x.dtype == weight.dtype == torch.bfloat16 and gates.dtype == torch.float32
        scores = (x.float() @ weight.float().T).sigmoid().gather(1, experts)
        expected = scores / scores.sum(1, keepdim=True) * router.scaling
        assert torch.allclose(gates, expected, rtol=1e-5)
        coarse = (x @ weight.T).sigmoid().gather(1, experts).float()
        assert not torch.allclose(gates, coarse / coarse.sum(1, keepdim=True) * router.scaling, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bf16_model_routes_in_fp32(checkpointing: bool) -> None:
    overrides = {"hidden_size": 64, "initializer_range": 0.2}
    model, _ = load_policy(ModelConfig(preset="tiny", overrides=overrides, dtype="bfloat16"), 0)
    assert isinstance(model, PolicyModel) and biases(model).dtype == torch.float32
    seen = _watch(model)
    mode = "layer" if checkpointing else "none"
    learner(model, RouterConfig(bias="update"), activation_checkpointing=mode).step(batch(4))
    _check_fp32(model, seen)
    assert biases(model).dtype == torch.float32 and biases(model).any()


def test_a_sharded_model_in_mixed_precision_routes_in_fp32(one_rank: None) -> None:
    """FSDP2 casts the router's weight with the others; the bias is a buffer and stays as it is."""
    model = policy(initializer_range=0.2)
    samples = batch(4)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    seen = _watch(model)
    ids = torch.tensor([samples[0].token_ids])
    hidden = model.hidden_states(ids, segment_lengths=[ids.shape[1]], balance=True)
    reported = hidden.router_reports[0].balance
    assert reported is not None and reported.dtype == torch.float32
    assert biases(model).dtype == torch.float32
    _check_fp32(model, seen)


# -- the bias ---------------------------------------------------------------------------------------------------------


def _counts(load: list[list[int]]) -> RouterCounts:
    return RouterCounts(torch.tensor(load), torch.zeros(len(load), dtype=torch.float64))


def test_the_bias_moves_towards_the_mean_by_hand() -> None:
    """Mean 3: the expert with 6 goes down, those with 0 and 2 up, and one with 4 down by as much as the one with 6."""
    model = policy(n_routed_experts=4, num_hidden_layers=2)
    [router] = routers(model)
    router.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    balancer = BiasBalancer(model, RouterConfig(bias="update", bias_rate=0.01))
    balancer.step(_counts([[6, 0, 2, 4]]))
    assert router.e_score_correction_bias.tolist() == pytest.approx([0.49, 0.01, 0.01, -0.51])
    balancer.step(_counts([[3, 3, 3, 3]]))
    assert router.e_score_correction_bias.tolist() == pytest.approx([0.49, 0.01, 0.01, -0.51])


def test_frozen_is_the_default_and_touches_nothing() -> None:
    model = policy()
    for router in routers(model):
        torch.nn.init.normal_(router.e_score_correction_bias)
    before = biases(model)
    subject = learner(model)
    for _ in range(3):
        subject.step(batch(), mini_batches=2)
    assert torch.equal(biases(model), before)


def test_each_mini_batch_moves_it_once_by_its_own_load() -> None:
    """With a learning rate of next to nothing, three mini-batches move the bias as three single steps would."""
    rate, samples = 0.003, batch(12)
    model = policy(torch.float64)
    learner(model, RouterConfig(bias="update", bias_rate=rate), lr=1e-30, micro_batch_tokens=30).step(
        samples, mini_batches=3
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tensor_split(3)
    twin = policy(torch.float64)
    expected = biases(twin)
    for part in order:
        chosen = own_choice(twin, [samples[int(i)] for i in part])
        experts = torch.cat([s.routed_experts for s in chosen if s.routed_experts is not None]).long()  # [N, L, K]
        for layer, router in enumerate(routers(twin)):
            load = torch.bincount(experts[:, layer].flatten(), minlength=8).double()
            router.e_score_correction_bias.add_(rate * (load.mean() - load).sign())
        assert not torch.equal(biases(twin), expected)
    assert torch.allclose(biases(model), biases(twin), atol=1e-12)


def test_a_skipped_step_does_not_move_it() -> None:
    model = policy()
    subject = learner(model, RouterConfig(bias="update"))
    bad = [replace(sample, advantage=float("nan")) for sample in batch(4)]
    subject.step(bad)
    assert subject.bad_updates and not biases(model).any()
    subject.step([])
    assert not biases(model).any()
    subject.step(batch(4))
    assert biases(model).any()


def test_the_moved_bias_is_in_what_travels_and_is_saved() -> None:
    model = policy()
    learner(model, RouterConfig(bias="update")).step(batch())
    sent = {name: tensor for name, tensor in checkpoint_tensors(model) if name.endswith("e_score_correction_bias")}
    assert list(sent) == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
    assert torch.equal(torch.stack(list(sent.values())), biases(model)) and biases(model).any()
    assert set(sent) <= set(model.state_dict())


def test_updates_balance_the_load() -> None:
    """Nothing but the bias moves: the busiest expert comes down towards the mean in every layer."""
    model, samples = policy(), batch(24)
    for router in routers(model):
        router.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    subject = learner(model, RouterConfig(bias="update", bias_rate=0.02), lr=1e-12)
    rows = [subject.step(samples) for _ in range(20)]
    for layer in (1, 2):
        name = f"router/load_max_over_mean/layer_{layer}"
        assert rows[0][name] > 2.0 and rows[-1][name] < 0.75 * rows[0][name]
        assert rows[-1][f"router/load_entropy/layer_{layer}"] > rows[0][f"router/load_entropy/layer_{layer}"]


# -- what is counted --------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """Six tokens, two experts each: loads (6, 5, 1, 0) and (3, 3, 3, 3); of 12 choices 9 and 12 agree."""
    counts = RouterCounts(
        torch.tensor([[6, 5, 1, 0], [3, 3, 3, 3]]), torch.tensor([6.0, 3.0], dtype=torch.float64), torch.tensor([9, 12])
    )
    uneven = math.log(2) / 2 + 5 / 12 * math.log(12 / 5) + math.log(12) / 12
    assert counts.metrics(first_layer=5, top_k=2) == pytest.approx(
        {
            "router/load_max_over_mean/layer_5": 2.0, "router/load_max_over_mean/layer_6": 1.0,
            "router/load_entropy/layer_5": uneven / math.log(4), "router/load_entropy/layer_6": 1.0,
            "router/dead_experts/layer_5": 1.0, "router/dead_experts/layer_6": 0.0,
            "router/score_entropy/layer_5": 1.0, "router/score_entropy/layer_6": 0.5,
            "router/replay_agreement/layer_5": 0.75, "router/replay_agreement/layer_6": 1.0,
            "router/replay_agreement": 0.875,
        }
    )  # fmt: skip
    both = counts + counts.times(0)
    assert both.metrics(5, 2) == counts.metrics(5, 2)
    assert (counts + counts).total(lambda tensor: tensor * 2).load.tolist() == (counts.load * 4).tolist()


@pytest.mark.parametrize("tokens", [10_000, 20])
def test_the_learner_counts_every_token_once_however_the_batch_is_cut(tokens: int) -> None:
    model, samples = policy(torch.float64), batch(12)
    whole = learner(copy.deepcopy(model)).step(samples)
    cut = learner(copy.deepcopy(model), micro_batch_tokens=tokens).step(samples)
    names = [name for name in whole if name.startswith("router/")]
    assert len(names) == 2 * 4
    assert {name: cut[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-9)
    assert all(name.rpartition("_")[0] + "_{i}" in LEARNER_METRICS for name in names)
    experts = torch.cat([s.routed_experts for s in own_choice(model, samples) if s.routed_experts is not None]).long()
    load = torch.bincount(experts[:, 0].flatten(), minlength=8).double()
    assert cut["router/load_max_over_mean/layer_1"] == pytest.approx(float(load.max() / load.mean()))
    assert cut["router/dead_experts/layer_1"] == int((load == 0).sum())
    shares = load / load.sum()
    entropy = -float(sum(p * p.log() for p in shares if p > 0)) / float(torch.tensor(8.0).log())
    assert cut["router/load_entropy/layer_1"] == pytest.approx(entropy)
    assert 0 < cut["router/score_entropy/layer_1"] <= float(torch.tensor(8.0).log()) + 1e-9


# -- replay -----------------------------------------------------------------------------------------------------------


def test_replaying_the_own_choice_changes_no_bit() -> None:
    ours, theirs = policy(), policy()
    samples = own_choice(ours, batch())
    free, replayed = learner(ours).step(samples), learner(theirs, RouterConfig(replay=True)).step(samples)
    del free["learner/tokens_per_s"], replayed["learner/tokens_per_s"]
    agreements = {name: replayed.pop(name) for name in list(replayed) if name.startswith("router/replay_agreement")}
    assert agreements == dict.fromkeys(
        ("router/replay_agreement/layer_1", "router/replay_agreement/layer_2", "router/replay_agreement"), 1.0
    )
    assert replayed == free
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


def _moved(samples: Sequence[Sample]) -> list[Sample]:
    """Other experts: the next one for each of a token's."""
    out = []
    for sample in samples:
        assert sample.routed_experts is not None
        out.append(replace(sample, routed_experts=(sample.routed_experts.long() + 1) % 8))
    return out


def test_other_experts_give_the_log_probabilities_of_the_model_that_is_forced() -> None:
    """Current and old log-probabilities are under the replayed experts, the reference's under its own choice."""
    model = policy(torch.float64)
    samples = _moved(own_choice(model, batch(6)))
    forced = []
    for sample in samples:
        assert sample.routed_experts is not None
        ids, given = torch.tensor([sample.token_ids[:-1]]), list(sample.routed_experts.transpose(0, 1))
        with torch.no_grad():
            logits = model(ids, segment_lengths=[ids.shape[1]], routed_experts=given).logits[0]
        targets = torch.tensor(sample.token_ids[1:])[:, None]
        logprobs = logits.log_softmax(-1).gather(1, targets)[sample.prompt_length - 1 :, 0]
        forced.append(replace(sample, rollout_logprobs=tuple(logprobs.tolist())))
    subject = learner(copy.deepcopy(model), RouterConfig(replay=True))
    metrics = subject.step(forced, mini_batches=2)  # the second mini-batch's old ones are computed before any update
    assert metrics["mismatch/max_abs"] < 1e-9
    assert metrics["router/replay_agreement"] < 0.9
    unforced = learner(copy.deepcopy(model)).step(forced)
    assert unforced["mismatch/max_abs"] > 1e-3 and "router/replay_agreement" not in unforced

    held = Learner(
        copy.deepcopy(model), optimizer=OptimizerConfig(lr=1e-9), loss=LossConfig(kl_coef=1.0),
        config=LearnerConfig(threads=1), total_steps=2, router=RouterConfig(replay=True), reference=model,
    )  # fmt: skip
    assert held.step(forced)["learner/kl_ref"] > 1e-6


def test_agreement_is_the_overlap_of_the_sets() -> None:
    """One expert of two replaced: half agrees; another order of the same: all does."""
    model = policy(torch.float64)
    samples = own_choice(model, batch(6))
    turned, half = [], []
    for sample in samples:
        experts = sample.routed_experts
        assert experts is not None
        turned.append(replace(sample, routed_experts=experts.flip(-1)))
        others = torch.stack([(experts[..., 0] + i) % 8 for i in range(1, 3)])
        other = torch.where(others[0] == experts[..., 1], others[1], others[0])
        # in the first MoE layer only: the second one's inputs then change, and with them its choice
        half.append(replace(sample, routed_experts=torch.stack((experts[..., 0], other), -1)))
    found = [learner(copy.deepcopy(model), RouterConfig(replay=True)).step(some) for some in (turned, half)]
    assert found[0]["router/replay_agreement"] == 1.0
    assert found[1]["router/replay_agreement/layer_1"] == 0.5


def test_replay_without_experts_is_refused_and_without_replay_they_are_ignored() -> None:
    subject = learner(policy(), RouterConfig(replay=True))
    with pytest.raises(ValueError, match=r"4 of 4 samples have no routed_experts: .*replay to false"):
        subject.step(batch(4))
    ours = policy()
    samples = _moved(own_choice(ours, batch(4)))
    plain, given = learner(policy()), learner(policy())
    a, b = plain.step(batch(4)), given.step(samples)
    assert a["learner/loss"] == b["learner/loss"]
    assert len(subject.sequence_logprobs([[5, 6, 7]])[0]) == 2  # what engine and learner are compared by


# -- refusals ---------------------------------------------------------------------------------------------------------

ASKED = [
    (RouterConfig(bias="update"), "router.bias update"),
    (RouterConfig(balance_coef=1e-4), r"router.balance_coef 0\.0001"),
    (RouterConfig(replay=True), "router.replay"),
]


@pytest.mark.parametrize(("config", "words"), ASKED)
def test_a_model_without_experts_is_refused_by_the_learner(config: RouterConfig, words: str) -> None:
    for model in (dense("qwen2"), policy(first_k_dense_replace=3)):
        with pytest.raises(ValueError, match=f"^{words} needs a DeepSeek-V3 mixture of experts.*train another model$"):
            learner(model, config)
        learner(model, RouterConfig())


@pytest.mark.parametrize(("config", "words"), ASKED)
def test_and_before_anything_is_loaded(config: RouterConfig, words: str, tmp_path: Any) -> None:
    Qwen2ForCausalLM(Qwen2Config(**DENSE)).save_pretrained(tmp_path)
    shallow = ModelConfig(preset="tiny", overrides={"first_k_dense_replace": 2, "num_hidden_layers": 2})
    for model in (ModelConfig(path=str(tmp_path)), shallow):
        with pytest.raises(ValueError, match=f"^stages.rl.{words} needs a DeepSeek-V3 mixture"):
            check_routing(model, config, "stages.rl")
        check_routing(model, RouterConfig(), "stages.rl")
        with pytest.raises(ValueError, match=r"^engine.return_routed_experts needs"):
            check_routing(model, RouterConfig(), "stages.rl", return_experts=True)
    check_routing(ModelConfig(preset="tiny"), config, "stages.rl", return_experts=True)


def test_a_recipe_is_refused_by_its_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    dense_model = "model.overrides={first_k_dense_replace: 2}"
    assert main(["run", str(MINI), dense_model, "stages.grpo.router.replay=true", "--dry-run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("r1: stages.grpo.router.replay needs a DeepSeek-V3 mixture of experts, and tiny has none")
    assert told.count("\n") == 1
    assert main(["run", str(MINI), "stages.sft.router.replay=true", "--dry-run"]) != 0
    assert "demonstrations have none: set it to false" in capsys.readouterr().err


def test_the_service_hands_the_router_to_its_learner() -> None:
    service = LearnerService(ModelConfig(preset="tiny"), seed=0)
    service.load()
    service.begin(
        optimizer=OptimizerConfig(), loss=LossConfig(), config=LearnerConfig(threads=1), total_steps=2,
        router=RouterConfig(bias="update", balance_coef=0.1),
    )  # fmt: skip
    assert service.sft_step([((5, 6, 7, 8), 2)])["learner/balance_loss"] > 0
    assert biases(service.model).any()
