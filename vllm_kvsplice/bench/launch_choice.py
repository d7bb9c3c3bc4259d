# SPDX-License-Identifier: Apache-2.0
"""Which launch parameters are tried, and which are chosen by their times. Nothing is run here. Next: ``launch_sweep``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvsplice_kernels.launch import Launch

# Programs of more warps are right, but each warp repeats most of a tile's instructions (of two, compiled for sm_90: 624 of
# 669 in near_lossless, 486 of 650 in v_only), so they come last, when the time may be up.
WARPS = 1, 2  # times the default's
STAGES = 3, 2, 4
REGISTERS = 200, 168, None, 128  # of a thread: 10, 12, 8 and 16 warps on a multiprocessor
PROGRAMS = 8, 10, 12, 16, 6
# Queries as rows, from ROWS_FROM columns on: 4 warps for 64 rows. Four programs of 128 registers lie on a multiprocessor, three of
# 168, two of what most layouts take without a limit. More rows would stay empty: no step of few tokens a request has more columns.
ROWS, ROWS_WARPS = 64, 4
ROWS_STAGES = 3, 2, 4
ROWS_REGISTERS = None, 168, 128
ROWS_PROGRAMS = 2, 3, 1, 4
LEAST_GAIN = 1.02  # below this, a default that all GPUs share is worth more


class Choice(NamedTuple):
    """The fastest of what was timed; ``speedup``: geometric mean over the points, of the default's time over its own."""

    best: Launch
    speedup: float

    @property
    def launch(self) -> Launch | None:
        """What to launch with; None: the default, which nothing beats by enough."""
        return self.best if self.speedup >= LEAST_GAIN else None


def variants(default: Launch, with_columns: Launch, columns: int) -> list[Launch]:
    """What is compiled, the default first; ``with_columns``: the default where queries are columns. programs are a default's."""
    from kvsplice_kernels.launch import ROWS_FROM, Launch

    grid = product(WARPS, STAGES, REGISTERS)
    found = [replace(with_columns, num_warps=w * with_columns.num_warps, num_stages=s, maxnreg=r) for w, s, r in grid]
    rows = [Launch(ROWS_WARPS, s, r, default.programs, ROWS) for s, r in product(ROWS_STAGES, ROWS_REGISTERS)]
    return list(dict.fromkeys([default, *(rows if columns >= ROWS_FROM else []), *found]))


def programs_of(variant: Launch) -> tuple[int, ...]:
    """Counts of programs that a variant is timed with."""
    return PROGRAMS if variant.rows is None else ROWS_PROGRAMS


def candidates(default: Launch, usable: Sequence[Launch]) -> list[Launch]:
    """What is timed: every usable variant with its counts of programs, the default first."""
    found = [replace(variant, programs=n) for variant in usable for n in programs_of(variant)]
    return list(dict.fromkeys([default, *found]))


def ranked(default: Launch, times: Mapping[Launch, Sequence[float]]) -> list[Choice]:
    """All launches but the default, fastest first. ``times``: of each at every point, the default among them."""
    base = times[default]
    found = [Choice(launch, _speedup(base, own)) for launch, own in times.items() if launch != default]
    return sorted(found, key=lambda choice: -choice.speedup)


def choose(default: Launch, times: Mapping[Launch, Sequence[float]]) -> Choice:
    """The fastest; the default itself where nothing else was timed."""
    return next(iter(ranked(default, times)), Choice(default, 1.0))


def _speedup(base: Sequence[float], own: Sequence[float]) -> float:
    return math.exp(sum(math.log(b / o) for b, o in zip(base, own, strict=True)) / len(base))
