# SPDX-License-Identifier: Apache-2.0
"""Calibration end to end on tiny models: what is watched, what is solved, what is written, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, save, tiny, tokens
from safetensors import SafetensorError

from vllm_kvsplice.calibration import moments
from vllm_kvsplice.calibration.calibrate import CalibrateRequest, choose_seq_len, collect, run
from vllm_kvsplice.calibration.calibrate import save as save_projector
from vllm_kvsplice.calibration.hf_attention import load_model, transformed_kv
from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "tiny-qwen", num_hidden_layers=2, hidden_size=96)  # head_dim 24


@pytest.fixture(scope="module")
def request_of(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")

    def make(name="p", **changes):
        few = dict(samples=6, seq_len=64)
        return CalibrateRequest(folder, str(out / f"{name}.safetensors"), **(few | changes))

    return make


def test_watching_sums_what_the_model_computes():
    model, ids = tiny("qwen2"), tokens(batch=3, length=20)
    layers = {}

    def watch(layer_idx, q, k, v):
        layers[layer_idx] = moments.add_batch(moments.new_moments(2, 16), q, k, v)
        return k, v

    with torch.no_grad(), transformed_kv(model, watch):
        model(ids)
    seen = collect(model, ids)
    assert list(seen) == [0, 1, 2]
    for i, m in seen.items():
        assert m.tokens == 60
        for got, want in zip(m[1:], layers[i][1:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())  # fp32 forward


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_calibrates(family, tmp_path):
    folder = save(tmp_path / "model", family)
    projector = run(CalibrateRequest(folder, str(tmp_path / "p.safetensors"), samples=2, seq_len=48))
    assert sorted(projector.layers) == [0, 1, 2]
    projector.verify(load_model(folder)[0].config)


def test_file_round_trip_and_metadata(request_of, folder):
    request = request_of(seed=3)
    projector = run(request)
    loaded = Projector.load(request.out)
    assert loaded.metadata == projector.metadata
    for i, layer in projector.layers.items():
        for side in ("k", "v"):
            assert all(torch.equal(a, b) for a, b in zip(vars(layer.side(side)).values(), vars(loaded.layers[i].side(side)).values(), strict=True))  # fmt: skip
    meta = loaded.metadata
    assert (meta.preset, meta.model_name, meta.model.head_dim) == ("near_lossless", "tiny-qwen", 24)
    assert meta.recipe["v"]["metric"] == "output-aware" and meta.recipe["bytes_per_token_head"] == 2 * (8 + 8 + 2)
    c = meta.calibration
    assert (c.text, c.tokens, c.samples, c.seq_len, c.seed) == ("pydoc_data.topics", 6 * 64, 6, 64, 3)
    assert len(c.text_sha256) == 64 and set(meta.versions) == {"kvsplice", "torch", "transformers"}


def test_equal_requests_write_equal_bytes(request_of):
    first, again, other = (request_of(name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for request in (first, again, other):
        run(request)
    bytes_of = [Path(r.out).read_bytes() for r in (first, again, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_values_of_a_low_rank_model_are_recovered_by_a_rank_cut(folder, tmp_path):
    """W_v of rank 16 in 24 dimensions: `orthogonal --rank 16` loses nothing but the 16-bit rounding."""
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in layer.self_attn.v_proj.weight.view(2, 24, -1):
                u, s, v = torch.linalg.svd(head, full_matrices=False)
                head.copy_(u[:, :16] @ torch.diag(s[:16]) @ v[:16])
    model.save_pretrained(tmp_path / "low")
    tokenizer.save_pretrained(tmp_path / "low")
    request = CalibrateRequest(
        str(tmp_path / "low"), str(tmp_path / "p"), preset="orthogonal", rank=16, samples=8, seq_len=64
    )
    projector = run(request)
    assert projector.layers[0].layout == LatentLayout.of(24, [(16, 24)], [(16, 16), (0, 8)])
    errors = []

    def check(layer_idx, q, k, v):
        E, D, mu = projector.layers[layer_idx].v.folded()
        x = v.transpose(1, 2)
        back = reference.expand(reference.encode(x, E, mu), D, mu)
        errors.append(((back - x).norm() / x.norm()).item())
        return k, v

    with torch.no_grad(), transformed_kv(model, check):
        model(tokens(batch=2, length=30, seed=9))
    assert len(errors) == 2 and max(errors) < 1e-4


def test_untouched_and_fixed_bases(request_of):
    none, int8 = run(request_of("none", preset="none")), run(request_of("int8", preset="int8"))
    eye = torch.eye(24).expand(2, 24, 24)
    for layer in none.layers.values():
        for side in ("k", "v"):
            basis = layer.side(side)
            assert torch.equal(basis.encode, eye) and torch.equal(basis.decode, eye) and not basis.mean.any()
    assert none.metadata.calibration is None and int8.metadata.calibration is None
    assert int8.layers[0].layout == LatentLayout.of(24, [(8, 24)], [(8, 24)])
    v_only = run(request_of("v_only", preset="v_only"))
    assert torch.equal(v_only.layers[1].k.encode, eye) and not torch.equal(v_only.layers[1].v.encode, eye)


def test_latents_are_of_sane_size(request_of):
    """Latents of calibration-like text have an rms near 1 in every quantised tier, far from the ends of what a scale byte holds."""
    request = request_of("sane", samples=20)
    projector = run(request)
    model, _ = load_model(request.model)
    sizes = []

    def measure(layer_idx, q, k, v):
        for side, x in (("k", k), ("v", v)):
            E, _, mu = projector.layers[layer_idx].side(side).folded()
            z = reference.encode(x.transpose(1, 2), E, mu)
            sizes.extend(part.square().mean().sqrt().item() for part in z.split([8, 16], dim=-1))
        return k, v

    with torch.no_grad(), transformed_kv(model, measure):
        model(tokens(batch=2, length=60, seed=4))
    assert min(sizes) > 0.2 and max(sizes) < 5


def test_choices_of_the_request_reach_the_bases(request_of):
    plain = run(request_of("plain", metric_k="plain", metric_v="plain", equalise="none"))
    for layer in plain.layers.values():
        torch.testing.assert_close(layer.v.encode, layer.v.decode.transpose(1, 2))
    sigma = run(request_of("sigma", equalise="sigma"))
    assert (sigma.layers[0].k.sigma != 1).all() and (plain.layers[0].k.sigma == 1).all()


def test_a_short_text_gives_fewer_samples_and_says_so(request_of, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("brightcolddayinApril" * 10)  # one token per letter
    c = run(request_of("short", text=str(text))).metadata.calibration
    assert (c.text, c.samples, c.tokens) == ("short.txt", 3, 192)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(preset="best"), "preset 'best' is not known"),
        (dict(metric_k="output-aware"), "--metric-k output-aware is not known: expected query-aware or plain"),
        (dict(equalise="all"), "--equalise all"),
        (dict(rank=12), "--rank 12"),
        (dict(seq_len=500), "expected at most 256"),
        (dict(text="/no/such/file"), "cannot be read"),
        (dict(out="."), "is a folder"),
        (dict(out="/proc/kvsplice/p.safetensors"), "cannot be written"),
        (dict(out=f"{__file__}/p.safetensors"), "cannot be written .* is no folder"),
    ],
)
def test_refusals(request_of, folder, changes, says):
    request = CalibrateRequest(**(vars(request_of("refused")) | changes))
    with pytest.raises(KVSpliceError, match=says) as caught:
        run(request)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_one_sentence(request_of, tmp_path, monkeypatch):
    """A full disk, say: safetensors has an error of its own, which is no OSError."""
    projector = run(request_of("whole", preset="int8"))

    def fails(path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: no space left\non this device")

    out = tmp_path / "p.safetensors"
    monkeypatch.setattr(type(projector), "save", lambda self, path: fails(path))
    with pytest.raises(KVSpliceError, match=r"p.safetensors cannot be written \(.*no space left\): give a path"):
        save_projector(projector, out)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_refused():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = math.inf
    with pytest.raises(KVSpliceError, match="layer 1 gave keys or values that are not finite.*--dtype float32"):
        collect(model, tokens())


def test_an_output_projection_of_another_name_is_refused_for_the_output_metric(request_of, monkeypatch):
    monkeypatch.setattr("vllm_kvsplice.calibration.hf_attention.OUTPUT_NAMES", ("projection",))
    with pytest.raises(KVSpliceError, match="--metric-v plain"):
        run(request_of("odd"))
    assert run(request_of("odd", metric_v="plain")).layers


def test_seq_len_defaults_to_what_the_model_holds():
    config = tiny("qwen2").config
    assert choose_seq_len(config, None) == 256
    config.max_position_embeddings = 32768
    assert choose_seq_len(config, None) == 2048
