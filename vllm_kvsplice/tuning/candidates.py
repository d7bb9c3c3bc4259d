# SPDX-License-Identifier: Apache-2.0
"""The ways to store one side of one layer that the tuner chooses from, and what each takes.

In: a head_dim and a side. Out: tier plans that ``LatentLayout`` accepts and the kernels read at speed. Bit widths and bytes
are the layout's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm_kvsplice.calibration.presets import Recipe, SideRecipe, TierShare
from vllm_kvsplice.codec.layout import BIT_WIDTHS, SIDES, TIER_MULTIPLE, LatentLayout, Side, Tier, runs
from vllm_kvsplice.errors import KVSpliceError

Tiers = tuple[tuple[int, int], ...]  # (bits, dims), bits falling, dropped dimensions as a last tier of 0 bits

STEPS = 8  # a tier is so many eighths of head_dim, or TIER_MULTIPLE where an eighth is less
# Least bytes of a run of codes (layout.runs). Kernels pad shorter runs to a tensor core's 16 rows or 32 bytes, so that they
# cost the time of longer ones and save next to nothing.
MIN_RUN = 8
# The plans that decode reads fastest: two stored tiers, no run below an eighth of head_dim. Of 132 bytes such a layout took 49 us, one with
# shorter runs 57; layouts of 94 to 181 bytes with five or six tiers took 61 to 78 (docs/results/kernels-layouts-h200.json).
FAST_TIERS = 2
FAST_RUN_SHARE = 8
WIDE = 16  # bits of an untouched side


class Option(NamedTuple):
    """One way to store one side of one layer."""

    tiers: Tiers
    bytes: int  # all-in, per token and KV head
    loss: float  # predicted KL divergence per token, nats, of this side of this layer alone


def tier_plans(head_dim: int, side: Side, fast: bool = False) -> list[Tiers]:
    """Every plan of a side: untouched, or whole eighths of head_dim in tiers below 16 bits; ``fast``: of those, what decode
    reads fastest.

    K drops no dimension: retrieval falls long before a KL divergence on prose shows it.
    """
    narrow = [bits for bits in BIT_WIDTHS if bits < WIDE and (bits or side == "v")]
    found = [
        plan
        for plan in _compositions(head_dim, step_of(head_dim), narrow)
        if _readable(plan) and _valid(head_dim, plan) and (not fast or _fast(head_dim, plan))
    ]
    return [((WIDE, head_dim),), *found]


def step_of(head_dim: int) -> int:
    """Dimensions by which tiers grow: a multiple of TIER_MULTIPLE that divides head_dim."""
    step = TIER_MULTIPLE * max(1, head_dim // (STEPS * TIER_MULTIPLE))
    while head_dim % step:
        step -= TIER_MULTIPLE
    return step


def side_bytes(head_dim: int, plan: Tiers) -> int:
    """All-in bytes per token and KV head of a plan."""
    return LatentLayout.of(head_dim, plan, plan).side_bytes("k")


def recipe_of(base: Recipe, layout: LatentLayout) -> Recipe:
    """The base recipe, its bases and metrics, with the tiers of a layout."""
    return base.model_copy(update={side: with_tiers(getattr(base, side), layout.tiers(side)) for side in SIDES})


def with_tiers(side: SideRecipe, tiers: Sequence[Tier]) -> SideRecipe:
    """A side's recipe with other tiers."""
    total = sum(tier.dims for tier in tiers)
    shares = tuple(TierShare(bits=tier.bits, share=tier.dims / total) for tier in tiers)  # type: ignore[arg-type]
    return side.model_copy(update={"tiers": shares})


def _compositions(dims: int, step: int, widths: Sequence[int]) -> Iterator[Tiers]:
    """All ways to deal ``dims`` in whole steps to some of the widths, which fall."""
    if not dims:
        yield ()
    for i, bits in enumerate(widths):
        for n in range(step, dims + 1, step):
            for rest in _compositions(dims - n, step, widths[i + 1 :]):
                yield ((bits, n), *rest)


def _readable(plan: Tiers) -> bool:
    lengths = _runs_of(plan)
    return bool(lengths) and min(lengths) >= MIN_RUN


def _fast(head_dim: int, plan: Tiers) -> bool:
    return sum(bits > 0 for bits, _ in plan) <= FAST_TIERS and min(_runs_of(plan)) * FAST_RUN_SHARE >= head_dim


def _runs_of(plan: Tiers) -> list[int]:
    """Bytes of every run of codes."""
    return [length for bits, dims in plan if bits for _, length in runs(Tier(bits, dims).code_bytes)]


def _valid(head_dim: int, plan: Tiers) -> bool:
    """Whether the layout takes it: it alone knows what a width asks of a tier."""
    try:
        LatentLayout.of(head_dim, plan, plan)
    except KVSpliceError:
        return False
    return True
