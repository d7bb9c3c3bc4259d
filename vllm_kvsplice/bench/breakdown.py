# SPDX-License-Identifier: Apache-2.0
"""Where a decode step's attention spends its time: the rows of `kvsplice bench kernels --json` as bars.

In: that JSON. Out: per decode shape one bar for each kernel and preset, cut into stages where the file has them. Next: plots.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvsplice.errors import KVSpliceError

STAGE = ": "  # between a kernel's name and its stage's


@dataclass
class Bar:
    """One kernel: its name with the preset, microseconds (p50) of the whole, and (name, microseconds) of its stages."""

    label: str
    us: float
    stages: list[tuple[str, float]] = field(default_factory=list)


def read(path: str) -> dict[str, list[Bar]]:
    """Bars by shape ("64x4096, 28/4 heads x 128"), the fastest row of each kernel and preset, fastest first.

    Raises:
        KVSpliceError: the file is not a result of the kernel benchmark, or has no decode rows.
    """
    try:
        rows = [row for row in json.loads(Path(path).read_text())["rows"] if row["what"] == "decode"]
        shapes = _bars(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KVSpliceError(
            f"--kernels-json {path} is not a kernel benchmark ({type(error).__name__}: {error}): "
            "expected a file of `kvsplice bench kernels --json`."
        ) from None
    if not shapes:
        raise KVSpliceError(
            f"--kernels-json {path} has no decode rows: run `kvsplice bench kernels --what decode` again."
        )
    return shapes


def _bars(rows: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    shapes: dict[str, dict[str, Bar]] = {}
    current = None  # the bar whose stages may follow: rows of stages come behind their kernel's
    for row in rows:
        kernel, _, stage = str(row["kernel"]).partition(STAGE)
        us = float(row["p50_us"])
        if stage:
            if current is not None:
                current.stages.append((stage, us))
            continue
        shape = f"{row['batch']}x{row['context']}, {row['heads']} heads x {row['head_dim']}"
        found = shapes.setdefault(shape, {})
        current = Bar(f"{kernel} {row['preset']}".strip(), us)
        known = found.get(current.label)
        if known is None or us < known.us:
            found[current.label] = current
    return {shape: sorted(of.values(), key=lambda bar: bar.us) for shape, of in shapes.items()}
