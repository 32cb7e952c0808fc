"""The sequence-wise balance loss of a mixture of experts.

It is DeepSeek-V3's (arXiv 2412.19437, equations 17 to 20). For one sequence of T tokens and one layer of E experts
of which K are chosen, with s[t, i] the router's score of expert i for token t::

    f[i] = E / (K T) * sum over t of 1[s[t, i] is one of the K largest of s[t, :]]
    P[i] = 1 / T * sum over t of s[t, i] / sum over j of s[t, j]
    L    = sum over i of f[i] P[i]

It is 1 when the experts are used evenly, at most E / K, and its gradient flows through P alone. Its tokens are those
that are fed: the whole prompt and the completion without its last token; padding is never among them. As in the paper
f knows the scores only: neither the correction bias, nor groups, nor replayed experts. The layers' losses are added up.

Shapes: N tokens, S sequences, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceIndex:
    """Which sequence each token of a packed stream belongs to.

    Attributes:
        of_token: index of the sequence of each token. [N], int64
        lengths: tokens of each sequence. [S], int64
    """

    of_token: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SequenceIndex:
        """Of sequences that lie one after the other."""
        counts = torch.tensor(lengths)
        index = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(index.to(device), counts.to(device))


def sequence_balance(scores: Tensor, sequences: SequenceIndex, top_k: int) -> Tensor:
    """Sum over the sequences of DeepSeek-V3's balance loss of one layer. [N, E] -> 0-d

    Formula and source stand at the top of this file. It does not depend on the order in which tokens or sequences lie.
    """
    chosen = torch.zeros_like(scores).scatter_(1, scores.detach().topk(top_k, dim=-1, sorted=False).indices, 1)
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    count, experts = len(sequences.lengths), scores.shape[1]
    tokens = sequences.lengths.to(scores.dtype)[:, None]
    load = scores.new_zeros(count, experts).index_add_(0, sequences.of_token, chosen) * (experts / top_k) / tokens
    mean_share = scores.new_zeros(count, experts).index_add(0, sequences.of_token, shares) / tokens
    return (load * mean_share).sum()
