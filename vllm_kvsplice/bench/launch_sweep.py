# SPDX-License-Identifier: Apache-2.0
"""One kind of decode step, launched in every way of the grid: checked, then timed, until the time is up.

In: jobs of the points. Out: ``Sweep``, times of the default and the finalists, and what became of the other candidates.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from vllm_kvsplice.bench import kernels_ours
from vllm_kvsplice.bench.kernels_build import WrongResultError, usable
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_ours import ATTENTION_TOLERANCE, DecodeData
from vllm_kvsplice.bench.kernels_timing import Device, time_calls
from vllm_kvsplice.bench.launch_choice import candidates, ranked
from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    from kvsplice_kernels.launch import Launch

FINALISTS = 3
ROUNDS = 3  # of the final: default and finalists in turn


@dataclass
class Sweep:
    """Microseconds at every point of the default and the finalists, of the final; counts of all candidates by outcome.

    Outcomes: "timed", "failed" (out of resources, not compiled), "wrong", "not reached" when the time was up.
    """

    default: Launch
    times: dict[Launch, list[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass
class _Point:
    data: DecodeData
    exact: Tensor
    known: dict[tuple[Launch, int], float] = field(default_factory=dict)  # by launch without programs, and splits

    def time(self, launch: Launch, device: Device, again: bool = False) -> float:
        """Median microseconds of a decode step's attention. Raises WrongResultError, or what the launch raises."""
        from kvsplice_kernels.attention import choose_num_splits

        shape = self.data.shape
        splits = choose_num_splits(shape.batch, shape.num_kv_heads, shape.context, device.num_sms, launch)
        key = replace(launch, programs=0), splits
        if again or key not in self.known:
            calls = kernels_ours.decode_calls(self.data, splits, launch)
            error = kernels_ours.decode_error(self.data, calls[0], self.exact)
            if not error <= ATTENTION_TOLERANCE:
                raise WrongResultError(f"relative error {error:.3g}, allowed {ATTENTION_TOLERANCE:.3g}")
            self.known[key] = time_calls(calls, device).p50
        return self.known[key]


def sweep(jobs: Sequence[Job], default: Launch, tried: Sequence[Launch], device: Device, deadline: float) -> Sweep:
    """Time the candidates of the variants ``tried`` at the points of ``jobs``, then the finalists again.

    ``deadline``, of time.monotonic: no further candidate is begun after it; the default and the final are timed anyway.

    Raises:
        KVSpliceError: the default itself fails or is wrong, or a candidate broke the CUDA context.
    """
    points = [_point(job, device) for job in jobs]
    quick = replace(device, replays=device.replays // 2, seconds=device.seconds / 5)
    found = Sweep(default)
    times: dict[Launch, list[float]] = {}
    for launch in candidates(default, tried):
        if launch != default and time.monotonic() > deadline:
            found.outcomes["not reached"] += 1
            continue
        kind, own = _attempt(points, launch, quick)
        found.outcomes[kind] += 1
        if kind == "timed":
            times[launch] = own
        elif launch == default:
            raise KVSpliceError(f"the default launch of {jobs[0].preset} {kind}: expected it to be right on every GPU.")
    best = [choice.best for choice in ranked(default, times)[:FINALISTS]]
    found.times = _final(points, [default, *best], device)
    return found


def _point(job: Job, device: Device) -> _Point:
    data = kernels_ours.decode_data(job, device, None)
    return _Point(data, kernels_ours.last_request(data))


def _attempt(points: Sequence[_Point], launch: Launch, device: Device) -> tuple[str, list[float]]:
    try:
        return "timed", [point.time(launch, device) for point in points]
    except WrongResultError:
        return "wrong", []
    except Exception:  # whatever one launch raises, the others are measured
        if not usable(device):
            raise KVSpliceError(f"{launch} broke the CUDA context: leave its parameters out of the grid.") from None
        return "failed", []


def _final(points: Sequence[_Point], launches: Sequence[Launch], device: Device) -> dict[Launch, list[float]]:
    """Medians of rounds in which the launches take turns, so that a clock that drifts meets all of them."""
    rounds = [
        {launch: [p.time(launch, device, again=True) for p in points] for launch in launches} for _ in range(ROUNDS)
    ]
    return {
        launch: [statistics.median(each[launch][i] for each in rounds) for i in range(len(points))]
        for launch in launches
    }
