# SPDX-License-Identifier: Apache-2.0
"""Memory, clock and power of a GPU while a server is measured, as `nvidia-smi` reads them. In: nothing. Out: numbers.

``gpu_memory_utilization`` is vLLM's plan: weights, cache, graphs and scratch together are to stay below that share of the
GPU. Scratch that a kernel takes beyond it shows here and nowhere else. Every process on the GPU is counted: keep it to the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

INTERVAL_S = 0.5
BUSY = 90  # per cent of the last sample's time in which a kernel ran; less is a pause between two calls
MIB = 1 << 20
FIELDS = "memory.used,memory.total,utilization.gpu,clocks.sm,power.draw"


class Sample(NamedTuple):
    """at: seconds of ``time.monotonic``. Bytes, per cent, MHz of the multiprocessors, watts."""

    at: float
    used_bytes: int
    total_bytes: int
    busy: float
    sm_mhz: float
    watts: float


class GpuWatch:
    """A context that samples every ``INTERVAL_S`` seconds; it sees nothing where there is no NVIDIA GPU."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while (seen := sample()) is not None:
            self.samples.append(seen)
            if self._stop.wait(INTERVAL_S):
                return

    def memory(self) -> dict[str, int | None]:
        """The peak so far and what the GPU has, in bytes; None for both without a sample."""
        seen = self.samples
        peak = max((s.used_bytes for s in seen), default=None)
        return {"peak_bytes": peak, "total_bytes": seen[-1].total_bytes if seen else None}

    def since(self, start: float) -> dict[str, Any] | None:
        """Medians and the least clock of the busy samples from ``start`` (``time.monotonic``) on; None if there is none."""
        seen = [s for s in self.samples if s.at >= start and s.busy >= BUSY]
        if not seen:
            return None
        clocks = [s.sm_mhz for s in seen]
        watts = median(s.watts for s in seen)
        return {"samples": len(seen), "sm_mhz": median(clocks), "least_sm_mhz": min(clocks), "watts": watts}


def sample() -> Sample | None:
    """What the first visible GPU does now; None without `nvidia-smi` or where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = [program, f"--id={gpu}", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        used, total, busy, clock, watts = (float(part) for part in out.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Sample(time.monotonic(), int(used) * MIB, int(total) * MIB, busy, clock, watts)
