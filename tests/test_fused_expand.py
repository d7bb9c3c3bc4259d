# SPDX-License-Identifier: Apache-2.0
"""fused_expand_int8, fused_expand_int4 and expand_cached against reference.dequantize and expand; copy_fresh."""

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch

A8_4 = cases.A8_4


@pytest.mark.parametrize("name", cases.EXPAND)
def test_loose_codes(name: str) -> None:
    checks.check_fused_expand(*cases.EXPAND[name])


@pytest.mark.parametrize("name", cases.EXPAND_CACHED)
def test_straight_from_pages(name: str) -> None:
    checks.check_expand_cached(*cases.EXPAND_CACHED[name])


def test_all_codes_decode_exactly() -> None:
    """Every int8 code and every pair of nibbles, through an identity basis in fp32."""
    device = cases.DEVICE
    eye, mean = torch.eye(64, device=device)[None].contiguous(), torch.zeros(1, 64, device=device)
    scale = cases.reference.scale_code(torch.full((4, 1), 0.5, device=device))
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device).view(4, 1, 64)
    out = torch.full((4, 1, 64), float("nan"), device=device)
    cases.fused_expand.fused_expand_int8(codes, scale, eye, mean, out)
    assert torch.equal(out, codes.float() * 0.5)
    packed = torch.arange(256, device=device).to(torch.uint8).view(8, 1, 32)
    out = torch.full((8, 1, 64), float("nan"), device=device)
    cases.fused_expand.fused_expand_int4(packed, scale.repeat(2, 1), eye, mean, out)
    assert torch.equal(out, (torch.cat([packed & 15, packed >> 4], -1).float() - 7.5) * 0.5)


@pytest.mark.parametrize("rows", [0, cases.fused_expand.LONG_ROWS], ids=["short-runs", "long-runs"])
def test_ranges_of_tokens(rows: int) -> None:
    """Rows from ``starts`` on, finite below ``firsts`` whatever the bytes there, none for a request that ends at 0."""
    batch = cases.make_batch(cases.Case(k=A8_4, v=A8_4, seq_lens=(200, 50, 150), query_lens=(1, 1, 1)))
    table, plan, (_, decode, mean) = batch.block_table, batch.plan("v"), batch.bases["v"]
    starts, firsts, ends, bounds = (
        torch.tensor(x, dtype=torch.int32, device=cases.DEVICE)
        for x in ([64, 0, 128], [100, 0, 130], [190, 0, 150], [0, 126, 129, 151])
    )
    whole = torch.empty(400, 2, 64, device=cases.DEVICE)
    every = torch.tensor([0, 200, 250, 400], dtype=torch.int32, device=cases.DEVICE)
    args = (batch.kv_cache, plan, table, batch.seq_lens, every, decode, mean, whole, 200)
    cases.fused_expand.expand_cached(*args, wide_dtype=batch.wide_dtype)
    table[0, : 100 // 16] = cases.FOREIGN_BLOCK
    out = torch.full((155 + rows, 2, 64), float("nan"), device=cases.DEVICE)
    args = (batch.kv_cache, plan, table, ends, bounds, decode, mean, out, 126)
    cases.fused_expand.expand_cached(*args, batch.wide_dtype, starts, firsts)
    assert torch.equal(out[36:126], whole[100:190]) and torch.equal(out[131:151], whole[380:400])
    assert out[:36].isfinite().all() and out[129:131].isfinite().all()
    assert out[126:129].isnan().all() and out[151:].isnan().all()


@pytest.mark.parametrize("scale", [1e-6, 1e7])
def test_bases_of_any_magnitude(scale: float) -> None:
    """D holds the sigmas, so its numbers may lie outside fp16."""
    batch = cases.make_batch(cases.Case(v=A8_4, seq_lens=(30,), query_lens=(1,)))
    _, decode, mean = batch.bases["v"]
    bounds = torch.tensor([0, 30], dtype=torch.int32, device=cases.DEVICE)
    results = []
    for factor in (1.0, scale):
        out = torch.empty(30, 2, 64, device=cases.DEVICE)
        args = (
            batch.kv_cache,
            batch.plan("v"),
            batch.block_table,
            batch.seq_lens,
            bounds,
            decode * factor,
            mean * factor,
        )
        cases.fused_expand.expand_cached(*args, out, 30, batch.wide_dtype)
        results.append(out / factor)
    assert (results[0] - results[1]).abs().max() <= 2**-20 * results[0].abs().max()


def test_fresh_keys_and_values_are_copied_beside() -> None:
    """Requests with seq_len 0 only, to the rows that cu_seqlens gives them, from strided inputs."""
    g = torch.Generator().manual_seed(0)
    key, value = (
        checks.with_gaps(torch.randn(90, 3, 80, generator=g).to(cases.DEVICE, torch.bfloat16)) for _ in range(2)
    )
    bounds, rows, ends = (
        torch.tensor(x, dtype=torch.int32, device=cases.DEVICE)
        for x in ([0, 70, 75, 90], [5, 75, 200, 215], [0, 130, 0])
    )
    outs = [torch.full((220, 3, 80), float("nan"), device=cases.DEVICE).bfloat16() for _ in range(2)]
    cases.fused_expand.copy_fresh(key[:90], value[:90], bounds, ends, rows, *outs)
    for out, x in zip(outs, (key, value), strict=True):
        assert torch.equal(out[5:75], x[:70]) and torch.equal(out[200:215], x[75:90])
        assert out[:5].isnan().all() and out[75:200].isnan().all() and out[215:].isnan().all()


def test_wrong_arguments_are_named() -> None:
    codes, scale = torch.zeros(4, 2, 64, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8)
    v_decode, mean, out = torch.zeros(2, 64, 64), torch.zeros(2, 64), torch.zeros(4, 2, 64)
    with pytest.raises(ValueError, match="^codes: expected"):
        cases.fused_expand.fused_expand_int8(codes.view(torch.uint8), scale, v_decode, mean, out)
    with pytest.raises(ValueError, match="^scale: expected"):
        cases.fused_expand.fused_expand_int8(codes, scale.float(), v_decode, mean, out)
    with pytest.raises(ValueError, match="^packed: expected"):
        cases.fused_expand.fused_expand_int4(codes.view(torch.uint8), scale, v_decode, mean, out)


def test_wrong_ranges_are_named() -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    _, decode, mean = batch.bases["v"]
    starts = torch.zeros(2, dtype=torch.int32, device=cases.DEVICE)
    out = torch.empty(38, 2, 64, device=cases.DEVICE)
    args = (batch.kv_cache, batch.plan("v"), batch.block_table, batch.seq_lens, torch.zeros_like(starts).repeat(2)[:3])
    with pytest.raises(ValueError, match="^firsts: expected starts and firsts together"):
        cases.fused_expand.expand_cached(*args, decode, mean, out, 37, torch.float16, starts)
    with pytest.raises(ValueError, match="^starts: expected contiguous torch.int32"):
        cases.fused_expand.expand_cached(*args, decode, mean, out, 37, torch.float16, starts.long(), starts)
    key = torch.empty(4, 2, 64, device=cases.DEVICE)
    with pytest.raises(ValueError, match="^value_out: expected torch.float32"):
        cases.fused_expand.copy_fresh(key, key, args[4], starts, args[4], key, key.half())
    with pytest.raises(ValueError, match="^value_out: expected the strides"):
        cases.fused_expand.copy_fresh(key, key, args[4], starts, args[4], key, checks.with_gaps(key)[:4])
