# SPDX-License-Identifier: Apache-2.0
"""Deals bytes to layers and sides: for every total the least predicted loss.

In: the options of K and V of every layer. Out: a front, ``Point`` by ``Point`` of rising bytes and falling loss. Losses add
up over layers and sides, and bytes are small whole numbers, so the least loss of every total is found exactly, by dynamic
programming over the totals (the multiple-choice knapsack; a Lagrange multiplier finds the corners of its convex hull
alone, and those lie far apart where layers are few). Where all pages must have one size each layer takes its best
pair within that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_kvsplice.tuning.candidates import Option

MOST_POINTS = 2000  # of a front; more, evenly thinned, are closer than a prediction is good
Layers = Sequence[tuple[Sequence[Option], Sequence[Option]]]  # options of K and of V of every layer


class Pair(NamedTuple):
    """What one layer stores."""

    k: Option
    v: Option

    @property
    def bytes(self) -> int:
        """All-in per token and KV head."""
        return self.k.bytes + self.v.bytes

    @property
    def loss(self) -> float:
        """Predicted, nats per token."""
        return self.k.loss + self.v.loss


class Point(NamedTuple):
    """A choice for all layers."""

    bytes: int  # per token and KV head as vLLM pages them, K+V, sum over layers
    loss: float  # predicted KL divergence per token, nats
    layers: tuple[Pair, ...]


def best_first(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in bytes and loss, rising in bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def free_front(layers: Layers) -> list[Point]:
    """Every layer and side by itself."""
    slots = [best_first(options) for pair in layers for options in pair]
    least = sum(options[0].bytes for options in slots)
    unit = reduce(gcd, (o.bytes - options[0].bytes for options in slots for o in options)) or 1
    loss, picks = np.zeros(1), []
    for options in slots:
        loss, pick = _with_slot(loss, options, unit)
        picks.append(pick)
    falling = np.minimum.accumulate(loss)
    totals = np.flatnonzero(np.append(True, loss[1:] < falling[:-1]))
    if len(totals) > MOST_POINTS:
        totals = totals[np.linspace(0, len(totals) - 1, MOST_POINTS).astype(int)]
    return [_point(_chosen(int(total), slots, picks, unit), least + unit * int(total)) for total in totals]


def _with_slot(
    loss: npt.NDArray[np.float64], options: Sequence[Option], unit: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int16]]:
    """Least loss by total, in units above the least total, with one more slot; and the option that it takes there."""
    extra = [(o.bytes - options[0].bytes) // unit for o in options]
    best = np.full(len(loss) + extra[-1], np.inf)
    pick = np.zeros(len(best), dtype=np.int16)
    for i, (shift, option) in enumerate(zip(extra, options, strict=True)):
        part = slice(shift, shift + len(loss))
        better = loss + option.loss < best[part]
        best[part][better] = (loss + option.loss)[better]
        pick[part][better] = i
    return best, pick


def _chosen(
    total: int, slots: Sequence[Sequence[Option]], picks: Sequence[npt.NDArray[np.int16]], unit: int
) -> list[Option]:
    """The options that make up a total, last slot first and turned round."""
    found = []
    for options, pick in zip(reversed(slots), reversed(picks), strict=True):
        option = options[pick[total]]
        found.append(option)
        total -= (option.bytes - options[0].bytes) // unit
    return found[::-1]


def even_front(layers: Layers) -> list[Point]:
    """All layers with pages of one size: a page holds the best pair that fits, and is padded where that is smaller."""
    pairs = [_pairs(k, v) for k, v in layers]
    front: list[Point] = []
    for size in sorted({pair.bytes for found in pairs for pair in found}):
        chosen = [_largest_within(found, size) for found in pairs]
        fitting = [pair for pair in chosen if pair]
        if len(fitting) < len(pairs):
            continue
        loss = sum(pair.loss for pair in fitting)
        if not front or loss < front[-1].loss:
            front.append(Point(size * len(pairs), loss, tuple(fitting)))
    return front


def uniform_front(layers: Layers) -> list[Point]:
    """One K plan and one V plan for all layers: what there is without a tuner, at its best."""
    sides = []
    for side in (0, 1):
        columns = list(zip(*(pair[side] for pair in layers), strict=True))
        sides.append([Option(c[0].tiers, c[0].bytes, sum(o.loss for o in c)) for c in columns])
    by_plan = [({o.tiers: o for o in k}, {o.tiers: o for o in v}) for k, v in layers]
    return [
        Point(pair.bytes * len(layers), pair.loss, tuple(Pair(k[pair.k.tiers], v[pair.v.tiers]) for k, v in by_plan))
        for pair in _pairs(*sides)
    ]


def _pairs(k: Sequence[Option], v: Sequence[Option]) -> list[Pair]:
    """Pairs of a layer that no other beats, rising in bytes and falling in loss."""
    kept: list[Pair] = []
    every = (Pair(a, b) for a in best_first(k) for b in best_first(v))
    for pair in sorted(every, key=lambda p: (p.bytes, p.loss)):
        if not kept or pair.loss < kept[-1].loss:
            kept.append(pair)
    return kept


def _largest_within(pairs: Sequence[Pair], size: int) -> Pair | None:
    fitting = [pair for pair in pairs if pair.bytes <= size]
    return fitting[-1] if fitting else None


def _point(chosen: Sequence[Option], total: int) -> Point:
    pairs = tuple(Pair(k, v) for k, v in zip(chosen[::2], chosen[1::2], strict=True))
    return Point(total, sum(pair.loss for pair in pairs), pairs)
