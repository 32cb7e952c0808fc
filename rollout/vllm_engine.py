"""vLLM behind the Engine protocol. The only module that imports vLLM's engine.

One engine = this process (requests in, completions out) + one child process that holds the model. On a CPU the child
runs scheduler and model in one thread (vLLM's UniProcExecutor): a worker process of its own per engine would cost
another import of vLLM at start, another gigabyte, and a hand-over per step on the same core.

What is mended in vLLM, and why, is in ``rollout.vllm_mends``. Beside the mends: every request carries its own seed,
the dtype is the learner's, and log-probabilities are those after temperature, top-p and top-k.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rollout.engine import EngineConfig, EngineDied, GenerateRequest, WeightUpdate
from rollout.types import Completion, FinishReason, SamplingParams
from rollout.vllm_routing import ASKED, returned_experts
from rollout.vllm_start import MENDS, StartOptions, start_llm


class _Job(NamedTuple):
    """One request to vLLM: its tokens, vLLM's sampling parameters, and whether its experts are wanted."""

    prompt: Sequence[int]
    params: Any
    experts: bool = False


class _Answer(NamedTuple):
    """vLLM's output, log-probabilities of the prompt if they were asked for, and the experts as text if they were."""

    before: list[float]
    output: Any
    experts: str | None = None


class VllmEngine:
    """Samples completions with vLLM; see :class:`rollout.engine.Engine` for the contract of each method.

    Example:
        >>> engine = await VllmEngine.create("runs/demo/model", EngineConfig(), cores="0")
        >>> [completion] = await engine.generate([request], SamplingParams(max_tokens=64))
    """

    def __init__(self, llm: Any, config: EngineConfig, options: StartOptions) -> None:
        self._llm: Any = llm
        self._config = config
        self._options = options
        self._tokenizer = llm.get_tokenizer()
        self._names = itertools.count()
        self._version = -1
        self._in_flight = 0
        self._connected = False
        self._undefined = ""  # why the weights are undefined, once they are
        self._open = asyncio.Event()  # cleared while weights are taken over
        self._open.set()

    @classmethod
    async def create(
        cls,
        model_folder: str | Path,
        config: EngineConfig,
        *,
        dtype: str = "float32",
        seed: int = 0,
        cores: str | None = None,
        load_format: str = "auto",
        worker: int = 0,
        mends: frozenset[str] = MENDS,
    ) -> VllmEngine:
        """Starts the engine process and waits until it is ready.

        Args:
            model_folder: Hugging Face folder (config, tokenizer; weights unless ``load_format`` is ``dummy``).
            config: sizes, limits and the backend by which weights arrive.
            dtype: ``float32`` | ``bfloat16``.
            seed: of vLLM itself; each request brings its own.
            cores: CPU cores of this engine, e.g. ``"0"`` or ``"0,2-3"``; None takes all that this process may use.
            load_format: vLLM's; ``dummy`` starts with random weights, to be replaced by the first update.
            worker: number of this engine among its siblings (``nccl`` places it by this).
            mends: for tests alone: a mend that is left out brings the upstream bug back.

        Raises:
            ValueError: no model folder there, a model or an option that vLLM cannot run here.
            EngineDied: the engine process ended while it started.
        """
        options = StartOptions(dtype=dtype, seed=seed, cores=cores, load_format=load_format, worker=worker, mends=mends)
        started: list[Any] = []
        # Not as the thread's result: vLLM's imports keep an exception whose frames would hold it for ever.
        await asyncio.to_thread(lambda: started.append(start_llm(Path(model_folder), config, options)))
        engine = cls(started.pop(), config, options)
        if config.return_routed_experts and engine._on_cpu:
            [fault, *_] = await engine._llm.collective_rpc("capture_routing")
            if fault:
                await engine.close()
                raise ValueError(fault)
        return engine

    @property
    def policy_version(self) -> int:
        """Version of the weights that the next request will use (-1 before the first update)."""
        return self._version

    async def generate(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[Completion]:
        """Draws one completion per request, in request order; all are submitted at once.

        A completion carries the version with which it was begun. Called while weights are taken over, it waits.

        Raises:
            ValueError: a prompt leaves no room for a single new token in the context.
            EngineDied: the engine process is gone.
        """
        for request in requests:
            self._require_room(len(request.prompt_token_ids), 1)
        await self._open.wait()
        version = self._version
        jobs = [_Job(r.prompt_token_ids, _sampling(params, r.seed), r.routed_experts) for r in requests]
        answers = await self._run(jobs)
        texts = self._texts([answer.output for answer in answers])
        return [
            Completion(
                prompt_token_ids=request.prompt_token_ids,
                token_ids=tuple(output.token_ids),
                text=text,
                rollout_logprobs=tuple(output.logprobs.logprobs),
                finish_reason=FinishReason(output.finish_reason),
                policy_version=version,
                sample_index=request.sample_index,
                seed=request.seed,
                routed_experts=experts,
            )
            for request, (_, output, experts), text in zip(requests, answers, texts, strict=True)
        ]

    async def score_tokens(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (nats, temperature 1) of tokens 1..T-1 given those before them. [T] -> [T-1]

        Raises:
            ValueError: no tokens, or more than the context holds (one place is kept for a new one).
        """
        self._require_room(len(token_ids), 1)
        await self._open.wait()
        [answer] = await self._run([_Job(token_ids, _scoring(1))])
        return answer.before

    async def routed_experts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The experts that each token of each sequence is sent to, all of them fed as prompts.

        Returns:
            One text per sequence, which ``rollout.types.unpack_experts`` reads. [T, MoE layers, K]

        Raises:
            ValueError: no tokens or too many, or the engine was started without ``return_routed_experts``.
        """
        for sequence in sequences:
            self._require_room(len(sequence), 1)
        await self._open.wait()
        answers = await self._run([_Job(sequence, _scoring(1), experts=True) for sequence in sequences])
        return [answer.experts for answer in answers if answer.experts is not None]

    async def canary(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Continues each prompt greedily, past any end-of-sequence, by exactly ``new_tokens`` (>= 1).

        Returns:
            (tokens [T], log-probabilities of tokens 1..T-1 [T-1]) per prompt: the prompt's from prefill, the new ones'
            from decode, at temperature 1.

        Raises:
            ValueError: a prompt and its continuation do not fit the context.
        """
        for prompt in prompts:
            self._require_room(len(prompt), new_tokens)
        await self._open.wait()
        answers = await self._run([_Job(prompt, _scoring(new_tokens)) for prompt in prompts])
        return [
            ([*prompt, *output.token_ids], [*before, *output.logprobs.logprobs])
            for prompt, (before, output, _) in zip(prompts, answers, strict=True)
        ]

    async def update_weights(self, update: WeightUpdate, *, keep_in_flight: bool = False) -> str:
        """Takes over the weights and returns the hex digest of the bytes that were received.

        Args:
            update: what the learner published.
            keep_in_flight: freeze running requests and let them go on with the new weights (their key-value cache
                stays the old one's). Otherwise running requests are refused.

        Raises:
            ValueError: requests are running, or the update came by another backend than this engine's.
            EngineDied: the engine process is gone.
        """
        if update.backend != self._config.weight_backend:
            raise ValueError(
                f"version {update.version} came by {update.backend!r}, this engine was started for "
                f"{self._config.weight_backend!r}: use one engine.weight_backend for learner and workers"
            )
        if self._in_flight and self._config.return_routed_experts and not self._on_cpu:
            raise ValueError(
                f"{self._in_flight} requests are running, and on a GPU routed experts come with a prefix cache that "
                "must be emptied: wait for the requests before an update"
            )
        if self._in_flight and not keep_in_flight:
            raise ValueError(
                f"{self._in_flight} requests are running: wait for them before an update, or pass keep_in_flight=True"
            )
        await self._open.wait()
        self._open.clear()
        self._undefined = f"the update to version {update.version} failed half-way"
        try:
            with self._alive():
                digest = await self._take_over(update)
        finally:
            self._open.set()
        self._version, self._undefined = update.version, ""
        return digest

    async def close(self) -> None:
        """Stops the engine process; safe to call twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if llm.output_handler is not None:  # first, or it reports the end that was asked for as an error
            llm.output_handler.cancel()
            await asyncio.gather(llm.output_handler, return_exceptions=True)
        await asyncio.to_thread(llm.shutdown)
        del llm
        gc.collect()  # vLLM's object is part of a cycle and complains when it meets the end of the interpreter

    # -- leaves -------------------------------------------------------------------------------------------------------

    @property
    def _on_cpu(self) -> bool:
        return self._llm.vllm_config.device_config.device_type == "cpu"

    def _require_room(self, length: int, new_tokens: int) -> None:
        limit = self._config.max_model_len
        if not 1 <= length <= limit - new_tokens:
            raise ValueError(
                f"a prompt of {length} tokens and {new_tokens} new do not fit a context of {limit}: "
                "shorten the prompt or raise engine.max_model_len"
                if length
                else "a prompt needs at least one token"
            )

    async def _run(self, jobs: Sequence[_Job]) -> list[_Answer]:
        """Answers in the order of the jobs."""
        if self._undefined:
            raise EngineDied(f"this engine cannot be used: {self._undefined}")
        captured = any(job.experts for job in jobs)
        if captured and not self._config.return_routed_experts:
            raise ValueError("this engine returns no experts: start it with engine.return_routed_experts")
        captured = captured and self._on_cpu
        names = [f"{ASKED if job.experts else ''}{next(self._names)}" for job in jobs]
        self._in_flight += len(jobs)
        tasks = [asyncio.ensure_future(self._one(job, name)) for job, name in zip(jobs, names, strict=True)]
        try:
            with self._alive():
                answers = await asyncio.gather(*tasks)
                return await self._with_captured(jobs, names, answers) if captured else answers
        finally:
            for task in tasks:
                task.cancel()  # of those that still run, when one failed or this call was cancelled
            self._in_flight -= len(jobs)
            if captured and self._llm is not None:
                await asyncio.gather(*tasks, return_exceptions=True)  # vLLM knows by then that they are over
                with contextlib.suppress(EngineDied), self._alive():
                    await self._llm.collective_rpc("drop_routing", args=(names,))

    async def _one(self, job: _Job, name: str) -> _Answer:
        from vllm.inputs.engine import tokens_input

        async for result in self._llm.generate(tokens_input(list(job.prompt)), job.params, name):
            if result.finished:
                before, output = result.prompt_logprobs, result.outputs[0]
                experts = None
                if job.experts and not self._on_cpu:
                    experts = returned_experts(output, self._llm.model_config, _fed(job, output))
                    if experts is None:
                        raise RuntimeError(f"vLLM returned too few rows of experts for request {name}")
                return _Answer([] if before is None else list(before.logprobs), output, experts)
        raise AssertionError(f"vLLM ended request {name} without a finished output")

    async def _with_captured(
        self, jobs: Sequence[_Job], names: Sequence[str], answers: Sequence[_Answer]
    ) -> list[_Answer]:
        """The answers with the experts that the engine process captured for them."""
        triples = list(zip(jobs, names, answers, strict=True))
        asked = [(name, _fed(job, answer.output)) for job, name, answer in triples if job.experts]
        [texts, *_] = await self._llm.collective_rpc("take_routing", args=(asked,))
        if None in texts:
            raise RuntimeError(f"the experts of request {asked[texts.index(None)][0]} were not captured")
        found = dict(zip((name for name, _ in asked), texts, strict=True))
        return [answer._replace(experts=found.get(name)) for _, name, answer in triples]

    async def _take_over(self, update: WeightUpdate) -> str:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        llm, payload = self._llm, dict(update.payload)
        init = payload.pop("init", None)
        if init is not None and not self._connected:
            if "rank_offset" in init:  # nccl: each engine has its place in the group
                place = self._options.worker * self._config.tensor_parallel
                init = {**init, "rank_offset": init["rank_offset"] + place}
            await llm.init_weight_transfer_engine(WeightTransferInitRequest(init))
            self._connected = True
        if update.backend == "shm":
            shapes = [list(shape) for shape in update.shapes]
            payload.update(names=list(update.names), dtypes=list(update.dtypes), shapes=shapes)
        frozen = self._in_flight > 0
        if frozen:
            await llm.pause_generation(mode="keep", clear_cache=False)
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(payload))
        await llm.finish_weight_update(str(update.version))
        if frozen:
            await llm.resume_generation()
        if self._config.return_routed_experts and not self._on_cpu:
            assert await llm.reset_prefix_cache(), "vLLM kept what the old weights computed"
        return "/".join(sorted(set(await llm.collective_rpc("received_digest"))))

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        if self._llm is None:
            raise EngineDied("this engine was closed")
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError:
            raise EngineDied("the vLLM process of this engine is gone; its log says why") from None

    def _texts(self, outputs: Sequence[Any]) -> list[str]:
        """Decoded once at the end: vLLM's incremental decoding costs a pass per token."""
        ids, cuts = [], []
        for output in outputs:
            ended, by = output.finish_reason == FinishReason.STOP, output.stop_reason
            cuts.append(by if ended and isinstance(by, str) else None)
            ids.append(output.token_ids[:-1] if ended and not isinstance(by, str) else output.token_ids)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text if cut is None else text.partition(cut)[0] for text, cut in zip(texts, cuts, strict=True)]


def _fed(job: _Job, output: Any) -> int:
    """Tokens that were fed: the prompt, and the sampled ones but the last, which is drawn and never fed."""
    return len(job.prompt) + len(output.token_ids) - 1


def _sampling(params: SamplingParams, seed: int) -> Any:
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    return VllmSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop=list(params.stop),
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=bool(params.stop),
        skip_special_tokens=False,
    )


def _scoring(new_tokens: int) -> Any:
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    return VllmSampling(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,
    )
