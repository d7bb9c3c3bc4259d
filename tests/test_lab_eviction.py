# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: what a query may see, budgets, votes against plain attention, and nothing lost with room for all."""

import pytest
import torch
from hf_models import tiny, tokens

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab import eviction, registry
from vllm_kvsplice.lab.codec import Geometry, Run, Setup
from vllm_kvsplice.lab.eviction import BLOCK, POLICIES
from vllm_kvsplice.lab.score import base_logits, logits

T, BUDGET = 200, 96
STREAMING, H2O, SNAP, PYRAMID = (POLICIES[name][0] for name in ("streaming_llm", "h2o", "snapkv", "pyramidkv"))


def qk(heads=4, kv_heads=2, d=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(heads, T, d, generator=generator) * 2, torch.randn(kv_heads, T, d, generator=generator)


def test_streaming_sees_sinks_and_a_window():
    seen = eviction.streamed(STREAMING, *qk(), BUDGET)[0]
    for t in (BUDGET, 150, T - 1):
        places = seen[t].nonzero()[:, 0].tolist()
        held = t // BLOCK * BLOCK  # what was there when its block began
        assert places == [0, 1, 2, 3, *range(held - (BUDGET - BLOCK - 4), t + 1)]
    assert torch.equal(seen[: BUDGET - BLOCK], torch.ones(T, T).tril().bool()[: BUDGET - BLOCK])


@pytest.mark.parametrize("policy", [STREAMING, H2O, SNAP], ids=["streaming", "h2o", "snapkv"])
def test_no_query_holds_more_than_the_budget_and_nothing_comes_back(policy):
    seen = eviction.streamed(policy, *qk(), BUDGET)
    assert seen.sum(-1).max() <= BUDGET
    assert seen.sum(-1)[:, BUDGET:].min() > BUDGET - BLOCK
    assert seen.diagonal(dim1=1, dim2=2).all()  # itself
    gone = seen.tril(-1).int().diff(dim=1) > 0  # appears below the diagonal at a later query
    assert not gone.tril(-2).any()


def test_heavy_hitters_stay():
    q, k = qk()
    k[:, 10] = q.mean(1).view(2, 2, -1).mean(1)
    q = q + 3 * q.mean(1, keepdim=True)
    k[:, 10] *= 20  # every query looks there
    assert eviction.streamed(H2O, q, k, BUDGET)[:, :, 10][:, 10:].all()
    assert not eviction.streamed(STREAMING, q, k, BUDGET)[:, -1, 10].any()


def test_votes_are_attention_probabilities():
    q, k = qk()
    logits = torch.einsum("htd,hnd->htn", q, k.repeat_interleave(2, 0)) / 4
    causal = torch.ones(T, T).tril().bool()
    weights = logits.masked_fill(~causal, -1e9).softmax(-1)
    want = weights.view(2, 2, T, T).mean(1).sum(1)
    torch.testing.assert_close(eviction.received(q, k, causal.expand(2, T, T)), want)
    assert float(want.sum()) == pytest.approx(2 * T, rel=1e-4)


def test_snapkv_cuts_a_prompt_by_the_votes_of_its_last_queries():
    q, k = qk()
    prompt, budget = 160, 64
    seen = eviction.cut_once(SNAP, q, k, prompt, budget)
    causal = torch.ones(T, T).tril().bool()
    assert torch.equal(seen[:, :prompt], causal[:prompt].expand(2, -1, -1))  # the prompt itself is read whole
    logits = torch.einsum("htd,hnd->htn", q[:, prompt - BLOCK : prompt], k[:, :prompt].repeat_interleave(2, 0)) / 4
    weights = logits.masked_fill(~causal[prompt - BLOCK : prompt, :prompt], -1e9).softmax(-1)
    votes = weights.mean(1).view(2, 2, -1).mean(1)
    pooled = torch.nn.functional.avg_pool1d(votes[None], 5, 1, 2)[0][:, : prompt - BLOCK]
    for head in range(2):
        want = sorted(pooled[head].topk(budget - BLOCK).indices.tolist()) + list(range(prompt - BLOCK, prompt))
        assert seen[head, -1, :prompt].nonzero()[:, 0].tolist() == want
        assert seen[head, -1, prompt:].all()


def test_pyramid_has_the_same_tokens_in_all():
    budgets = [eviction.layer_budget(PYRAMID, 512, 2048, i, 8) for i in range(8)]
    assert sum(budgets) == pytest.approx(8 * 512, abs=8) and budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == pytest.approx(BLOCK + 480 / 20, abs=1)
    assert max(eviction.layer_budget(PYRAMID, 1900, 2048, i, 8) for i in range(8)) <= 2048
    assert eviction.layer_budget(SNAP, 512, 2048, 3, 8) == 512


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("prefill", [None, 60])
def test_room_for_all_loses_nothing(name, prefill):
    model, ids = tiny("qwen2"), tokens(1, 90)[0]
    setup = Setup(model, Geometry(3, 2, 16, 90), {})
    run = Run(prefill, {})
    bf16 = registry.RIVALS[0].prepare(setup)
    whole, half = (logits(model, ids, eviction._prepare(setup, POLICIES[name][0], s), run) for s in (2.0, 0.5))
    torch.testing.assert_close(whole, logits(model, ids, bf16, run), atol=1e-4, rtol=1e-4)
    lost = (half - whole).abs().amax(-1)
    first = 90 // 2 // BLOCK * BLOCK if prefill is None else prefill
    assert lost[:first].max() < 1e-3 and lost[first:].max() > 0.1


def test_a_sliding_window_still_slides():
    """A mask of our own narrows the model's, and copies of the sequence are masked alike."""
    model, ids = tiny("mistral"), tokens(1, 40)[0]

    def everything(i, q, k, v):
        return k, v, torch.ones(1, 1, 40, 40, dtype=torch.bool)

    def twice(i, q, k, v):
        first = torch.arange(40) % 2 == 0
        return torch.cat([k, k], 2), torch.cat([v, v], 2), torch.cat([first, ~first]).expand(1, 1, 40, 80)

    base = base_logits(model, ids, False)[0]
    for fn in (everything, twice):
        with torch.no_grad(), transformed_kv(model, fn):
            torch.testing.assert_close(model(ids[None]).logits[0], base, atol=1e-4, rtol=1e-4)
