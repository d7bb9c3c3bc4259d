# SPDX-License-Identifier: Apache-2.0
"""expand_cached against reference.dequantize and expand; copy_fresh."""

from collections.abc import Iterator

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch
from kernel_cases import expand_cached

A8_4 = cases.A8_4


@pytest.fixture(params=[1, 1000], ids=["few-programs", "a-tile-each"], autouse=True)
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many tiles in a program, as on a long context, or one."""
    monkeypatch.setattr(expand_cached, "PROGRAMS", request.param)
    expand_cached.expand_tiles.cache_clear()
    yield
    expand_cached.expand_tiles.cache_clear()


@pytest.mark.parametrize("name", cases.EXPAND_CACHED)
def test_straight_from_pages(name: str) -> None:
    checks.check_expand_cached(*cases.EXPAND_CACHED[name])


def test_ranges_of_tokens() -> None:
    """Rows from ``starts`` on, finite below ``firsts`` whatever the bytes there, none for a request that ends at 0."""
    batch = cases.make_batch(cases.Case(k=A8_4, v=A8_4, seq_lens=(200, 50, 150), query_lens=(1, 1, 1)))
    table, both = batch.block_table, (batch.plan("k"), batch.plan("v"))
    bases = batch.bases["k"][1:], batch.bases["v"][1:]
    starts, firsts, ends, bounds = (
        torch.tensor(x, dtype=torch.int32, device=cases.DEVICE)
        for x in ([64, 0, 128], [100, 0, 130], [190, 0, 150], [0, 126, 129, 151])
    )
    whole = torch.empty(2, 400, 2, 64, device=cases.DEVICE)
    every = torch.tensor([0, 200, 250, 400], dtype=torch.int32, device=cases.DEVICE)
    args = (batch.kv_cache, *both, table, batch.seq_lens, every, *bases, *whole, 200)
    expand_cached.expand_cached(*args, wide_dtype=batch.wide_dtype)
    table[0, : 100 // 16] = cases.FOREIGN_BLOCK
    out = torch.full((2, 155, 2, 64), float("nan"), device=cases.DEVICE)
    args = (batch.kv_cache, *both, table, ends, bounds, *bases, *out, 126)
    expand_cached.expand_cached(*args, batch.wide_dtype, starts, firsts)
    assert torch.equal(out[:, 36:126], whole[:, 100:190]) and torch.equal(out[:, 131:151], whole[:, 380:400])
    assert out[:, :36].isfinite().all() and out[:, 129:131].isfinite().all()
    assert out[:, 126:129].isnan().all() and out[:, 151:].isnan().all()


@pytest.mark.parametrize("scale", [1e-6, 1e7])
def test_bases_of_any_magnitude(scale: float) -> None:
    """D holds the sigmas, so its numbers may lie outside fp16."""
    batch = cases.make_batch(cases.Case(k=A8_4, v=A8_4, seq_lens=(30,), query_lens=(1,)))
    bounds = torch.tensor([0, 30], dtype=torch.int32, device=cases.DEVICE)
    results = []
    for factor in (1.0, scale):
        out = torch.empty(2, 30, 2, 64, device=cases.DEVICE)
        bases = (tuple(x * factor for x in batch.bases[side][1:]) for side in ("k", "v"))
        args = (batch.kv_cache, batch.plan("k"), batch.plan("v"), batch.block_table, batch.seq_lens, bounds, *bases)
        expand_cached.expand_cached(*args, *out, 30, batch.wide_dtype)
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
    expand_cached.copy_fresh(key[:90], value[:90], bounds, ends, rows, *outs)
    for out, x in zip(outs, (key, value), strict=True):
        assert torch.equal(out[5:75], x[:70]) and torch.equal(out[200:215], x[75:90])
        assert out[:5].isnan().all() and out[75:200].isnan().all() and out[215:].isnan().all()


def test_wrong_arguments_are_named() -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    bases = batch.bases["k"][1:], batch.bases["v"][1:]
    starts = torch.zeros(2, dtype=torch.int32, device=cases.DEVICE)
    outs = torch.empty(2, 38, 2, 64, device=cases.DEVICE)
    bounds = torch.zeros(3, dtype=torch.int32, device=cases.DEVICE)
    args = (batch.kv_cache, batch.plan("k"), batch.plan("v"), batch.block_table, batch.seq_lens, bounds)
    with pytest.raises(ValueError, match="^firsts: expected starts and firsts together"):
        expand_cached.expand_cached(*args, *bases, *outs, 37, torch.float16, starts)
    with pytest.raises(ValueError, match="^starts: expected contiguous torch.int32"):
        expand_cached.expand_cached(*args, *bases, *outs, 37, torch.float16, starts.long(), starts)
    with pytest.raises(ValueError, match="^v_mean: expected contiguous torch.float32"):
        expand_cached.expand_cached(*args, bases[0], (bases[1][0], bases[1][1].half()), *outs, 37)
    with pytest.raises(ValueError, match="^value: expected torch.float32"):
        expand_cached.expand_cached(*args, *bases, outs[0], outs[1].half(), 37)
    with pytest.raises(ValueError, match=r"^key: expected shape \(38, 2, 64\), got \(38, 2, 32\)"):
        expand_cached.expand_cached(*args, *bases, *outs[..., :32], 37)
    key = torch.empty(4, 2, 64, device=cases.DEVICE)
    with pytest.raises(ValueError, match="^value_out: expected torch.float32"):
        expand_cached.copy_fresh(key, key, bounds, starts, bounds, key, key.half())
    with pytest.raises(ValueError, match="^value_out: expected the strides"):
        expand_cached.copy_fresh(key, key, bounds, starts, bounds, key, checks.with_gaps(key)[:4])
