# SPDX-License-Identifier: Apache-2.0
"""`kvsplice compare` on a tiny model: rows, errors and spreads, what is chosen and refused, the files it writes."""

import json
import math
from pathlib import Path

import pytest
import torch
from hf_models import save, tiny, tokens

from vllm_kvsplice import cli
from vllm_kvsplice.calibration.presets import preset_names
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import compare, minicache, ours, plot, registry, rows, score
from vllm_kvsplice.lab.codec import Bytes, Codec, Geometry, Run, Setup
from vllm_kvsplice.lab.compare import CompareRequest
from vllm_kvsplice.lab.statistics import collect
from vllm_kvsplice.scoring import hf_engine
from vllm_kvsplice.scoring.evaluate import EvalRequest
from vllm_kvsplice.scoring.evaluate import run as evaluate
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.scoring.needle import Needle, NeedleTask, make_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "tiny-qwen", num_hidden_layers=2, hidden_size=64)  # head_dim 16


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ferry.txt"
    path.write_text("The ferry had not been seen for a week, and the river was wide. " * 12)
    return str(path)


def request(folder, text_file, *codecs, **changes):
    given = dict(seq_len=60, windows=3, samples=3, seeds=2) | changes
    return CompareRequest(folder, text_file, codecs=codecs, **given)


# ---------------------------------------------------------------- the command
def test_every_codec_scores_on_every_window(folder, text_file, tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    arguments = "--seq-len 60 --windows 2 --samples 3 --seeds 2 --needle 2 --needle-len 200 --dtype float32"
    status = cli.main(
        ["compare", folder, "--text", text_file, *arguments.split(), "--json", str(out), "--plot", str(picture)]
    )
    result = json.loads(out.read_text())
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG")
    found = {row["name"]: row for row in result["codecs"]}
    assert set(found) == {c.name for c in registry.RIVALS} | set(preset_names())
    assert {"command", "date", "hardware", "versions", "text", "calibration", "dtype", "device"} <= set(result)
    assert result["tokens"] == 2 * 59 and result["windows"] == 2 and not result["left_out"]
    assert [row["bytes_per_token_head"]["kv"] for row in result["codecs"]] == sorted(
        (row["bytes_per_token_head"]["kv"] for row in result["codecs"]), reverse=True
    )
    for row in result["codecs"]:
        assert row["kld"]["mean"] > 0 and row["kld"]["se"] > 0 and 0 <= row["needle"] <= 1, row["name"]
        samples = [band["samples"] for band in row["needle_by_depth"]]
        assert samples == [1, 1] and row["samples"] in (1, 2)
        assert (row["kld"]["sd"] is None) == (row["samples"] == 1)
    assert found["near_lossless"]["samples"] == 2 and found["fp8"]["samples"] == 1
    # Order of quality at both ends, on a random model.
    loss = {name: row["kld"]["mean"] for name, row in found.items()}
    assert loss["bf16"] < loss["int8_per_token_head"] < loss["fp8"] < loss["int4_per_token_head"] < loss["palu_70_int3"]
    assert loss["turboquant_k3v4_nc"] < loss["turboquant_3bit_nc"] and loss["palu_70"] < loss["palu_50"]


def test_a_projector_scores_as_kvsplice_eval_scores_it(folder, text_file, tmp_path):
    path = str(tmp_path / "p.safetensors")
    assert cli.main(["calibrate", folder, "--out", path, "--samples", "3", "--seq-len", "60"]) == 0
    mine = compare.run(request(folder, text_file, "bf16", projectors=(path,)))
    theirs = evaluate(EvalRequest(folder, path, text_file, seq_len=60, windows=3))
    (row,) = [row for row in mine["codecs"] if row["name"] == "file:p.safetensors"]
    assert row["kld"]["mean"] == pytest.approx(theirs["kld"], rel=1e-6)
    assert row["delta_ppl_pct"]["mean"] == pytest.approx(theirs["ppl"]["delta_pct"], abs=1e-6)
    assert row["ratio"]["kv"] == theirs["ratio"]["kv"] and row["top1"] == pytest.approx(theirs["top1"])
    assert mine["baseline"]["ppl"] == pytest.approx(theirs["ppl"]["baseline"])


def test_two_files_of_one_name_and_a_file_made_from_the_scored_text_are_refused(folder, text_file, tmp_path):
    paths = [str(tmp_path / place / "p.safetensors") for place in "ab"]
    for path, text in zip(paths, ([], ["--text", text_file]), strict=True):
        assert cli.main(["calibrate", folder, "--out", path, "--samples", "2", "--seq-len", "60", *text]) == 0
    with pytest.raises(KVSpliceError, match="would both be called file:p.safetensors: rename one"):
        compare.run(request(folder, text_file, "bf16", projectors=paths))
    assert [c.name for c in registry.choose(["bf16"], {paths[0]: Projector.load(paths[0])})] == [
        "bf16",
        "file:p.safetensors",
    ]
    with pytest.raises(KVSpliceError, match="b/p.safetensors was calibrated on"):
        compare.run(request(folder, text_file, "bf16", projectors=paths[1:]))


def test_presets_without_text_are_the_same_for_every_sample(folder, text_file):
    result = compare.run(request(folder, text_file, "int8", "bf16"))
    (row,) = [row for row in result["codecs"] if row["name"] == "int8"]
    served = evaluate(EvalRequest(folder, None, text_file, seq_len=60, windows=3))
    assert row["samples"] == 1 and row["kld"]["mean"] == pytest.approx(served["kld"], rel=1e-6)
    assert "left out" not in rows.comparison_table(result)


# ---------------------------------------------------------------- choices and refusals
def test_names_families_and_files_are_chosen_once(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('description = "x"\n[k]\ntiers = [{ bits = 4 }]\n[v]\ntiers = [{ bits = 4 }]\n')
    names = [c.name for c in registry.choose(["KIVI", "kivi4_r128", "bf16", str(recipe)])]
    assert names == ["kivi4_r128", "kivi4_r32", "kivi2_r128", "kivi2_r32", "bf16", str(recipe)]
    with pytest.raises(KVSpliceError, match="codec 'kivi9' is not known"):
        registry.choose(["kivi9"])


def test_a_codec_that_cannot_store_the_model_is_left_out_or_refused(tmp_path, text_file):
    odd = save(tmp_path / "odd", num_hidden_layers=2, hidden_size=96)  # head_dim 24
    codecs, left_out = compare._that_fit(registry.RIVALS, Geometry(2, 2, 24, 60), refuse=False)
    assert set(left_out) == {"nvfp4", "nvfp4_calibrated", "nvfp4_4over6"} and len(codecs) == len(registry.RIVALS) - 3
    with pytest.raises(KVSpliceError, match="head_dim 24"):
        compare.run(request(odd, text_file, "nvfp4"))


def test_a_codec_that_the_model_has_no_modules_for_is_left_out_or_refused(tmp_path, text_file):
    gpt2 = save(tmp_path / "gpt2", "gpt2", n_layer=2)
    every = compare.run(request(gpt2, text_file, windows=1, seq_len=40, samples=1, seeds=1))
    assert set(every["left_out"]) == {c.name for c in registry.RIVALS if c.family == "Palu"}
    assert "left out: palu_70 (palu needs" in rows.comparison_table(every)
    with pytest.raises(KVSpliceError, match="k_proj"):
        compare.run(request(gpt2, text_file, "palu_50"))


def test_calibrating_on_the_scored_text_is_refused(folder, text_file, tmp_path):
    longer = tmp_path / "longer.txt"
    longer.write_text("More. " + Path(text_file).read_text())
    for calibration in (text_file, str(longer)):
        with pytest.raises(KVSpliceError, match="overlap"):
            compare.run(request(folder, text_file, "bf16", calibration=calibration))


def test_bad_requests_exit_with_two(folder, text_file, tmp_path, capsys):
    for extra in (
        ["--codecs", "nonsense"],
        ["--seeds", "0"],
        ["--json", str(tmp_path / "no" / "r.json")],
        ["--seq-len", "999"],
    ):
        assert cli.main(["compare", folder, "--text", text_file, *extra]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "kvsplice: " in line]
        assert len(said) == 1 and said[0].endswith(".")


# ---------------------------------------------------------------- numbers
def test_errors_are_over_windows_and_spread_over_samples():
    codec = Codec("x", "X", "arXiv", lambda g: Bytes(g.head_dim, g.head_dim / 2), lambda setup: None)

    def window(nll, kl):
        return Scores(tokens=10, nll_base=20.0, nll=nll, kl=kl, agree=9)

    scores = [[window(20.1, 0.1), window(20.3, 0.3)], [window(20.2, 0.2), window(20.4, 0.4)]]
    row = rows.row_of(codec, Geometry(1, 1, 64, 10), scores, [], [[], []])
    assert row["delta_ppl_pct"]["mean"] == pytest.approx(100 * math.expm1(0.025))
    assert row["delta_ppl_pct"]["se"] == pytest.approx(100 * math.exp(0.025) * 0.01)  # windows: 0.015 and 0.035
    spread = [100 * math.expm1(x) for x in (0.02, 0.03)]
    assert row["delta_ppl_pct"]["sd"] == pytest.approx((spread[1] - spread[0]) / 2**0.5)
    assert row["kld"] == pytest.approx({"mean": 0.025, "se": 0.01, "sd": 0.01 / 2**0.5})
    assert row["ratio"] == {"k": 2.0, "v": 4.0, "kv": 256 / 96} and row["needle"] is None


def test_one_window_has_no_error():
    row = rows.row_of(registry.RIVALS[0], Geometry(1, 1, 64, 10), [[Scores(10, 20.0, 20.1, 0.1, 0.1, 9)]], [], [[]])
    assert math.isnan(row["kld"]["se"]) and row["kld"]["sd"] is None
    assert rows.cells(row)[6:8] == ["-", "-"]


def test_the_front_has_no_row_that_another_beats():
    def row(name, size, kld):
        return {"name": name, "bytes_per_token_head": {"kv": size}, "kld": {"mean": kld}}

    made = [row("a", 100, 0.1), row("b", 90, 0.2), row("c", 95, 0.3), row("d", 80, 0.25), row("e", 80, 0.24)]
    assert [r["name"] for r in plot.best(made)] == ["a", "b", "e"]


# ---------------------------------------------------------------- what a codec is told
def test_the_question_of_a_needle_is_its_last_tokens(folder):
    _, tokenizer = hf_engine.load_model(folder)
    (sample,) = make_samples(tokenizer, list(range(5, 90)), NeedleTask(1, 200, question=" Which {word}? It is"))
    question = tokenizer.decode(sample.prompt[-sample.question_tokens :]).replace(" ", "")
    assert question.startswith("Which") and question.endswith("?Itis")


def test_needles_are_told_where_the_question_starts_and_windows_are_not():
    model, told = tiny("qwen2"), []

    def attach(model, run):
        told.append((run.prefill, sorted(run.base)))
        return hf_engine.transformed_kv(model, lambda i, q, k, v: (k, v))

    codec = Codec("spy", "X", "arXiv", lambda g: Bytes(1, 1), lambda setup: attach, needs_base=True)
    candidates = [score.Candidate(codec, 0, attach)]
    (windows,) = score.score_windows(model, candidates, [tokens(1, 20)[0].tolist()])
    ids = tokens(1, 30)[0].tolist()
    base, (hits,) = score.score_needles(model, candidates, [Needle(ids[:27], ids[27:], 0.5, 7)])
    assert told == [(None, [0, 1, 2]), (20, [0, 1, 2])]
    assert windows[0].kl == pytest.approx(0, abs=1e-4) and base == hits


def test_statistics_are_those_of_the_calibration():
    model, windows = tiny("qwen3"), tokens(3, 30)
    from vllm_kvsplice.calibration.calibrate import collect as moments_alone

    mine, theirs = collect(model, windows), moments_alone(model, windows)
    for i, layer in theirs.items():
        assert all(torch.equal(a, b) for a, b in zip(mine[i].moments[1:], layer[1:], strict=True))
        # The greatest value is at least the root of the mean square, and is reached.
        rms = (layer.v_outer.diagonal(dim1=1, dim2=2) / layer.tokens).sqrt()
        assert (mine[i].v_amax >= rms).all() and mine[i].outer["v"].diagonal().view(2, -1).allclose(
            layer.v_outer.diagonal(dim1=1, dim2=2)
        )  # qwen3: values leave v_proj as they are cached


def test_a_file_for_fewer_layers_is_refused(folder, tmp_path):
    path = str(tmp_path / "p.safetensors")
    cli.main(["calibrate", folder, "--out", path, "--preset", "int8"])
    model = tiny("qwen2")  # three layers, not two
    with pytest.raises(KVSpliceError, match="another model"):
        ours.file_codec(path, Projector.load(path)).prepare(Setup(model, Geometry(3, 2, 16, 60), {}))


def test_minicache_merges_what_the_base_run_had():
    model, ids = tiny("qwen2", num_hidden_layers=4), tokens(1, 40)[0]
    (codec,) = [c for c in registry.RIVALS if c.name == "minicache"]
    attach = codec.prepare(Setup(model, Geometry(4, 2, 16, 40), {}))
    base, seen = score.base_logits(model, ids, True)
    other = score.logits(model, ids, attach, Run(None, seen))
    assert (other - base).abs().max() > 1e-2
    found = minicache.merged(seen, 4)
    assert sorted(found) == [2, 3]
    with torch.no_grad(), hf_engine.transformed_kv(model, lambda i, q, k, v: found.get(i, (k, v))):
        by_hand = model(ids[None]).logits[0]
    torch.testing.assert_close(other, by_hand, atol=0.2, rtol=0)  # the first layers in bf16 there, in fp32 here
    assert sorted(seen) == [0, 1, 2, 3] and seen[0][0].shape == (1, 2, 40, 16)
