"""Checkpoints in the background: a step waits for a copy of the state, a thread writes it while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policy.checkpoint import Peers, Snapshot, Stateful, save_model
from policy.config import ModelConfig
from policy.parallel import Ranks, sharded


class Saver:
    """Writes checkpoints and models of one learner, at most one at a time.

    With many ranks each has one, and all call each method together.

    Args:
        peers: this process, or the ranks over which the learner's model is sharded.
        source: what its model was loaded from in the first place (``ModelWriter``).
    """

    def __init__(self, peers: Peers | None = None, source: ModelConfig | None = None) -> None:
        self._peers, self._source = peers or Peers(), source
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, source: ModelConfig | None = None) -> Saver:
        """For a model, whole or sharded; every rank of a sharded one calls this."""
        root = sharded(model)
        return cls(Peers.of(Ranks.alone() if root is None else root.ranks), source)

    def save(
        self,
        folder: Path,
        *,
        learner: Stateful,
        tokenizer: PreTrainedTokenizerBase,
        extra: Mapping[str, Any],
        background: bool = True,
    ) -> None:
        """Saves a learner's state, of which a copy is taken before this returns; an earlier save is waited for.

        Args:
            folder: named ``step-NNNNNN``.
            learner: the state's owner; free to go on.
            tokenizer: goes to ``folder/model``.
            extra: JSON-serialisable.
            background: write in a thread; without, the state is written before this returns and no copy is taken.

        Raises:
            CheckpointError: this or the earlier one could not be written; those before are intact.
        """
        self.wait()
        snapshot = Snapshot(learner, tokenizer, extra, source=self._source, copy=background)
        if background:
            self._pending = self._thread.submit(snapshot.write, folder, self._peers)
        else:
            snapshot.write(folder, self._peers)

    def export(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """:func:`policy.checkpoint.save_model`, after a save that is under way.

        Raises:
            CheckpointError: this or an earlier save failed.
        """
        self.wait()
        save_model(model, tokenizer, folder, source=self._source, peers=self._peers)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: the save that was under way failed (told once).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
