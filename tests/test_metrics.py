# SPDX-License-Identifier: Apache-2.0
"""Scores against literal formulas, in fp64, on peaked, flat and tied distributions."""

import math

import pytest
import torch

from vllm_kvsplice.scoring.metrics import REST_FLOOR, Scores, TopK, kl_rows, kl_topk_rows, score_logits, score_topk


def pair(T=37, V=203, noise=0.3, scale=3.0):
    base = torch.randn(T, V, dtype=torch.float64) * scale
    return base, base + noise * torch.randn(T, V, dtype=torch.float64), torch.randint(0, V, (T,))


def topk(logprobs, k):
    values, ids = logprobs.topk(k, dim=-1)
    return TopK(ids, values)


def test_scores_of_a_distribution_by_hand():
    base = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
    scores = score_logits(base, other, torch.tensor([0, 1]), k=3)
    assert scores.tokens == 2
    assert scores.kld == pytest.approx(0.5 * (0.5 * math.log(2) - 0.25 * math.log(2)))
    assert scores.top1 == 0.5
    assert scores.ppl["baseline"] == pytest.approx((0.5 * 0.6) ** -0.5)
    assert scores.ppl["kvsplice"] == pytest.approx((0.25 * 0.6) ** -0.5)
    assert scores.ppl["delta_pct"] == pytest.approx(100 * (math.sqrt(2) - 1))


@pytest.mark.parametrize("rows", [1, 7, 37, 1000], ids=["one", "ragged", "exact", "more-than-there-are"])
def test_chunks_of_rows_change_nothing(rows):
    base, other, targets = pair()
    whole = score_logits(base, other, targets, k=20, rows=37)
    parts = score_logits(base, other, targets, k=20, rows=rows)
    for name in ("tokens", "agree"):
        assert getattr(parts, name) == getattr(whole, name)
    for name in ("kld", "kld_topk"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert parts.ppl["kvsplice"] == pytest.approx(whole.ppl["kvsplice"], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_compared_as_they_are(dtype):
    base, other, targets = pair()
    base, other = base.to(dtype), other.to(dtype)
    exact = score_logits(base.double(), other.double(), targets, k=20)
    scores = score_logits(base, other, targets, k=20)
    # fp32 sums over V terms: a few eps of terms of the size of the largest log-probability.
    assert scores.kld == pytest.approx(exact.kld, abs=32 * torch.finfo(torch.float32).eps)
    assert scores.ppl["kvsplice"] == pytest.approx(exact.ppl["kvsplice"], rel=1e-5)


def test_equal_logits_have_no_divergence_and_a_shift_is_none():
    base, _, targets = pair()
    scores = score_logits(base, base + 5.0, targets, k=10)
    assert abs(scores.kld) < 1e-12 and abs(scores.kld_topk) < 1e-9
    assert scores.top1 == 1.0 and scores.ppl["delta_pct"] == pytest.approx(0.0, abs=1e-9)


def test_kl_agrees_with_torch_and_allows_impossible_tokens():
    base, other, _ = pair()
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_rows(p, q), expected)
    banned = base.clone()
    banned[:, 3] = -math.inf
    assert torch.isfinite(kl_rows(banned.log_softmax(-1), q)).all()


def test_topk_of_the_whole_vocabulary_is_the_full_divergence():
    base, other, _ = pair(V=31)
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    # The rest is empty; its floor adds nothing, since both sides have the same.
    torch.testing.assert_close(kl_topk_rows(topk(p, 31), topk(q, 31)), kl_rows(p, q), atol=1e-9, rtol=0)


def test_topk_is_a_lower_bound_that_grows_with_k():
    base, other, _ = pair(noise=0.5)
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    values = [float(kl_topk_rows(topk(p, k), topk(q, k)).mean()) for k in (1, 5, 20, 80, 203)]
    assert values == sorted(values) and values[0] >= 0
    assert values[-1] == pytest.approx(float(kl_rows(p, q).mean()), rel=1e-6)


def test_topk_counts_shared_tokens_only():
    p = TopK(torch.tensor([[4, 9]]), torch.tensor([[0.6, 0.3]]).log())
    q = TopK(torch.tensor([[4, 2]]), torch.tensor([[0.5, 0.4]]).log())
    expected = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert float(kl_topk_rows(p, q)) == pytest.approx(expected, rel=1e-5)


def test_nothing_shared_compares_nothing_but_the_rest():
    p = TopK(torch.tensor([[1]]), torch.tensor([[0.9]]).log())
    q = TopK(torch.tensor([[2]]), torch.tensor([[0.9]]).log())
    assert float(kl_topk_rows(p, q)) == 0.0


def test_rounding_of_a_sum_near_one_costs_no_more_than_the_floor():
    sure = TopK(torch.tensor([[1, 2]]), torch.tensor([[-1e-7, -17.0]]))
    surer = TopK(torch.tensor([[1, 2]]), torch.tensor([[0.0, -17.0]]))
    assert abs(float(kl_topk_rows(sure, surer))) < 2 * REST_FLOOR


def test_server_scores_match_logit_scores():
    base, other, targets = pair(T=20, V=64)
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    expected = score_logits(base, other, targets, k=16)
    at = targets[:, None]
    scores = score_topk(topk(p, 16), topk(q, 16), p.gather(1, at)[:, 0], q.gather(1, at)[:, 0])
    assert math.isnan(scores.kld)
    assert scores.kld_topk == pytest.approx(expected.kld_topk)
    assert scores.ppl == pytest.approx(expected.ppl) and scores.top1 == expected.top1


def test_scores_add_up():
    a, b = Scores(2, 1.0, 2.0, 0.1, 0.05, 2), Scores(6, 3.0, 2.0, 0.3, 0.15, 3)
    total = a + b
    assert (total.tokens, total.kld, total.top1) == (8, 0.05, 5 / 8)
    assert total.ppl["baseline"] == pytest.approx(math.exp(0.5))
