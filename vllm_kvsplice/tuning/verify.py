# SPDX-License-Identifier: Apache-2.0
"""Real scoring of many codecs on the same held-out windows, and what the sums say with which standard error.

In: a model, windows, codecs by name. Out: ``Measured`` by name. Both runs of a difference see the same tokens, so errors
are those of the paired difference, over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import Transform
from vllm_kvsplice.scoring.hf_engine import logits
from vllm_kvsplice.scoring.metrics import Scores, score_logits

TOPK = 128  # as `kvsplice eval`
KEPT_BYTES = 2 << 30  # baseline logits that are kept instead of computed again


@dataclass(frozen=True)
class Measured:
    """Scores of one codec, window by window."""

    windows: tuple[Scores, ...]

    @property
    def total(self) -> Scores:
        """Of all windows."""
        return sum(self.windows, Scores())

    def first(self, count: int) -> Measured:
        """Of the first windows alone."""
        return Measured(self.windows[:count])

    @property
    def kld_se(self) -> float:
        """Standard error of ``total.kld``, nats; NaN of one window."""
        return _standard_error([s.kld for s in self.windows])

    @property
    def nll_rise(self) -> float:
        """Mean rise of the negative log-likelihood per token, nats: perplexity grows by a factor exp of it."""
        return (self.total.nll - self.total.nll_base) / self.total.tokens

    @property
    def nll_rise_se(self) -> float:
        """Standard error of ``nll_rise``, nats; NaN of one window."""
        return _standard_error([(s.nll - s.nll_base) / s.tokens for s in self.windows])

    @property
    def ppl_pct(self) -> float:
        """Loss of perplexity, percent."""
        return percent(self.nll_rise)

    @property
    def ppl_pct_se(self) -> float:
        """Standard error of ``ppl_pct``; NaN of one window."""
        return 100.0 * math.exp(self.nll_rise) * self.nll_rise_se


def percent(nll_rise: float) -> float:
    """Loss of perplexity in percent from a rise in nats per token."""
    return 100.0 * math.expm1(nll_rise)


def baseline(model: Any, windows: Tensor) -> Callable[[int], Tensor]:
    """Logits of window i without a codec, [seq_len, vocab]; the first ones are kept, as far as KEPT_BYTES goes."""
    kept: dict[int, Tensor] = {}

    def of(i: int) -> Tensor:
        if i in kept:
            return kept[i]
        found = logits(model, windows[i].to(model.device), None)
        if (len(kept) + 1) * found.numel() * found.element_size() <= KEPT_BYTES:
            kept[i] = found
        return found

    return of


def score(
    model: Any, windows: Tensor, base: Callable[[int], Tensor], codecs: Mapping[str, Transform], count: int, text: str
) -> dict[str, Measured]:
    """Score codecs on the first ``count`` windows [n, seq_len], teacher forced. ``text`` names the progress bar."""
    rows: dict[str, list[Scores]] = {name: [] for name in codecs}
    for i in track(range(count), text, console=Console(stderr=True), transient=True):
        ids = windows[i].to(model.device)
        before = base(i)
        for name, codec in codecs.items():
            after = logits(model, ids, codec)
            rows[name].append(score_logits(before[:-1], after[:-1], ids[1:], TOPK))
    return {name: Measured(tuple(found)) for name, found in rows.items()}


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))
