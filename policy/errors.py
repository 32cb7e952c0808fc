"""Errors in one line. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


class NonFiniteError(FloatingPointError):
    """Something in an update of the weights is NaN or infinite.

    Attributes:
        what: one of ``policy.guards.KINDS``, ``gradient`` or ``weights``.
        micro_batches: where in the mini-batch, 0-based; empty for gradients and weights.
        samples: which samples of the mini-batch; for a loss all of its micro-batch.
        parameters: whose gradients or weights.
    """

    def __init__(
        self,
        message: str,
        what: str = "",
        *,
        micro_batches: Sequence[int] = (),
        samples: Sequence[int] = (),
        parameters: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.what = what
        self.micro_batches, self.samples, self.parameters = tuple(micro_batches), tuple(samples), tuple(parameters)


def one_line(error: BaseException) -> str:
    """The first line of what an error says, at most 200 characters; its type's name where it says nothing."""
    first = str(error).strip().split("\n", 1)[0].strip()
    return first[:200] or type(error).__name__
