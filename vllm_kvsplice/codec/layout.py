# SPDX-License-Identifier: Apache-2.0
"""Where every byte of a compressed cache page is: the one place that counts bytes.

A latent vector (the rotated key or value of one token and KV head) is cut into contiguous *tiers* of one bit width
each, most important dimensions first. A page, the bytes of one (block, KV head), is a row of *planes*, each contiguous
over the block's tokens:

    K codes by tier | K scales by tier | V codes by tier | V scales by tier

A tier's codes are cut into runs of a power of two of elements (``runs``), each a plane of its own, so that 16 tokens of a
run are one stretch of bytes without gaps: copies of odd row lengths cost GPUs half their bandwidth. Runs of 16 bytes of V
hold the tokens t and t + 8 of each 16 side by side (``unit_of``). A scale plane holds one byte per token
(``reference.scale_of``).

A block size that is a multiple of 16 puts every plane on a 16-byte boundary. Kernels, cache spec and projector file
all take their numbers from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from vllm_kvsplice.errors import KVSpliceError

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")
BIT_WIDTHS = (16, 8, 4, 2, 0)
BLOCK_MULTIPLE = 16  # tokens: puts every plane on 16 bytes, whatever the bytes per token
# Tokens of a page unless the server is told otherwise. With vLLM's 16 the attention of a long decode step takes 6 % longer
# (docs/results/kernels-h200.json).
PREFERRED_BLOCK_SIZE = 64
TIER_MULTIPLE = 8  # dimensions: whole 16-bit words for 2-bit codes
MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Tier:
    """``dims`` consecutive latent dimensions stored with ``bits`` bits each.

    16 bits is the model's own 16-bit float; 8, 4 and 2 bits are codes with one scale per token, symmetric around zero.
    0 bits: dropped, decoded as zero.
    """

    bits: int
    dims: int

    @property
    def code_bytes(self) -> int:
        """Bytes of codes per token and head."""
        return self.dims * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of scale per token and head: one, but for floats and for what is dropped."""
        return int(0 < self.bits < 16)


class TierPlan(NamedTuple):
    """One stored tier with its place in a page; plain integers, so that a kernel can take it as a constant.

    Offsets are bytes from the start of the (block, KV head) page; -1 where the tier has no such plane.
    """

    bits: int
    dims: int
    start: int  # first latent dimension of the tier
    codes_offset: int
    scale_offset: int
    block_size: int
    pairs: bool  # whether runs of 16 bytes hold tokens in pairs: V's, see unit_of


def runs(elements: int) -> list[tuple[int, int]]:
    """(first, length) of the runs of a row of ``elements``: its binary digits, greatest first."""
    found, first = [], 0
    while first < elements:
        length = 1 << ((elements - first).bit_length() - 1)
        found.append((first, length))
        first += length
    return found


PAIRED_RUN = 16  # bytes


def unit_of(token: int) -> int:
    """Place of a block's token in a run that holds tokens in pairs: 0, 8, 1, 9, ... of each 16.

    Two tokens make a row of 32 bytes, 16 words as the dot of V wants them, of which 16 bytes alone are half.
    """
    return token // 16 * 16 + token % 8 * 2 + token % 16 // 8


@dataclass(frozen=True)
class LatentLayout:
    """Tiers of K and of V for one layer; every KV head of the layer has the same ones.

    Raises KVSpliceError if a side's tiers are not falling in bits, not multiples of 8 dimensions, or do not add up to
    ``head_dim``.
    """

    head_dim: int
    k: tuple[Tier, ...]
    v: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if not (0 < self.head_dim <= MAX_HEAD_DIM and self.head_dim % TIER_MULTIPLE == 0):
            raise KVSpliceError(
                f"head_dim {self.head_dim} is not supported: expected a multiple of {TIER_MULTIPLE} up to {MAX_HEAD_DIM}."
            )
        for side, tiers in (("K", self.k), ("V", self.v)):
            _check_tiers(side, tiers, self.head_dim)

    @classmethod
    def of(cls, head_dim: int, k: Iterable[tuple[int, int]], v: Iterable[tuple[int, int]]) -> LatentLayout:
        """Build from (bits, dims) pairs, for example ``of(128, k=[(8, 32), (4, 96)], v=[(8, 32), (4, 96)])``."""
        return cls(head_dim, tuple(Tier(*t) for t in k), tuple(Tier(*t) for t in v))

    def tiers(self, side: Side) -> tuple[Tier, ...]:
        """All tiers of a side, dropped dimensions included."""
        return self.k if side == "k" else self.v

    def rank(self, side: Side) -> int:
        """Latent dimensions of a side that are stored, that is have more than 0 bits."""
        return sum(t.dims for t in self.tiers(side) if t.bits)

    def side_bytes(self, side: Side) -> int:
        """All-in bytes per token and KV head of a side: codes and scales."""
        return sum(t.code_bytes + t.scale_bytes for t in self.tiers(side))

    @property
    def bytes_per_token_head(self) -> int:
        """All-in bytes per token and KV head, K and V together."""
        return self.side_bytes("k") + self.side_bytes("v")

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one (block, KV head) page of ``block_size`` tokens."""
        _check_block_size(block_size)
        return block_size * self.bytes_per_token_head

    def plan(self, side: Side, block_size: int) -> tuple[TierPlan, ...]:
        """The stored tiers of a side with their byte offsets in a page of ``block_size`` tokens."""
        return _plan(self, side, block_size)

    def plans(self, block_size: int) -> tuple[tuple[TierPlan, ...], tuple[TierPlan, ...]]:
        """The plans of K and V."""
        return self.plan("k", block_size), self.plan("v", block_size)

    def to_json(self) -> dict[str, object]:
        """Plain JSON form; ``from_json`` reads it back."""
        return {"head_dim": self.head_dim} | {s: [[t.bits, t.dims] for t in self.tiers(s)] for s in ("k", "v")}

    @classmethod
    def from_json(cls, data: object) -> LatentLayout:
        """Read ``to_json``'s form from an untrusted file; raises KVSpliceError on anything else."""
        try:
            head_dim, k, v = (data[name] for name in ("head_dim", "k", "v"))  # type: ignore[index]
            numbers = [head_dim, *(n for tier in (*k, *v) for n in tier)]
            if any(type(n) is not int for n in numbers):
                raise TypeError
            return cls.of(head_dim, [(b, d) for b, d in k], [(b, d) for b, d in v])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, KVSpliceError):
                raise
            raise KVSpliceError(
                f"layout {str(data)[:80]!r} is not readable: expected head_dim and (bits, dims) pairs for k and v."
            ) from None

    def __str__(self) -> str:
        return " ".join(f"{s.upper()} " + "+".join(f"{t.dims}x{t.bits}" for t in self.tiers(s)) for s in ("k", "v"))


@lru_cache(maxsize=1024)
def _plan(layout: LatentLayout, side: Side, block_size: int) -> tuple[TierPlan, ...]:
    """Cached: every layer asks in every step that no CUDA graph replays."""
    _check_block_size(block_size)
    stored = [t for t in layout.tiers(side) if t.bits]
    offset = 0 if side == "k" else block_size * layout.side_bytes("k")
    code_offsets = []
    for tier in stored:
        code_offsets.append(offset)
        offset += block_size * tier.code_bytes
    plans, start = [], 0
    for tier, codes in zip(stored, code_offsets, strict=True):
        scale = offset if tier.scale_bytes else -1
        plans.append(TierPlan(tier.bits, tier.dims, start, codes, scale, block_size, side == "v"))
        offset += block_size * tier.scale_bytes
        start += tier.dims
    return tuple(plans)


def dense_bytes(head_dim: int, dtype_bytes: int = 2) -> int:
    """Bytes of one side (K or V) per token and KV head in an uncompressed cache."""
    return head_dim * dtype_bytes


class Ratios(NamedTuple):
    """Compression against a dense cache of the same tokens, all-in, by side and together."""

    k: float
    v: float
    kv: float


def ratios(layouts: Iterable[LatentLayout], dtype_bytes: int = 2) -> Ratios:
    """All-in compression over layers with equal head counts: dense bytes over stored bytes for K, V and K+V."""
    layouts = list(layouts)
    dense = sum(dense_bytes(layout.head_dim, dtype_bytes) for layout in layouts)
    k, v = (sum(layout.side_bytes(s) for layout in layouts) for s in ("k", "v"))
    return Ratios(dense / k, dense / v, 2 * dense / (k + v))


def _check_tiers(side: str, tiers: tuple[Tier, ...], head_dim: int) -> None:
    bits = [t.bits for t in tiers]
    total = sum(t.dims for t in tiers)
    if any(b not in BIT_WIDTHS for b in bits) or bits != sorted(set(bits), reverse=True):
        raise KVSpliceError(f"{side} tiers have bits {bits}: expected some of {list(BIT_WIDTHS)}, falling, each once.")
    if any(t.dims <= 0 or t.dims % TIER_MULTIPLE for t in tiers):
        raise KVSpliceError(
            f"{side} tiers have dims {[t.dims for t in tiers]}: expected positive multiples of {TIER_MULTIPLE}."
        )
    if total != head_dim:
        raise KVSpliceError(
            f"{side} tiers cover {total} dimensions: expected head_dim {head_dim} (dropped ones as a 0-bit tier)."
        )
    if not bits or bits[0] == 0:
        raise KVSpliceError(f"{side} tiers store nothing: expected at least one tier with more than 0 bits.")


def _check_block_size(block_size: int) -> None:
    if block_size <= 0 or block_size % BLOCK_MULTIPLE:
        raise KVSpliceError(
            f"block size {block_size} is not supported: expected a multiple of {BLOCK_MULTIPLE} (--block-size {BLOCK_MULTIPLE})."
        )
