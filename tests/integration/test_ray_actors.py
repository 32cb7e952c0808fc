"""What becomes of a failure on its way out of a real Ray actor: its own words in one line, or that it is gone."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipelines.actors import RayHandle, settle
from pipelines.resources import actor
from pipelines.workers import LearnerDied, Workers
from policy.config import ModelConfig
from rewards.rubric import RubricConfig
from rollout.engine import EngineDied, GenerateRequest
from rollout.types import SamplingParams
from tests.integration.support.services import Judge, WatchedLearner, WatchedRollouts, refusing, scripted
from tests.unit.reward_groups import group, reward

PARAMS = SamplingParams(max_tokens=8)
SOON = 100  # seconds; an actor's process starts within two on an idle machine


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def rollouts(start: Callable[[], Any]) -> RayHandle:
    return RayHandle(actor(WatchedRollouts, max_concurrency=16).remote(start))


@pytest.fixture(scope="module")
def service() -> Iterator[RayHandle]:
    handle = rollouts(scripted)
    assert settle(handle.submit("ready"), SOON) == -1
    yield handle
    handle.kill()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def learner(empty: Path) -> Iterator[RayHandle]:
    """One whose recipe names an empty folder as its model."""
    handle = RayHandle(actor(WatchedLearner, max_concurrency=2).remote(ModelConfig(path=str(empty)), 0, 1))
    yield handle
    handle.kill()


def request(seed: int = 1, length: int = 2) -> GenerateRequest:
    return GenerateRequest(prompt_token_ids=(5,) * length, sample_index=0, seed=seed)


def one_line(error: BaseException) -> str:
    """What the error says; fails when that is more than a person reads at a glance."""
    text = str(error)
    assert text and "\n" not in text and "\x1b" not in text and len(text) < 300, text
    return text


def test_what_the_engine_draws_comes_back(service: RayHandle) -> None:
    drawn = settle(service.submit("generate", [request(1), request(2)], PARAMS), SOON)
    assert [(c.token_ids, c.seed) for c in drawn] == [((2, 1), 1), ((2, 2), 2)]


@pytest.mark.parametrize("kind", [EngineDied, ValueError, OSError, KeyError])
def test_an_error_of_the_engine_comes_back_as_itself_with_its_own_words(
    service: RayHandle, kind: type[Exception]
) -> None:
    words = "the prompt takes 900 tokens: raise engine.max_model_len"
    with pytest.raises(kind) as caught:
        settle(service.submit("fail", kind, words), SOON)
    assert type(caught.value) is kind and caught.value.args == (words,)
    assert one_line(caught.value) == str(kind(words))


def test_a_request_that_the_engine_refuses_says_why_and_the_next_one_is_answered(service: RayHandle) -> None:
    with pytest.raises(ValueError) as caught:
        settle(service.submit("generate", [request(length=1024)], PARAMS), SOON)
    assert type(caught.value) is ValueError
    assert one_line(caught.value) == "a prompt of 1024 tokens leaves no room in a context of 1024"
    assert len(settle(service.submit("generate", [request()], PARAMS), SOON)) == 1


def test_an_engine_that_cannot_be_started_says_why() -> None:
    handle = rollouts(refusing)
    with pytest.raises(ValueError) as caught:
        settle(handle.submit("ready"), SOON)
    assert type(caught.value) is ValueError
    assert one_line(caught.value) == "vLLM cannot run this model: no such layer"
    handle.kill()


def test_a_process_that_is_killed_while_a_request_runs_is_a_dead_engine() -> None:
    handle = rollouts(partial(scripted, hang_on=1))
    settle(handle.submit("ready"), SOON)
    running = handle.submit("generate", [request()], PARAMS)
    deadline = time.monotonic() + SOON
    while not settle(handle.submit("arrived"), SOON):
        assert time.monotonic() < deadline, "the request does not arrive"
        time.sleep(0.02)
    with pytest.raises(TimeoutError):  # it is late, and lives: the pool decides when that is too late
        settle(running, 0.1)
    os.kill(settle(handle.submit("pid"), SOON), signal.SIGKILL)
    with pytest.raises(EngineDied) as caught:
        settle(running, SOON)
    assert one_line(caught.value) == "its process is gone (killed, or the machine is out of memory)"
    assert caught.value.__suppress_context__, "Ray's report of many lines would be shown above it"
    with pytest.raises(EngineDied):
        settle(handle.submit("generate", [request()], PARAMS), SOON)


def test_the_learner_says_itself_that_a_folder_is_no_model(learner: RayHandle, empty: Path) -> None:
    with pytest.raises(ValueError) as caught:
        settle(learner.submit("load"), SOON)
    assert type(caught.value) is ValueError
    words = f"model.path: {empty} has no config.json, so it is not a Hugging Face folder"
    assert one_line(caught.value) == words


def test_a_learner_that_is_killed_is_lost_and_the_mend_is_named(learner: RayHandle) -> None:
    workers = Workers.__new__(Workers)
    workers._learner = learner  # all that asking it needs
    pid = workers._ask_learner("pid")
    idle = learner.submit("work")
    with pytest.raises(TimeoutError):
        settle(idle, 0.1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LearnerDied) as caught:
        workers._ask_learner("save", "step-000002", {})
    assert one_line(caught.value) == (
        "the learner was lost while it was asked to save: its process is gone (killed, or the machine is out of "
        "memory); run the same command, it goes on from the last checkpoint"
    )


def test_a_rubric_in_an_actor_outlives_its_bombs_and_does_not_outlive_the_actor() -> None:
    functions = (reward("sleeps_on_first", timeout_s=1.0), reward("dies_always", timeout_s=5.0), reward("length"))
    config = RubricConfig(functions=functions, processes=2, max_error_rate=1.0)
    judge: Any = actor(Judge).remote(config)
    for _ in range(2):  # after any number of bombs the next right answer is right
        scored = ray.get(judge.score.remote([group(3, number=n) for n in range(2)]), timeout=SOON)
        for each in scored:
            first, *others = each.rollouts
            assert first.errors["sleeps_on_first"].startswith("timeout: ")
            assert [rollout.scores["sleeps_on_first"] for rollout in others] == [1.0, 1.0]
            assert all(rollout.errors["dies_always"].startswith("crash: ") for rollout in each.rollouts)
            assert [rollout.scores["length"] for rollout in each.rollouts] == [1.0, 2.0, 3.0]
    below = ray.get(judge.processes.remote(), timeout=SOON)
    assert len(below) >= 2
    ray.kill(judge)
    deadline = time.monotonic() + SOON
    while any(psutil.pid_exists(pid) for pid in below):
        assert time.monotonic() < deadline, "processes of the pool outlive the actor"
        time.sleep(0.05)
