# SPDX-License-Identifier: Apache-2.0
"""Which point of the front to score next, and when to stop. Pure: no model in sight.

In: a budget, the front, what was measured. Out: the next point, or a verdict.

Perplexity over few windows is noisy, KL divergence is not. Were the text drawn from the model, the rise of its negative
log-likelihood would be the KL divergence on average; real text differs by a factor near 1, which all scored points
together show better than any one of them. So a budget of perplexity is steered by KL divergence times that factor, and
the measured perplexity decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.tuning.allocate import Point
from vllm_kvsplice.tuning.verify import Measured, percent

LEAST_USE = 0.9  # share of the budget that a point must use
AIM = 0.96  # share that is aimed for
PRIOR_SPREAD = (
    0.2  # of the factor between the rise of the negative log-likelihood and KL divergence, before it is measured
)
QUIET = 0.05  # share of the budget: measured perplexity with a smaller standard error decides alone


class Budget(NamedTuple):
    """ppl: loss of perplexity in percent. kld: nats per token. ratio: dense bytes over ours, K+V."""

    kind: Literal["ppl", "kld", "ratio"]
    value: float


class Seen(NamedTuple):
    """A point that was really scored: its predicted and its measured KL divergence, nats per token."""

    predicted: float
    measured: float


class Factor(NamedTuple):
    """Rise of the negative log-likelihood per unit of KL divergence, with its standard error."""

    value: float
    error: float


def budget_of(ppl: float | None, kld: float | None, ratio: float | None) -> Budget:
    """The one budget that was given; raises KVSpliceError for none, several, or one that is not positive."""
    kinds: tuple[tuple[Literal["ppl", "kld", "ratio"], float | None], ...] = (
        ("ppl", ppl),
        ("kld", kld),
        ("ratio", ratio),
    )
    given = [Budget(kind, value) for kind, value in kinds if value is not None]
    if len(given) != 1:
        raise KVSpliceError(
            f"{len(given)} budgets are given, expected one: pass --budget-ppl PCT, --budget-kld X or --target-ratio R."
        )
    kind, value = given[0]
    least = 1.0 if kind == "ratio" else 0.0
    if not (math.isfinite(value) and value > least):
        option = "--target-ratio" if kind == "ratio" else f"--budget-{kind}"
        raise KVSpliceError(f"{option} {value:g} is not a budget: expected a number above {least:g}.")
    return given[0]


def factor_of(measured: Sequence[Measured]) -> Factor:
    """The factor from all that was scored, on whatever windows, weighed against 1 +- PRIOR_SPREAD."""
    windows = [[s for s in column if s] for column in zip_longest(*(m.windows for m in measured))]
    rises = [sum((s.nll - s.nll_base) / s.tokens for s in window) for window in windows]
    klds = [sum(s.kld for s in window) for window in windows]
    if len(windows) < 2 or not sum(klds) > 0:
        return Factor(1.0, PRIOR_SPREAD)
    n, found = len(windows), sum(rises) / sum(klds)
    spread = sum((rise - found * kld) ** 2 for rise, kld in zip(rises, klds, strict=True))
    variance = n / (n - 1) * spread / sum(klds) ** 2
    prior = PRIOR_SPREAD**2
    total = variance + prior
    return Factor((prior * found + variance) / total, math.sqrt(variance * prior / total))


def kld_limit(budget: Budget, factor: Factor) -> float:
    """The KL divergence that uses up a budget of loss."""
    return math.log1p(budget.value / 100.0) / factor.value if budget.kind == "ppl" else budget.value


def expected_kld(predicted: float, seen: Sequence[Seen]) -> float:
    """A prediction times how far measurements were from predictions, interpolated between them in the logarithm."""
    known = sorted({s.predicted: s.measured / s.predicted for s in seen}.items())
    if not known:
        return predicted
    (x0, y0) = [k for k in known if k[0] <= predicted][-1] if known[0][0] <= predicted else known[0]
    (x1, y1) = next((k for k in known if k[0] >= predicted), known[-1])
    share = math.log(predicted / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
    return predicted * math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def nearest(front: Sequence[Point], loss: float) -> Point:
    """The point whose predicted loss is nearest in the logarithm."""
    return min(front, key=lambda p: abs(math.log(p.loss / loss)))


def cheapest_within(front: Sequence[Point], kld: float, seen: Sequence[Seen]) -> Point:
    """The point of fewest bytes that is expected to stay within a KL divergence, else the one of most bytes."""
    return next((p for p in front if expected_kld(p.loss, seen) <= kld), front[-1])


def largest_within(front: Sequence[Point], total_bytes: float) -> Point:
    """The point of most bytes within a total, which is the one of least loss.

    Raises KVSpliceError if every point has more.
    """
    fitting = [point for point in front if point.bytes <= total_bytes]
    if not fitting:
        raise KVSpliceError(
            f"no layout of this model takes {total_bytes / len(front[0].layers):.1f} bytes per token and KV head: expected "
            f"at least {front[0].bytes / len(front[0].layers):.1f}, give a smaller --target-ratio."
        )
    return fitting[-1]


class Use(NamedTuple):
    """How much of a budget of loss a point uses: 1 is all of it."""

    measured: float
    error: float  # standard error of ``measured``; NaN if unknown
    expected: float  # KL divergence times the factor; for a budget of KL divergence the same as ``measured``


def use_of(budget: Budget, measured: Measured, factor: Factor) -> Use:
    """What a scored point uses of a budget of loss."""
    kld = measured.total.kld
    if budget.kind == "kld":
        return Use(kld / budget.value, measured.kld_se / budget.value, kld / budget.value)
    return Use(
        measured.ppl_pct / budget.value, measured.ppl_pct_se / budget.value, percent(kld * factor.value) / budget.value
    )


def is_within(use: Use) -> bool:
    """Whether a point stays within the budget, as measured and as expected."""
    return use.measured <= 1.0 and (use.expected <= 1.0 or use.error < QUIET)


def is_accepted(use: Use) -> bool:
    """Whether a point is within the budget and uses enough of it."""
    best = use.measured if use.error < QUIET else use.expected
    return is_within(use) and best >= LEAST_USE


def correction(use: Use) -> float:
    """What to multiply the aim by after a point was refused. A wrong expectation corrects itself, since the point was
    scored; measured perplexity that stays off the expected one is met by small steps."""
    if not LEAST_USE <= use.expected <= 1.0:
        return 1.0
    return min(1.08, max(0.9, AIM / use.measured)) if use.measured > 0 else 1.08


def best(uses: Mapping[Point, Use]) -> Point:
    """Of scored points the one within the budget that uses most of it, else the one that overruns it least."""
    within = {point: use for point, use in uses.items() if is_within(use)}
    if within:
        return min(within, key=lambda p: p.bytes)
    return min(uses, key=lambda p: max(uses[p].measured, uses[p].expected))
