# SPDX-License-Identifier: Apache-2.0
"""Byte counts as literals: whoever changes the format changes these numbers by hand."""

import pytest

from vllm_kvsplice.codec.layout import LatentLayout, TierPlan, ratios, runs, unit_of
from vllm_kvsplice.errors import KVSpliceError

NEAR_LOSSLESS = [(8, 32), (4, 96)]


@pytest.mark.parametrize(
    ("head_dim", "k", "v", "k_bytes", "v_bytes"),
    [
        pytest.param(128, NEAR_LOSSLESS, NEAR_LOSSLESS, 82, 82, id="near_lossless: 32+48 codes, 1+1 scales"),
        pytest.param(64, [(8, 16), (4, 48)], [(8, 16), (4, 48)], 42, 42, id="near_lossless at 64"),
        pytest.param(128, [(8, 128)], [(8, 128)], 129, 129, id="int8"),
        pytest.param(64, [(8, 64)], [(8, 64)], 65, 65, id="int8 at 64"),
        pytest.param(128, [(16, 128)], NEAR_LOSSLESS, 256, 82, id="v_only"),
        pytest.param(128, [(16, 128)], [(16, 96), (0, 32)], 256, 192, id="orthogonal: rank cut at 16 bits"),
        pytest.param(128, [(16, 128)], [(8, 96), (0, 32)], 256, 97, id="orthogonal_int8"),
        pytest.param(128, [(16, 128)], [(4, 96), (0, 32)], 256, 49, id="orthogonal_int4"),
        pytest.param(128, [(8, 16), (4, 80), (2, 32)], [(4, 64), (2, 64)], 67, 50, id="three tiers, two-bit tails"),
        pytest.param(80, [(8, 24), (4, 56)], [(8, 40), (0, 40)], 54, 41, id="head_dim 80, rank 40"),
    ],
)
def test_bytes_per_token_and_head(head_dim, k, v, k_bytes, v_bytes):
    layout = LatentLayout.of(head_dim, k, v)
    assert (layout.side_bytes("k"), layout.side_bytes("v")) == (k_bytes, v_bytes)
    assert layout.bytes_per_token_head == k_bytes + v_bytes
    assert layout.page_bytes(48) == 48 * (k_bytes + v_bytes)


def test_plane_offsets_of_a_16_token_page():
    layout = LatentLayout.of(128, NEAR_LOSSLESS, [(8, 64), (2, 32), (0, 32)])
    assert layout.plan("k", 16) == (TierPlan(8, 32, 0, 0, 1280, 16, False), TierPlan(4, 96, 32, 512, 1296, 16, False))
    # V starts after 16 * 82 bytes of K: 64 * 16 codes, 8 * 16 codes, then the scales of both
    assert layout.plan("v", 16) == (
        TierPlan(8, 64, 0, 1312, 2464, 16, True),
        TierPlan(2, 32, 64, 2336, 2480, 16, True),
    )
    assert layout.page_bytes(16) == 2496 == 2480 + 16


@pytest.mark.parametrize("block_size", [16, 48, 528])
@pytest.mark.parametrize("k", [[(16, 40), (8, 24), (4, 8), (2, 8)], [(2, 80)], [(4, 72), (0, 8)]])
def test_planes_tile_the_page_without_gap_on_16_bytes(block_size, k):
    layout = LatentLayout.of(80, k, [(8, 40), (4, 40)])
    spans = []
    for side in ("k", "v"):
        for t in layout.plan(side, block_size):
            spans.append((t.codes_offset, block_size * t.dims * t.bits // 8))
            if t.bits < 16:
                spans.append((t.scale_offset, block_size))
    end = 0
    for offset, size in sorted(spans):
        assert offset == end and offset % 16 == 0
        end = offset + size
    assert end == layout.page_bytes(block_size)


def test_ratios_are_all_in_and_per_side():
    layout = LatentLayout.of(128, [(16, 128)], NEAR_LOSSLESS)
    assert ratios([layout]) == (1.0, 256 / 82, 512 / 338)
    other = LatentLayout.of(128, [(8, 128)], [(8, 128)])
    assert ratios([layout, other]).kv == 1024 / (338 + 258)


def test_json_round_trip():
    layout = LatentLayout.of(128, [(8, 16), (4, 80), (2, 32)], [(4, 96), (0, 32)])
    assert LatentLayout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("head_dim", "k", "why"),
    [
        (128, [(8, 120)], "cover 120 dimensions: expected head_dim 128"),
        (128, [(4, 64), (8, 64)], "expected some of .* falling"),
        (128, [(8, 64), (8, 64)], "each once"),
        (128, [(3, 128)], "bits \\[3\\]"),
        (128, [(8, 124), (4, 4)], "multiples of 8"),
        (128, [(8, 136), (4, -8)], "positive"),
        (128, [(0, 128)], "store nothing"),
        (100, [(8, 100)], "head_dim 100"),
        (1 << 30, [(8, 1 << 30)], "head_dim 1073741824"),
    ],
)
def test_refuses_what_it_cannot_store(head_dim, k, why):
    with pytest.raises(KVSpliceError, match=why):
        LatentLayout.of(head_dim, k, k)


@pytest.mark.parametrize("data", [None, [], {}, {"head_dim": "128", "k": [], "v": []}, {"head_dim": 8, "k": [[8]], "v": [[8, 8]]},
                                  {"head_dim": 8, "k": [[True, 8]], "v": [[8, 8]]}, {"head_dim": 8, "k": 3, "v": 4}])  # fmt: skip
def test_json_from_outside_is_refused_in_one_sentence(data):
    with pytest.raises(KVSpliceError, match=r"^[^\n]*\.$"):
        LatentLayout.from_json(data)


@pytest.mark.parametrize("block_size", [0, -16, 8, 24, 100])
def test_block_sizes_that_break_alignment(block_size):
    with pytest.raises(KVSpliceError, match="multiple of 16"):
        LatentLayout.of(64, [(8, 64)], [(8, 64)]).page_bytes(block_size)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [(48, [(0, 32), (32, 16)]), (128, [(0, 128)]), (7, [(0, 4), (4, 2), (6, 1)]), (1, [(0, 1)])],
)
def test_a_row_is_cut_into_powers_of_two(elements, expected):
    assert runs(elements) == expected


def test_tokens_in_pairs_keep_to_their_sixteen_and_lie_eight_apart():
    units = [unit_of(token) for token in range(48)]
    assert sorted(units) == list(range(48)) and all(u // 16 == t // 16 for t, u in enumerate(units))
    assert all(unit_of(t + 8) == unit_of(t) + 1 for t in range(48) if t % 16 < 8)
