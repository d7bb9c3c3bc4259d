# SPDX-License-Identifier: Apache-2.0
"""What inspect says of a projector file, in numbers worked out by hand."""

import pytest

from vllm_kvsplice.codec.bases import hadamard
from vllm_kvsplice.codec.fingerprint import ModelShape
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, Calibration, LayerProjector, Metadata, Projector
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.inspect_file import describe, inspect, inspect_table, served_layouts, summary

SHAPE = ModelShape(
    model_type="qwen2",
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
MIXED = LatentLayout.of(64, [(8, 16), (4, 48)], [(4, 48), (0, 16)])  # K 16 + 2 + 24 + 4 = 46, V 24 + 4 = 28
WIDE = LatentLayout.of(64, [(16, 64)], [(8, 64)])  # K 128, V 64 + 2 = 66


def projector(layouts):
    rows = hadamard(64).expand(2, -1, -1)
    layers = {
        i: LayerProjector(layout, *(Basis.orthogonal(rows[:, : layout.rank(s)]) for s in ("k", "v")))
        for i, layout in layouts.items()
    }
    calibration = Calibration(text="novel.txt", text_sha256="ab" * 32, tokens=4096, samples=2, seq_len=2048, seed=7)
    meta = Metadata(
        model=SHAPE,
        model_digest=SHAPE.digest,
        model_name="tiny",
        preset="mine",
        calibration=calibration,
        versions={"kvsplice": "0.0.9"},
        quality={"kld": 0.001},
    )
    return Projector(meta, layers)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "p.safetensors"
    projector({0: MIXED, 1: MIXED, 2: WIDE}).save(path)
    return str(path)


def test_bytes_and_ratios(path):
    facts = inspect(path)
    assert facts["bytes_per_token_head"] == pytest.approx((67 + 67 + 193) / 3)
    assert facts["ratio"] == {"k": 3 * 128 / (42 + 42 + 128), "v": 3 * 128 / (25 + 25 + 65), "kv": 6 * 128 / 327}
    assert [layer["bytes_per_token_head"] for layer in facts["layers"]] == [67, 67, 193]
    assert facts["layers"][0]["k"] == [[8, 16], [4, 48]] and facts["layers"][0]["v"] == [[4, 48], [0, 16]]
    assert facts["layers"][2]["ratio"] == {"k": 1.0, "v": 128 / 65, "kv": 256 / 193}


def test_fingerprint_and_provenance(path):
    facts = inspect(path)
    assert facts["fingerprint"] == {"digest": SHAPE.digest} | SHAPE.model_dump()
    assert facts["calibration"]["text_sha256"] == "ab" * 32 and facts["calibration"]["seed"] == 7
    assert (facts["preset"], facts["model_name"], facts["quality"]) == ("mine", "tiny", {"kld": 0.001})
    assert facts["versions"] == {"kvsplice": "0.0.9"} and len(facts["sha256"]) == 64


def test_table_names_the_numbers(path):
    text = inspect_table(inspect(path))
    for part in (SHAPE.digest, "novel.txt", "4,096 tokens", "K+V 2.35 x", "16 x 8 bit + 48 x 4 bit", "kvsplice 0.0.9"):
        assert part in text


def test_layers_without_a_projector_count_as_dense():
    layouts = served_layouts(projector({1: MIXED}), SHAPE)
    assert [layouts[i].bytes_per_token_head for i in range(3)] == [256, 67, 256]
    assert [layer["compressed"] for layer in describe(projector({1: MIXED}), SHAPE, None)["layers"]] == [
        False,
        True,
        False,
    ]


def test_no_projector_is_the_int8_default():
    facts = describe(None, SHAPE, None)
    assert facts["preset"] == "int8" and facts["bytes_per_token_head"] == 130
    assert facts["ratio"]["kv"] == pytest.approx(256 / 130)


def test_summary_counts_layers_where_they_differ():
    assert summary([MIXED, MIXED]) == "K 16x8+48x4 V 48x4+16x0"
    assert summary([MIXED, WIDE, MIXED]) == "2 layers K 16x8+48x4 V 48x4+16x0, 1 layers K 64x16 V 64x8"


def test_what_is_no_projector_is_refused(tmp_path):
    with pytest.raises(KVSpliceError, match="does not exist"):
        inspect(str(tmp_path / "missing.safetensors"))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    with pytest.raises(KVSpliceError, match="not a usable projector"):
        inspect(str(bad))
