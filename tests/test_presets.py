# SPDX-License-Identifier: Apache-2.0
"""Presets as literal tables, overrides, and files that are refused."""

import pytest

from vllm_kvsplice.calibration.presets import TierShare, load_preset, preset_names, resolve, tier_dims
from vllm_kvsplice.codec.layout import LatentLayout, ratios
from vllm_kvsplice.errors import KVSpliceError

# preset, head_dim: K tiers, V tiers as (bits, dims), bytes per token and head
TABLE = [
    ("none", 128, [(16, 128)], [(16, 128)], 512),
    ("orthogonal", 64, [(16, 64)], [(16, 48), (0, 16)], 224),
    ("orthogonal", 80, [(16, 80)], [(16, 64), (0, 16)], 288),  # 60 is half way between 56 and 64: up
    ("orthogonal_int8", 128, [(16, 128)], [(8, 96), (0, 32)], 353),
    ("orthogonal_int4", 256, [(16, 256)], [(4, 192), (0, 64)], 609),
    ("near_lossless", 16, [(8, 8), (4, 8)], [(8, 8), (4, 8)], 28),  # a quarter is 4: at least 8
    ("near_lossless", 80, [(8, 24), (4, 56)], [(8, 24), (4, 56)], 108),
    ("near_lossless", 128, [(8, 32), (4, 96)], [(8, 32), (4, 96)], 164),
    ("balanced", 64, [(8, 8), (4, 40), (2, 16)], [(8, 16), (4, 16), (2, 32)], 70),
    ("balanced", 128, [(8, 16), (4, 80), (2, 32)], [(8, 32), (4, 32), (2, 64)], 134),
    ("max", 128, [(4, 64), (2, 64)], [(4, 64), (2, 64)], 100),
    ("v_only", 96, [(16, 96)], [(8, 24), (4, 72)], 254),
    ("int8", 64, [(8, 64)], [(8, 64)], 130),
]


@pytest.mark.parametrize("preset, head_dim, k, v, total", TABLE)
def test_layouts(preset, head_dim, k, v, total):
    layout, _ = resolve(preset, head_dim)
    assert layout == LatentLayout.of(head_dim, k, v) and layout.bytes_per_token_head == total


def test_every_preset_is_in_the_table_and_fits_every_head_dim():
    assert preset_names() == sorted({row[0] for row in TABLE})
    for name in preset_names():
        for head_dim in (16, 24, 64, 72, 80, 96, 112, 128, 192, 256, 512):
            layout, recipe = resolve(name, head_dim)
            assert layout.head_dim == head_dim and recipe.description
    assert round(ratios([resolve("near_lossless", 128)[0]]).kv, 2) == 3.12


@pytest.mark.parametrize(
    "preset, overrides, k, v",
    [
        ("orthogonal", dict(rank=64), [(16, 128)], [(16, 64), (0, 64)]),
        ("orthogonal_int8", dict(rank=104, v_bits=4), [(16, 128)], [(4, 104), (0, 24)]),
        ("orthogonal_int8", dict(k_bits=8), [(8, 128)], [(8, 96), (0, 32)]),
        ("orthogonal_int4", dict(rank=128), [(16, 128)], [(4, 128)]),
        ("near_lossless", dict(rank=96), [(8, 32), (4, 96)], [(8, 24), (4, 72), (0, 32)]),
        ("near_lossless", dict(v_bits=16, k_bits=4), [(4, 128)], [(16, 128)]),
        ("none", dict(rank=40, v_bits=2), [(16, 128)], [(2, 40), (0, 88)]),
        ("int8", dict(v_bits=4), [(8, 128)], [(4, 128)]),
    ],
)
def test_overrides(preset, overrides, k, v):
    assert resolve(preset, 128, **overrides)[0] == LatentLayout.of(128, k, v)


def test_an_untouched_side_that_is_compressed_after_all_is_calibrated_for_its_metric():
    _, recipe = resolve("none", 64, rank=32, k_bits=4)
    assert (recipe.k.metric, recipe.v.metric) == ("query-aware", "output-aware") and recipe.needs_text
    assert not resolve("none", 64)[1].needs_text and not resolve("int8", 64)[1].needs_text
    assert resolve("near_lossless", 64, v_bits=16)[1].v.untouched


@pytest.mark.parametrize(
    "preset, overrides, says",
    [
        ("nearlossless", {}, "not known: expected balanced, int8, max, near_lossless, none, orthogonal, .*v_only"),
        ("../none", {}, "not known"),
        ("orthogonal", dict(rank=12), "multiple of 8 up to head_dim 64"),
        ("orthogonal", dict(rank=72), "multiple of 8 up to head_dim 64"),
        ("orthogonal", dict(rank=0), "multiple of 8"),
        ("near_lossless", dict(rank=8), "too small for 2 tiers"),
        ("int8", dict(rank=32), "calibrated basis"),
        ("none", dict(k_bits=3), "--k-bits 3 is not supported: expected one of 16, 8, 4, 2"),
        ("none", dict(v_bits=0), "--v-bits 0"),
    ],
)
def test_refusals(preset, overrides, says):
    with pytest.raises(KVSpliceError, match=says) as caught:
        resolve(preset, 64, **overrides)
    assert "\n" not in str(caught.value)


def test_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'description = "mine"\n[k]\nmetric = "plain"\nequalise = "sigma"\ntiers = [{ bits = 4 }]\n'
        '[v]\ntiers = [{ bits = 8, share = 0.5 }, { bits = 2, share = 0.25 }, { bits = 0, share = "rest" }]\n'
    )
    layout, recipe = resolve(str(path), 96)
    assert layout == LatentLayout.of(96, [(4, 96)], [(8, 48), (2, 24), (0, 24)])
    assert (recipe.k.equalise, recipe.v.equalise, recipe.v.metric) == ("sigma", "gamma", "plain")


GOOD = 'description = "d"\n[k]\ntiers = [{ bits = 16 }]\n[v]\n'


@pytest.mark.parametrize(
    "content, says",
    [
        ("nonsense", "is not TOML"),
        (GOOD + "tiers = []", "bad v.tiers"),
        (GOOD + "tiers = [{ bits = 3 }]", "bad v.tiers.0.bits"),
        (GOOD + "tiers = [{ bits = 8, share = 1.5 }]", "bad v.tiers.0.share"),
        (GOOD + 'tiers = [{ bits = 8 }]\nmetrik = "plain"', "bad v.metrik"),
        (GOOD + 'metric = "query-aware"\ntiers = [{ bits = 8 }]', "does not belong"),
        (GOOD + "tiers = [{ bits = 8 }, { bits = 4 }]", "at most one"),
        (GOOD + "tiers = [{ bits = 8, share = 0.9 }, { bits = 4, share = 0.9 }]", "cover 112 dimensions"),
        (GOOD + "tiers = [{ bits = 4, share = 0.5 }, { bits = 8 }]", "falling"),
    ],
)
def test_bad_files(tmp_path, content, says):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(KVSpliceError, match=says) as caught:
        resolve(str(path), 64)
    assert "\n" not in str(caught.value)
    with pytest.raises(KVSpliceError, match="cannot be read"):
        load_preset(str(tmp_path / "missing.toml"))


def test_rounding_is_half_up_to_eight_and_an_empty_rest_is_left_out():
    shares = tuple(TierShare(bits=b, share=s) for b, s in ((8, 0.5), (4, 0.5)))
    assert tier_dims((*shares, TierShare(bits=0)), 64) == [(8, 32), (4, 32)]
    assert tier_dims((TierShare(bits=8, share=0.1875), TierShare(bits=4)), 64) == [(8, 16), (4, 48)]  # 12 up to 16
    assert tier_dims((TierShare(bits=8, share=0.01), TierShare(bits=4)), 64) == [(8, 8), (4, 56)]
