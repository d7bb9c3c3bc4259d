# SPDX-License-Identifier: Apache-2.0
"""`kvsplice study` on tiny models: what each study must show, joint latents, LayerNorm's nullspace, recipes and refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hf_models import save, tiny, tokens

from vllm_kvsplice import cli
from vllm_kvsplice.calibration.calibrate import collect as head_moments
from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.calibration.presets import MODES, load_preset, shown_preset
from vllm_kvsplice.calibration.texts import code_text
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import norms, nullspace, score, statistics, studies, study, study_report
from vllm_kvsplice.lab.codec import Geometry, Run, Setup
from vllm_kvsplice.lab.joint import joint_codec
from vllm_kvsplice.lab.study import StudyRequest

RECIPES = sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.toml"))
GPT2 = Geometry(12, 12, 64, 1024)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ferry.txt"
    path.write_text("The ferry had not been seen for a week, and the river was wide. " * 12)
    return str(path)


def shaken(model):
    """The model with norms before attention whose gains and biases matter."""
    torch.manual_seed(5)
    with torch.no_grad():
        for at in norms.attention_inputs(model).values():
            at.norm.weight.uniform_(0.5, 2.0)
            if getattr(at.norm, "bias", None) is not None:
                at.norm.bias.normal_()
    return model


@pytest.fixture(scope="module")
def result(tmp_path_factory, text_file):
    """All studies of a GPT-2 with 2 heads of 64 dimensions, as the command writes them."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("gpt2")
    model = save(folder / "tiny-gpt2", "gpt2", n_layer=1, n_embd=128, n_head=2)
    out, picture = folder / "s.json", folder / "s.png"
    numbers = "--seq-len 40 --windows 2 --samples 8 --seeds 2"
    status = cli.main(
        ["study", model, "--text", text_file, *numbers.split(), "--json", str(out), "--plot", str(picture)]
    )
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(out.read_text())


def klds(result, name, **at):
    """KLD by the row's place, of the rows of a study at some places."""
    rows = result["studies"][name]["rows"]
    wanted = [r for r in rows if all(r["at"][axis] == value for axis, value in at.items())]
    return {tuple(r["at"].values()): r["kld"]["mean"] for r in wanted}


# ---------------------------------------------------------------- what the studies show
def test_every_study_has_its_rows(result):
    rope = {"refinements": "GPT2LMHeadModel has no rotary_emb: a moving mean needs a model with RoPE."}
    assert list(result["studies"]) == [s.name for s in studies.STUDIES if s.name not in rope]
    assert result["left_out"] == rope
    assert {"command", "date", "hardware", "versions", "calibration", "dtype"} <= set(result)
    assert {name: text["windows"] for name, text in result["texts"].items()} == {"given": 2, "code": 2}
    for found in result["studies"].values():
        for row in found["rows"]:
            assert row["kld"]["mean"] > 0 and found["axis"] in row["at"] and row["needle"] is None
            assert row["ratio"]["kv"] == pytest.approx(256 / row["bytes_per_token_head"]["kv"])


@pytest.mark.parametrize("side", ["K", "V"])
def test_more_rank_loses_less_and_full_rank_in_16_bits_nothing(result, side):
    found = list(klds(result, "rank", sides=side, bits=16).values())
    assert len(found) == 6 and found == sorted(found)
    assert found[0] < 1e-3 and 10 * found[0] < found[1]


@pytest.mark.parametrize("side", ["K", "V", "K+V"])
def test_more_bits_lose_less(result, side):
    found = list(klds(result, "bits", sides=side).values())
    assert len(found) == 4 and found == sorted(found)


def test_both_sides_lose_more_than_one(result):
    found = klds(result, "sides", tiers="max")
    assert found["K+V", "max"] > max(found["K", "max"], found["V", "max"])
    assert all(spread > 1 for spread in result["studies"]["sides"]["spread"].values())


def test_the_gain_can_be_anywhere_and_equalising_matters(result):
    for tiers in ("int8", "int4", "near_lossless"):
        found = klds(result, "gamma", tiers=tiers)
        assert found[tiers, "gamma", "folded"] == pytest.approx(found[tiers, "gamma", "in the norm"], rel=1e-3)
        assert found[tiers, "gamma", "in the norm"] != found[tiers, "none", "in the norm"]


def test_a_nullspace_of_all_heads_is_free_and_of_one_head_is_none(result):
    found = klds(result, "nullspace")
    assert all(found[side, "joint"] < 1e-4 < 1e-2 < found[side, "head"] for side in ("V", "K", "K+V"))
    saved = result["studies"]["nullspace"]["ranks_saved"]
    assert (saved["head"]["numbers"], saved["head"]["saved"]) == (64, 0)
    assert (saved["joint"]["numbers"], saved["joint"]["saved"]) == (128, 1)
    sizes = {tuple(r["at"].values()): r["bytes_per_token_head"] for r in result["studies"]["nullspace"]["rows"]}
    assert sizes["V", "head"] == {"k": 128, "v": 126, "kv": 254} and sizes["K", "joint"]["k"] == 127


def test_calibration_reads_what_it_says(result):
    rows = {tuple(r["at"].values()): r for r in result["studies"]["calibration"]["rows"]}
    assert [rows["balanced", n]["calibration_windows"] for n in studies.SAMPLES] == list(studies.SAMPLES)
    found = klds(result, "domain", preset="balanced")
    assert len(set(found.values())) == 4  # the given text is the built-in English here
    assert all(r["samples"] == 2 and r["kld"]["sd"] > 0 for r in result["studies"]["seeds"]["rows"])


def test_a_latent_of_all_heads_loses_no_more_at_equal_rank(result):
    rows = [
        r
        for r in result["studies"]["joint"]["rows"]
        if r["at"]["scope"] in ("head", "joint") and r["at"]["tiers"] == "8 bits"
    ]
    for head, joint in zip(rows[::2], rows[1::2], strict=True):
        assert joint["kld"]["mean"] < head["kld"]["mean"]
        assert (head["bytes_per_token_head"]["v"], head["products"]) == (head["at"]["rank of all heads"] / 2 + 1, 64 + head["at"]["rank of all heads"] / 2)  # fmt: skip
        assert joint["bytes_per_token_head"]["v"] == (joint["at"]["rank of all heads"] + 1) / 2
        assert joint["products"] == 64 + joint["at"]["rank of all heads"]


def test_tables_and_lines_name_every_row(result):
    text = study_report.study_tables(result)
    assert "saves 0 of 64 numbers, scope head" in text and "saves 1 of 128 numbers, scope joint" in text
    assert len(text.splitlines()) > sum(len(s["rows"]) for s in result["studies"].values())
    lines = study_report.series(result["studies"]["rank"])
    assert set(lines) == {f"{side}, {bits}" for side in "VK" for bits in (16, 8, 4)}
    assert [place for place, _, _ in lines["V, 8"]] == [64, 56, 48, 32, 24, 16]


# ---------------------------------------------------------------- joint latents
def test_gpt2_presets_cost_what_they_cost():
    rows = {tuple(v.at.values())[:2]: v for v in studies.joint(GPT2)}
    cost = {at: tuple(v.codec.bytes(GPT2)) for at, v in rows.items() if at[1].startswith("joint orth")}
    assert cost == {
        ("V", "joint orthogonal"): (128, 256 / 12),  # 128 numbers of 2 bytes for 12 heads: V 6x, K+V 1.71x
        ("K+V", "joint orthogonal"): (256 / 12, 256 / 12),
        ("V", "joint orthogonal_int8"): (128, 129 / 12),
        ("K+V", "joint orthogonal_int8"): (129 / 12, 129 / 12),
        ("V", "joint orthogonal_int4"): (128, 65 / 12),
        ("K+V", "joint orthogonal_int4"): (65 / 12, 65 / 12),  # 23.6x, not 24x: the scale
    }
    assert rows["K+V", "joint orthogonal"].products == 256 and rows["V", "joint orthogonal"].products == 192
    with pytest.raises(KVSpliceError, match="joint rank 769"):
        joint_codec("x", None, [(8, 769)]).bytes(GPT2)


def setup_of(model, windows):
    seen = statistics.with_joint(model, windows, statistics.collect(model, windows))
    heads, dims = next(iter(seen.values())).k_amax.shape
    return Setup(model, Geometry(len(seen), heads, dims, windows.shape[1]), seen)


def test_joint_moments_hold_those_of_every_head():
    model, windows = tiny("qwen3"), tokens(3, 30)
    for i, m in head_moments(model, windows).items():
        joint = setup_of(model, windows).statistics[i].joint
        assert joint.tokens == 90 and joint.k_sum.shape == (1, 48)
        for h, part in enumerate((slice(0, 24), slice(24, 48))):
            torch.testing.assert_close(joint.v_outer[0, part, part], m.v_outer[h])
            torch.testing.assert_close(joint.k_sum[0, part], m.k_sum[h])
        assert joint.k_outer[0, :24, 24:].abs().max() > 0


def test_one_head_has_the_same_latents_by_itself():
    model, windows = tiny("qwen2", num_key_value_heads=1), tokens(3, 30)
    setup, ids = setup_of(model, windows), tokens(1, 40)[0]
    found = [
        score.logits(model, ids, codec.prepare(setup), Run(None, {}))
        for codec in (joint_codec("joint", None, [(4, 16)]), studies.uniform("V", 4, 16, 16, "plain"))
    ]
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)
    assert (found[0] - score.base_logits(model, ids, False)[0]).abs().max() > 0.05


# ---------------------------------------------------------------- norms
def keys_and_values(model, ids):
    seen = {}

    def watch(i, q, k, v):
        seen[i] = k, v
        return k, v

    with torch.no_grad(), transformed_kv(model, watch):
        model(ids)
    return seen


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_folding_the_gain_changes_no_key_and_comes_undone(family):
    model, ids = shaken(tiny(family)), tokens()
    before, weights = keys_and_values(model, ids), [p.clone() for p in model.parameters()]
    with norms.folded_gain(model):
        assert all((at.norm.weight == 1).all() for at in norms.attention_inputs(model).values())
        inside = keys_and_values(model, ids)
    for i, sides in before.items():
        for a, b in zip(sides, inside[i], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_norms_that_are_not_known_are_refused():
    with pytest.raises(KVSpliceError, match="Gemma2ForCausalLM is not among"), norms.folded_gain(tiny("gemma2")):
        pass
    dead = shaken(tiny("llama"))
    with torch.no_grad():
        norms.attention_inputs(dead)[1].norm.weight[3] = 0
    with pytest.raises(KVSpliceError, match="gain of zero"), norms.folded_gain(dead):
        pass


def test_keys_and_values_lie_in_the_hyperplane_of_the_weights():
    model = shaken(tiny("gpt2"))
    seen = keys_and_values(model, tokens())
    for i, at in nullspace.layer_norms(model).items():
        for side, x in zip(("k", "v"), seen[i], strict=True):
            plane = nullspace.hyperplane(at, side)
            along = x.transpose(1, 2).flatten(2).double() @ plane.normal
            assert plane.residual < 1e-9 and (along - plane.offset).abs().max() < 1e-4 < along.abs().max()
            assert nullspace.hyperplane(at, side, slice(0, 16)).residual > 0.1
    assert nullspace.ranks_saved(model, 16)["joint"] == {"numbers": 64, "saved": 1}


def test_a_coordinate_is_dropped_and_no_other():
    x, normal = torch.randn(7, 24), torch.nn.functional.normalize(torch.randn(24, dtype=torch.float64), dim=0)
    found = nullspace.without(x, normal, 0.25)
    torch.testing.assert_close(found.double() @ normal, torch.full((7,), 0.25).double(), atol=1e-5, rtol=0)
    along = normal.float()
    rest = x - (x @ along)[:, None] * along + 0.25 * along
    torch.testing.assert_close(found, rest, atol=0.05, rtol=0)  # bf16


def test_rmsnorm_and_rope_have_no_nullspace(tmp_path, text_file, capsys, monkeypatch):
    folder = save(tmp_path / "q", num_hidden_layers=2)
    numbers = ["--seq-len", "40", "--windows", "1", "--samples", "1"]
    assert cli.main(["study", folder, "--text", text_file, "--study", "nullspace", *numbers]) == 2
    assert "Qwen2ForCausalLM, whose Qwen2RMSNorm subtracts no mean" in capsys.readouterr().err
    few = tuple(s for s in studies.STUDIES if s.name in ("nullspace", "modes"))
    monkeypatch.setattr(studies, "STUDIES", few)
    found = study.run(StudyRequest(folder, text=text_file, seq_len=40, windows=1, samples=1))
    assert set(found["studies"]) == {"modes"} and "subtracts no mean" in found["left_out"]["nullspace"]
    assert "left out: nullspace" in study_report.study_tables(found)
    model = shaken(tiny("gpt2"))
    moved = {(0, "k"): nullspace.hyperplane(nullspace.layer_norms(model)[1], "k")}  # of another layer
    with pytest.raises(KVSpliceError, match="keys of GPT2LMHeadModel layer 0 are in no hyperplane"):
        nullspace._check(model, moved)


# ---------------------------------------------------------------- recipes, modes and requests
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_a_model_of_their_architecture(path, tmp_path, text_file):
    family = {"gpt": "gpt2", "qwe": "qwen2", "lla": "llama"}[path.stem[:3]]
    folder = save(tmp_path / "m", family, **({"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}))
    pydoc = tmp_path / "other.txt"
    pydoc.write_text("A boat is a small vessel. " * 40)
    request = study.request_of(
        dict(model=folder, recipe=str(path), text=text_file, calibration=str(pydoc), seq_len=40, windows=1, needle=1)
        | dict(samples=2, needle_len=200, studies=("bits", "joint", "modes", "seeds"))
    )
    assert (request.score_dataset, request.dataset, request.seeds) == (None, None, 3)
    found = study.run(request)
    assert found["texts"]["given"]["needle"] == 0 and "by depth" in study_report.study_tables(found)
    assert found["calibration"]["given"]["name"] == "other.txt" and not found["left_out"]
    assert found["studies"]["seeds"]["rows"][0]["samples"] == 3


def test_a_recipe_runs_on_a_trained_model_in_place_of_the_public_one():
    model = str(Path(cli.__file__).parent / "demo/model")  # of Qwen2.5's architecture
    given = dict(model=model, recipe=str(RECIPES[-1].with_name("qwen2.5-0.5b.toml")), studies=("modes",))
    few = dict(seq_len=128, windows=2, samples=4, needle=1, needle_len=256)
    request = study.request_of(given | few)
    assert request.score_dataset == request.dataset == "wikitext2"
    found = study.run(dataclasses.replace(request, score_dataset=None, dataset=None))  # the built-in English
    losses = [row["kld"]["mean"] for row in found["studies"]["modes"]["rows"]]
    assert 1e-4 < losses[0] < losses[1] / 2 < losses[2] / 2 < 0.1
    assert [row["needle"] for row in found["studies"]["modes"]["rows"]] == [1.0, 1.0, 1.0]


def test_recipes_name_public_models_and_everything_else():
    found = {path.stem: study.request_of({"recipe": str(path)}) for path in RECIPES}
    assert {name: r.model for name, r in found.items()} == {
        "gpt2": "openai-community/gpt2",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    }
    assert all((r.dataset, r.score_dataset, r.studies) == ("wikitext2", "wikitext2", ()) for r in found.values())


@pytest.mark.parametrize(
    "content, says",
    [
        ('modle = "x"', "has a 'modle'"),
        ('model = "x"\nwindows = "many"', "bad windows"),
        ("model = ", "cannot be read"),
        ("windows = 1", "no model is given"),
    ],
)
def test_bad_recipes_are_refused(content, says, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text(content)
    assert cli.main(["study", "--recipe", str(recipe)]) == 2
    assert says in capsys.readouterr().err


def test_bad_requests_are_refused(tmp_path, capsys):
    folder = save(tmp_path / "q", num_hidden_layers=2)
    for extra, says in ((["--study", "rnak"], "study 'rnak' is not known"), (["--seeds", "0"], "--seeds 0")):
        assert cli.main(["study", folder, *extra]) == 2
        assert says in capsys.readouterr().err


def test_the_help_names_every_study(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(s.name for s in studies.STUDIES) + "; with commas" in shown


def test_modes_are_names_of_presets(tmp_path):
    assert {mode: load_preset(mode) for mode in MODES} == {
        "default": load_preset("near_lossless"),
        "high_compression": load_preset("balanced"),
        "memory_emergency": load_preset("max"),
    }
    folder, out = save(tmp_path / "q", num_hidden_layers=2), str(tmp_path / "p.safetensors")
    cli.main(["calibrate", folder, "--preset", "memory_emergency", "--samples", "1", "--seq-len", "40", "--out", out])
    assert Projector.load(out).metadata.preset == "max" == shown_preset("memory_emergency")
    assert shown_preset("some/mine.toml") == "mine" and shown_preset("int8") == "int8"


def test_code_is_scored_on_other_modules_than_it_calibrates():
    mine, held_out = code_text(), code_text(held_out=True)
    assert "class ArgumentParser" in mine.content and "class Popen" in held_out.content
    assert "class Popen" not in mine.content and mine.sha256 != held_out.sha256
