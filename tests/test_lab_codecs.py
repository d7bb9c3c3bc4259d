# SPDX-License-Identifier: Apache-2.0
"""Codecs of the laboratory against published distortions, brute force, properties of their papers, and bytes counted by hand."""

import math

import pytest
import torch
from hf_models import tiny, tokens

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import affine, dense, kivi, minicache, nvfp4, palu, per_token, registry, turboquant
from vllm_kvsplice.lab.codec import Geometry, Run, Setup
from vllm_kvsplice.lab.score import base_logits, logits
from vllm_kvsplice.lab.statistics import collect, with_fisher

D128 = Geometry(num_layers=8, num_kv_heads=2, head_dim=128, seq_len=2048)


@pytest.mark.parametrize(
    "name, k, v",
    [
        ("bf16", 256, 256),
        ("fp8", 128, 128),
        ("fp8_per_token_head", 132, 132),
        ("int8_per_token_head", 132, 132),
        ("int4_per_token_head", 68, 68),
        ("qserve_kv4", 68, 68),
        ("nvfp4", 72, 72),
        ("turboquant_k8v4", 128, 68),
        ("turboquant_4bit_nc", 66, 68),
        ("turboquant_3bit_nc", 50, 52),
        ("turboquant_4bit_nc_edges", (256 + 66) / 2, (256 + 68) / 2),  # 4 of 8 layers
        ("kivi2_r128", 63.5 / 2048 * 256 + (1 - 63.5 / 2048) * 48, 61),  # 48 = 128 / 4 + 4 groups x 4
        ("kivi4_r32", 15.5 / 2048 * 256 + (1 - 15.5 / 2048) * 80, 82.75),
        ("asymkv_half", 63.5 / 2048 * 256 + (1 - 63.5 / 2048) * 40, 16 + 0.9375 * 32),  # K: half 48, half 32
        ("palu_50", 128, 128),
        ("palu_50_int4", 34, 34),  # two heads share 128 nibbles and 4 bytes
        ("minicache", 0.5 * (128 + 2 + 0.05 * 258) + 128, 0.5 * (128 + 2 + 0.05 * 258) + 128),
        ("h2o_25", 64, 64),
        ("streaming_llm_50", 128, 128),
    ],
)
def test_bytes_counted_by_hand(name, k, v):
    (codec,) = [c for c in registry.RIVALS if c.name == name]
    assert codec.bytes(D128) == pytest.approx((k, v))


def test_every_rival_names_its_paper_and_has_a_name_of_its_own():
    assert all("arXiv" in c.paper for c in registry.RIVALS)
    assert len({c.name for c in registry.RIVALS}) == len(registry.RIVALS) > 30


# ---------------------------------------------------------------- rounding
def test_e4m3_keeps_four_significant_bits():
    x = torch.logspace(-6, 8, 4001, base=2.0)  # normal numbers, up to 256
    relative = (dense.fp8(x) - x).abs() / x
    assert 0.05 < relative.max() <= 2**-4
    assert dense.fp8(torch.tensor([1e4, -1e4])).tolist() == [448, -448]  # saturates, does not become NaN
    assert dense.fp8(torch.tensor([700.0]), 2.0).item() == 704


def test_fp8_per_token_head_uses_the_whole_range_of_each_row():
    x = torch.randn(3, 64) * torch.tensor([[1e-3], [1.0], [1e3]])
    errors = (dense.fp8_per_token_head(x) - x).norm(dim=-1) / x.norm(dim=-1)
    # e4m3 rounds to 1/16 of a power of two: rms 2**-4 / sqrt(3) at 1.0, half of that just below 2.0.
    assert errors.min() > 2**-5 / math.sqrt(3) and errors.max() < 2**-4 / math.sqrt(3)


def test_uniform_quantiser_has_a_twelfth_of_a_step_squared():
    x = torch.rand(4000, 32)
    for bits in (4, 2, 1):
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        inner = x.shape[1] - 2  # the extremes are exact
        want = (step.square() / 12).mean() * inner / x.shape[1]
        assert (affine.affine(x, bits) - x).square().mean() == pytest.approx(float(want), rel=0.03)


def test_int4_rotation_spreads_an_outlier():
    x = torch.randn(500, 128)
    x[:, 7] *= 20
    rotated, plain = (
        (f(x) - x).square().mean() for f in (per_token.int4_per_token_head, lambda x: affine.affine(x, 4))
    )
    assert rotated < plain / 3


@pytest.mark.parametrize("bits, distortion", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_has_the_distortion_of_max_1960(bits, distortion):
    centroids = turboquant.lloyd_max(bits)
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    nearest = (x[:, None] - centroids).abs().amin(-1)
    assert float((nearest.square() * weight).sum()) == pytest.approx(distortion, rel=1e-3)
    if bits in (3, 4):  # and a rotated direction of 128 coordinates is close to Gaussian
        k = torch.randn(4000, 128)
        error = (turboquant.lloyd_max_direction(k, bits, False) - k).square().sum() / k.square().sum()
        assert float(error) == pytest.approx(distortion, rel=0.03)


def test_norm_correction_keeps_the_norm():
    k = torch.randn(100, 64) * 3
    kept = turboquant.lloyd_max_direction(k, 3, True).norm(dim=-1)
    torch.testing.assert_close(kept, k.norm(dim=-1), rtol=2**-10, atol=0)  # fp16


def test_edges_are_the_layers_that_vllm_skips():
    assert [turboquant.is_edge(i, 8) for i in range(8)] == [True, True, False, False, False, False, True, True]
    assert all(turboquant.is_edge(i, 4) for i in range(4))


def test_e2m1_is_the_nearest_of_its_numbers():
    levels = torch.tensor([s * m for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)])
    x = torch.randn(5000) * 3
    got = nvfp4.e2m1(x)
    assert torch.isin(got, levels).all()
    torch.testing.assert_close((got - x).abs(), (levels - x[:, None]).abs().amin(-1))
    assert nvfp4.e2m1(torch.tensor([2.5, 5.0, 0.25])).tolist() == [2.0, 4.0, 0.0]  # ties to even


def test_four_over_six_is_never_worse_than_nvfp4():
    x = torch.randn(300, 64)
    errors = [(f(x) - x).unflatten(-1, (-1, 16)).square().sum(-1) for f in (nvfp4.four_over_six, nvfp4.nvfp4)]
    assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.97 * errors[1].sum()


def test_nvfp4_refuses_what_its_blocks_do_not_divide():
    with pytest.raises(KVSpliceError, match="multiple of 16"):
        nvfp4.CODECS[0].bytes(Geometry(2, 2, 24, 100))


# ---------------------------------------------------------------- QServe
def test_smooth_attention_halves_the_range_of_outliers_in_logarithm():
    amax = torch.ones(1, 8)
    amax[0, 2] = 16.0  # with 6, its RoPE partner
    assert per_token.smooth_factors(amax).tolist() == [[1, 1, 4, 1, 1, 1, 4, 1]]


def test_smooth_attention_helps_the_channels_beside_an_outlier():
    k = torch.randn(1, 2, 400, 32)
    k[..., 5] *= 40
    factor = per_token.smooth_factors(k.abs().amax((0, 2)))[:, None]
    others = [i for i in range(32) if i not in (5, 21)]
    smooth, plain = (
        (x - k)[..., others].square().mean() for x in (affine.affine(k / factor, 4) * factor, affine.affine(k, 4))
    )
    assert smooth < plain / 10


# ---------------------------------------------------------------- KIVI
def test_an_outlier_channel_costs_keys_nothing_and_tokens_after_the_last_group_are_exact():
    k = torch.randn(1, 1, 70, 16)
    loud = k.clone()
    loud[..., 3] *= 1000
    quiet = [i for i in range(16) if i != 3]
    torch.testing.assert_close(kivi.per_channel(k, 2)[..., quiet], kivi.per_channel(loud, 2)[..., quiet])
    assert torch.equal(kivi.per_channel(k, 2)[..., 64:, :], k[..., 64:, :])


def test_each_query_reads_each_token_once():
    seen = kivi.visible(100, 32, torch.device("cpu")).view(100, 3, 100)
    assert (seen.sum(1) == 1).all()
    exact_k, exact_v = seen[:, 2], seen[:, 1] | seen[:, 2]
    causal = torch.ones(100, 100).tril().bool()
    assert [int((exact_k & causal)[t].sum()) for t in (0, 31, 32, 99)] == [1, 32, 1, 4]
    assert [int((exact_v & causal)[t].sum()) for t in (0, 31, 32, 99)] == [1, 32, 32, 32]


def step_by_step(q, k, v, bits, residual):
    """KIVI's cache as its algorithm grows it, one token at a time: q, k, v [T, d] of one head; the residual is bf16."""
    out, codes_k, codes_v, full_k, full_v = [], [], [], [], []
    for t in range(len(q)):
        full_k.append(k[t])
        full_v.append(v[t])
        if len(full_v) > residual:
            codes_v.append(kivi.per_token(full_v.pop(0)[None], bits)[0])
        keys, values = (
            torch.stack(c + [x.bfloat16().float() for x in full]) for c, full in ((codes_k, full_k), (codes_v, full_v))
        )
        out.append((keys @ q[t] / len(q[t]) ** 0.5).softmax(-1) @ values)
        if len(full_k) == residual:
            for group in torch.stack(full_k).split(kivi.GROUP):
                codes_k += list(kivi.per_channel(group, bits))
            full_k = []
    return torch.stack(out)


def test_kivi_in_one_pass_is_kivi_token_by_token():
    model, seen = tiny("qwen2", num_attention_heads=4, num_key_value_heads=4, head_dim=32), {}
    ids = tokens(1, 150)[0]

    def keep_output(module, inputs, output):
        seen["out"] = inputs[0][0]

    def keep_inputs(i, q, k, v):
        seen.setdefault("qkv", (q, k, v))
        return k, v

    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(keep_output)
    with torch.no_grad(), transformed_kv(model, keep_inputs):
        model(ids[None])
    (codec,) = [c for c in registry.RIVALS if c.name == "kivi2_r32"]
    geometry = Geometry(3, 4, 32, 150)
    logits(model, ids, codec.prepare(Setup(model, geometry, {})), Run(None, {}))
    hook.remove()
    q, k, v = (x[0] for x in seen["qkv"])
    for head in range(4):
        want = step_by_step(q[head], k[head], v[head], 2, 32)
        got = seen["out"][:, head * 32 : (head + 1) * 32]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert (got - step_by_step(q[head], k[head], v[head], 2, 128)).norm() > 0.1 * want.norm()


def test_asymkv_gives_its_second_bit_to_the_first_layers_of_k():
    bits = kivi._asymmetric(0.5, 0.0)
    assert [bits(i, 8) for i in (0, 3, 4, 7)] == [(2, 1), (2, 1), (1, 1), (1, 1)]


# ---------------------------------------------------------------- Palu
def test_ranks_follow_the_weights():
    assert palu.allocate([1.0] * 4, 4 * 64, 128) == [64] * 4
    assert palu.allocate([3.0, 1.0], 128, 128) == [96, 32]
    assert palu.allocate([1e9, 1.0], 160, 128) == [128, 32]  # nobody gets more than all
    assert sum(palu.allocate([0.1, 5.0, 2.0], 200, 128)) == 200


def test_palu_keeps_what_a_singular_value_decomposition_keeps():
    y = torch.randn(500, 48) @ torch.randn(48, 48)
    basis = palu._leading(y.double().T @ y.double(), 0, 48, 16)
    lost = (y - y @ basis @ basis.T).square().sum()
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(y)[16:].square().sum()), rel=1e-4)  # Eckart-Young


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_palu_of_full_rank_changes_next_to_nothing(family):
    model = tiny(family)  # qwen2: with biases; qwen3: with norms after the projections
    windows = tokens(3, 40)
    statistics = with_fisher(model, windows, collect(model, windows))
    geometry = Geometry(3, *statistics[0].k_amax.shape, 40)
    run, ids = Run(None, {}), tokens(1, 30, seed=5)[0]
    base = base_logits(model, ids, False)[0]
    full, half, by_fisher = (
        logits(model, ids, palu._attach(Setup(model, geometry, statistics), kept, 16, fisher), run)
        for kept, fisher in ((1.0, False), (0.5, False), (0.5, True))
    )
    spread = (base - base.mean()).norm()
    assert 0 < (full - base).norm() < 0.05 * spread < (half - base).norm()
    assert not torch.equal(half, by_fisher)
    ranks = palu.ranks_of(statistics, 0.5, fisher=True)
    assert sum(ranks.values()) == sum(palu.ranks_of(statistics, 0.5, fisher=False).values())
    assert all(p.requires_grad for p in model.parameters())


def test_palu_is_refused_where_keys_have_no_projection_of_their_own():
    model = tiny("gpt2")
    with pytest.raises(KVSpliceError, match="k_proj"):
        palu.ranks_of(collect(model, tokens(1, 20)), 0.5, False)


# ---------------------------------------------------------------- MiniCache
def test_slerp_walks_along_the_sphere():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(minicache.slerp(a, b, 0.5), torch.tensor([1.0, 1.0]) / 2**0.5)
    torch.testing.assert_close(
        minicache.slerp(a, b, 0.6), torch.tensor([math.cos(0.3 * math.pi), math.sin(0.3 * math.pi)])
    )
    assert torch.equal(minicache.slerp(a, a, 0.6), a)


def test_equal_layers_merge_without_loss_and_norms_are_kept():
    x = torch.randn(1, 2, 40, 16)
    for part, scale in zip(minicache.merge(x, 3 * x, retained=0.0), (1, 3), strict=True):
        torch.testing.assert_close(part, scale * x, rtol=2**-8, atol=0)  # the direction is stored in bf16
    a, b = torch.randn(2, 1, 2, 40, 16)
    for part, own in zip(minicache.merge(a, b, retained=0.0), (a, b), strict=True):
        torch.testing.assert_close(part.norm(dim=-1), own.norm(dim=-1), rtol=2**-8, atol=0)


def test_the_most_different_tokens_are_retained():
    a = torch.randn(1, 1, 40, 16)
    b = a.clone()
    b[..., 7, :] *= -1
    first, second = minicache.merge(a, b, retained=1 / 40)
    assert torch.equal(first[0, 0, 7], a[0, 0, 7].bfloat16().float())
    assert torch.equal(second[0, 0, 7], b[0, 0, 7].bfloat16().float())


def test_only_the_second_half_is_merged():
    assert minicache.pairs(8) == [(4, 5), (6, 7)] and minicache.pairs(5) == [(2, 3)]
