# SPDX-License-Identifier: Apache-2.0
"""Caches that keep some tokens and drop the rest: StreamingLLM, H2O, SnapKV, PyramidKV.

Each keeps, per layer and KV head, a budget of a quarter or half of the scored tokens, in 16 bits. Simulated by attention
masks in one teacher-forced forward: a query sees the tokens that the policy still held when it came. Tokens arrive in
blocks of 32; after a block the policy drops what exceeds its budget less one block, for good, so it never holds more than
the budget. Until the budget is full nothing is lost, which favours these policies over codecs that compress every token.
SnapKV and PyramidKV were made to compress a prompt once; here their vote is repeated after each block. In the needle test
the text is read uncompressed and the cache is cut once, before the question, so no policy knows what will be asked.
A dropped token's position stays empty: RoPE positions are not renumbered, as StreamingLLM does beyond the trained length.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab.codec import Attach, Bytes, Codec, Geometry, Run, Setup
from vllm_kvsplice.lab.dense import bf16

BLOCK = 32  # tokens between evictions, and queries that vote in SnapKV
POOL = 5  # neighbours that share SnapKV's votes
SINKS = 4
PYRAMID_SLOPE = 20  # PyramidKV's beta: the last layer has 1 / 20 of the mean budget, the first what is left over
QUERIES = 256  # rows of attention probabilities held at a time


class Policy(NamedTuple):
    """What is kept: the first ``sinks`` tokens, the last ``recent`` (share of the budget, or tokens), and the best voted.

    votes: attention probability received from all queries so far ("all"), from the last block ("last"), or none.
    """

    sinks: int
    recent: float | int
    votes: Literal["all", "last", "none"]
    pool: int = 1
    pyramid: bool = False


POLICIES = {
    "streaming_llm": (Policy(SINKS, 1.0, "none"), "StreamingLLM, arXiv 2309.17453"),
    "h2o": (Policy(0, 0.5, "all"), "H2O, arXiv 2306.14048"),
    "snapkv": (Policy(0, BLOCK, "last", POOL), "SnapKV, arXiv 2404.14469"),
    "pyramidkv": (Policy(0, BLOCK, "last", POOL, pyramid=True), "PyramidKV, arXiv 2406.02069"),
}


def layer_budget(policy: Policy, budget: int, tokens: int, layer_idx: int, num_layers: int) -> int:
    """Tokens of one layer, of ``tokens`` that come; a pyramid falls linearly over the layers and has ``budget`` as its mean."""
    if not policy.pyramid or num_layers == 1 or budget <= BLOCK:
        return budget
    voted = budget - BLOCK
    first = min(2 * voted - voted / PYRAMID_SLOPE, tokens - BLOCK)
    last = 2 * voted - first
    return BLOCK + round(first - layer_idx * (first - last) / (num_layers - 1))


def kept(policy: Policy, votes: Tensor, alive: Tensor, budget: int) -> Tensor:
    """Which of n tokens each head goes on holding.

    Args:
        votes: [H, n] fp32. alive: [H, n] bool, those still held. budget: most tokens kept per head.
    Returns:
        [H, n] bool, a part of ``alive``.
    """
    n = votes.shape[1]
    if budget >= n:
        return alive
    recent = policy.recent if isinstance(policy.recent, int) else round(policy.recent * (budget - policy.sinks))
    if policy.pool > 1:
        votes = avg_pool1d(votes[None], policy.pool, stride=1, padding=policy.pool // 2)[0]
    place = torch.arange(n, device=votes.device)
    rank = votes.masked_fill((place < policy.sinks) | (place >= n - min(recent, budget)), math.inf)
    rank = rank.masked_fill(~alive, -math.inf)
    return torch.zeros_like(alive).scatter_(1, rank.topk(budget, dim=1).indices, True) & alive


def received(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """Attention probability that each key gets, summed over queries, mean over the query heads of a KV head: [H, n] fp32.

    Args:
        q: [num_heads, t, d]; k: [H, n, d]; seen: [H, t, n] bool.
    """
    H, n, d = k.shape
    total = torch.zeros(H, n, device=q.device)
    groups = q.unflatten(0, (H, -1))
    for start in range(0, q.shape[1], QUERIES):
        part = slice(start, start + QUERIES)
        logits = torch.einsum("hgtd,hnd->hgtn", groups[:, :, part].float(), k.float()) * d**-0.5
        total += logits.masked_fill(~seen[:, None, part], -math.inf).softmax(-1).mean(1).sum(1)
    return total


def streamed(policy: Policy, q: Tensor, k: Tensor, budget: int) -> Tensor:
    """Keys that each query sees when tokens arrive in blocks: q [num_heads, T, d], k [H, T, d] -> [H, T, T] bool."""
    H, T, _ = k.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
    seen = torch.zeros(H, T, T, dtype=torch.bool, device=k.device)
    alive = torch.zeros(H, T, dtype=torch.bool, device=k.device)
    votes = torch.zeros(H, T, device=k.device)
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        alive[:, start:stop] = True
        rows = alive[:, None, :stop] & causal[start:stop, :stop]
        seen[:, start:stop, :stop] = rows
        if policy.votes != "none":
            now = received(q[:, start:stop], k[:, :stop], rows)
            votes[:, :stop] = now + (votes[:, :stop] if policy.votes == "all" else 0)
        if budget < T and stop > budget - BLOCK:
            alive[:, :stop] = kept(policy, votes[:, :stop], alive[:, :stop], max(budget - BLOCK, 1))
    return seen


def cut_once(policy: Policy, q: Tensor, k: Tensor, prefill: int, budget: int) -> Tensor:
    """Keys that each query sees when the first ``prefill`` tokens are read whole and then cut to ``budget``: [H, T, T] bool."""
    H, T, _ = k.shape
    seen = torch.ones(T, T, dtype=torch.bool, device=k.device).tril().repeat(H, 1, 1)
    voters = slice(prefill - BLOCK if policy.votes == "last" else 0, prefill)
    votes = torch.zeros(H, prefill, device=k.device)
    if policy.votes != "none":
        votes = received(q[:, voters], k[:, :prefill], seen[:, voters, :prefill])
    held = kept(policy, votes, torch.ones(H, prefill, dtype=torch.bool, device=k.device), budget)
    seen[:, prefill:, :prefill] &= held[:, None]
    return seen


def _prepare(setup: Setup, policy: Policy, share: float) -> Attach:
    layers = setup.geometry.num_layers

    def attach(model: Any, run: Run) -> AbstractContextManager[None]:
        def transform(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            tokens = k.shape[2] if run.prefill is None else run.prefill
            budget = layer_budget(policy, round(share * tokens), tokens, layer_idx, layers)
            if run.prefill is None:
                seen = streamed(policy, q[0], k[0], budget)
            else:
                seen = cut_once(policy, q[0], k[0], run.prefill, budget)
            return bf16(k), bf16(v), seen.repeat_interleave(q.shape[1] // k.shape[1], 0)[None]

        return transformed_kv(model, transform)

    return attach


def _bytes(geometry: Geometry, share: float) -> Bytes:
    held = min(1.0, round(share * geometry.seq_len) / geometry.seq_len)
    return Bytes(2 * geometry.head_dim * held, 2 * geometry.head_dim * held)


CODECS = [
    Codec(
        f"{name}_{round(100 * share)}",
        paper.split(",")[0],
        paper,
        partial(_bytes, share=share),
        partial(_prepare, policy=policy, share=share),
    )
    for name, (policy, paper) in POLICIES.items()
    for share in (0.5, 0.25)
]
