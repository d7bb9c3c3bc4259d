# SPDX-License-Identifier: Apache-2.0
"""Refinements of the laboratory: tiers of 3 bits, fitted rotations, RoPE's pairs, a mean that turns with the position."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import vllm_kvsplice.demo
from vllm_kvsplice.calibration.presets import load_preset
from vllm_kvsplice.codec import reference
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import refined, study, tiers
from vllm_kvsplice.lab.codec import Geometry

HEADS, DIM, LENGTH = 2, 16, 40


@pytest.fixture(scope="module")
def turn():
    """RoPE of a Llama with heads of ``DIM``."""
    config = LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM)
    return refined._rope(SimpleNamespace(base_model=SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(config))))


# ---------------------------------------------------------------- tiers
def test_three_bits_are_the_best_of_all_scales():
    z = torch.randn(50, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    got = (tiers.three_bits(z) - z).square().sum(-1)
    scales = reference.scale_of(torch.arange(256, dtype=torch.uint8), torch.float64)[:, None, None]
    levels = ((z / scales).sub(0.5).round().clamp(-4, 3) + 0.5) * scales
    assert torch.allclose(got, (levels - z).square().sum(-1).amin(0), rtol=1e-9)


def test_three_bits_lose_less_than_two_and_more_than_four():
    z = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    lost = [float((tiers.read(z, [(bits, 64)]) - z).square().mean()) for bits in (4, 3, 2)]
    assert lost == sorted(lost) and lost[1] < lost[2] / 2 and lost[0] < lost[1] / 2


def test_latents_are_read_tier_by_tier_and_dropped_ones_are_no_part():
    z = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(3))
    got = tiers.read(z, [(16, 8), (8, 8), (3, 8), (0, 8)])
    assert torch.equal(got[..., :8], z[..., :8].bfloat16().float())
    assert torch.equal(got[..., 8:16], reference.dequantize(*reference.quantize(z[..., 8:16], 8), 8))
    assert torch.equal(got[..., 16:], tiers.three_bits(z[..., 16:]))
    assert tiers.latent_bytes([(16, 8), (8, 8), (3, 8), (0, 8)]) == 16 + 9 + 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(8, 16), (4, 80), (2, 32)], [(8, 16), (4, 48), (3, 64)]),
        ([(4, 32), (2, 64)], [(3, 64), (2, 32)]),
        ([(4, 64), (2, 64)], [(3, 128)]),
        ([(8, 32), (4, 96)], [(8, 32), (4, 96)]),
    ],
)
def test_three_bits_take_as_many_code_bytes(before, after):
    got = refined.with_three_bits(before)
    assert got == after and sum(b * n for b, n in before) == sum(b * n for b, n in got)


# ---------------------------------------------------------------- rotations
def test_a_fitted_rotation_is_one_and_loses_less():
    """Latents of a skewed distribution and an uneven cost: there is something to fit."""
    random = torch.Generator().manual_seed(4)
    z = torch.randn(2000, HEADS, DIM, dtype=torch.float64, generator=random) * torch.linspace(0.3, 3, DIM)
    root = torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=random)
    cost = root @ root.transpose(1, 2)
    got = refined.fitted_rotation(z, [(2, DIM)], cost)
    assert torch.allclose(got @ got.transpose(1, 2), torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))

    def loss(turn):
        rows = z.transpose(0, 1)
        miss = tiers.read(rows @ turn.transpose(1, 2), [(2, DIM)]) @ turn - rows
        return torch.einsum("hnd,hde,hne->h", miss, cost, miss)

    assert (loss(got) < 0.9 * loss(torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))).all()


# ---------------------------------------------------------------- RoPE
def test_turning_is_the_models_rope(turn):
    x = torch.randn(1, HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(5))
    config = LlamaConfig(hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    assert torch.allclose(turn(x, 1), apply_rotary_pos_emb(x, x, cos, sin)[0])
    assert torch.allclose(turn(turn(x, 1), -1), x, atol=1e-5)


def test_keys_with_a_mean_before_rope_leave_only_their_spread(turn):
    random = torch.Generator().manual_seed(6)
    bias = torch.randn(HEADS, DIM, generator=random, dtype=torch.float64) * 5
    noise = torch.randn(3, LENGTH, HEADS, DIM, generator=random, dtype=torch.float64)
    keys = refined.turned(bias, LENGTH, turn).transpose(0, 1) + noise
    mean = refined.moving_mean(keys, turn, 1.0)
    assert torch.allclose(mean, bias, atol=0.5)
    _, left = refined._what_stays(keys, turn, mean)
    assert 0.8 < float(left.diagonal(dim1=1, dim2=2).mean()) < 1.05


def test_a_mean_in_steps_is_that_of_the_tokens_around(turn):
    bias = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    exact = refined.turned(bias, LENGTH + 8, turn)
    got = refined.turned(bias, LENGTH, turn, 16)  # the last step has 8 tokens of this length
    assert got.shape == (HEADS, LENGTH, DIM)
    for token in (0, 15, 16, LENGTH - 1):
        start = token // 16 * 16
        assert torch.allclose(got[:, token], exact[:, start : start + 16].mean(1))


def test_a_share_of_the_pairs_keeps_those_that_turn_most(turn):
    bias = torch.zeros(1, DIM, dtype=torch.float64)
    bias[0, [0, 8]], bias[0, 7] = 1.0, 100.0  # pair 7 hardly turns in LENGTH tokens: one mean of all positions has it
    keys = refined.turned(bias, LENGTH, turn).transpose(0, 1)[None]
    kept = refined.moving_mean(keys, turn, 1 / 8)
    assert kept.nonzero()[:, 1].tolist() == [0, 8]


def test_pairs_are_those_that_rope_turns():
    kept = refined._within_pairs(torch.ones(1, DIM, DIM))[0]
    assert kept.sum() == 2 * DIM and kept[3, 3 + DIM // 2] == kept[3, 3] == 1 and kept[3, 4] == 0


def test_a_model_without_rope_is_refused():
    with pytest.raises(KVSpliceError, match="has no rotary_emb"):
        refined._rope(SimpleNamespace(base_model=SimpleNamespace()))


@pytest.mark.parametrize("refinement", get_args(refined.Refinement))
def test_bytes_are_those_of_the_preset(refinement):
    codec = refined.refined_codec("balanced", load_preset("balanced"), refinement)
    size = codec.bytes(Geometry(8, 2, 128, 2048))
    assert (size.k, size.v) == (67.0, 67.0) and codec.needs == "vectors"


def test_the_bundled_model_keeps_more_with_a_moving_mean():
    """A short form of `study-refinements-demo`, which has 0.5 of the preset's KLD with `max`, and 2 with 3 bits there."""
    model = str(Path(vllm_kvsplice.demo.__file__).parent / "model")
    result = study.run(study.StudyRequest(model, ("refinements",), samples=4, seq_len=512, windows=2, dtype="float32"))
    rows = result["studies"]["refinements"]["rows"]
    assert len(rows) == 3 * len(get_args(refined.Refinement)) - 1 and not result["left_out"]
    kld = {row["at"]["refinement"]: row["kld"]["mean"] for row in rows if row["at"]["tiers"] == "max"}
    assert kld["moving mean"] < kld["moving mean, steps of 32"] < 0.85 * kld["as it is"]
    assert kld["moving mean"] < 0.75 * kld["as it is"] and kld["3 bits"] > 1.3 * kld["as it is"]
    assert kld["pairs, unmixed"] > kld["as it is"] and kld["learned"] < 1.2 * kld["as it is"]
