# SPDX-License-Identifier: Apache-2.0
"""Bases against what makes them best: Eckart-Young, the metric's own loss, and the cost of one step size per tier."""

import pytest
import torch

from vllm_kvsplice.codec import bases
from vllm_kvsplice.codec.bases import blend, hadamard, output_metric, principal, solve

F64 = torch.float64
H = 2


def spread(d, power=1.5, seed=0):
    """A covariance [H, d, d] with a falling spectrum, and another positive definite matrix of the same kind."""
    g = torch.Generator().manual_seed(seed)
    rotations = torch.linalg.qr(torch.randn(2, H, d, d, dtype=F64, generator=g))[0]
    values = torch.arange(1, d + 1, dtype=F64) ** -power
    covariance, metric = rotations @ (values[:, None] * rotations.transpose(-1, -2))
    return covariance, blend(metric)


def loss(encode, decode, covariance, metric):
    """E |D E x - x|^2 in the metric, per head."""
    error = decode @ encode - torch.eye(covariance.shape[-1], dtype=F64)
    return torch.einsum("hij,hik,hkl,hjl->h", metric, error, covariance, error)


@pytest.mark.parametrize("n", [1, 2, 8, 24, 40, 64, 72, 80, 96, 128, 144, 256])
def test_hadamard_is_orthogonal_and_spreads_every_coordinate(n):
    matrix = hadamard(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=F64), atol=1e-13, rtol=0)
    assert matrix.abs().max() <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("d", [16, 40])
def test_full_rank_is_lossless_and_variances_are_the_latents(d):
    covariance, metric = spread(d)
    for m in (None, metric):
        encode, decode, variance = principal(covariance, m)
        torch.testing.assert_close(decode @ encode, torch.eye(d, dtype=F64).expand(H, d, d), atol=1e-12, rtol=0)
        latents = encode @ covariance @ encode.transpose(1, 2)
        torch.testing.assert_close(latents, torch.diag_embed(variance), atol=1e-12, rtol=0)
        assert (variance.diff(dim=-1) <= 0).all()


def test_plain_is_orthonormal():
    encode, decode, _ = principal(spread(40)[0], None)
    assert torch.equal(decode, encode.transpose(1, 2))
    torch.testing.assert_close(encode @ decode, torch.eye(40, dtype=F64).expand(H, 40, 40), atol=1e-12, rtol=0)


def test_known_low_rank_values_are_recovered():
    g = torch.Generator().manual_seed(3)
    d, rank, T = 40, 16, 500
    x = torch.randn(H, T, rank, dtype=F64, generator=g) @ torch.randn(H, rank, d, dtype=F64, generator=g) + 7.0
    mean = x.mean(1)
    centred = x - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred / T
    for metric in (None, spread(d)[1]):
        s = solve(mean, covariance, metric, [(8, 8), (4, 8), (0, 24)])
        assert s.encode.shape == (H, rank, d)
        z = torch.einsum("htd,hrd->htr", centred, s.encode) / s.sigma[:, None]
        back = torch.einsum("htr,hdr->htd", z * s.sigma[:, None], s.decode) + s.mean[:, None]
        torch.testing.assert_close(back, x, atol=1e-10, rtol=0)


def test_a_metric_loses_least_in_that_metric_at_every_rank():
    d = 24
    covariance, metric = spread(d)
    encode, decode, variance = principal(covariance, metric)
    plain_encode, plain_decode, _ = principal(covariance, None)
    g = torch.Generator().manual_seed(5)
    for rank in (8, 16):
        e, dec = encode[:, :rank], decode[:, :, :rank]
        best = loss(e, dec, covariance, metric)
        torch.testing.assert_close(best, variance[:, rank:].sum(-1), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(e @ dec, torch.eye(rank, dtype=F64).expand(H, rank, rank), atol=1e-12, rtol=0)
        assert (best < loss(plain_encode[:, :rank], plain_decode[:, :, :rank], covariance, metric)).all()
        for _ in range(20):
            rival = e + 0.05 * torch.randn(e.shape, dtype=F64, generator=g)
            # the rival's own best decoder: C E^T (E C E^T)^-1
            cross = covariance @ rival.transpose(1, 2)
            assert (best < loss(rival, cross @ torch.linalg.inv(rival @ cross), covariance, metric)).all()


@pytest.mark.parametrize("equalise", ["gamma", "rotate", "sigma"])
def test_every_latent_of_a_tier_has_the_same_variance(equalise):
    covariance, metric = spread(40)
    s = solve(torch.zeros(H, 40, dtype=F64), covariance, metric, [(8, 16), (4, 24)], equalise)
    encode = s.encode / s.sigma[..., None]
    variance = (encode @ covariance @ encode.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    floor = 1e-9 if equalise == "sigma" else 0.45  # a rotation by a DCT, not a Hadamard matrix, equalises only nearly
    assert (variance - 1).abs().max() < floor
    torch.testing.assert_close(s.decode @ s.encode, torch.eye(40, dtype=F64).expand(H, 40, 40), atol=1e-10, rtol=0)


def test_gamma_pays_least_for_one_step_size():
    """Rounding with step 1 on latents of rms 1 adds variance 1/12 each; decoded and weighed in the metric."""
    covariance, metric = spread(64)
    cost = {}
    for equalise in ("gamma", "rotate", "sigma"):
        s = solve(torch.zeros(H, 64, dtype=F64), covariance, metric, [(4, 64)], equalise)
        decode = s.decode * s.sigma[:, None, :]
        cost[equalise] = torch.einsum("hdr,hde,her->h", decode, metric, decode)
    variance = principal(covariance, metric)[2]
    torch.testing.assert_close(cost["gamma"], variance.sqrt().sum(-1).square() / 64, rtol=1e-9, atol=0)
    torch.testing.assert_close(cost["rotate"], variance.sum(-1), rtol=1e-9, atol=0)
    torch.testing.assert_close(cost["sigma"], variance.sum(-1), rtol=1e-9, atol=0)
    assert (cost["gamma"] < 0.7 * cost["rotate"]).all()


@pytest.mark.parametrize("equalise", bases.EQUALISE)
def test_dimensions_that_never_vary_stay_finite(equalise):
    covariance = torch.zeros(H, 16, 16, dtype=F64)
    covariance[0, 0, 0] = 1.0
    s = solve(torch.zeros(H, 16, dtype=F64), covariance, None, [(8, 8), (4, 8)], equalise)
    x = torch.zeros(16, dtype=F64)
    x[3] = 0.25  # a direction that calibration never saw
    back = (s.decode * s.sigma[:, None]) @ ((s.encode @ x) / s.sigma)[..., None]
    assert s.encode.abs().max() <= 1e6 and all(t.isfinite().all() for t in s)
    torch.testing.assert_close(back[..., 0], x.expand(H, 16), atol=1e-9, rtol=0)


def test_sixteen_bit_tiers_are_left_as_they_are():
    covariance, _ = spread(40)
    s = solve(torch.zeros(H, 40, dtype=F64), covariance, None, [(16, 32), (0, 8)], "gamma")
    torch.testing.assert_close(s.encode @ s.decode, torch.eye(32, dtype=F64).expand(H, 32, 32), atol=1e-12, rtol=0)
    assert torch.equal(s.decode, s.encode.transpose(1, 2)) and (s.sigma == 1).all()


def test_output_metric_is_the_error_behind_the_projection():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 6 * 8, generator=g)  # 6 query heads of 8, 3 for each of 2 KV heads
    error = torch.randn(8, dtype=F64, generator=g)
    metric = output_metric(weight, 2, 8)
    for h in range(2):
        heads = weight.double().view(10, 6, 8)[:, 3 * h : 3 * h + 3]
        torch.testing.assert_close(error @ metric[h] @ error, (heads @ error).square().sum(), rtol=1e-12, atol=0)


def test_blend_is_positive_definite_and_scale_free():
    one = torch.zeros(1, 8, 8, dtype=F64)
    one[0, 0, 0] = 5.0
    assert torch.linalg.eigvalsh(blend(one)).min() > 0.09
    torch.testing.assert_close(blend(one), blend(1e6 * one))
    assert blend(torch.zeros(1, 8, 8, dtype=F64)).isfinite().all()
