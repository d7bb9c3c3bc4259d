# SPDX-License-Identifier: Apache-2.0
"""On a machine with an NVIDIA GPU and vLLM: the ends of cached prompts, by every way that serves them, and FlashAttention-3.

    python tests/gpu_ways.py [--chunk 1x16x32768 ...] [--json FILE]

One layer of ``near_lossless``, 28/4 heads x 128, its cache write included: microseconds as launched and of a CUDA graph, which leaves
the host out. "chosen" is what serving.routes takes by itself; its constants are fitted to the others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_kvsplice.bench import kernels_build
from vllm_kvsplice.bench.kernels_jobs import OURS, VLLM_BLOCK_SIZE, Job
from vllm_kvsplice.bench.kernels_timing import Device, time_calls
from vllm_kvsplice.codec.layout import PREFERRED_BLOCK_SIZE
from vllm_kvsplice.scoring.results import provenance
from vllm_kvsplice.serving import routes

CHUNKS = (
    "1x8x32768", "1x16x32768", "1x36x32768", "1x64x32768", "1x128x32768", "4x16x8192", "1x64x8192", "1x128x8192", "1x256x8192",
    "1x512x8192", "1x16x2048", "8x16x2048", "1x256x0",
)  # fmt: skip
WAYS = {"flash-attention-3": None, "chosen": None, "latent": True, "expanded": False}


@contextmanager
def forced(latent: bool | None) -> Iterator[None]:
    """Take one way, where there are tokens in the cache; None: the one that is chosen."""
    if latent is None:
        yield
    else:
        with mock.patch.object(routes, "latent_is_faster", lambda *args: latent):
            yield


def measure(chunk: str, way: str, device: Device) -> dict[str, Any]:
    batch, query_len, cached = map(int, chunk.split("x"))
    kernel, preset, block_size = OURS, "near_lossless", PREFERRED_BLOCK_SIZE
    if way == "flash-attention-3":
        kernel, preset, block_size = way, "bf16", VLLM_BLOCK_SIZE
    job = Job("prefill", kernel, preset, (28, 4), 128, batch, cached + query_len, query_len, block_size)
    with forced(WAYS[way]):
        prepared = kernels_build.build(job, device)
        error = prepared.check()
        if not error <= prepared.tolerance:
            raise SystemExit(f"{chunk} {way}: relative error {error:.3g}, allowed {prepared.tolerance:.3g}")
        launched, graph = (time_calls(prepared.calls, device, graph).p50 for graph in (False, True))
    return {"chunk": chunk, "way": way, "error": error, "launched_us": launched, "graph_us": graph}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", action="append", help="requests x new tokens x cached tokens of each")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device, rows = Device(), []
    for chunk in given.chunk or CHUNKS:
        for way in WAYS:
            if WAYS[way] is not None and chunk.endswith("x0"):
                continue  # first chunks attend to their fresh keys
            rows.append(measure(chunk, way, device))
            torch.cuda.empty_cache()
            print(
                "{chunk:12} {way:18} launched {launched_us:7.1f} us  graph {graph_us:7.1f} us".format(**rows[-1]),
                flush=True,
            )
    command = shlex.join(["python", "tests/gpu_ways.py", *sys.argv[1:]])
    result = (
        {"layout": "near_lossless", "heads": "28/4", "head_dim": 128, "rows": rows}
        | provenance()
        | {"command": command}
    )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
