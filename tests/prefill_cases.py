# SPDX-License-Identifier: Apache-2.0
"""Steps of prefills over a cache, made from kernel cases, and FlashAttention emulated in torch; shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import kernel_cases as cases
import torch
from torch import Tensor

from vllm_kvsplice.serving import cached_prefill
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits
from vllm_kvsplice.serving.metadata import Prefills


@dataclass
class Flash:
    """flash_attn_varlen_func as FlashAttention documents it, in fp64; remembers its calls."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: list[int], softcap: float, fa_version: int,
        return_softmax_lse: bool = False, num_splits: int = 0,
    ) -> Any:  # fmt: skip
        self.calls.append(dict(requests=len(cu_seqlens_q) - 1, keys=len(k), causal=causal, lse=return_softmax_lse))
        q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert q_bounds[-1] == len(q) == len(out) and k_bounds[-1] == len(k) == len(v)
        lse = torch.full((q.shape[1], len(q)), float("nan"), device=q.device)
        for (a, b), (s, e) in zip(
            zip(q_bounds, q_bounds[1:], strict=False), zip(k_bounds, k_bounds[1:], strict=False), strict=True
        ):
            assert b - a <= max_seqlen_q and e - s <= max_seqlen_k
            rows, row_lse = attention(q[a:b], k[s:e], v[s:e], softmax_scale, causal, window_size, softcap)
            out[a:b], lse[:, a:b] = rows.to(out), row_lse.to(lse)
        return (out, lse) if return_softmax_lse else out


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: list[int], cap: float
) -> tuple[Tensor, Tensor]:
    """(output [T, heads, D], lse [heads, T]) fp64 of one sequence; masks are aligned to the last key. No key: 0, -inf."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.einsum("thd,shd->hts", q.double(), k) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    i = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    j = torch.arange(len(k), device=q.device)[None]
    left, right = window[0], 0 if causal else window[1]
    seen = (j >= i - left if left >= 0 else j >= 0) & (j <= i + right if right >= 0 else j >= 0)
    logits = logits.masked_fill(~seen, float("-inf"))
    p = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", p, v), logits.logsumexp(-1)


def codec_of(case: cases.Case) -> LayerCodec:
    layout = cases.LatentLayout.of(case.head_dim, case.k, case.v)
    wide = torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float16
    return LayerCodec(
        layout, layout.bytes_per_token_head, wide, case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim**-0.5,
        case.window, case.soft_cap,
    )  # fmt: skip


def requests_of(batch: cases.Batch, limits: Limits | None = None) -> Prefills:
    case, starts = batch.case, batch.query_start_loc.cpu()
    first = [n == q for n, q in zip(case.seq_lens, case.query_lens, strict=True)]
    return Prefills(
        len(first), int(starts[-1]), max(case.query_lens), max(case.seq_lens), batch.query_start_loc, batch.seq_lens,
        batch.block_table, starts, first, torch.tensor(case.seq_lens, dtype=torch.int32), limits=limits,
    )  # fmt: skip


def forget_below_windows(batch: cases.Batch) -> None:
    """Block ids of pages that no query sees any more become ones that fault: vLLM gives those pages to others."""
    case = batch.case
    for b, (n, q) in enumerate(zip(case.seq_lens, case.query_lens, strict=True)):
        batch.block_table[b, : max(0, n - q - (case.window or n) + 1) // case.block_size] = cases.FOREIGN_BLOCK


def num_bytes(shapes: Any) -> int:
    return sum(-(-torch.Size(s).numel() * d.itemsize // 256) * 256 for s, d in shapes)


def limits_of(case: cases.Case) -> Limits:
    return Limits(len(case.seq_lens) + 3, max(64, sum(case.query_lens)), max(case.seq_lens) + 50)


def run(
    batch: cases.Batch,
    fresh: tuple[Tensor, Tensor] | None,
    flash: Any,
    version: int = 3,
    requests: Prefills | None = None,
) -> Tensor:
    """triton_path's way through the expanded codes."""
    codec, requests = codec_of(batch.case), requests or requests_of(batch, limits_of(batch.case))
    out = torch.full_like(batch.query, float("nan"))
    bases = Bases(*batch.bases["k"], *batch.bases["v"])
    pieces = cached_prefill.plan(codec, requests, fresh is not None, batch.query.device)
    assert pieces is not None
    cached_prefill.attend(codec, bases, batch.query, fresh, batch.kv_cache, requests, out, pieces, (flash, version))
    return out
