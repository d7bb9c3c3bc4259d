# SPDX-License-Identifier: Apache-2.0
"""From a job to calls, and one attempt at it that cannot raise. Next: ``kernels`` and ``kernels_rehearsal``."""

from __future__ import annotations

import gc
from typing import Literal, NamedTuple

import torch

from vllm_kvsplice.bench import kernels_ours, kernels_peers, kernels_prefill
from vllm_kvsplice.bench.kernels_data import Prepared
from vllm_kvsplice.bench.kernels_jobs import OURS, Job
from vllm_kvsplice.bench.kernels_timing import Device, Times, time_calls

MOST_TEXT = 300  # characters of an error


class Stage(NamedTuple):
    """Time of one launch of a kernel that is several, and the bytes that it moves where it reads the cache."""

    name: str
    times: Times
    bytes: int | None


class Outcome(NamedTuple):
    """What became of a job. "absent": a peer that is not installed; "failed": an error, or a wrong result."""

    kind: Literal["ok", "absent", "failed"]
    text: str = ""
    error: float | None = None  # relative, of the checked part of the result
    times: Times | None = None
    bytes: int = 0
    num_splits: int | None = None
    stages: tuple[Stage, ...] = ()


class WrongResultError(Exception):
    """A kernel's result is farther from the reference than its format allows."""


def build(job: Job, device: Device, copies: int | None = None) -> Prepared:
    """Make the tensors and calls of a job. ``copies`` of the pages, None: as many as make the L2 cache cold.

    Raises ImportError where a peer is not there, and whatever else a kernel raises.
    """
    if job.what == "prefill":
        return kernels_prefill.prefill(job, device, copies)
    where = kernels_ours if job.kernel == OURS else kernels_peers
    return (where.decode if job.what == "decode" else where.write)(job, device, copies)


def attempt(job: Job, device: Device, timed: bool) -> Outcome:
    """Build a job, check its result and, if that is right and ``timed``, time it. Nothing is raised."""
    try:
        return _attempt(job, device, timed)
    except ImportError as error:
        return Outcome("failed" if job.kernel == OURS else "absent", _line(error))
    except Exception as error:  # whatever one kernel raises, the others are measured
        return Outcome("failed", _line(error))
    finally:
        gc.collect()
        if device.on_gpu:
            _free()


def usable(device: Device) -> bool:
    """Whether the device still works: a kernel that reads outside its memory takes the CUDA context of its process along."""
    try:
        device.synchronize()
    except RuntimeError:
        return False
    return True


def _attempt(job: Job, device: Device, timed: bool) -> Outcome:
    prepared = build(job, device, None if timed else 1)
    error = prepared.check()
    device.synchronize()
    if not error <= prepared.tolerance:
        raise WrongResultError(f"wrong result: relative error {error:.3g}, allowed {prepared.tolerance:.3g}")
    outcome = Outcome("ok", error=error, bytes=prepared.bytes, num_splits=prepared.num_splits)
    if not timed:
        for launches, _ in prepared.stages.values():
            launches[0]()
        device.synchronize()
        return outcome
    times = time_calls(prepared.calls, device, prepared.graph)
    stages = tuple(
        Stage(name, time_calls(launches, device, prepared.graph), moved)
        for name, (launches, moved) in prepared.stages.items()
    )
    return outcome._replace(times=times, stages=stages)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MOST_TEXT]


def _free() -> None:
    try:
        torch.cuda.empty_cache()
    except RuntimeError:  # the context is lost; whoever synchronises next reports it
        return
