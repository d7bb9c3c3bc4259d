# SPDX-License-Identifier: Apache-2.0
"""Streamed moments against the moments of all tokens at once."""

import pytest
import torch

from vllm_kvsplice.calibration import moments

H, GROUP, D, T = 2, 3, 24, 37


def batch(generator, batches=5, offset=3.0):
    """fp32 q, k, v of [batches, heads, T, D]; an offset far from zero, as keys with a bias have it."""
    q = torch.randn(batches, H * GROUP, T, D, generator=generator)
    k, v = (torch.randn(batches, H, T, D, generator=generator) + offset for _ in range(2))
    return q, k, v


@pytest.fixture
def qkv():
    return batch(torch.Generator().manual_seed(0))


def whole(qkv):
    return moments.add_batch(moments.new_moments(H, D), *qkv)


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_how_the_text_is_cut_into_batches_changes_nothing(qkv, cuts):
    total = moments.new_moments(H, D)
    for parts in zip(*(x.split(cuts) for x in qkv), strict=True):
        total = moments.add_batch(total, *parts)
    expected = whole(qkv)
    assert total.tokens == expected.tokens == 5 * T
    for got, want in zip(total[1:], expected[1:], strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13 * want.abs().max().item())


def test_cutting_windows_along_time_changes_nothing(qkv):
    q, k, v = qkv
    halves = [whole(part) for part in ((x[:, :, :5] for x in qkv), (x[:, :, 5:] for x in qkv))]
    merged = moments.merge(*halves)
    for got, want in zip(merged[1:], whole((q, k, v))[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13 * want.abs().max().item())


@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_mean_and_covariance_are_numpys(offset):
    q, k, v = batch(torch.Generator().manual_seed(1), offset=offset)
    m = whole((q, k, v))
    for x, total, outer in ((k, m.k_sum, m.k_outer), (v, m.v_sum, m.v_outer)):
        for h in range(H):
            rows = x[:, h].reshape(-1, D).double()
            torch.testing.assert_close(moments.mean(total, m.tokens)[h], rows.mean(0), rtol=1e-12, atol=1e-12)
            covariance = moments.covariance(total, outer, m.tokens)[h]
            # E xx^T - mu mu^T cancels: fp64 leaves about eps * offset^2 of it
            torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0), rtol=1e-10, atol=1e-9)
            assert torch.equal(covariance, covariance.T)


def test_queries_count_for_the_kv_head_that_they_read(qkv):
    q, k, v = qkv
    m = whole(qkv)
    for h in range(H):
        rows = q[:, h * GROUP : (h + 1) * GROUP].reshape(-1, D).double()
        torch.testing.assert_close(m.q_outer[h], rows.T @ rows, rtol=1e-12, atol=1e-12)


def test_adding_leaves_the_old_moments_alone(qkv):
    empty = moments.new_moments(H, D)
    moments.add_batch(empty, *qkv)
    assert empty.tokens == 0 and not any(t.any() for t in empty[1:])
