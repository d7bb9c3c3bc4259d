# SPDX-License-Identifier: Apache-2.0
"""Host time of one attention layer in a step that is launched, not replayed: everything but vLLM's own work and the GPU's.

    python tests/host_time.py [--preset near_lossless] [--repeats 40] [--json FILE]

Runs without a GPU: kernels are compiled for sm90 as on one, and Triton's last step, the driver's launch, does nothing; nor do
FlashAttention and vLLM's workspace. What is left is the Python of ``KVSpliceImpl.forward`` and of the launches, of which a GPU's
driver takes some 4 us each besides. Medians over steps of 28 layers, first layers included.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from test_kernels_compile import NoDevice
from torch import Tensor, nn

from vllm_kvsplice.calibration.presets import resolve
from vllm_kvsplice.codec.layout import SIDES
from vllm_kvsplice.codec.projector import Basis, LayerProjector
from vllm_kvsplice.scoring.results import provenance

HEADS, KV_HEADS, HEAD_DIM, LAYERS, BLOCK_SIZE = 28, 4, 128, 28, 16  # of Qwen2.5-7B
MULTIPROCESSORS = 132
# Name -> (new tokens, cached tokens) of each request.
STEPS = {
    "1 x 16 after 32768": [(16, 32768)],
    "4 x 16 after 8192": [(16, 8192)] * 4,
    "1 x 512 after 8192": [(512, 8192)],
    "1 x 256": [(256, 0)],
    "1 x 256 beside 1 x 512 after 8192": [(256, 0), (512, 8192)],
}


@contextmanager
def no_gpu() -> Iterator[None]:
    """A Triton driver, FlashAttention and a workspace that take no time."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from kvsplice_kernels import expand_cached
    from vllm_kvsplice.serving import cached_prefill, routes, triton_path

    memory = torch.empty(512 << 20, dtype=torch.uint8)

    def loaded(kernel: Any) -> None:
        kernel.module, kernel.function, kernel._run = 1, 1, lambda *args: None

    def workspace(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        found, start = [], 0
        for shape, dtype in shapes:
            stop = start + prod(shape) * dtype.itemsize
            found.append(memory[start:stop].view(dtype).view(shape))
            start = -(-stop // 256) * 256
        return found

    def flash(**arguments: Any) -> tuple[Any, None]:
        return arguments["out"], None

    driver.set_active(NoDevice(90))
    with (
        mock.patch.object(CompiledKernel, "_init_handles", loaded),
        mock.patch.object(triton_path, "flash_attends", lambda *args: (flash, 3)),
        mock.patch.object(triton_path, "workspace", workspace),
        mock.patch.object(cached_prefill, "workspace", workspace),
        mock.patch.object(triton_path, "multiprocessors", lambda device: MULTIPROCESSORS),
        mock.patch.object(routes, "multiprocessors", lambda device: MULTIPROCESSORS),
        mock.patch.object(expand_cached, "multiprocessors", lambda device: MULTIPROCESSORS),
    ):
        yield


def make_layers(preset: str) -> list[tuple[Any, nn.Module, Tensor]]:
    """(implementation, layer, cache) of every layer, as vLLM has them after a model of one layout was loaded."""
    from vllm_kvsplice.serving import triton_path
    from vllm_kvsplice.serving.attention_layer import LayerCodec, attach, one_codec
    from vllm_kvsplice.serving.impl import KVSpliceImpl

    layout, _ = resolve(preset, HEAD_DIM)
    rows = torch.eye(HEAD_DIM).expand(KV_HEADS, -1, -1)
    bases = (Basis.orthogonal(rows[:, : layout.rank(side)]) for side in SIDES)
    projector, cell = LayerProjector(layout, *bases), layout.bytes_per_token_head
    layers: list[tuple[Any, nn.Module, Tensor]] = []
    for _ in range(LAYERS):
        impl, layer = object.__new__(KVSpliceImpl), nn.Module()
        codec = LayerCodec(layout, cell, torch.bfloat16, HEADS, KV_HEADS, HEAD_DIM**-0.5, None, None)
        impl.codec = one_codec(codec)
        impl.path, impl.kv_sharing_target_layer_name, impl.exact_prefill = triton_path, None, True
        attach(layer, projector, torch.device("cpu"))
        layers.append((impl, layer, torch.zeros(8, KV_HEADS, BLOCK_SIZE, cell, dtype=torch.uint8)))
    return layers


def metadata(requests: list[tuple[int, int]]) -> Any:
    """A step of prefills, as the builder makes it for each step."""
    from vllm_kvsplice.serving.attention_layer import Limits
    from vllm_kvsplice.serving.metadata import KVSpliceMetadata, Prefills, Requests

    new, total = [n for n, _ in requests], [n + cached for n, cached in requests]
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lens = torch.tensor(total, dtype=torch.int32)
    table = torch.zeros(len(new), -(-max(total) // BLOCK_SIZE), dtype=torch.int32)
    first = [cached == 0 for _, cached in requests]
    limits = Limits(256, 8192, 40960)
    prefills = Prefills(
        len(new), sum(new), max(new), max(total), starts, lens, table, starts, first, lens, limits=limits
    )
    decodes = Requests(0, 0, 1, limits.max_model_len, starts[:1], lens[:0], table[:0])
    return KVSpliceMetadata(sum(new), torch.zeros(sum(new), dtype=torch.int64), decodes, prefills)


def step_us(layers: list[tuple[Any, nn.Module, Tensor]], requests: list[tuple[int, int]]) -> float:
    """Microseconds of a layer, the mean over one step."""
    step = metadata(requests)
    tokens = step.num_actual_tokens
    query, out = (torch.zeros(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.zeros(tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
    start = time.perf_counter()
    for impl, layer, cache in layers:
        impl.forward(layer, query, key, value, cache, step, out)
    return (time.perf_counter() - start) * 1e6 / len(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="near_lossless")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 was given, but compiled kernels are launched here: unset it.")
    torch.set_num_threads(1)
    with no_gpu():
        layers, rows = make_layers(given.preset), {}
        for name, requests in STEPS.items():
            for _ in range(3):  # compiled, and found by their kind
                step_us(layers, requests)
            rows[name] = round(median(step_us(layers, requests) for _ in range(given.repeats)), 1)
            print(f"{name:35} {rows[name]:7.1f} us a layer", flush=True)
    command = shlex.join(["python", "tests/host_time.py", *sys.argv[1:]])
    result = {"preset": given.preset, "layers": LAYERS, "us_a_layer": rows} | provenance() | {"command": command}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
