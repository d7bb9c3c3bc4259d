# SPDX-License-Identifier: Apache-2.0
"""The most memory that a GPU held while a server was measured, as `nvidia-smi` counts it. In: nothing. Out: bytes.

``gpu_memory_utilization`` is vLLM's plan: weights, cache, graphs and scratch together are to stay below that share of the
GPU. Scratch that a kernel takes beyond it shows here and nowhere else. Every process on the GPU is counted: keep it to the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from types import TracebackType

INTERVAL_S = 0.5
MIB = 1 << 20


@dataclass
class PeakMemory:
    """A context that samples every ``INTERVAL_S`` seconds; ``peak_bytes`` and ``total_bytes`` are None without an NVIDIA GPU."""

    peak_bytes: int | None = None
    total_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while (seen := used_and_total()) is not None:
            self.peak_bytes, self.total_bytes = max(self.peak_bytes or 0, seen[0]), seen[1]
            if self._stop.wait(INTERVAL_S):
                return


def used_and_total() -> tuple[int, int] | None:
    """Bytes in use on the first visible GPU and bytes that it has; None without `nvidia-smi` or where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = [program, f"--id={gpu}", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        used, total = (int(part) * MIB for part in out.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return used, total
