# SPDX-License-Identifier: Apache-2.0
"""What every operation means, in plain torch, on any device, up to fp64.

The Triton kernels are tested against this file, the offline scoring runs through it, and it serves where Triton has no
device. Notation: ``x`` a key or value, ``z`` its latent; E ``encode`` [rank, head_dim], D ``decode`` [head_dim, rank],
mu ``mean``. With z = E(x - mu) and x^ = Dz + mu attention commutes with the projection: sum_t p_t x^_t =
D(sum_t p_t z_t) + mu because sum_t p_t = 1, and q.k^_t = (D^T q).z_t + q.mu.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_kvsplice.codec.layout import PAIRED_RUN, LatentLayout, Side, TierPlan, runs, unit_of

# A scale is one byte: 5 bits of exponent and 3 of mantissa, without sign, zero, infinities or NaN. Whatever lies in memory
# is a finite scale, and one step of the code is 7 to 13 % of it. (NVFP4 and MX store their block scales in 8 bits as well,
# https://arxiv.org/abs/2310.10537.)
LEAST_EXPONENT = -18  # scales from 2**-18 to 1.875 * 2**13
# Clip candidates: scales CLIP_FIRST .. CLIP_FIRST + CLIP_COUNT - 1 steps of the code below the one that covers the row; the one
# with the least squared error is kept. At 8 bits clipping never wins on rotated latents; at 2 covering never does.
CLIP_FIRST, CLIP_COUNT = {8: 0, 4: 0, 2: 3}, {8: 1, 4: 4, 2: 8}


# ---------------------------------------------------------------- latents
def encode(x: Tensor, encode: Tensor, mean: Tensor) -> Tensor:
    """Project to latents: [..., H, head_dim] with [H, rank, head_dim] and [H, head_dim] -> [..., H, rank]."""
    return torch.einsum("...hd,hrd->...hr", x - mean, encode)


def expand(z: Tensor, decode: Tensor, mean: Tensor) -> Tensor:
    """Project back: [..., H, rank] with [H, head_dim, rank] and [H, head_dim] -> [..., H, head_dim]."""
    return torch.einsum("...hr,hdr->...hd", z, decode) + mean


def project_query(query: Tensor, decode: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries into the latent space of K.

    Args:
        query: [T, num_heads, head_dim]; query head h reads KV head h // (num_heads // H).
        decode: [H, head_dim, rank], mean: [H, head_dim], of K.
    Returns:
        q_latent [T, num_heads, rank] = D^T q and q_bias [T, num_heads] = q.mu, so that q.k^ = q_latent.z + q_bias.
    """
    T, num_heads, head_dim = query.shape
    q = query.view(T, decode.shape[0], -1, head_dim)
    q_latent = torch.einsum("thgd,hdr->thgr", q, decode)
    q_bias = torch.einsum("thgd,hd->thg", q, mean)
    return q_latent.reshape(T, num_heads, -1), q_bias.reshape(T, num_heads)


# ---------------------------------------------------------------- codes
def middle(bits: int) -> float:
    """The code, or half-way point between two codes, that stands for zero: levels lie symmetrically around it."""
    return 0.0 if bits == 8 else (2**bits - 1) / 2


def scale_of(scale_code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale bytes [...] uint8 -> scales: 2**(code // 8 + LEAST_EXPONENT) * (1 + code % 8 / 8)."""
    code = scale_code.to(torch.int32)
    bits = (code << 20) + ((127 + LEAST_EXPONENT) << 23)  # of the fp32 number
    return bits.view(torch.float32).to(dtype)


def scale_code(scale: Tensor) -> Tensor:
    """The least scale that is not below ``scale`` [...], as a byte, uint8; the greatest where there is none."""
    bits = scale.to(torch.float32).contiguous().view(torch.int32)
    code = ((bits + 0xFFFFF) >> 20) - ((127 + LEAST_EXPONENT) << 3)
    return code.clamp(0, 255).to(torch.uint8)


def quantize(z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise one tier, each row (token, head) by itself.

    Args:
        z: [..., dims] latents of the tier, fp32 or fp64. bits: 8, 4 or 2.
    Returns:
        codes [..., dims] (int8 in [-127, 127] at 8 bits, else uint8 in [0, 2**bits - 1]) and scale bytes [...] uint8.
        Codes are rounded to nearest with the scale as stored, so that decoding is exact about what was kept.
    """
    low, high = (-127, 127) if bits == 8 else (0, 2**bits - 1)
    covers = scale_code(z.abs().amax(-1) / (high - middle(bits))).to(torch.int32)
    first, count = CLIP_FIRST[bits], CLIP_COUNT[bits]
    tried = torch.arange(first, first + count, device=z.device, dtype=torch.int32)
    scale = (covers - tried.view(-1, *[1] * covers.dim())).clamp_min(0).to(torch.uint8)  # [count, ...]

    def codes_of(scale: Tensor) -> Tensor:
        return (z / scale_of(scale, z.dtype)[..., None]).add_(middle(bits)).round_().clamp_(low, high)

    if count > 1:
        errors = dequantize(codes_of(scale), scale, bits, z.dtype).sub_(z).square_().sum(-1)
        scale = scale.gather(0, errors.argmin(0, keepdim=True))  # the first of equals
    return codes_of(scale[0]).to(torch.int8 if bits == 8 else torch.uint8), scale[0]


def dequantize(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes [..., dims] with scale bytes [...] -> latents [..., dims] in ``dtype``: (code - middle) * scale."""
    return (codes.to(dtype) - middle(bits)) * scale_of(scale, dtype)[..., None]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., dims] of 8, 4 or 2 bits -> uint8 [..., dims * bits // 8].

    Planar: with n bytes per row, byte i holds dimensions i, n + i, 2n + i, ... from its lowest bits up, so that one
    shift and mask of a row of bytes gives n consecutive dimensions.
    """
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: int8 at 8 bits, else uint8."""
    if bits == 8:
        return packed.contiguous().view(torch.int8)
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=-1)


def roundtrip(z: Tensor, layout: LatentLayout, side: Side, wide_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Quantise and dequantise latents [..., rank] without a cache: what a reader of the cache will see, in z's dtype."""
    parts = []
    start = 0
    for tier in layout.tiers(side):
        if tier.bits == 0:
            continue
        part = z[..., start : start + tier.dims]
        parts.append(
            part.to(wide_dtype).to(z.dtype)
            if tier.bits == 16
            else dequantize(*quantize(part, tier.bits), tier.bits, z.dtype)
        )
        start += tier.dims
    return torch.cat(parts, dim=-1)


# ---------------------------------------------------------------- the paged cache
def pages(kv_cache: Tensor) -> Tensor:
    """View a cache [num_blocks, H, block_size, C] uint8 as pages [num_blocks, H, block_size * C].

    The two outer strides are the cache's own: pages may be padded or interleaved with other layers'.
    """
    num_blocks, H, block_size, C = kv_cache.shape
    if kv_cache.dtype != torch.uint8 or kv_cache.stride(3) != 1 or kv_cache.stride(2) != C:
        raise ValueError(
            f"kv_cache: expected uint8 with contiguous (block_size, C) cells, got {kv_cache.dtype} with strides {kv_cache.stride()}"
        )
    return kv_cache.as_strided((num_blocks, H, block_size * C), (kv_cache.stride(0), kv_cache.stride(1), 1))


def _plane(kv_cache: Tensor, offset: int, bytes_per_token: int) -> Tensor:
    """One plane of all pages: [num_blocks, H, block_size, bytes_per_token] uint8, a view."""
    page, block_size = pages(kv_cache), kv_cache.shape[2]
    return page[..., offset : offset + block_size * bytes_per_token].unflatten(-1, (block_size, bytes_per_token))


def scale_plane(kv_cache: Tensor, tier: TierPlan) -> Tensor:
    """A tier's scale bytes in all pages: [num_blocks, H, block_size] uint8, a view."""
    return _plane(kv_cache, tier.scale_offset, 1)[..., 0]


def write_side(
    kv_cache: Tensor, z: Tensor, plan: tuple[TierPlan, ...], slot_mapping: Tensor, wide_dtype: torch.dtype
) -> None:
    """Quantise latents [T, H, rank] and scatter them; slot = block * block_size + offset, -1 is skipped. In place."""
    block_size = kv_cache.shape[2]
    kept = slot_mapping >= 0
    slots, z = slot_mapping[kept].long(), z[: slot_mapping.shape[0]][kept]
    block, row = slots // block_size, slots % block_size
    for tier in plan:
        part = z[..., tier.start : tier.start + tier.dims]
        if tier.bits == 16:
            stored = part.to(wide_dtype).contiguous().view(torch.uint8)
        else:
            codes, scale = quantize(part, tier.bits)
            stored = pack(codes, tier.bits)
            scale_plane(kv_cache, tier)[block, :, row] = scale
        parts = stored.split(_run_bytes(tier), dim=-1)
        for (plane, units), part in zip(_code_planes(kv_cache, tier), parts, strict=True):
            plane[block, :, row if units is None else units[row]] = part


def read_codes(kv_cache: Tensor, tier: TierPlan, block_ids: Tensor) -> Tensor:
    """A tier's packed codes in some blocks: [n, H, block_size, bytes] uint8."""
    runs_of_blocks = []
    for plane, units in _code_planes(kv_cache, tier):
        found = plane[block_ids]
        runs_of_blocks.append(found if units is None else found[:, :, units])
    return torch.cat(runs_of_blocks, dim=-1)


@lru_cache(maxsize=64)
def _units(block_size: int, device: torch.device) -> Tensor:
    """unit_of every token of a block: [block_size] int64."""
    return torch.tensor([unit_of(token) for token in range(block_size)], device=device)


def _code_planes(kv_cache: Tensor, tier: TierPlan) -> list[tuple[Tensor, Tensor | None]]:
    """Run by run: [num_blocks, H, block_size, bytes] uint8, a view, and where in it each token is, None for its own place."""
    planes: list[tuple[Tensor, Tensor | None]] = []
    offset = tier.codes_offset
    for size in _run_bytes(tier):
        paired = tier.pairs and tier.bits < 16 and size == PAIRED_RUN
        planes.append((_plane(kv_cache, offset, size), _units(tier.block_size, kv_cache.device) if paired else None))
        offset += size * tier.block_size
    return planes


def _run_bytes(tier: TierPlan) -> list[int]:
    unit = 2 if tier.bits == 16 else 1
    return [unit * length for _, length in runs(tier.dims * tier.bits // 8 // unit)]


def read_side(
    kv_cache: Tensor, plan: tuple[TierPlan, ...], block_ids: Tensor, dtype: torch.dtype, wide_dtype: torch.dtype
) -> Tensor:
    """Dequantise whole blocks [n] -> latents [H, n * block_size, rank] in ``dtype``; rows never written hold anything."""
    parts = []
    for tier in plan:
        raw = read_codes(kv_cache, tier, block_ids)
        if tier.bits == 16:
            parts.append(raw.view(wide_dtype).to(dtype))
            continue
        scale = scale_plane(kv_cache, tier)[block_ids]
        parts.append(dequantize(unpack(raw, tier.bits), scale, tier.bits, dtype))
    z = torch.cat(parts, dim=-1)  # [n, H, block_size, rank]
    return z.transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- attention
def attend(
    q_latent: Tensor,
    z_k: Tensor,
    z_v: Tensor,
    scale: float,
    q_bias: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention in latent space over one sequence, or over a split of it.

    Args:
        q_latent: [T, num_heads, k_rank]; z_k: [H, S, k_rank]; z_v: [H, S, v_rank].
        scale: softmax scale of the uncompressed attention. q_bias: [T, num_heads], q.mu of K (default zero).
        q_positions, k_positions: [T] and [S] token positions (default: the last T of S, and 0..S-1).
        sliding_window: a query sees keys at distance < sliding_window. soft_cap: logits become cap * tanh(logit / cap).
    Returns:
        latents [T, num_heads, v_rank], and lse [T, num_heads], natural log, -inf (with latents 0) where nothing is seen.
    """
    T, num_heads, _ = q_latent.shape
    H, S, _ = z_k.shape
    q_positions = torch.arange(S - T, S, device=z_k.device) if q_positions is None else q_positions
    k_positions = torch.arange(S, device=z_k.device) if k_positions is None else k_positions
    logits = torch.einsum("thgr,hsr->thgs", q_latent.view(T, H, num_heads // H, -1), z_k)
    if q_bias is not None:
        logits = logits + q_bias.view(T, H, -1, 1)
    logits = logits * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    distance = q_positions[:, None] - k_positions[None, :]
    seen = distance >= 0
    if sliding_window:
        seen &= distance < sliding_window
    logits = logits.masked_fill(~seen[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    p = torch.exp(logits - torch.where(lse.isinf(), 0.0, lse)[..., None])
    latent = torch.einsum("thgs,hsr->thgr", p, z_v)
    return latent.reshape(T, num_heads, -1), lse.reshape(T, num_heads)


def merge_splits(latents: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint splits of the keys: [splits, ..., r] and natural-log lses [splits, ...].

    Returns the latents and lse of the union; 0 and -inf where every split is empty. Latents of empty splits (lse -inf)
    are not read, so they may hold anything. Flash-Decoding, https://pytorch.org/blog/flash-decoding/.
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(lse.isinf(), 0.0, lse))
    latents = torch.where(lses.isneginf()[..., None], 0.0, latents)
    return (latents * weights[..., None]).sum(0), lse


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: LatentLayout,
    k_decode: Tensor,
    k_mean: Tensor,
    v_decode: Tensor,
    v_mean: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    wide_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.float64,
    query_block: int = 256,
) -> Tensor:
    """Attention of a batch over its compressed pages, the cache already holding this step's tokens.

    Args:
        query: [T, num_heads, head_dim], requests one after another as ``query_start_loc`` [B + 1] says.
        kv_cache: [num_blocks, H, block_size, C] uint8. block_table: [B, max_blocks]. seq_lens: [B], new tokens included.
        k_decode, k_mean, v_decode, v_mean: [H, head_dim, rank] and [H, head_dim].
        dtype: of all arithmetic. query_block: rows of one request attended at a time, which bounds memory.
    Returns:
        [T, num_heads, head_dim] in ``dtype``; 0 in rows that belong to no request or see no key.
    """
    block_size = kv_cache.shape[2]
    plan_k, plan_v = layout.plans(block_size)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    k_decode, k_mean, v_decode, v_mean = (t.to(dtype) for t in (k_decode, k_mean, v_decode, v_mean))
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    group = query.shape[1] // v_decode.shape[0]
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        S = lens[b]
        if end == start or S == 0:
            continue
        first = max(0, S - (end - start) - sliding_window + 1) // block_size if sliding_window else 0
        blocks = block_table[b, first : -(-S // block_size)].long()
        positions = torch.arange(first * block_size, S, device=query.device)
        z_k, z_v = (read_side(kv_cache, p, blocks, dtype, wide_dtype)[:, : len(positions)] for p in (plan_k, plan_v))
        for a in range(start, end, query_block):
            e = min(end, a + query_block)
            q_latent, q_bias = project_query(query[a:e].to(dtype), k_decode, k_mean)
            q_positions = torch.arange(S - (end - a), S - (end - e), device=query.device)
            latent, lse = attend(q_latent, z_k, z_v, scale, q_bias, q_positions, positions, sliding_window, soft_cap)
            full = (
                expand(latent.unflatten(1, (-1, group)).transpose(1, 2), v_decode, v_mean).transpose(1, 2).flatten(1, 2)
            )
            out[a:e] = torch.where(lse.isneginf()[..., None], 0.0, full)
    return out
