# SPDX-License-Identifier: Apache-2.0
"""What must hold of every kernel in a case of kernel_cases.py; the tests and gpu_check.py run the same checks."""

from __future__ import annotations

import torch
from kernel_cases import (
    DEVICE,
    POISON,
    Batch,
    Case,
    attention,
    cache_write,
    encode,
    expand_cached,
    fused_expand,
    make_batch,
    project_query,
    write_and_project,
    write_by_reference,
)
from torch import Tensor

from kvsplice_kernels.launch import Launch
from kvsplice_kernels.row_operands import in_columns
from vllm_kvsplice.codec import reference


def assert_within(out: Tensor, exact: Tensor, low: Tensor, eps: float, what: str) -> None:
    """|out - exact| <= twice the error of the same maths in low precision, plus a rounding floor."""
    assert torch.isfinite(out).all(), f"{what}: {(~torch.isfinite(out)).sum()} values are not finite"
    error = (out.double() - exact).abs().max().item()
    bound = 2 * (low.double() - exact).abs().max().item() + eps * exact.abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}, greatest value {exact.abs().max():.3g}"


def run_reference(batch: Batch, dtype: torch.dtype) -> Tensor:
    case = batch.case
    (_, k_decode, k_mean), (_, v_decode, v_mean) = batch.bases["k"], batch.bases["v"]
    return reference.paged_attention(
        batch.query, batch.kv_cache, batch.layout, k_decode, k_mean, v_decode, v_mean, batch.block_table,
        batch.seq_lens, batch.query_start_loc, case.head_dim**-0.5, case.window, case.soft_cap, batch.wide_dtype, dtype,
    )  # fmt: skip


def run_kernels(
    batch: Batch, out: Tensor, workspace: attention.Workspace | None = None, launch: Launch | None = None
) -> None:
    case = batch.case
    attention.paged_attention(
        batch.query, batch.kv_cache, batch.plan("k"), batch.plan("v"), prepared(batch), batch.block_table,
        batch.seq_lens, batch.query_start_loc, case.head_dim**-0.5, out, max(case.query_lens),
        case.splits, case.window, case.soft_cap, batch.wide_dtype, case.skip_first_chunks, workspace, launch=launch,
    )  # fmt: skip


def poisoned_workspace(batch: Batch, launch: Launch | None = None) -> attention.Workspace:
    ranks = attention.latent_ranks(batch.plan("k"), batch.plan("v"), launch)
    shapes = attention.workspace_shapes(*batch.query.shape[:2], *ranks, batch.case.splits)
    return attention.Workspace(*(torch.full(s, float("nan"), device=batch.query.device) for s in shapes))


def check_attention(case: Case, device: str = DEVICE, launch: Launch | None = None) -> None:
    """project_query, decode and reduce_expand together against the reference; skipped and foreign rows keep NaN."""
    batch = make_batch(case, device)
    before = batch.storage.clone()
    out = torch.full((batch.query.shape[0] + 3, *batch.query.shape[1:]), float("nan"), device=device)
    run_kernels(batch, out, poisoned_workspace(batch, launch), launch)
    exact, low = run_reference(batch, torch.float64), run_reference(batch, case.low)
    live = torch.zeros(out.shape[0], dtype=torch.bool)
    starts = batch.query_start_loc.tolist()
    for b, (seq_len, query_len) in enumerate(zip(case.seq_lens, case.query_lens, strict=True)):
        live[starts[b] : starts[b + 1]] = not (case.skip_first_chunks and seq_len == query_len)
    live = live.to(device)
    assert out[~live].isnan().all(), "rows of skipped requests or of none were written"
    eps = torch.finfo(torch.float16).eps
    rows = live[: exact.shape[0]]
    assert_within(out[live], exact[rows], low[rows], eps, "attention")
    assert torch.equal(batch.storage, before), "the cache was written"


def check_write(case: Case, device: str = DEVICE, fused: bool = False) -> None:
    """cache_write, or with ``fused`` write_and_project, against the reference: see check_written."""
    check_written(make_batch(case, device, filled=False), fused)


def check_written(batch: Batch, fused: bool = False) -> None:
    """Codes within a step, scales equal, no foreign byte touched; some slots are skipped, tensors have gaps."""
    drop = torch.arange(batch.slot_mapping.shape[0], device=batch.key.device) % 5 == 3
    batch.slot_mapping = torch.where(drop, -1, batch.slot_mapping)
    batch.key, batch.value = with_gaps(batch.key), with_gaps(batch.value)
    (write_and_check_query if fused else write)(batch)
    written = batch.storage.clone()
    strides = batch.kv_cache.shape, batch.kv_cache.stride()
    expected, zeroed = (torch.full_like(written, fill) for fill in (POISON, 0))
    for storage in (expected, zeroed):
        write_by_reference(batch, storage.as_strided(*strides))
    owned = expected == zeroed
    assert (written[~owned] == POISON).all(), f"{(written[~owned] != POISON).sum()} foreign bytes were touched"
    blocks = (batch.slot_mapping[~drop] // batch.case.block_size).unique()
    for side in ("k", "v"):
        compare_codes(batch, side, written.as_strided(*strides), expected.as_strided(*strides), blocks)


def prepared(batch: Batch) -> encode.Prepared:
    (k_encode, k_decode, k_mean), (v_encode, v_decode, v_mean) = batch.bases["k"], batch.bases["v"]
    natural = encode.prepare(k_encode, k_decode, k_mean, v_encode, v_decode, v_mean)
    return in_columns(natural, batch.plan("k"), batch.plan("v"))


def write(batch: Batch) -> None:
    cache_write.cache_write(
        batch.key, batch.value, batch.kv_cache, batch.slot_mapping, prepared(batch),
        batch.plan("k"), batch.plan("v"), batch.wide_dtype,
    )  # fmt: skip


def write_and_check_query(batch: Batch) -> None:
    """write_and_project of queries with gaps, whose projection is compared with the reference in fp64."""
    query = with_gaps(batch.query)[: batch.query.shape[0], : batch.query.shape[1]]
    rank = batch.layout.rank("k")
    out = [torch.full((*query.shape[:2], *tail), float("nan"), device=query.device) for tail in ((rank,), ())]
    write_and_project.write_and_project(
        query, batch.key, batch.value, batch.kv_cache, batch.slot_mapping, prepared(batch),
        batch.plan("k"), batch.plan("v"), *out, batch.wide_dtype,
    )  # fmt: skip
    if query.shape[0]:
        compare_query(batch, *out)


def check_project_query(case: Case, device: str = DEVICE) -> None:
    """project_query against the reference in fp64."""
    batch = make_batch(case, device, filled=False)
    shape = *batch.query.shape[:2], batch.layout.rank("k")
    out = [torch.full(s, float("nan"), device=device) for s in (shape, shape[:2])]
    project_query.project_query(batch.query, prepared(batch).k_decode, batch.bases["k"][2], *out)
    compare_query(batch, *out)


def compare_query(batch: Batch, q_latent: Tensor, q_bias: Tensor) -> None:
    """Errors within 2**-15 of the greatest value: each operand of a product is off by 2**-16 at most."""
    _, decode, mean = (t.double() for t in batch.bases["k"])
    for got, exact in zip((q_latent, q_bias), reference.project_query(batch.query.double(), decode, mean), strict=True):
        assert_within(got, exact, exact, 2**-15, "project_query")


def with_gaps(x: Tensor) -> Tensor:
    """The same values as a view with padding between heads and between tokens, and a row that belongs to no slot."""
    T, H, D = x.shape
    wide = torch.full((T + 1, H + 1, D + 8), float("nan"), dtype=x.dtype, device=x.device)
    wide[:T, :H, :D] = x
    return wide[:, :H, :D]


def compare_codes(batch: Batch, side: str, written: Tensor, expected: Tensor, blocks: Tensor) -> None:
    """Tier by tier: 16-bit floats equal but for the last bit, few codes off, none by more than one, scales equal.

    Two clips of a row may be equally good, and the last bit of the projection decides; those rows must stay rare.
    """
    for tier in batch.plan(side):
        bits, label = tier.bits, f"{side} {tier.bits}-bit tier"
        ours, theirs = (reference.read_codes(c, tier, blocks) for c in (written, expected))
        if bits == 16:
            wide = batch.wide_dtype
            x = (batch.key if side == "k" else batch.value)[: batch.slot_mapping.shape[0]]
            close = nearly_equal(ours.view(wide), theirs.view(wide), 2**-16 * x.abs().max().item())  # two bf16 planes
            assert close.all(), f"{label}: {(~close).sum()} values differ"
            continue
        same = torch.eq(*(reference.scale_plane(c, tier)[blocks] for c in (written, expected)))
        assert (~same).sum() <= 1 + 1e-3 * same.numel(), (
            f"{label}: {(~same).sum()} of {same.numel()} rows have another scale"
        )
        off = (reference.unpack(ours, bits).int() - reference.unpack(theirs, bits).int()).abs()[same]
        wrong = (off > 0).float().mean().item()
        assert off.max() <= 1 and wrong < 5e-3, f"{label}: {wrong:.2%} of codes differ, by at most {off.max()}"


def nearly_equal(a: Tensor, b: Tensor, atol: float) -> Tensor:
    """Equal but for the last bit or ``atol``, or NaN (never written) in both."""
    error, size = (a.double() - b.double()).abs(), b.double().abs()
    return (error <= torch.finfo(a.dtype).eps * size + atol) | (a.isnan() & b.isnan())


def check_expand_cached(case: Case, out_dtype: torch.dtype, device: str = DEVICE) -> None:
    """expand_cached against the reference; rows past the requests' tokens keep NaN."""
    batch = make_batch(case, device)
    starts = torch.tensor([0, *case.seq_lens], device=device).cumsum(0).to(torch.int32)
    rows = sum(case.seq_lens) + 2, case.num_kv_heads, case.head_dim
    outs = {side: torch.full(rows, float("nan"), device=device).to(out_dtype) for side in ("k", "v")}
    expand_cached.expand_cached(
        batch.kv_cache, batch.plan("k"), batch.plan("v"), batch.block_table, batch.seq_lens, starts,
        batch.bases["k"][1:], batch.bases["v"][1:], *outs.values(), max(case.seq_lens), batch.wide_dtype,
    )  # fmt: skip
    for side, out in outs.items():
        _, decode, mean = batch.bases[side]
        want = []
        for dtype in (torch.float64, torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float16):
            full = []
            for b, n in enumerate(case.seq_lens):
                blocks = batch.block_table[b, : -(-n // case.block_size)].long()
                z = reference.read_side(batch.kv_cache, batch.plan(side), blocks, torch.float64, batch.wide_dtype)[
                    :, :n
                ]
                full.append(reference.expand(z.transpose(0, 1).to(dtype), decode.to(dtype), mean.to(dtype)))
            want.append(torch.cat(full))
        n = want[0].shape[0]
        assert out[n:].isnan().all(), "rows of no request were written"
        assert_within(out[:n], want[0], want[1], torch.finfo(out_dtype).eps, f"expand_cached {side}")


def check_fused_expand(
    bits: int, rows: int, head_dim: int, rank: int, out_dtype: torch.dtype, device: str = DEVICE
) -> None:
    """fused_expand_int8 or fused_expand_int4 against the reference, into a strided output."""
    g = torch.Generator().manual_seed(bits)
    H = 2
    z = (torch.randn(rows, H, rank, generator=g) + 1.0).to(device)
    v_decode = (torch.randn(H, head_dim, rank, generator=g) / rank**0.5).to(device)
    mean = torch.randn(H, head_dim, generator=g).to(device)
    codes, scale = reference.quantize(z, bits)
    packed = reference.pack(codes, bits)
    out = torch.full((rows, H + 1, head_dim + 16), float("nan"), device=device).to(out_dtype)
    view = out[:, :H, :head_dim]
    if bits == 8:
        fused_expand.fused_expand_int8(codes, scale, v_decode, mean, view)
    else:
        fused_expand.fused_expand_int4(packed, scale, v_decode, mean, view)
    low_dtype = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float16
    exact, low = (
        reference.expand(reference.dequantize(codes, scale, bits, torch.float64).to(d), v_decode.to(d), mean.to(d))
        for d in (torch.float64, low_dtype)
    )
    assert_within(view, exact, low, torch.finfo(out_dtype).eps, f"fused_expand_int{bits}")
    assert out[:, H].isnan().all() and out[..., head_dim:].isnan().all(), "bytes beside the output were written"
