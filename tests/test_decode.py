# SPDX-License-Identifier: Apache-2.0
"""decode and reduce_expand, alone and together, against reference.attend, merge_splits and paged_attention."""

from dataclasses import replace
from typing import Any

import kernel_cases as cases
import kernel_checks as checks
import numpy as np
import pytest
import torch

from kvsplice_kernels import row_operands
from kvsplice_kernels.launch import Launch
from vllm_kvsplice.codec import reference


@pytest.mark.parametrize("name", cases.ATTENTION)
def test_attention_matches_reference(name: str) -> None:
    checks.check_attention(cases.ATTENTION[name])


@pytest.mark.parametrize("name", cases.ATTENTION)
def test_queries_as_rows_match_reference(name: str) -> None:
    """In several tiles of rows, as rows=16 makes them, which no file of configs/launch/ may ask for."""
    checks.check_attention(cases.ATTENTION[name], launch=Launch(4, num_stages=2, rows=16))


@pytest.mark.parametrize("name", ["group-8-speculative", "long-query-skip", "wide-fp16", "group-16"])
def test_rows_of_a_real_launch(name: str) -> None:
    checks.check_attention(cases.ATTENTION[name], launch=Launch(4, rows=64))


def one_token_requests(bits: int, scale_bytes: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Requests of one token, one for each scale byte: the workspace that rows leave, and K, V and V's codes [requests, rank]."""
    ones = (1,) * len(scale_bytes)
    batch = cases.make_batch(
        cases.Case(k=((bits, 64),), v=((bits, 64),), seq_lens=ones, query_lens=ones, splits=1, num_kv_heads=1, group=2)
    )
    blocks = batch.block_table[:, 0].long()

    def read(side: str) -> torch.Tensor:
        z = reference.read_side(batch.kv_cache, batch.plan(side), blocks, torch.float64, torch.bfloat16)
        return z.unflatten(1, (len(ones), -1))[0, :, 0][:, list(row_operands.column_order(batch.plan(side)))]

    def put(scales: torch.Tensor) -> None:
        pages = batch.kv_cache[blocks, 0].flatten(1)
        for side in ("k", "v"):
            pages[:, batch.plan(side)[0][4]] = scales.to(pages)
        batch.kv_cache[blocks, 0] = pages.unflatten(1, batch.kv_cache.shape[2:])

    put(torch.full((len(ones),), 18 * 8))  # a scale of 1
    codes = read("v")
    put(scale_bytes)
    work, out = checks.poisoned_workspace(batch), torch.empty(batch.query.shape, device=cases.DEVICE)
    checks.run_kernels(batch, out, work, Launch(4, rows=16))
    return work, read("k"), read("v"), codes


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_unpack_scales_from_2_to_minus_15_on_exactly(bits: int) -> None:
    """Each latent is its token's, but for exp2's last bits; each logit is off by no more than the query's fp16."""
    work, k, v, _ = one_token_requests(bits, torch.arange(24, 256, 7))
    assert ((work.latent[:, :, 0] - v[:, None]).abs() <= 2**-18 * v[:, None].abs()).all()  # rounded to fp16: 2**-12
    terms = work.q_latent.double() * k[:, None] * 0.125
    exact = terms.sum(-1) + work.q_bias * 0.125
    assert ((work.lse[:, :, 0] - exact).abs() <= 2**-11 * terms.abs().sum(-1) + 1e-5).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_round_the_least_scales_to_multiples(bits: int) -> None:
    """Below 2**-15 a scale is off by half of 2**-19, times the code, whose middle is rounded by itself."""
    work, _, v, codes = one_token_requests(bits, torch.arange(24))
    assert ((work.latent[:, :, 0] - v[:, None]).abs() <= 2**-20 * (codes.abs()[:, None] + 2)).all()
    assert (work.latent[:, :, 0] != v[:, None]).any()


def test_stage_1_alone() -> None:
    """Each split is attention over its own run of keys: latent and lse (natural log) match; empty splits say -inf."""
    case = cases.Case(seq_lens=(150,), query_lens=(1,), splits=4, k=cases.A8_4, v=cases.A8_4, group=3, num_kv_heads=1)
    batch = cases.make_batch(case)
    work = checks.poisoned_workspace(batch)
    out = torch.empty(batch.query.shape, device=cases.DEVICE)
    checks.run_kernels(batch, out, work)
    z_k, z_v = (
        reference.read_side(
            batch.kv_cache, batch.plan(s), batch.block_table[0, :10].long(), torch.float64, torch.bfloat16
        )[:, :150]
        for s in ("k", "v")
    )
    _, k_decode, k_mean = (t.double() for t in batch.bases["k"])
    q, bias = reference.project_query(batch.query.double(), k_decode, k_mean)
    assert (work.q_latent - q).abs().max() < 1e-4 * q.abs().max()
    length = 2 * cases.decode.TILE
    for s in range(4):  # 5 tiles of 32 keys: two for each of the first splits
        keys = torch.arange(150, device=q.device)[s * length : (s + 1) * length]
        if len(keys) == 0:
            assert (work.lse[:, :, s] == float("-inf")).all() and work.latent[:, :, s].isnan().all()
            continue
        positions = torch.tensor([149], device=q.device)
        latent, lse = reference.attend(q, z_k[:, keys], z_v[:, keys], 0.125, bias, positions, keys)
        assert (work.lse[:, :, s] - lse).abs().max() < 2e-3
        assert (work.latent[:, :, s] - latent).abs().max() < 2e-3 * latent.abs().max()


@pytest.mark.parametrize("slope", [0.05, -0.05, 0.4])
def test_logits_that_rise_or_fall_from_tile_to_tile(slope: float) -> None:
    """A rise of 2.3, in base 2, a tile of 32 tokens is below the step from which accumulators are scaled, and adds up; 18 is
    above it. V's scales rise as well, so that their unit moves on its own."""
    batch = cases.make_batch(cases.Case(seq_lens=(200,), query_lens=(1,), splits=1, num_kv_heads=1, k=((8, 64),),
                                        v=cases.A8_4, offset=0.0), filled=False)  # fmt: skip
    one = batch.query[0, :1].float() / batch.query[0, :1].float().square().sum() * 8  # logit 1 for the first head
    token = torch.arange(200, device=cases.DEVICE)[:, None, None]
    batch.key = (one * slope * token).to(batch.key.dtype)
    batch.value = (batch.value * (1 + token / 10)).to(batch.value.dtype)
    cases.write_by_reference(batch, batch.kv_cache)
    out = torch.full(batch.query.shape, float("nan"), device=cases.DEVICE)
    checks.run_kernels(batch, out, checks.poisoned_workspace(batch))
    exact, low = (checks.run_reference(batch, dtype) for dtype in (torch.float64, torch.float16))
    checks.assert_within(out, exact, low, torch.finfo(torch.float16).eps, "attention")


def test_stage_2_merges_what_it_is_given() -> None:
    """Unlike lses, empty splits that hold NaN, a row of empty splits alone, and a strided bf16 output."""
    g = torch.Generator().manual_seed(0)
    T, num_heads, splits, rank, head_dim = 3, 4, 5, 40, 80
    latent = torch.randn(T, num_heads, splits, rank, generator=g)
    lse = torch.randn(T, num_heads, splits, generator=g) * 20
    lse[0, :, 1], lse[1, 2], lse[2, 0, :4] = float("-inf"), float("-inf"), float("-inf")
    latent[lse.isinf()] = float("nan")
    v_decode, mean = torch.randn(2, head_dim, rank, generator=g), torch.randn(2, head_dim, generator=g)
    merged, total = reference.merge_splits(latent.double().permute(2, 0, 1, 3), lse.double().permute(2, 0, 1))
    exact = reference.expand(merged.unflatten(1, (2, 2)).transpose(1, 2), v_decode.double(), mean.double())
    exact = torch.where(total.isinf()[..., None], 0.0, exact.transpose(1, 2).flatten(1, 2))
    d = cases.DEVICE
    lens, starts = torch.tensor([9, 9], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    wide = torch.full((T, num_heads, head_dim + 8), float("nan"), dtype=torch.bfloat16, device=d)
    args = [x.to(d) for x in (latent, lse, cases.encode.split(v_decode), mean, lens, starts)]
    cases.reduce_expand.reduce_expand(*args, wide[..., :head_dim], 2)
    low = exact.bfloat16()
    checks.assert_within(wide[..., :head_dim].cpu(), exact, low, torch.finfo(torch.bfloat16).eps, "reduce_expand")
    assert (wide[1, 2, :head_dim] == 0).all() and wide[..., head_dim:].isnan().all()


def test_many_rows_take_the_dot_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """reduce_expand with all heads of a group in one program, as large batches run it."""
    monkeypatch.setattr(cases.reduce_expand, "FEW_ROWS", 0)
    for name in ("int8", "query-lens-1-to-8", "long-query-skip", "query-without-keys"):
        checks.check_attention(cases.ATTENTION[name])


def test_split_count_does_not_change_the_answer() -> None:
    outs = []
    for splits in (1, 2, 5):
        batch = cases.make_batch(replace(cases.ATTENTION["window"], splits=splits))
        out = torch.full(batch.query.shape, float("nan"), device=cases.DEVICE)
        checks.run_kernels(batch, out)
        outs.append(out)
    assert (outs[0] - outs[1]).abs().max() < 1e-3 and (outs[0] - outs[2]).abs().max() < 1e-3


def test_foreign_bytes_never_count() -> None:
    """Two caches that differ in every byte that no token owns, and foreign block ids: bit-equal outputs."""
    outs = []
    for fill in (0xFF, 0x00, 0x7C):
        batch = cases.make_batch(replace(cases.ATTENTION["wide-fp16"], seq_lens=(5, 21)), filled=False)
        batch.storage.fill_(fill)
        cases.write_by_reference(batch, batch.kv_cache)
        out = torch.full(batch.query.shape, float("nan"), device=cases.DEVICE)
        checks.run_kernels(batch, out)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_model_dtypes_of_the_output() -> None:
    batch = cases.make_batch(cases.Case())
    exact = checks.run_reference(batch, torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.full(batch.query.shape, float("nan"), dtype=dtype, device=cases.DEVICE)
        checks.run_kernels(batch, out)
        low = checks.run_reference(batch, torch.float16)
        checks.assert_within(out, exact, low, torch.finfo(dtype).eps, str(dtype))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("block_table", lambda b: setattr(b, "block_table", b.block_table.long())),
        ("seq_lens", lambda b: setattr(b, "seq_lens", b.seq_lens.long())),
        ("query_start_loc", lambda b: setattr(b, "query_start_loc", b.query_start_loc[:-1])),
        ("kv_cache", lambda b: setattr(b, "kv_cache", b.kv_cache.view(torch.int8))),
        ("query", lambda b: setattr(b, "query", b.query[:, :3])),
        ("v_mean", lambda b: b.bases.update(v=(b.bases["v"][0], b.bases["v"][1], b.bases["v"][2].half()))),
    ],
)
def test_wrong_arguments_are_named(name: str, change) -> None:
    batch = cases.make_batch(cases.Case())
    out = torch.empty(batch.query.shape, device=cases.DEVICE)
    change(batch)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        checks.run_kernels(batch, out[:, : batch.query.shape[1]])


def test_chosen_splits_fill_the_gpu_and_no_more() -> None:
    choose = cases.attention.choose_num_splits
    assert choose(1, 4, 32768, 132) == 256
    assert choose(16, 4, 32768, 132) == 16
    assert choose(64, 4, 4096, 132) == 4
    assert choose(256, 4, 2048, 132) == 1
    assert choose(64, 4, 100, 132) == 1
    assert choose(1000, 8, 10**6, 132) == 1


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_ptx_that_unpacks_words_does_what_is_interpreted(bits: int) -> None:
    """What the interpreter does not run: words through the instructions of _words_asm, in numpy, with a scale of 1 / 2."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, 4096, dtype=np.uint64).astype(np.uint32)
    count, middle = 16 // bits, 0.0 if bits == 8 else (2**bits - 1) / 2

    def twice(value: float) -> np.ndarray:
        return np.full((words.size, 2), value, np.float16).view(np.uint32)[:, 0]

    registers = dict(zip((f"${count + i}" for i in range(3)), (words, twice(0.5), twice(-middle / 2)), strict=True))
    for line in filter(None, (line.strip() for line in row_operands._words_asm.fn(bits).strip("{ }").split(";"))):
        name, target, *given = line.replace(",", "").split()
        if name == ".reg":
            continue
        values = [registers[x] if x in registers else np.full_like(words, int(x, 0)) for x in given]
        if name.endswith("f16x2"):
            a, *others = (x.copy().view(np.float16).astype(np.float64) for x in values)
            for b in others[:1]:
                a = a * b if name[:3] in ("mul", "fma") else a + b
            a = a + others[1] if name.startswith("fma") else a
            registers[target] = a.astype(np.float16).view(np.uint32)
        elif name == "lop3.b32":
            assert (values[3] == 0x6A).all()  # (a & b) ^ c
            registers[target] = values[0] & values[1] ^ values[2]
        elif name == "shr.u32":
            registers[target] = values[0] >> values[1]
        else:
            assert name == "mov.b32"
            registers[target] = values[0]
    for k in range(count):
        got = registers[f"${k}"].view(np.float16).reshape(-1, 2)
        for half in range(2):
            code = (words >> np.uint32(k * bits + 16 * half) & np.uint32((1 << bits) - 1)).astype(np.int64)
            code = (code ^ 0x80) - 128 if bits == 8 else code
            assert np.array_equal(got[:, half], ((code - middle) / 2).astype(np.float16))
