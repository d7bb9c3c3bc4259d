# SPDX-License-Identifier: Apache-2.0
"""cache_write against reference.encode, quantize, pack and write_side."""

from dataclasses import replace

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch

from vllm_kvsplice.codec import reference


@pytest.mark.parametrize("name", cases.WRITE)
def test_matches_reference(name: str) -> None:
    checks.check_write(cases.WRITE[name])


def test_clip_search_is_the_reference_s() -> None:
    first = {8: 0, 4: 0, 2: cases.quantize.CLIP_FIRST_2.value}
    count = {8: 1, 4: cases.quantize.CLIP_COUNT_4.value, 2: cases.quantize.CLIP_COUNT_2.value}
    assert (first, count) == (reference.CLIP_FIRST, reference.CLIP_COUNT)
    assert cases.packing.LEAST_EXPONENT.value == reference.LEAST_EXPONENT


@pytest.mark.parametrize(("bits", "dims"), [(8, 64), (4, 64), (2, 64)])
def test_codes_are_equal_where_the_projection_is_exact(bits: int, dims: int) -> None:
    """Identity basis, no mean: the latents are the inputs, so that rounding and packing alone are compared."""
    batch = cases.make_batch(
        cases.Case(k=((bits, dims),), v=((bits, dims),), seq_lens=(33,), num_kv_heads=1), filled=False
    )
    eye, none = torch.eye(64, device=cases.DEVICE)[None].contiguous(), torch.zeros(1, 64, device=cases.DEVICE)
    batch.bases = {"k": (eye, eye, none), "v": (eye, eye, none)}
    expected = torch.full_like(batch.storage, cases.POISON).as_strided(batch.kv_cache.shape, batch.kv_cache.stride())
    cases.write_by_reference(batch, expected)
    checks.write(batch)
    differing = (batch.kv_cache != expected).float().mean()
    assert differing == 0 if cases.DEVICE == "cpu" else differing < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_has_no_bias(bits: int) -> None:
    """Truncation would shift codes by half a step towards zero; rounding keeps the mean error near 0."""
    batch = cases.make_batch(
        cases.Case(k=((bits, 64),), v=((bits, 64),), seq_lens=(60,), num_kv_heads=1, offset=3.0), filled=False
    )
    checks.write(batch)
    encode, _, mean = (t.double() for t in batch.bases["v"])
    z = reference.encode(batch.value.double(), encode, mean)
    blocks = batch.block_table[0, :4].long()
    (plan,) = batch.plan("v")
    got = reference.read_side(batch.kv_cache, (plan,), blocks, torch.float64, batch.wide_dtype)[:, :60].transpose(0, 1)
    scale = reference.scale_of(reference.scale_plane(batch.kv_cache, plan)[blocks], torch.float64)
    off = (got - z) / scale.transpose(0, 1).flatten(1)[:, :60].T[..., None]
    inside = off.abs() < 0.51  # not clipped
    assert inside.double().mean() > 0.9
    assert (off[inside] * z[inside].sign()).mean().abs() < 0.02


def test_rows_of_zeros_and_of_one_number() -> None:
    batch = cases.make_batch(cases.Case(k=cases.A8_4, v=cases.A8_4, seq_lens=(4,), num_kv_heads=1), filled=False)
    batch.key[:2], batch.value[1:3] = 0, 2.5
    expected = torch.full_like(batch.storage, cases.POISON).as_strided(batch.kv_cache.shape, batch.kv_cache.stride())
    cases.write_by_reference(batch, expected)
    checks.write(batch)
    block = batch.block_table[0, :1].long()
    for side in ("k", "v"):
        got, want = (
            reference.read_side(c, batch.plan(side), block, torch.float64, batch.wide_dtype)[:, :4]
            for c in (batch.kv_cache, expected)
        )
        assert torch.allclose(got, want, atol=0.02)


def test_slot_mapping_may_be_shorter_than_the_tokens() -> None:
    batch = cases.make_batch(cases.Case(seq_lens=(20,)), filled=False)
    batch.slot_mapping = batch.slot_mapping[:7]
    checks.write(batch)
    seen = (batch.kv_cache[batch.block_table[0, :2].long()] != cases.POISON).any(-1).any(1).flatten()
    assert seen[:7].any() and not batch.kv_cache[batch.block_table[0, 1].long()].ne(cases.POISON).any()


def test_nothing_to_write() -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    batch.slot_mapping = batch.slot_mapping[:0]
    checks.write(batch)
    assert (batch.storage == cases.POISON).all()


@pytest.mark.parametrize(("name", "block_t"), [("four-tiers", 32), ("near-lossless-64", 64), ("four-tiers", 128)])
def test_tiles_of_long_steps_match_the_reference(name: str, block_t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cases.cache_write, "write_tiles", lambda T, *_: cases.cache_write.WriteTiles(block_t, 64, -(-T // block_t))
    )
    checks.check_write(replace(cases.WRITE[name], num_kv_heads=1))


def test_longer_steps_have_larger_tiles() -> None:
    plan = cases.make_batch(cases.WRITE["near-lossless-128"], filled=False).plan("k")
    tiles = [cases.cache_write.write_tiles(T, 4, 128, (plan, plan)) for T in (1, 64, 256, 1024, 8192)]
    assert [cut.block_t for cut in tiles] == [16, 16, 32, 64, 128]
    assert [cut.tiles for cut in tiles] == [1, 4, 8, 16, 64] and {cut.block_d for cut in tiles} == {128}
    assert cases.cache_write.write_tiles(8192, 4, 256, (plan, plan)).block_t == 64  # 128 rows of 256 would not fit


def test_a_mean_far_larger_than_the_spread_costs_no_accuracy() -> None:
    """Ex - E mu cancels: with E rounded to two planes and E mu taken from E itself, codes would be off by 1 % and more."""
    batch = cases.make_batch(cases.Case(head_dim=128, k=((8, 128),), v=((8, 128),), num_kv_heads=1), filled=False)
    g = torch.Generator().manual_seed(1)
    for side, x in (("k", batch.key), ("v", batch.value)):
        encode, decode, mean = batch.bases[side]
        mean = (torch.randn(mean.shape, generator=g) * 50.0).to(mean.device)
        batch.bases[side] = encode, decode, mean
        x.copy_(torch.randn(x.shape, generator=g).to(x.device) * 0.3 + mean)
    checks.check_written(batch)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("slot_mapping", lambda b: setattr(b, "slot_mapping", b.slot_mapping.int())),
        ("kv_cache", lambda b: setattr(b, "kv_cache", b.kv_cache.view(torch.int8))),
        ("kv_cache", lambda b: setattr(b, "kv_cache", b.kv_cache[:, :1])),
        ("value", lambda b: setattr(b, "value", b.value[:, :, :32])),
        ("key", lambda b: setattr(b, "key", b.key.double())),
        ("k_encode", lambda b: b.bases.update(k=(b.bases["k"][0][:, :32].contiguous(), *b.bases["k"][1:]))),
        ("v_encode", lambda b: b.bases.update(v=tuple(t[:1] for t in b.bases["v"]))),
    ],
)
def test_wrong_arguments_are_named(name: str, change) -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    change(batch)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        checks.write(batch)


@pytest.mark.parametrize("field", ["k_encode", "k_offset", "v_encode", "v_offset"])
def test_tensors_that_were_not_prepared_are_named(field: str) -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    prepared = checks.prepared(batch)._replace(**{field: batch.bases["k"][0]})
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        cases.cache_write.cache_write(
            batch.key, batch.value, batch.kv_cache, batch.slot_mapping, prepared, batch.plan("k"), batch.plan("v")
        )
