# SPDX-License-Identifier: Apache-2.0
"""Scoring on tiny models: windows, the simulation against the law, what the result carries, what is refused."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import VOCAB, save, tiny, tokens

from vllm_kvsplice.calibration import calibrate
from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, build_metadata, default_layer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring import evaluate, hf_engine, results, vllm_engine
from vllm_kvsplice.scoring.evaluate import EvalRequest, choose_seq_len, cut_windows
from vllm_kvsplice.scoring.needle import Needle
from vllm_kvsplice.scoring.vllm_worker import Job, window_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "tiny-qwen", num_hidden_layers=2, hidden_size=96)  # head_dim 24


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ferry.txt"
    path.write_text("The ferry had not been seen for a week, and the river was wide. " * 12)
    return str(path)


def projector_of(model, k, v, seed=0, layers=None):
    """Random orthogonal bases with means and sigmas for a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    shape = build_metadata(model.config, "random").model

    def basis(rank):
        q, _ = torch.linalg.qr(torch.randn(shape.num_kv_heads, shape.head_dim, shape.head_dim, generator=generator))
        sigma = 0.5 + torch.rand(shape.num_kv_heads, rank, generator=generator)
        rows = q[:, :rank].contiguous()
        return Basis(rows, rows.transpose(1, 2).contiguous(), torch.randn(shape.num_kv_heads, shape.head_dim, generator=generator), sigma)  # fmt: skip

    layout = LatentLayout.of(shape.head_dim, k, v)
    indices = range(shape.num_hidden_layers) if layers is None else layers
    made = {i: LayerProjector(layout, basis(layout.rank("k")), basis(layout.rank("v"))) for i in indices}
    return Projector(build_metadata(model.config, "random"), made)


# ---------------------------------------------------------------- windows
def test_windows_do_not_overlap_and_drop_the_rest():
    assert cut_windows(range(10), [], 3, 0) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(range(9), [], 3, 0) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows(range(10), [99], 3, 2) == [[99, 0, 1], [99, 2, 3]]
    with pytest.raises(KVSpliceError, match="--seq-len"):
        cut_windows(range(2), [], 3, 0)


def test_window_length_leaves_room_for_the_token_a_server_adds():
    config = tiny("qwen2").config  # holds 256
    assert choose_seq_len(config, None) == 255
    assert choose_seq_len(config, 17) == 17
    for wrong in (1, 256):
        with pytest.raises(KVSpliceError, match="2 to 255"):
            choose_seq_len(config, wrong)


# ---------------------------------------------------------------- the simulation
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_full_rank_sixteen_bits_changes_next_to_nothing(family):
    model = tiny(family)
    d = build_metadata(model.config, "x").model.head_dim
    codec = hf_engine.Codec(projector_of(model, [(16, d)], [(16, d)]), torch.float32)
    ids = tokens(batch=1, length=40)[0]
    base, other = hf_engine.logits(model, ids, None), hf_engine.logits(model, ids, codec)
    # Latents are rounded to bf16, 2**-9 relative, once each; logits see a few of those.
    assert 0 < (other - base).abs().max() < 32 * 2**-9 * base.abs().max()


def test_codec_is_the_reference_round_trip():
    model = tiny("qwen3")
    projector = projector_of(model, [(8, 8), (4, 16)], [(8, 8), (2, 8), (0, 8)])
    codec = hf_engine.Codec(projector, torch.float16)
    k, v = torch.randn(2, 3, 2, 11, 24)
    got = codec(1, torch.empty(0), k, v)
    for x, side, out in ((k, "k", got[0]), (v, "v", got[1])):
        folded = projector.layers[1].side(side).folded()
        for b in range(3):
            z = reference.encode(x[b].transpose(0, 1), folded.encode, folded.mean)
            seen = reference.roundtrip(z, projector.layers[1].layout, side, torch.float16)
            want = reference.expand(seen, folded.decode, folded.mean).transpose(0, 1)
            # fp32 sums in another order may move a latent across the edge of a code: one step of it, seldom.
            close = torch.isclose(out[b], want, rtol=1e-5, atol=1e-5)
            assert close.float().mean() > 0.99 and (out[b] - want).abs().max() < 0.5 * x.std()


def test_without_projector_the_default_codec_is_simulated():
    k, v = torch.randn(2, 1, 2, 9, 24)
    got = hf_engine.Codec(None, torch.float32)(0, torch.empty(0), k, v)
    layer = default_layer(24, 2)
    named = Projector(build_metadata(tiny("qwen3").config, "int8"), {0: layer})
    want = hf_engine.Codec(named, torch.float32)(0, torch.empty(0), k, v)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    # int8 per token: at most half a step of amax/127 per latent, spread by an orthogonal rotation of 24 dimensions.
    assert (got[0] - k).abs().max() < math.sqrt(24) * 0.6 * k.abs().max() * math.sqrt(24) / 127


def test_a_layer_that_the_projector_lacks_is_refused():
    model = tiny("qwen2")
    codec = hf_engine.Codec(projector_of(model, [(8, 16)], [(8, 16)], layers=[0]), torch.float32)
    with pytest.raises(KVSpliceError, match="no layer 1"):
        hf_engine.logits(model, tokens(1, 5)[0], codec)


@pytest.mark.parametrize("compressed", [False, True], ids=["baseline", "kvsplice"])
def test_teacher_forced_answers_are_those_of_greedy_decoding(compressed):
    model = tiny("qwen2")
    codec = hf_engine.Codec(projector_of(model, [(4, 16)], [(2, 16)]), torch.float32) if compressed else None
    prompt, wrote = tokens(1, 12)[0].tolist(), []
    for _ in range(4):  # decoding one token at a time
        ids = torch.tensor(prompt + wrote)
        wrote.append(int(hf_engine.logits(model, ids, codec)[-1].argmax()))
    assert hf_engine.answers(model, Needle(prompt, wrote, 0.0), codec)
    for i in range(4):
        wrong = [t if j != i else (t + 1) % VOCAB for j, t in enumerate(wrote)]
        assert not hf_engine.answers(model, Needle(prompt, wrong, 0.0), codec)


# ---------------------------------------------------------------- the result
def test_result_has_the_promised_keys_and_survives_json(folder, text_file, tmp_path):
    model = tiny("qwen2", num_hidden_layers=2, hidden_size=96)
    path = tmp_path / "p.safetensors"
    projector_of(model, [(8, 8), (4, 16)], [(4, 24)]).save(path)
    result = evaluate.run(EvalRequest(folder, str(path), text_file, seq_len=50, windows=3, needle=3, needle_len=220))
    results.write_json(result, str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["ppl"]) == {"baseline", "kvsplice", "delta_pct"} and set(result["needle"]) == {
        "baseline",
        "kvsplice",
    }
    # K: 8 + 1, 8 + 1; V: 12 + 1 bytes.
    assert result["bytes_per_token_head"] == 31
    assert result["ratio"] == {"k": 48 / 18, "v": 48 / 13, "kv": 96 / 31}
    assert result["tokens"] == 3 * 49 and result["windows"] == 3 and result["seq_len"] == 50
    assert 0 < result["kld_topk"] <= result["kld"] * (1 + 1e-6) and 0 < result["top1"] <= 1
    assert result["text"]["name"] == "ferry.txt" and len(result["text"]["sha256"]) == 64
    assert result["projector"]["preset"] == "random" and len(result["projector"]["sha256"]) == 64
    assert result["projector"]["layout"] == "K 8x8+16x4 V 24x4"
    assert {"command", "date", "hardware", "versions", "model", "engine", "dtype", "topk"} <= set(result)
    assert result["cache_tokens"] is None
    table = results.eval_table(result)
    assert "K+V 3.10 x" in table and "ferry.txt" in table


def test_projector_beside_the_weights_is_found_and_another_models_refused(folder, text_file, tmp_path):
    other = tiny("qwen2", num_hidden_layers=3)
    path = tmp_path / "other.safetensors"
    projector_of(other, [(8, 16)], [(8, 16)]).save(path)
    with pytest.raises(KVSpliceError, match="another model"):
        evaluate.run(EvalRequest(folder, str(path), text_file))


def test_a_projector_is_not_scored_on_the_text_that_it_was_calibrated_on(folder, text_file, tmp_path):
    path = tmp_path / "p.safetensors"
    calibrate.run(calibrate.CalibrateRequest(folder, str(path), text_file, samples=2, seq_len=20))
    with pytest.raises(KVSpliceError, match=r"was calibrated on ferry.txt, the text to score: give another --text"):
        evaluate.run(EvalRequest(folder, str(path), text_file, seq_len=20))
    other = tmp_path / "other.txt"
    other.write_text(Path(text_file).read_text() + "So it was told.")
    assert evaluate.run(EvalRequest(folder, str(path), str(other), seq_len=20, windows=1))["windows"] == 1


def test_builtin_text_to_score_on_shares_no_paragraph_with_the_one_to_calibrate_on():
    from vllm_kvsplice.calibration.texts import load_text

    scored, calibrated = (load_text(held_out=h) for h in (True, False))
    assert scored.sha256 != calibrated.sha256 and len(scored.content) > 30_000
    paragraphs = {p.strip() for p in calibrated.content.split("\n\n")}
    assert not paragraphs & {p.strip() for p in scored.content.split("\n\n") if p.strip()}


def test_nan_becomes_null():
    assert json.loads(results.to_json({"a": [math.nan, 1.0], "b": {"c": math.inf}})) == {
        "a": [None, 1.0],
        "b": {"c": None},
    }


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(KVSpliceError, match="--json"):
        results.check_writable(str(tmp_path / "no" / "such" / "r.json"))


# ---------------------------------------------------------------- the vLLM engine, without vLLM
def test_kvsplice_settings_join_others():
    engine = {"additional_config": {"gdn": 1, "kvsplice": {"prefill": "exact"}}}
    added = vllm_engine.kvsplice_arguments(None, engine)
    assert added == {
        "attention_backend": "kvsplice",
        "additional_config": {"gdn": 1, "kvsplice": {"prefill": "latent"}},
    }
    assert os.path.isabs(vllm_engine.kvsplice_arguments("p", {})["additional_config"]["kvsplice"]["projector"])


def test_window_files_are_compared(tmp_path):
    logits = torch.randn(2, 3, 7, 50, dtype=torch.float64)  # runs, windows, tokens, vocabulary
    targets = torch.randint(0, 50, (3, 7))
    expected = sum((evaluate_pair(logits, targets, w) for w in range(3)), start=hf_engine.Scores())
    for run, name in enumerate(vllm_engine.RUNS):
        (tmp_path / name).mkdir()
        for w in range(3):
            logprobs = logits[run, w].log_softmax(-1)
            top = logprobs.topk(10, dim=-1)
            own = logprobs.gather(1, targets[w][:, None])[:, 0]
            np.savez(window_file(tmp_path / name, w), ids=top.indices.int(), logprobs=top.values, targets=own)
    scores = vllm_engine.compare(tmp_path / "baseline", tmp_path / "kvsplice", 3)
    assert scores.tokens == 21 and scores.ppl == pytest.approx(expected.ppl)
    assert scores.kld_topk == pytest.approx(expected.kld_topk) and scores.top1 == expected.top1


def evaluate_pair(logits, targets, w):
    return hf_engine.score_logits(logits[0, w], logits[1, w], targets[w], 10)


def test_a_failing_engine_is_one_sentence_with_a_log(tmp_path, monkeypatch):
    def explode(command, **kwargs):
        script = "print('noise'); raise RuntimeError('no such backend')"
        return real([sys.executable, "-c", script], **kwargs)

    real = subprocess.Popen
    monkeypatch.setattr(vllm_engine.subprocess, "Popen", explode)
    (tmp_path / "kvsplice").mkdir()
    with pytest.raises(
        KVSpliceError, match=r"kvsplice vLLM engine stopped \(RuntimeError: no such backend\)"
    ) as caught:
        vllm_engine.start(Job({}, [], [], 1, str(tmp_path / "kvsplice")), "kvsplice")
    log = str(caught.value).split("its log is ")[1].rstrip(".").strip()
    assert "noise" in Path(log).read_text()
    os.remove(log)


def test_an_interrupt_ends_the_engine_and_its_children(tmp_path, monkeypatch):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    started = []

    def sleep(command, **kwargs):
        started.append(real([sys.executable, "-c", script], **kwargs))
        return started[0]

    def interrupt(seconds, pause=time.sleep):
        if len(started) == 1:
            started.append("interrupted")
            raise KeyboardInterrupt
        pause(seconds)

    real = subprocess.Popen
    monkeypatch.setattr(vllm_engine.subprocess, "Popen", sleep)
    monkeypatch.setattr(vllm_engine.time, "sleep", interrupt)
    (tmp_path / "x").mkdir()
    with pytest.raises(KeyboardInterrupt):
        vllm_engine.start(Job({}, [], [], 1, str(tmp_path / "x")), "baseline")
    monkeypatch.undo()
    from vllm_kvsplice.scoring.processes import group_members

    assert started[0].returncode is not None and not group_members(started[0].pid)
