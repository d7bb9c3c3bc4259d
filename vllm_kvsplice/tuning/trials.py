# SPDX-License-Identifier: Apache-2.0
"""Scoring for real, point by point, until a budget is met, and against one layout for all layers.

In: a model with its front, held-out windows, a budget. Out: the chosen point; the rest of what was scored is in ``Bench``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vllm_kvsplice.codec.layout import dense_bytes
from vllm_kvsplice.scoring.inspect_file import summary
from vllm_kvsplice.tuning import codecs, search, verify
from vllm_kvsplice.tuning.allocate import Point
from vllm_kvsplice.tuning.search import Budget, Factor, Seen
from vllm_kvsplice.tuning.verify import Measured

MOST_TRIALS = 6  # points that are scored on all windows
EQUAL_LOSS_ROUNDS = 2  # the first corrects the expectation that the second goes by
EXPLORED = (0.4, 1.0, 2.5)  # of the wanted loss: points that are scored first, on a few windows


@dataclass(frozen=True)
class Bench:
    """What scoring needs, and in ``tried`` the points that were scored, in order."""

    model: Any
    solve: Callable[[Any], codecs.Layers]
    indices: list[int]
    windows: Tensor
    few: int  # windows for points that only show the way
    base: Callable[[int], Tensor]
    front: list[Point]
    tried: dict[Point, Measured] = field(default_factory=dict)

    def layers(self, point: Point) -> codecs.Layers:
        """The projector of a point."""
        return self.solve(codecs.layouts_of(point, self.indices))

    def score(self, points: list[Point], count: int, text: str) -> None:
        """Score points on the first ``count`` windows, those left out that were scored on as many."""
        wanted = [p for p in dict.fromkeys(points) if p not in self.tried or len(self.tried[p].windows) < count]
        named = {str(i): codecs.transform(self.model, self.layers(p)) for i, p in enumerate(wanted)}
        found = verify.score(self.model, self.windows, self.base, named, count, text)
        self.tried.update({point: found[str(i)] for i, point in enumerate(wanted)})

    def seen(self, count: int | None = None) -> list[Seen]:
        """Predictions and measurements of all that was scored; of the first ``count`` windows, or brought to the level of
        all of them by those points that were scored on all."""
        if count is not None:
            return [Seen(p.loss, m.first(count).total.kld) for p, m in self.tried.items()]
        whole = [m for m in self.tried.values() if len(m.windows) == len(self.windows)]
        level = sum(m.total.kld / m.first(self.few).total.kld for m in whole) / len(whole) if whole else 1.0
        return [
            Seen(p.loss, m.total.kld * (1.0 if len(m.windows) == len(self.windows) else level))
            for p, m in self.tried.items()
        ]


class Rival(NamedTuple):
    """A codec with one layout for all layers."""

    bytes: int  # per token and KV head, K+V, sum over layers
    layout: str
    measured: Measured  # on the first windows
    tuned: Point  # the cheapest point scored that lost no more on the same windows


def choose(bench: Bench, budget: Budget) -> tuple[Point, Factor]:
    """Score a few points for real until one meets the budget; the best of them, and the factor of ``search``."""
    if budget.kind == "ratio":
        head_dim = sum(n for _, n in bench.front[0].layers[0].k.tiers)
        dense = 2 * dense_bytes(head_dim) * len(bench.indices)
        point = search.largest_within(bench.front, dense / budget.value)
        bench.score([search.nearest(bench.front, share * point.loss) for share in EXPLORED], bench.few, "exploring")
        bench.score([point], len(bench.windows), "verifying")
        return point, search.factor_of(list(bench.tried.values()))
    limit = search.kld_limit(budget, search.factor_of([]))
    bench.score([search.nearest(bench.front, share * limit) for share in EXPLORED], bench.few, "exploring")
    aim, verified = search.AIM, []
    for _ in range(MOST_TRIALS):
        factor = search.factor_of(list(bench.tried.values()))
        limit = aim * search.kld_limit(budget, factor)
        point = search.cheapest_within(bench.front, limit, bench.seen())
        if point in verified:
            break
        bench.score([point], len(bench.windows), "verifying")
        verified.append(point)
        factor = search.factor_of(list(bench.tried.values()))
        use = search.use_of(budget, bench.tried[point], factor)
        if search.is_accepted(use):
            break
        aim *= search.correction(use)
    return search.best({p: search.use_of(budget, bench.tried[p], factor) for p in verified}), factor


def compare(
    bench: Bench, chosen: Point, uniform: list[Point], presets: Mapping[str, codecs.Layers]
) -> dict[str, Rival]:
    """The presets and the best uniform tiers of equal bytes and of equal predicted loss, by name.

    Points of the front with the loss of each are scored too, so that both sides of a comparison were measured.
    """
    points = {
        "best uniform tiers, equal loss": next((p for p in uniform if p.loss <= chosen.loss), uniform[-1]),
        "best uniform tiers, equal bytes": search.largest_within(uniform, max(chosen.bytes, uniform[0].bytes)),
    }
    layers = dict(presets) | {name: bench.layers(point) for name, point in points.items()}
    coded = {name: codecs.transform(bench.model, found) for name, found in layers.items()}
    found = verify.score(bench.model, bench.windows, bench.base, coded, bench.few, "uniform")
    for _ in range(EQUAL_LOSS_ROUNDS):
        seen = bench.seen(bench.few)
        equal = [search.cheapest_within(bench.front, m.total.kld, seen) for m in found.values()]
        bench.score(equal, bench.few, "tuned, at equal loss")
    return {
        name: Rival(
            sum(one.layout.bytes_per_token_head for one in layers[name].values()),
            summary(one.layout for one in layers[name].values()),
            measured,
            _cheapest_scored(bench, measured.total.kld),
        )
        for name, measured in found.items()
    }


def _cheapest_scored(bench: Bench, kld: float) -> Point:
    """Of the points that were scored the cheapest that lost no more on the first windows, else the best one."""
    lost = {point: measured.first(bench.few).total.kld for point, measured in bench.tried.items()}
    within = [point for point, loss in lost.items() if loss <= kld]
    return min(within, key=lambda p: p.bytes) if within else min(lost, key=lambda p: lost[p])
