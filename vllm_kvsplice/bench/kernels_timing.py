# SPDX-License-Identifier: Apache-2.0
"""How long calls take, and how fast this device copies memory in the same run.

On a GPU: one CUDA graph of calls that each touch other pages, replayed; the L2 cache holds other bytes before every
replay. Times are of the device: events around a replay, over the number of calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.bench.kernels_data import Call

WARMUP = 2  # replays that do not count
MOST_REPLAYS = 200
FLUSH_BYTES = 2**28
COPY_BYTES = 2**31


@dataclass(frozen=True)
class Device:
    """Where a run happens, and how much is measured. The CPU is for tests: its kernels are interpreted, its times void.

    ``cold_bytes``: of distinct cache that one replay goes through. ``replays``, ``seconds``: least of both for a time.
    """

    name: str = "cuda"
    cold_bytes: float = 400e6
    replays: int = 20
    seconds: float = 0.1

    @property
    def on_gpu(self) -> bool:
        """Whether times and GB/s mean anything."""
        return self.name == "cuda"

    @property
    def num_sms(self) -> int:
        """Multiprocessors."""
        return int(torch.cuda.get_device_properties(0).multi_processor_count) if self.on_gpu else 1

    def synchronize(self) -> None:
        """Wait for all work; raises what a kernel did wrong."""
        if self.on_gpu:
            torch.cuda.synchronize()


class Times(NamedTuple):
    """Microseconds of one call: the 20th, 50th and 80th percentile of the replays."""

    p20: float
    p50: float
    p80: float


def time_calls(calls: Sequence[Call], device: Device, graph: bool = True) -> Times:
    """Time ``calls``, which do the same work on different memory. ``graph``: replay a CUDA graph of them, else launch."""
    samples = _gpu_samples(calls, device, graph) if device.on_gpu else _cpu_samples(calls, device)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7])


def copy_speeds(device: Device) -> dict[str, float]:
    """GB/s (1e9 bytes, read and written) of device copies: torch's copy_, and an elementwise kernel."""
    numel = COPY_BYTES // 4 if device.on_gpu else 2**16
    source = torch.randn(numel, device=device.name)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    def elementwise() -> None:
        torch.add(source, 0.0, out=target)

    ways = {"copy_": copy, "elementwise": elementwise}
    return {name: 2 * source.nbytes / time_calls([way] * 3, device).p50 / 1e3 for name, way in ways.items()}


def _gpu_samples(calls: Sequence[Call], device: Device, graph: bool) -> list[float]:
    _run(calls)
    torch.cuda.synchronize()
    replay = _captured(calls) if graph else lambda: _run(calls)
    samples: list[float] = []
    end_time = time.monotonic() + device.seconds
    while len(samples) < WARMUP + device.replays or (time.monotonic() < end_time and len(samples) < MOST_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush()
        start.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return samples[WARMUP:]


def _captured(calls: Sequence[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls)
    replay: Callable[[], None] = graph.replay
    return replay


def _flush() -> None:
    """Read more bytes than L2 holds. A read leaves clean lines: written ones would go back to memory in the timed part."""
    source, target = _flush_buffers()
    torch.amax(source, dim=0, out=target)


@lru_cache(maxsize=1)
def _flush_buffers() -> tuple[Tensor, Tensor]:
    source = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    return source, torch.zeros((), device="cuda")


def _cpu_samples(calls: Sequence[Call], device: Device) -> list[float]:
    samples = []
    for _ in range(max(2, device.replays)):
        start = time.perf_counter()
        _run(calls)
        samples.append((time.perf_counter() - start) * 1e6 / len(calls))
    return samples


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
