# SPDX-License-Identifier: Apache-2.0
"""Figures: each result file says how it was made, and what the README and docs/quality.md quote is what the files hold."""

import re

import pytest
from result_files import PERFORMANCE, QUALITY, README, RESULTS


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_says_how_it_was_made(name):
    origins = RESULTS[name].get("provenance", RESULTS[name])
    for origin in origins if isinstance(origins, list) else [origins]:
        assert origin["command"] and re.match(r"\d{4}-\d\d-\d\dT", origin["date"])
        assert origin["hardware"]["gpus"] or origin["hardware"]["cpu"]
        assert {"kvsplice", "torch", "python"} <= origin["versions"].keys()


def row(file):
    """The row of the README's table of what was served that names this file."""
    (line,) = [line for line in README.splitlines() if line.startswith("|") and f"(`{file}`" in line]
    return line


@pytest.mark.parametrize(
    "name", [*(f"ref-d128-{name}-vllm" for name in ("near_lossless", "balanced", "max", "tuned291")), "demo-h200"]
)
def test_the_readme_quotes_its_files(name):
    found, line = RESULTS[name].get("scores", RESULTS[name]), row(name)
    assert f"{found['ratio']['kv']:.2f}x" in line
    assert f"{found['ppl']['delta_pct']:+.2f} %" in line
    kld = found["kld_topk"] if found["engine"] == "vllm" else found["kld"]
    assert f"{kld:.5f}".lstrip("0") in line
    if name == "demo-h200":
        assert found["needle"]["kvsplice"] == found["needle"]["baseline"] == 1.0
    else:
        hits = (100 * found["needle"][run] for run in ("kvsplice", "baseline"))
        assert "{:.0f} of 100, stock {:.0f}".format(*hits) in line and f"{found['windows']} windows" in line
        assert line.endswith(f"| {found['cache_tokens']['ratio']:.2f}x |")


def codec_cells(codec):
    """A cell of the tables of codecs: ratio of K+V, perplexity, KLD, needles."""
    needles = f"{100 * codec['needle']:.0f} %"
    return f"{codec['ratio']['kv']:.2f}x {codec['delta_ppl_pct']['mean']:+.2f} % {codec['kld']['mean']:.5f} {needles}"


def whole_test():
    """The presets on the whole WikiText-2 test, by name."""
    return {c["name"]: c for f in ("whole-ref-d128", "whole-ref-d128-2") for c in RESULTS[f]["codecs"]}


def test_presets_are_quoted_as_measured():
    ref, demo = whole_test(), {c["name"]: c for c in RESULTS["presets-demo"]["codecs"]}
    for name in ("v_only", "near_lossless", "balanced", "max"):
        assert f"| `{name}` | {codec_cells(ref[name])} | {codec_cells(demo[name])} |" in README


def test_the_readme_quotes_speeds_and_failures_too():
    for name in ("demo-h200", "demo-cpu"):
        served = RESULTS[name]
        ratio = served["kvsplice"]["tokens_per_s"] / served["stock"]["tokens_per_s"]
        assert f"{ratio:.2f}x as fast" in README


def test_other_codecs_are_quoted_as_measured():
    ref, demo = ({c["name"]: c for c in RESULTS[f"compare-{m}"]["codecs"]} for m in ("ref-d128", "demo"))
    for name in ref.keys() & demo.keys() - {"bf16"}:
        assert f"| {name} | {codec_cells(ref[name])} | {codec_cells(demo[name])} |" in QUALITY


def test_tuning_is_quoted_as_measured():
    result = RESULTS["tune-ref-d128"]
    assert (
        f"{result['ratio']['kv']:.2f}x, KLD {result['kld']:.5f}, perplexity {result['ppl']['delta_pct']:+.2f}"
        in QUALITY
    )
    for point in result["tune"]["tried"]:
        cells = f"{point['ratio']:.2f}x | {point['predicted_kld']:.5f} | {point['kld']:.5f} |"
        assert f"| {point['bytes_per_token_head']:.1f} | {cells} {point['ppl_delta_pct']:+.2f} |" in QUALITY
    for row in result["tune"]["uniform"]:
        sizes = f"| {row['name']} | {row['bytes_per_token_head']:.0f} | {row['kld']:.6f} |"
        assert f"{sizes} {row['tuned']['bytes_per_token_head']:.1f} | {row['tuned']['kld']:.6f} |" in QUALITY


TUNED_FILES = {"tuned291": "291", "tuned382": "382", "tuned50": "500"}


@pytest.mark.parametrize("name", TUNED_FILES)
def test_tuned_files_are_quoted_as_measured(name):
    scored = {c["name"]: c for c in RESULTS["tuned-ref-d128"]["codecs"]}
    assert f"{RESULTS['tuned-ref-d128']['windows']} windows" in README
    tuned, fast = (scored[f"file:{n}.safetensors"] for n in (name, f"{name}fast"))
    speed = mean_of_layers(f"{name}fast", 64)["ratio_to_fa3_bf16"]
    assert f"| {codec_cells(tuned)} | {codec_cells(fast)} | {speed:.2f}x |" in README
    for codec, made, label, shown in ((tuned, "", "tuned", ""), (fast, "fast-", "tuned, `--fast`", f"{speed:.2f}x")):
        ppl, kv = codec["delta_ppl_pct"], codec["bytes_per_token_head"]["kv"]
        assert kv == RESULTS[f"tune-ref-d128-{made}{TUNED_FILES[name]}"]["bytes_per_token_head"]
        cells = f"{codec['ratio']['kv']:.2f}x, {label} | {kv:.1f} | {ppl['mean']:+.3f} +- {ppl['se']:.3f} % | {codec['kld']['mean']:.5f}"
        assert f"| {cells} | {100 * codec['top1']:.1f} % | {100 * codec['needle']:.0f} % | {shown} |" in QUALITY


def mean_of_layers(name, batch):
    """Decode of a projector file, the mean over its layers, or of a preset."""
    (row,) = [
        r
        for r in RESULTS["kernels-fast-h200"]["rows"]
        if (r["kernel"], r["batch"]) == ("kvsplice", batch) and r["preset"].split(" (mean")[0] == name
    ]
    return row


@pytest.mark.parametrize("name", ["near_lossless", *(f"{n}fast" for n in TUNED_FILES)])
def test_speeds_of_fast_files_are_quoted_as_measured(name):
    rows = [mean_of_layers(name, batch) for batch in (64, 16, 8)]
    cells = " | ".join(f"{r['p50_us']:.1f} ({r['ratio_to_fa3_bf16']:.2f}x)" for r in rows)
    (line,) = [x for x in PERFORMANCE.splitlines() if x.startswith(f"| {name} | ")]
    assert line.endswith(f" | {cells} |")


@pytest.mark.parametrize("name", ["v_only", "near_lossless", "balanced", "max"])
def test_presets_on_the_whole_test_are_quoted_as_measured(name):
    codec = whole_test()[name]
    ppl, kld = codec["delta_ppl_pct"], codec["kld"]["mean"]
    cells = f"{ppl['mean']:+.3f} +- {ppl['se']:.3f} % | {kld:.5f} | {100 * codec['top1']:.1f} % | {100 * codec['needle']:.0f} %"
    assert f"`{name}` | {codec['bytes_per_token_head']['kv']:.1f} | {cells} |" in QUALITY


def test_served_scores_in_sentences_are_those_of_the_files():
    *served, tuned = (RESULTS[f"ref-d128-{name}-vllm"] for name in ("near_lossless", "balanced", "max", "tuned291"))
    assert {one["windows"] for one in served} == {176}
    whole = [whole_test()[name]["kld"]["mean"] for name in ("near_lossless", "balanced", "max")]
    shown = [f"{one['kld_topk']:.5f}"[1:] for one in served], [f"{kld:.5f}"[1:] for kld in whole]
    assert (
        "tokens {}, {} and {} where the\nsimulation in fp32 has {}, {} and {} over".format(*shown[0], *shown[1])
        in QUALITY
    )
    changes = [f"{one['ppl']['delta_pct']:+.2f}".replace("+0.", "+.") for one in served]
    hits = [f"{100 * one['needle']['kvsplice']:.0f}" for one in served]
    assert "perplexity {}, {} and {} %; {}, {} and {} needles".format(*changes, *hits) in QUALITY
    change = f"{tuned['ppl']['delta_pct']:+.2f}".replace("+0.", "+.")
    quoted = f"{tuned['kld_topk']:.5f}"[1:], change, f"{100 * tuned['needle']['kvsplice']:.0f}"
    assert "(`ref-d128-tuned291-vllm`): {}, {} %, {} needles".format(*quoted) in QUALITY
