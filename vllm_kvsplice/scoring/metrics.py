# SPDX-License-Identifier: Apache-2.0
"""Quality of compressed attention from the next-token distributions of two runs over the same tokens.

In: logits, or the top-k log-probabilities that a server reports. Out: sums (``Scores``) that add up over windows and
become perplexity, KL divergence and top-1 agreement at the end. Rows are tokens, taken a few at a time, so memory
is bounded by ``rows`` times the vocabulary; sums over rows are fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # tokens whose whole vocabulary is held in fp32 at a time
# What is left of a distribution after its top k is 1 - sum of k fp32 probabilities: below this it is rounding noise.
REST_FLOOR = 1e-6


class TopK(NamedTuple):
    """The k most likely next tokens of each of T rows, falling, with natural-log probabilities."""

    ids: Tensor  # [T, k] int64
    logprobs: Tensor  # [T, k] float


@dataclass(frozen=True)
class Scores:
    """Sums over scored tokens; ``+`` adds two. ``kl`` is NaN where only top-k probabilities were seen."""

    tokens: int = 0
    nll_base: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    kl_topk: float = 0.0
    agree: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def kld(self) -> float:
        """Mean KL(base || kvsplice) per token over the full vocabulary, nats."""
        return self.kl / self.tokens

    @property
    def kld_topk(self) -> float:
        """Mean KL(base || kvsplice) per token over the shared top-k and one rest bucket, nats."""
        return self.kl_topk / self.tokens

    @property
    def top1(self) -> float:
        """Share of tokens where both runs have the same most likely next token."""
        return self.agree / self.tokens

    @property
    def ppl(self) -> dict[str, float]:
        """Perplexity of both runs, and the loss in percent."""
        base, mine = (math.exp(nll / self.tokens) for nll in (self.nll_base, self.nll))
        return {"baseline": base, "kvsplice": mine, "delta_pct": 100.0 * (mine / base - 1.0)}


def kl_rows(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) of each row of full log-probabilities [T, V] -> [T], nats; p log p/q is 0 where p is 0."""
    terms = base.exp() * (base - other)
    return torch.where(base.isneginf(), 0.0, terms).sum(-1)


def kl_topk_rows(base: TopK, other: TopK) -> Tensor:
    """KL of each row over the tokens that both runs list, and one bucket with all the rest -> [T] fp64, nats.

    Merging outcomes can only lower a KL divergence (data processing inequality), so this is a lower bound of the full
    one; the gap shrinks with k. It is what can be had of a server that reports k log-probabilities per token.
    """
    ids, order = other.ids.sort(dim=-1)
    place = torch.searchsorted(ids, base.ids).clamp_max(ids.shape[-1] - 1)
    shared = ids.gather(-1, place) == base.ids
    p = base.logprobs.double()
    q = other.logprobs.double().gather(-1, order.gather(-1, place))
    terms = torch.where(shared, p.exp() * (p - q), 0.0).sum(-1)
    rest_p, rest_q = (
        (1.0 - torch.where(shared, x.exp(), 0.0).sum(-1)).clamp_min(REST_FLOOR).clamp_max(1.0) for x in (p, q)
    )
    return terms + rest_p * (rest_p / rest_q).log()


def score_logits(base: Tensor, other: Tensor, targets: Tensor, k: int, rows: int = ROWS) -> Scores:
    """Compare two runs' logits for the same next tokens.

    Args:
        base, other: [T, V] logits, any float dtype and device. targets: [T] int64, the tokens that really follow.
        k: size of the support of ``kl_topk``; at most V is used.
    """
    total = Scores()
    k = min(k, base.shape[-1])
    for start in range(0, targets.shape[0], rows):
        part = slice(start, start + rows)
        p, q = (x[part].to(_wide(x.dtype)).log_softmax(-1) for x in (base, other))
        top_p, top_q = (TopK(*x.topk(k, dim=-1)[::-1]) for x in (p, q))
        total += Scores(
            tokens=p.shape[0],
            nll_base=-_gathered(p, targets[part]),
            nll=-_gathered(q, targets[part]),
            kl=float(kl_rows(p, q).double().sum()),
            kl_topk=float(kl_topk_rows(top_p, top_q).sum()),
            agree=_agree(top_p, top_q),
        )
    return total


def score_topk(base: TopK, other: TopK, base_targets: Tensor, other_targets: Tensor) -> Scores:
    """Compare two runs from what a server reports.

    Args:
        base, other: top-k of each of T rows, most likely first. base_targets, other_targets: [T] log-probabilities of
            the tokens that really follow.
    """
    return Scores(
        tokens=base_targets.shape[0],
        nll_base=-float(base_targets.double().sum()),
        nll=-float(other_targets.double().sum()),
        kl=math.nan,
        kl_topk=float(kl_topk_rows(base, other).sum()),
        agree=_agree(base, other),
    )


def _agree(base: TopK, other: TopK) -> int:
    return int((base.ids[:, 0] == other.ids[:, 0]).sum())


def _gathered(logprobs: Tensor, targets: Tensor) -> float:
    return float(logprobs.gather(-1, targets[:, None]).double().sum())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 inside a row changes a KL of 2e-4 by 3e-9 (8192 words, measured against fp64) and is four times faster."""
    return torch.float64 if dtype == torch.float64 else torch.float32
