# SPDX-License-Identifier: Apache-2.0
"""The reference against independent maths: SDPA, exhaustive packing, brute-force rounding, poisoned pages."""

import pytest
import torch
import torch.nn.functional as F

from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.bases import hadamard
from vllm_kvsplice.codec.layout import LatentLayout

F64 = torch.float64


def sdpa(query, key, value, scale, window=None, soft_cap=None):
    """Masked softmax attention of [T, heads, D] over [S, H, D] in fp64, the last T of S being the queries."""
    T, S, group = query.shape[0], key.shape[0], query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    logits = query.transpose(0, 1) @ k.transpose(1, 2) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    hidden = (distance < 0) | (distance >= (window or S + 1))
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_full_rank_without_codes_is_sdpa(window, soft_cap):
    torch.manual_seed(0)
    T, S, H, heads, D = 7, 23, 2, 6, 40
    q, k, v = torch.randn(T, heads, D, dtype=F64), torch.randn(S, H, D, dtype=F64) + 2, torch.randn(S, H, D, dtype=F64)
    E = torch.linalg.qr(torch.randn(H, D, D, dtype=F64))[0]
    mean = torch.randn(H, D, dtype=F64)
    z_k, z_v = (reference.encode(x, E, mean).transpose(0, 1) for x in (k, v))
    q_latent, q_bias = reference.project_query(q, E.transpose(1, 2), mean)
    latent, lse = reference.attend(q_latent, z_k, z_v, 0.3, q_bias, sliding_window=window, soft_cap=soft_cap)
    out = (
        reference.expand(latent.view(T, H, -1, D).transpose(1, 2), E.transpose(1, 2), mean)
        .transpose(1, 2)
        .flatten(1, 2)
    )
    torch.testing.assert_close(out, sdpa(q, k, v, 0.3, window, soft_cap), atol=1e-12, rtol=1e-12)
    if window is None and soft_cap is None:
        builtin = F.scaled_dot_product_attention(
            q[-1:].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[-1:], builtin[0].transpose(0, 1), atol=1e-12, rtol=1e-12)


def test_without_its_bias_a_soft_cap_would_be_wrong():
    torch.manual_seed(1)
    q, z = torch.randn(1, 2, 8, dtype=F64), torch.randn(1, 9, 8, dtype=F64)
    bias = torch.full((1, 2), 4.0, dtype=F64)
    plain, capped = ([reference.attend(q, z, z, 1.0, b, soft_cap=c)[0] for b in (None, bias)] for c in (None, 2.0))
    torch.testing.assert_close(*plain, atol=1e-12, rtol=0)  # softmax ignores a constant
    assert (capped[0] - capped[1]).abs().max() > 1e-2


@pytest.mark.parametrize("cuts", [[0, 11], [0, 1, 11], [0, 4, 4, 9, 11]])
def test_merged_splits_are_the_whole(cuts):
    torch.manual_seed(2)
    T, S, H = 3, 11, 2
    q, z_k, z_v = torch.randn(T, 4, 8, dtype=F64), torch.randn(H, S, 8, dtype=F64), torch.randn(H, S, 24, dtype=F64)
    whole = reference.attend(q, z_k, z_v, 0.5)
    parts = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        parts.append(
            reference.attend(
                q, z_k[:, a:b], z_v[:, a:b], 0.5, q_positions=torch.arange(S - T, S), k_positions=torch.arange(a, b)
            )
        )
    latents, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    latents[lses.isneginf()] = torch.nan  # what an empty split left behind must not matter
    for merged, want in zip(reference.merge_splits(latents, lses), whole, strict=True):
        torch.testing.assert_close(merged, want, atol=1e-12, rtol=0)


def test_nothing_seen_is_zero_and_minus_infinity():
    latent, lse = reference.attend(torch.randn(2, 2, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8), 1.0,
                                   q_positions=torch.tensor([0, 1]), k_positions=torch.tensor([5, 6, 7]))  # fmt: skip
    assert (latent == 0).all() and lse.isneginf().all()
    merged, lse = reference.merge_splits(torch.full((3, 2, 8), torch.nan), torch.full((3, 2), -torch.inf))
    assert (merged == 0).all() and lse.isneginf().all()


# ---------------------------------------------------------------- codes
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_pack_and_unpack_over_all_bytes(bits):
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = reference.unpack(every, bits)
    assert codes.shape == (16, 16 * 8 // bits)
    assert torch.equal(reference.pack(codes, bits), every)


def test_packing_is_planar():
    assert reference.pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist() == [1 | 3 << 4, 2 | 4 << 4]
    assert reference.pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [1 | 2 << 2 | 3 << 4]


def test_scale_bytes_are_all_finite_and_round_up():
    every = torch.arange(256, dtype=torch.uint8)
    scales = reference.scale_of(every, F64)
    assert scales[0] == 2.0**-18 and scales[-1] == 1.875 * 2.0**13
    steps = scales[1:] / scales[:-1]
    assert steps.min() > 1.06 and steps.max() < 1.13
    assert torch.equal(reference.scale_code(scales), every)
    assert torch.equal(reference.scale_code(scales[1:] * (1 - 2.0**-20)), every[1:])
    assert torch.equal(reference.scale_code(scales[:-1] * (1 + 2.0**-20)), every[1:])
    assert reference.scale_code(torch.tensor([0.0, 1e-30, 1e9])).tolist() == [0, 0, 255]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_codes_are_the_nearest_and_unbiased(bits, mean):
    torch.manual_seed(3)
    z = torch.randn(2000, 48, dtype=F64) + mean
    codes, scale = reference.quantize(z, bits)
    assert scale.dtype == torch.uint8 and scale.shape == (2000,)
    levels = torch.arange(-127, 128) if bits == 8 else torch.arange(2**bits)
    decoded = reference.dequantize(codes, scale, bits, F64)
    table = reference.dequantize(levels.expand(2000, -1), scale, bits, F64)  # every value a row could hold
    nearest = (z[:, :, None] - table[:, None, :]).abs().amin(-1)
    torch.testing.assert_close((z - decoded).abs(), nearest, atol=1e-12, rtol=0)
    # truncation instead of rounding would show as half a step; the mean of N uniform errors has std step / sqrt(12 N)
    off = (decoded - z) / reference.scale_of(scale, F64)[:, None]
    inside = off.abs() < 0.5000001  # not clipped
    assert inside.double().mean() > (0.95 if bits > 2 else 0.6)
    assert off[inside].mean().abs() < (4 / (12 * z.numel()) ** 0.5 if bits == 8 else 0.03)


@pytest.mark.parametrize("bits", [4, 2])
def test_the_clip_search_never_loses_to_the_full_range(bits, monkeypatch):
    torch.manual_seed(4)
    z = torch.randn(500, 64, dtype=F64)
    error = {}
    for name, first, count in (
        ("searched", reference.CLIP_FIRST, reference.CLIP_COUNT),
        ("full", {bits: 0}, {bits: 1}),
    ):
        monkeypatch.setattr(reference, "CLIP_FIRST", first)
        monkeypatch.setattr(reference, "CLIP_COUNT", count)
        error[name] = (reference.dequantize(*reference.quantize(z, bits), bits, F64) - z).square().sum(-1)
    assert (error["searched"] <= error["full"]).all()
    assert error["searched"].mean() < (0.9 if bits == 4 else 0.5) * error["full"].mean()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("value", [0.0, 1e-9, 7.5, -7.5, 60000.0, 1e9])
def test_constant_and_extreme_rows_stay_finite(bits, value):
    z = torch.full((3, 16), value, dtype=F64)
    decoded = reference.dequantize(*reference.quantize(z, bits), bits, F64)
    assert torch.isfinite(decoded).all()
    if abs(value) < 2.0**13:  # within a step of the scale code, or as far as 2 bits never cover a row
        torch.testing.assert_close(decoded, z, rtol=0.26 if bits == 2 else 0.07, atol=2**-18)


# ---------------------------------------------------------------- pages
LAYOUT = LatentLayout.of(80, [(16, 8), (8, 40), (4, 24), (2, 8)], [(8, 24), (4, 48), (0, 8)])


def padded_cache(layout, num_blocks, H, block_size, fill=0xFF):
    """A cache whose pages are interleaved with foreign bytes: [num_blocks, H, block_size, C], all ``fill``."""
    page = layout.page_bytes(block_size)
    raw = torch.full((num_blocks, H + 1, page + 64), fill, dtype=torch.uint8)
    cache = raw.as_strided((num_blocks, H, block_size, layout.bytes_per_token_head),
                           (raw.stride(0), raw.stride(1), layout.bytes_per_token_head, 1))  # fmt: skip
    return raw, cache


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("side", ["k", "v"])
def test_what_is_written_is_read_and_nothing_else_is_touched(block_size, side):
    torch.manual_seed(5)
    raw, cache = padded_cache(LAYOUT, 5, 2, block_size)
    plan, rank = LAYOUT.plan(side, block_size), LAYOUT.rank(side)
    z = torch.randn(6, 2, rank, dtype=F64)
    slots = torch.tensor([3 * block_size, 3 * block_size + 15, -1, block_size - 1, 4 * block_size + 2, -1])
    reference.write_side(cache, z, plan, slots, torch.bfloat16)
    want = reference.roundtrip(z, LAYOUT, side)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            got = reference.read_side(cache, plan, torch.tensor([slot // block_size]), F64, torch.bfloat16)
            assert torch.equal(got[:, slot % block_size], want[t])
    kept = int((slots >= 0).sum())
    assert (raw != 0xFF).sum() <= kept * 2 * LAYOUT.side_bytes(side)
    own = LAYOUT.plan(side, block_size)[0].codes_offset
    other = cache.flatten(2)[..., :own] if side == "v" else cache.flatten(2)[..., block_size * LAYOUT.side_bytes("k") :]
    assert (other == 0xFF).all() and (raw[:, 2] == 0xFF).all() and (raw[..., -64:] == 0xFF).all()


@pytest.mark.parametrize("window", [None, 20])
def test_paged_attention_over_shuffled_poisoned_pages(window):
    torch.manual_seed(6)
    block_size, H, heads, D = 16, 2, 6, LAYOUT.head_dim
    lens, news = [37, 1, 0, 64, 5], [1, 1, 0, 9, 5]
    raw, cache = padded_cache(LAYOUT, 16, H, block_size)
    order = iter(torch.randperm(16).tolist())
    table = torch.full((len(lens), 5), 1 << 20, dtype=torch.int32)  # entries past the end are never followed
    E = hadamard(D).expand(H, -1, -1)
    enc = {s: E[:, : LAYOUT.rank(s)] for s in ("k", "v")}
    dec = {s: e.transpose(1, 2) for s, e in enc.items()}
    mean = torch.randn(H, D, dtype=F64)
    query, wants, starts = [], [], [0]
    for b, (S, T) in enumerate(zip(lens, news, strict=True)):
        for i in range(-(-S // block_size)):
            table[b, i] = next(order)
        k, v, q = torch.randn(S, H, D, dtype=F64), torch.randn(S, H, D, dtype=F64), torch.randn(T, heads, D, dtype=F64)
        at = torch.arange(S)
        slots = table[b][at // block_size].long() * block_size + at % block_size
        decoded = {}
        for side, x in (("k", k), ("v", v)):
            z = reference.encode(x, enc[side], mean)
            reference.write_side(cache, z, LAYOUT.plan(side, block_size), slots, torch.bfloat16)
            decoded[side] = reference.expand(reference.roundtrip(z, LAYOUT, side), dec[side], mean)
        query.append(q)
        starts.append(starts[-1] + T)
        if T:
            wants.append(sdpa(q, decoded["k"], decoded["v"], 0.2, window))
    out = reference.paged_attention(
        torch.cat([*query, torch.randn(3, heads, D, dtype=F64)]), cache, LAYOUT, dec["k"], mean, dec["v"], mean, table,
        torch.tensor(lens), torch.tensor(starts), 0.2, sliding_window=window, query_block=4)  # fmt: skip
    torch.testing.assert_close(out[: starts[-1]], torch.cat(wants), atol=1e-10, rtol=0)
    assert (out[starts[-1] :] == 0).all()


def test_caches_of_another_form_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        reference.pages(torch.zeros(1, 1, 16, 8))
    with pytest.raises(ValueError, match="strides"):
        reference.pages(torch.zeros(1, 1, 16, 16, dtype=torch.uint8)[..., ::2])
