# SPDX-License-Identifier: Apache-2.0
"""Cases and checks of the kernels, shared by the tests (interpreter on CPU) and gpu_check.py (compiled).

Importing it imports the kernels: interpreted where there is no NVIDIA GPU, with TRITON_INTERPRET set for the import
alone, so that processes started later do not inherit it. Triton must not have been imported before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOREIGN_BLOCK = 2**30  # a block id that faults if it is ever followed
POISON = 0xFF  # NaN as fp16 and as bf16


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """TRITON_INTERPRET=1 while kernels are imported, unless they will run on a GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
            raise RuntimeError("import kernel_cases before anything that imports triton")
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("kvsplice_kernels") is None:  # a checkout that is not installed
    sys.path.append(str(ROOT))
    sys.modules["kvsplice_kernels"] = types.ModuleType("kvsplice_kernels")
    sys.modules["kvsplice_kernels"].__path__ = [str(ROOT / "kernels")]

with interpreter():
    import triton

    with contextlib.suppress(ImportError):
        import triton.experimental.gluon  # noqa: F401  (the interpreter imports it at its first launch)

    from kvsplice_kernels import (  # noqa: F401
        attention,
        cache_write,
        decode,
        encode,
        expand_cached,
        fused_expand,
        packing,
        pdl,
        project_query,
        quantize,
        reduce_expand,
        write_and_project,
    )

from vllm_kvsplice.codec import reference  # noqa: E402
from vllm_kvsplice.codec.layout import LatentLayout  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A batch over a compressed cache; the defaults are ordinary, each case changes what it is about."""

    head_dim: int = 64
    k: tuple[tuple[int, int], ...] = ((8, 64),)
    v: tuple[tuple[int, int], ...] = ((8, 64),)
    num_kv_heads: int = 2
    group: int = 2
    block_size: int = 16
    seq_lens: tuple[int, ...] = (1, 37)
    query_lens: tuple[int, ...] = (1, 1)
    splits: int = 2
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    skip_first_chunks: bool = False
    offset: float = 1.0  # of keys and values: a mean that the basis does not know
    k_magnitude: float = 1.0
    v_magnitude: float = 1.0
    q_magnitude: float = 1.0
    low: torch.dtype = torch.float16  # the precision whose error bounds the kernel's


A8_4 = ((8, 16), (4, 48))
A8_4_96 = ((8, 24), (4, 72))
ATTENTION = {
    "int8": Case(seq_lens=(1, 0, 37, 70), query_lens=(1, 0, 1, 1), splits=3),
    "more-splits-than-tiles": Case(seq_lens=(1, 15, 16, 17), query_lens=(1, 1, 1, 1), splits=7),
    "near-lossless-64": Case(k=A8_4, v=A8_4, seq_lens=(90,), query_lens=(1,)),
    "near-lossless-128": Case(head_dim=128, k=((8, 32), (4, 96)), v=((8, 32), (4, 96)), group=7, num_kv_heads=1),
    "balanced-128": Case(head_dim=128, k=((8, 16), (4, 80), (2, 32)), v=((8, 32), (4, 32), (2, 64)), num_kv_heads=1,
                         seq_lens=(90, 3)),
    "max-128": Case(head_dim=128, k=((4, 64), (2, 64)), v=((4, 64), (2, 64)), num_kv_heads=1, seq_lens=(90, 3)),
    "int8-128": Case(head_dim=128, k=((8, 128),), v=((8, 128),), num_kv_heads=1, seq_lens=(90, 3)),
    "four-tiers-not-powers-of-two": Case(
        head_dim=80, k=((16, 8), (8, 24), (4, 24), (2, 24)), v=((16, 16), (8, 8), (4, 40), (2, 16)), block_size=48,
        seq_lens=(50, 3), dtype=torch.float16,
    ),
    "rank-40-dropped": Case(head_dim=80, k=((8, 80),), v=((8, 40), (0, 40)), group=3),
    "rank-112-2-bit": Case(head_dim=128, k=((4, 112), (0, 16)), v=((2, 112), (0, 16)), num_kv_heads=1),
    "head-dim-96": Case(head_dim=96, k=((8, 24), (4, 72)), v=((4, 48), (2, 48)), group=1),
    "head-dim-256": Case(head_dim=256, k=((8, 64), (4, 192)), v=((8, 64), (4, 192)), num_kv_heads=1),
    "wide-bf16": Case(k=((16, 64),), v=((16, 48), (0, 16)), low=torch.bfloat16),
    "wide-fp16": Case(k=((16, 64),), v=((16, 32), (4, 32)), dtype=torch.float16),
    "fp32-model": Case(dtype=torch.float32, k=A8_4, v=((16, 64),)),
    "block-528": Case(block_size=528, seq_lens=(530,), query_lens=(1,), num_kv_heads=1),
    "block-64": Case(block_size=64, seq_lens=(130, 64), splits=2, k=A8_4, v=A8_4),
    "group-16": Case(group=16, num_kv_heads=1),
    "group-8-speculative": Case(group=8, num_kv_heads=1, seq_lens=(40, 9), query_lens=(3, 8)),
    "query-lens-1-to-8": Case(num_kv_heads=1, seq_lens=(20, 9, 33, 8), query_lens=(2, 4, 7, 8), splits=1),
    "long-query": Case(num_kv_heads=1, group=7, seq_lens=(70, 5, 40), query_lens=(25, 1, 40), splits=1),
    "long-query-window": Case(num_kv_heads=1, group=3, seq_lens=(150,), query_lens=(30,), window=20, splits=2),
    "window": Case(seq_lens=(130, 20), window=33, splits=3, num_kv_heads=1),
    "window-1": Case(seq_lens=(70,), query_lens=(2,), window=1, num_kv_heads=1),
    "soft-cap": Case(soft_cap=3.0, k=A8_4, v=A8_4, q_magnitude=4.0),
    "skip-first-chunks": Case(seq_lens=(9, 30, 1), query_lens=(9, 3, 1), skip_first_chunks=True),
    "long-query-skip": Case(
        num_kv_heads=1, group=7, seq_lens=(20, 70), query_lens=(20, 12), splits=1, skip_first_chunks=True
    ),
    "query-without-keys": Case(seq_lens=(0, 20), query_lens=(2, 1), num_kv_heads=1),
    "large-values": Case(v=A8_4, v_magnitude=2e4, low=torch.bfloat16),
    "huge-keys": Case(k=A8_4, k_magnitude=2e4, q_magnitude=1e-4, low=torch.bfloat16),
    "tiny": Case(v_magnitude=2e-4, k_magnitude=1e-3, q_magnitude=1e3, v=A8_4, k=A8_4),
    "constant-values": Case(v=((4, 64),), v_magnitude=0.0),
}  # fmt: skip
# For a GPU: longer, and with more of everything at once.
LARGE = {
    "7b-shape": replace(ATTENTION["near-lossless-128"], num_kv_heads=4, seq_lens=(4096, 1, 0, 777, 2048, 1500),
                        query_lens=(1,) * 2 + (0,) + (1,) * 3, splits=9),
    "7b-shape-block-64": replace(ATTENTION["near-lossless-128"], num_kv_heads=4, block_size=64,
                                 seq_lens=(4096, 100, 3000), query_lens=(1, 1, 1), splits=16),
    "7b-speculative": replace(ATTENTION["near-lossless-128"], num_kv_heads=4, seq_lens=(1000, 513, 64),
                              query_lens=(5, 5, 5), splits=4),
    "7b-prefill": replace(ATTENTION["near-lossless-128"], num_kv_heads=4, seq_lens=(1500, 20, 900),
                          query_lens=(400, 1, 900), splits=1),
    "v-only-128": Case(head_dim=128, k=((16, 128),), v=((8, 96), (0, 32)), num_kv_heads=8, group=4,
                       seq_lens=(2000, 333), splits=5, low=torch.bfloat16),
    "2-bit-tiers-256": Case(head_dim=256, k=((8, 64), (4, 160), (2, 32)), v=((4, 128), (2, 128)), num_kv_heads=4,
                            group=8, block_size=528, seq_lens=(1200, 600), window=700, soft_cap=30.0, splits=3),
    "prefill-256": Case(head_dim=256, k=((8, 64), (4, 192)), v=((8, 64), (4, 192)), num_kv_heads=2,
                        seq_lens=(600,), query_lens=(300,), splits=1),
    "group-71": Case(num_kv_heads=1, group=71, seq_lens=(300, 5), splits=2),
    "prefill-fp16": Case(k=A8_4, v=A8_4, dtype=torch.float16, group=4, seq_lens=(700, 300), query_lens=(257, 300),
                         splits=1, window=256),
}  # fmt: skip


@dataclass
class Batch:
    """A case made concrete: tensors on ``device`` and what they were made from."""

    case: Case
    layout: LatentLayout
    storage: Tensor  # all bytes, pads between pages included
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    slot_mapping: Tensor  # of every cached token, request by request
    key: Tensor
    value: Tensor
    query: Tensor
    bases: dict[str, tuple[Tensor, Tensor, Tensor]]  # side -> encode, decode, mean

    def plan(self, side: str) -> tuple[tuple[int, ...], ...]:
        return self.layout.plan(side, self.case.block_size)

    @property
    def wide_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.case.dtype == torch.bfloat16 else torch.float16


def make_batch(case: Case, device: str = DEVICE, filled: bool = True, seed: int = 0) -> Batch:
    """Shuffled pages with padded strides in poisoned memory, filled by the reference if ``filled``."""
    g = torch.Generator().manual_seed(seed)
    layout = LatentLayout.of(case.head_dim, case.k, case.v)
    H, N = case.num_kv_heads, case.block_size
    blocks = [-(-n // N) for n in case.seq_lens]
    page = layout.page_bytes(N)
    stride_head, stride_block = page + 16, H * (page + 16) + 48
    num_blocks = sum(blocks) + 2
    storage = torch.full((num_blocks * stride_block,), POISON, dtype=torch.uint8)
    order = (torch.randperm(num_blocks - 1, generator=g) + 1).tolist()
    block_table = torch.full((len(blocks), max(blocks) + 3), FOREIGN_BLOCK, dtype=torch.int32)
    slots = []
    for b, (count, n) in enumerate(zip(blocks, case.seq_lens, strict=True)):
        block_table[b, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        position = torch.arange(n)
        slots.append(block_table[b, position // N].long() * N + position % N)
    T, num_queries = sum(case.seq_lens), sum(case.query_lens)

    def draw(rows: int, heads: int, magnitude: float, offset: float) -> Tensor:
        spread = torch.linspace(2.0, 0.2, case.head_dim)
        x = (torch.randn(rows, heads, case.head_dim, generator=g) * spread + offset) * magnitude
        return x.to(case.dtype).to(device)

    starts = torch.tensor([0, *case.query_lens]).cumsum(0).to(torch.int32)
    batch = Batch(
        case, layout, storage.to(device), storage, block_table.to(device),
        torch.tensor(case.seq_lens, dtype=torch.int32, device=device), starts.to(device), torch.cat(slots).to(device),
        draw(T, H, case.k_magnitude, case.offset), draw(T, H, case.v_magnitude, -case.offset),
        draw(num_queries, H * case.group, case.q_magnitude, 0.0),
        {side: make_basis(case, layout.rank(side), g, device) for side in ("k", "v")},
    )  # fmt: skip
    shape = (num_blocks, H, N, layout.bytes_per_token_head)
    batch.kv_cache = batch.storage.as_strided(shape, (stride_block, stride_head, shape[3], 1))
    if filled:
        write_by_reference(batch, batch.kv_cache)
    return batch


def make_basis(case: Case, rank: int, g: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonal encode [H, rank, head_dim], decode [H, head_dim, rank] and a mean that is not the data's, fp32."""
    full = torch.linalg.qr(torch.randn(case.num_kv_heads, case.head_dim, case.head_dim, generator=g))[0]
    mean = torch.randn(case.num_kv_heads, case.head_dim, generator=g) * 0.1
    encode = full[:, :rank].contiguous()
    return encode.to(device), encode.transpose(1, 2).contiguous().to(device), mean.to(device)


def write_by_reference(batch: Batch, kv_cache: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Encode and store every token of the batch with the reference."""
    for side, x in (("k", batch.key), ("v", batch.value)):
        encode, _, mean = (t.to(dtype) for t in batch.bases[side])
        z = reference.encode(x.to(dtype), encode, mean)
        reference.write_side(kv_cache, z, batch.plan(side), batch.slot_mapping, batch.wide_dtype)


WRITE = {
    "int8": Case(),
    "near-lossless-64": Case(k=A8_4, v=A8_4),
    "near-lossless-128": Case(head_dim=128, k=((8, 32), (4, 96)), v=((8, 32), (4, 96)), num_kv_heads=1),
    "four-tiers": Case(
        head_dim=80, k=((16, 8), (8, 24), (4, 24), (2, 24)), v=((16, 16), (8, 8), (4, 40), (2, 16)), block_size=48
    ),
    "rank-112": Case(head_dim=128, k=((8, 112), (0, 16)), v=((2, 112), (0, 16)), num_kv_heads=1, seq_lens=(20,)),
    "rank-40-fp16": Case(head_dim=80, k=((8, 80),), v=((4, 40), (0, 40)), dtype=torch.float16, seq_lens=(20,)),
    "wide-fp32-model": Case(k=((16, 64),), v=((16, 48), (0, 16)), dtype=torch.float32),
    "head-dim-256": Case(head_dim=256, k=((8, 256),), v=((8, 64), (4, 192)), num_kv_heads=1, seq_lens=(5,)),
    "head-dim-96-offset": Case(head_dim=96, k=((8, 24), (4, 72)), v=((4, 96),), offset=5.0, block_size=528),
    "large": Case(k=A8_4, v=A8_4, k_magnitude=2e4, v_magnitude=2e4),
    "tiny": Case(k=A8_4, v=A8_4, k_magnitude=1e-4, v_magnitude=1e-4),
}
# Queries of a decode step beside its writes, and enough of them for every tile size.
PROJECT = {
    "one-row": Case(num_kv_heads=1, group=1, seq_lens=(1,), query_lens=(1,)),
    "64-rows": Case(head_dim=96, k=A8_4_96, v=A8_4_96, group=4, seq_lens=(9, 20), query_lens=(9, 20)),
    "128-rows": Case(group=7, num_kv_heads=1, seq_lens=(100, 90), query_lens=(90, 81)),
    "rank-40-fp16": Case(head_dim=80, k=((8, 40), (0, 40)), v=((8, 80),), group=3, dtype=torch.float16),
    "fp32-model": Case(dtype=torch.float32, group=71, num_kv_heads=1),
    "head-dim-256": Case(
        head_dim=256, k=((8, 64), (4, 192)), v=((8, 256),), num_kv_heads=1, seq_lens=(5,), query_lens=(1,)
    ),
}
WRITE_LARGE = {
    "7b-decode-step": replace(WRITE["near-lossless-128"], num_kv_heads=4, seq_lens=(64,)),
    "7b-prefill": replace(WRITE["near-lossless-128"], num_kv_heads=4, seq_lens=(2000, 77)),
    "2-bit-256": Case(head_dim=256, k=((8, 64), (4, 160), (2, 32)), v=((4, 128), (2, 128)), seq_lens=(600,)),
    "wide-128": Case(head_dim=128, k=((16, 128),), v=((16, 96), (0, 32)), seq_lens=(600,)),
    "7b-long-prefill": replace(WRITE["near-lossless-128"], num_kv_heads=4, seq_lens=(8192,)),
    "fp16-prefill": replace(WRITE["four-tiers"], num_kv_heads=4, seq_lens=(2500,), dtype=torch.float16),
}
PROJECT_LARGE = {
    "7b-64": replace(WRITE["near-lossless-128"], num_kv_heads=4, group=7, seq_lens=(64,), query_lens=(64,)),
    "7b-256": replace(WRITE["near-lossless-128"], num_kv_heads=4, group=7, seq_lens=(256,), query_lens=(256,)),
    "7b-1024": replace(WRITE["near-lossless-128"], num_kv_heads=4, group=7, seq_lens=(1024,), query_lens=(1024,)),
    "2-bit-256": replace(WRITE_LARGE["2-bit-256"], group=8, seq_lens=(300,), query_lens=(300,)),
}


EXPAND = {
    "int8": (8, 70, 64, 64, torch.bfloat16),
    "int8-rank-40": (8, 3, 80, 40, torch.float32),
    "int8-rank-112": (8, 20, 128, 112, torch.float16),
    "int4": (4, 70, 64, 64, torch.bfloat16),
    "int4-rank-48": (4, 1, 96, 48, torch.float16),
    "int4-rank-200": (4, 20, 256, 200, torch.float32),
}
EXPAND_CACHED = {
    "near-lossless-64": (
        replace(ATTENTION["near-lossless-64"], seq_lens=(90, 0, 3), query_lens=(1, 1, 1)),
        torch.bfloat16,
    ),
    "four-tiers": (ATTENTION["four-tiers-not-powers-of-two"], torch.float16),
    "block-528": (ATTENTION["block-528"], torch.float32),
    "wide": (ATTENTION["wide-bf16"], torch.bfloat16),
    "rank-112-2-bit": (ATTENTION["rank-112-2-bit"], torch.float32),
}
