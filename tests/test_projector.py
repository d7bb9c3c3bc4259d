# SPDX-License-Identifier: Apache-2.0
"""The projector file: round trip, wrong model, and files made to hurt."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_kvsplice.codec.bases import hadamard
from vllm_kvsplice.codec.fingerprint import ModelShape
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, build_metadata, default_layer
from vllm_kvsplice.errors import KVSpliceError

CONFIG = dict(model_type="qwen2", vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
LAYOUTS = {0: LatentLayout.of(32, [(8, 8), (4, 24)], [(8, 16), (0, 16)]), 2: LatentLayout.of(32, [(8, 32)], [(4, 32)])}


def config(**changes):
    return SimpleNamespace(**(CONFIG | dict(num_key_value_heads=2, head_dim=32) | changes))


def random_basis(layout, side, generator):
    rank, D = layout.rank(side), layout.head_dim
    encode = torch.randn(2, rank, D, generator=generator)
    return Basis(encode, torch.randn(2, D, rank, generator=generator), torch.randn(2, D, generator=generator),
                 torch.rand(2, rank, generator=generator) + 0.5)  # fmt: skip


@pytest.fixture(scope="module")
def projector():
    g = torch.Generator().manual_seed(0)
    layers = {
        i: LayerProjector(lay, random_basis(lay, "k", g), random_basis(lay, "v", g)) for i, lay in LAYOUTS.items()
    }
    return Projector(build_metadata(config(), "test", quality={"kld": 0.5}), layers)


@pytest.fixture(scope="module")
def good(projector, tmp_path_factory):
    path = tmp_path_factory.mktemp("projector") / "good.safetensors"
    projector.save(path)
    return path


def test_round_trip_keeps_every_number(projector, good):
    loaded = Projector.load(good)
    assert loaded.metadata == projector.metadata
    assert {i: layer.layout for i, layer in loaded.layers.items()} == LAYOUTS
    for i, layer in projector.layers.items():
        for side in ("k", "v"):
            for part in ("encode", "decode", "mean", "sigma"):
                assert torch.equal(getattr(loaded.layers[i].side(side), part), getattr(layer.side(side), part))
    assert loaded.bytes_per_token_head == (22 + 17 + 33 + 17) / 2


def test_equal_projectors_give_equal_bytes(projector, good, tmp_path):
    for n in range(3):
        projector.save(tmp_path / str(n))
        assert (tmp_path / str(n)).read_bytes() == good.read_bytes()


def test_verify_names_what_differs(projector):
    projector.verify(config())
    with pytest.raises(KVSpliceError, match="num_hidden_layers 3, not 4; num_kv_heads 2, not 4.*kvsplice calibrate"):
        projector.verify(config(num_hidden_layers=4, num_key_value_heads=None))


def test_sigma_folds_away(projector):
    basis = projector.layers[0].k
    x = torch.randn(5, 2, 32)
    z = torch.einsum("thd,hrd->thr", x, basis.encode) / basis.sigma
    folded = basis.folded()
    torch.testing.assert_close(torch.einsum("thd,hrd->thr", x, folded.encode), z)
    torch.testing.assert_close(torch.einsum("thr,hdr->thd", z, folded.decode),
                               torch.einsum("thr,hdr->thd", z * basis.sigma, basis.decode))  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 8, 12, 40, 64, 80, 96, 128, 7])
def test_hadamard_is_orthogonal_and_spreads(n):
    m = hadamard(n)
    torch.testing.assert_close(m @ m.T, torch.eye(n, dtype=torch.float64))
    assert m.abs().max() <= (2.0 / n) ** 0.5 + 1e-12


def test_default_layer_is_lossless_but_for_eight_bits():
    layer = default_layer(96, 2)
    assert layer.layout.bytes_per_token_head == 194
    torch.testing.assert_close(layer.k.decode @ layer.k.encode, torch.eye(96).expand(2, -1, -1), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- hostile files
def rewrite(good, path, change):
    """Save ``good`` again with its tensors and metadata changed in place by ``change(tensors, meta)``."""
    raw = good.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    meta = json.loads(header["__metadata__"]["kvsplice"])
    tensors = load_file(good)
    change(tensors, meta)
    save_file(tensors, path, metadata={"kvsplice": json.dumps(meta)})
    return path


def of_shape(meta, **fields):
    """Metadata fields of the same model but for some of its shape, digest and all."""
    shape = ModelShape(**(meta["metadata"]["model"] | fields))
    return {"model": shape.model_dump(), "model_digest": shape.digest}


def set_value(name, value):
    def change(tensors, meta):
        tensors[name].view(-1)[0] = value

    return change


CHANGES = {
    "nan": (set_value("layers.0.k.encode", float("nan")), "not finite"),
    "inf mean": (set_value("layers.2.v.mean", float("inf")), "not finite"),
    "zero sigma": (set_value("layers.0.v.sigma", 0.0), "not positive"),
    "sigma that overflows": (set_value("layers.0.v.sigma", 1e-40), "cannot be scaled by"),
    "another head_dim": (lambda t, m: m["metadata"].update(of_shape(m, head_dim=40)), "head_dim 40"),
    "missing": (lambda t, m: t.pop("layers.2.k.mean"), "layers.2.k.mean' is missing"),
    "extra": (lambda t, m: t.update(evil=torch.zeros(1)), "'evil' is not expected"),
    "wrong shape": (lambda t, m: t.update({"layers.0.k.mean": torch.zeros(2, 31)}), r"\[2, 31\], expected F32 \[2, 32\]"),
    "wrong dtype": (lambda t, m: t.update({"layers.0.k.mean": torch.zeros(2, 32).half()}), "F16"),
    "unknown version": (lambda t, m: m["metadata"].update(format="kvsplice/9"), "'kvsplice/9', this version reads 'kvsplice/1'"),
    "digest": (lambda t, m: m["metadata"].update(model_digest="0" * 16), "digest"),
    "absurd layout": (lambda t, m: m["layouts"]["0"].update(head_dim=1 << 40), "head_dim 1099511627776"),
    "absurd heads": (lambda t, m: m["metadata"]["model"].update(num_kv_heads=1 << 40), "digest"),
    "absurd layer": (lambda t, m: m["layouts"].update({"99999999": m["layouts"]["0"]}), "layer index"),
    "layer beyond the model": (lambda t, m: m["layouts"].update({"7": m["layouts"]["0"]}), "its model has 3"),
    "absurd number of layers": (lambda t, m: m["metadata"].update(of_shape(m, num_hidden_layers=1 << 30)), "1073741824 layers"),
    "escapes": (lambda t, m: m["metadata"].update(preset="near\x1b]0;x\x07"), "metadata preset: .* printable"),
    "second line": (lambda t, m: m["metadata"].update(model_name="a\nmeasured quality: 0"), "metadata model_name"),
    "long version": (lambda t, m: m["metadata"]["versions"].update(torch="2" * 501), "metadata versions.torch"),
    "no layers": (lambda t, m: m["layouts"].clear(), "its layers are"),
    "extra field": (lambda t, m: m["metadata"].update(hook="os.system"), "metadata hook"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused(name, good, tmp_path):
    change, why = CHANGES[name]
    path = rewrite(good, tmp_path / "bad.safetensors", change)
    with pytest.raises(KVSpliceError, match=why) as caught:
        Projector.load(path)
    assert "\n" not in str(caught.value) and "kvsplice calibrate" in str(caught.value) or "layout" in name


def test_header_lengths_are_checked_before_reading(tmp_path):
    path = tmp_path / "huge.safetensors"
    for length, why in ((1 << 62, "shorter than its header"), (17 << 20, "over 16777216")):
        with path.open("wb") as f:
            f.write(struct.pack("<Q", length))
            f.truncate(18 << 20)
        with pytest.raises(KVSpliceError, match=why):
            Projector.load(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(KVSpliceError, match="does not exist: make it with"):
        Projector.load(tmp_path / "none.safetensors")
    with pytest.raises(KVSpliceError, match="cannot be read"):
        Projector.load(tmp_path)


def test_any_truncation_is_refused(good, tmp_path):
    raw, path = good.read_bytes(), tmp_path / "cut"
    for size in [*range(0, 64, 7), len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(KVSpliceError):
            Projector.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_random_damage_never_raises_anything_else(edits, good, tmp_path):
    raw = bytearray(good.read_bytes())
    for at, data in edits:
        raw[at : at + len(data)] = data
    path = tmp_path / "damaged"
    path.write_bytes(raw)
    try:
        loaded = Projector.load(path)
    except KVSpliceError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(layer.k.encode).all() for layer in loaded.layers.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8),
                           lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["__metadata__", "kvsplice", "dtype", "shape", "data_offsets"]), x, max_size=3)))  # fmt: skip
def test_random_headers_are_refused(header, tmp_path):
    data = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(KVSpliceError):
        Projector.load(tmp_path / "x")
