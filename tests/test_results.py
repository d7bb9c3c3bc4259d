# SPDX-License-Identifier: Apache-2.0
"""Figures: each result file says how it was made, and what the README quotes is what the files hold."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from vllm_kvsplice.calibration.presets import resolve

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("*.json")}
README = (ROOT / "README.md").read_text()
QUALITY = (ROOT / "docs/quality.md").read_text()
BALANCED = "serve-balanced-h200"
PERFORMANCE = (ROOT / "docs/performance.md").read_text()


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


def best_us(file, kernel, preset, batch, context, block_size=None, heads="28/4"):
    """p50 in microseconds of a decode, at its best page size or at one."""
    return min(
        r["p50_us"]
        for r in RESULTS[file]["rows"]
        if (r["what"], r["kernel"], r["preset"], r["heads"]) == ("decode", kernel, preset, heads)
        and (r["batch"], r["context"]) == (batch, context)
        and block_size in (None, r["block_size"])
    )


SHAPES = [(64, 4096), (256, 2048), (16, 32768), (8, 8192), (1, 32768)]


@pytest.mark.parametrize(("batch", "context"), SHAPES)
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_kernel_speeds_are_quoted_as_measured(gpu, batch, context):
    us = partial(best_us, f"kernels-{gpu}", batch=batch, context=context)
    bf16, fp8 = (us("flash-attention-3", p) for p in ("bf16", "fp8"))
    ours, ours_64 = (us("kvsplice", "near_lossless", block_size=n) for n in (16, 64))
    cells = f"| {batch} x {context} | {bf16:.1f} | {fp8:.1f} | {ours:.1f} / {ours_64:.1f} | {bf16 / ours:.2f} / {bf16 / ours_64:.2f} |"
    assert cells in PERFORMANCE
    others = [("kvsplice", p) for p in ("near_lossless", "balanced", "max", "int8", "v_only")]
    others += [("flash-attention-3", "fp8"), *(("vllm-triton", p) for p in ("bf16", "int8", "int4"))]
    others += [("turboquant", "k8v4"), ("turboquant", "4bit_nc")]
    cells = " | ".join(f"{bf16 / us(*other):.2f}" for other in others)
    assert f"| {batch} x {context} | {cells} |" in PERFORMANCE


@pytest.mark.parametrize(("batch", "context"), SHAPES)
def test_the_readme_quotes_kernel_speeds_of_an_h200(batch, context):
    us = partial(best_us, "kernels-h200", batch=batch, context=context)
    bf16, fp8 = (us("flash-attention-3", p) for p in ("bf16", "fp8"))
    at_64 = [us("kvsplice", p, block_size=64) for p in ("near_lossless", "balanced", "max", "int8")]
    cells = " | ".join(f"{t:.1f} ({bf16 / t:.2f}x)" for t in at_64)
    assert f"| {batch} x {context} | {bf16:.1f} | {fp8:.1f} | {cells} |" in README


TUNED = ("tuned291 (mean of 8 layers)", "tuned50 (mean of 8 layers)")


@pytest.mark.parametrize(
    "layout",
    ["near_lossless", "balanced", "max", *TUNED, *(f"v_cut_{n}.toml" for n in ("132", "132b", "124", "107", "100"))],
)
def test_speeds_of_layouts_are_quoted_as_measured(layout):
    us = partial(best_us, "kernels-layouts-h200", batch=64, context=4096)
    bf16, ours = us("flash-attention-3", "bf16"), us("kvsplice", layout, block_size=64)
    (line,) = [
        x
        for x in PERFORMANCE.splitlines()
        if re.match(rf"\| `?{re.escape(layout.removesuffix('.toml'))}`? \| (K|six)", x)
    ]
    assert f" | {ours:.1f} | {bf16 / ours:.2f}x |" in line
    if layout.endswith(".toml"):
        shown = str(resolve(str(ROOT / "configs/candidates" / layout), 128)[0])
        tiers = line.split("|")[2].strip()
        assert re.sub(r"\+(\d+)x0", r", \1 dropped", shown) == tiers


def test_speeds_of_tuned_layouts_are_quoted_as_measured():
    us = partial(best_us, "kernels-layouts-h200", batch=64, context=4096)
    bf16 = us("flash-attention-3", "bf16")
    tuned, tuned_50, ours = (bf16 / us("kvsplice", p, block_size=64) for p in (*TUNED, "near_lossless"))
    assert f"at {tuned:.2f}x and {tuned_50:.2f}x the speed" in QUALITY
    assert f"`near_lossless` at {ours:.2f}x;" in QUALITY


def test_prefill_is_quoted_as_measured():
    for (batch, new, context), shown in (
        ((4, 2048, 2048), "4 x 2048 tokens"),
        ((1, 8192, 8192), "1 x 8192 tokens"),
        ((1, 8192, 40960), "1 x 8192 tokens after 32768 cached"),
    ):
        us = {
            (r["kernel"], r["preset"]): r["p50_us"]
            for r in RESULTS["prefill-h200"]["rows"]
            if (r["batch"], r["query_len"], r["context"]) == (batch, new, context)
        }
        bf16, fp8 = (us["flash-attention-3", p] for p in ("bf16", "fp8"))
        ours = [us["kvsplice", p] for p in ("near_lossless", "balanced", "max", "int8", "v_only")]
        cells = " | ".join(f"{t:.1f} ({bf16 / t:.2f}x)" for t in ours)
        assert f"| {shown} | {bf16:.1f} | {bf16 / fp8:.2f}x | {cells} |" in PERFORMANCE


@pytest.mark.parametrize(
    ("file", "heads", "head_dim"),
    [("heads", "32/8", 128), ("heads", "64/8", 128), ("d64", "14/2", 64), ("d64", "32/8", 64)],
)
@pytest.mark.parametrize(("batch", "context"), [(64, 4096), (16, 32768), (8, 8192)])
def test_other_heads_are_quoted_as_measured(file, heads, head_dim, batch, context):
    us = partial(best_us, f"kernels-{file}-h200", batch=batch, context=context, heads=heads)
    bf16, *ours = (
        us("flash-attention-3", "bf16"),
        *(us("kvsplice", "near_lossless", block_size=n) for n in (16, 64)),
    )
    cells = f"{bf16:.1f} | {ours[0]:.1f} / {ours[1]:.1f} | {bf16 / ours[0]:.2f} / {bf16 / ours[1]:.2f}"
    assert f"| {heads} x {head_dim} | {batch} x {context} | {cells} |" in PERFORMANCE


def test_profiles_and_writes_are_quoted_as_measured():
    for reading in RESULTS["profile-decode-h200"]["readings"].values():
        quoted = f"| {reading['l2_sectors_per_16_tokens']} | {reading['shared_wavefronts_per_16_tokens']} |"
        assert quoted in PERFORMANCE
    writes, before = (
        {(r["preset"], r["query_len"], r["kernel"]): r["p50_us"] for r in RESULTS[file]["rows"] if r["what"] == "write"}
        for file in ("writes-h200", "kernels-h200")
    )
    for tokens in (1, 64, 256, 2048, 8192):
        cells = [f"{writes['bf16', tokens, 'flash-attention-3']:.1f}"]
        cells += [
            f"{writes[p, tokens, 'kvsplice']:.1f}" for p in ("near_lossless", "int8", "v_only", "balanced", "max")
        ]
        assert f"| {tokens} | {' | '.join(cells)} |" in PERFORMANCE
    times = [before[p, n, "kvsplice"] for p, n in (("balanced", 64), ("balanced", 8192), ("max", 8192))]
    assert "`balanced` took {:.1f} us at 64 tokens and {:.1f} at 8192, `max` {:.1f}.".format(*times) in PERFORMANCE
    for name in ("checks-h100", "checks-h200", "sanitizer-h200"):
        assert RESULTS[name]["checks"] == {"ok": 98, "failed": []}
    assert RESULTS["sanitizer-h200"]["error_summary"] == "ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("file", "point"),
    [
        *((f"serve-{name}h200", i) for name in ("", "v_only-") for i in range(3)),
        *((f"serve-{name}-h200", i) for name in ("int8", "balanced", "fp8-cut") for i in range(2)),
        ("serve-fp8-int8-h200", 0),
    ],
)
def test_times_per_token_are_quoted_as_measured(file, point):
    points = [setting["points"][point] for setting in RESULTS[file]["settings"]]
    base, *others = (p["tpot_ms"] for p in points)
    cells = [f"{base:.2f}", *(f"{tpot:.2f} ({tpot / base:.2f}x)" for tpot in others)]
    name = f"{points[0]['batch']} x {points[0]['context']} (`{file}`)"
    assert f"| {name} | {' | '.join(cells)} |" in README


def test_shares_of_the_time_per_token_are_quoted_as_measured():
    for file, setting, quoted in (
        ("serve-h200", "kvsplice:near_lossless", "| `near_lossless` | .73 / .62 / .99 |"),
        ("serve-h200", "kvsplice:max", "| `max` | .74 / .63 / 1.00 |"),
        ("serve-int8-h200", "kvsplice:int8", "| `int8` | .805 / .738 |"),
        ("serve-int8-h200", "kvsplice:v_only", "| `v_only` | .872 / .813 |"),
        ("serve-v_only-h200", "kvsplice:v_only", "| `v_only`, default launch | .883 / .820 / .99 |"),
        (BALANCED, "kvsplice:balanced", "| `balanced` | .798 / .669 |"),
        ("serve-v_only-h200", "fp8", "| fp8 | .91 / .85 / 1.03 |"),
        (BALANCED, "kvsplice:v_cut_132.toml", "| `v_cut_132`, 3.87x the tokens | .708 / .576 |"),
        ("serve-fp8-int8-h200", "fp8", "| fp8, beside the next two | .903 |"),
        ("serve-fp8-int8-h200", "kvsplice:int8", "| `int8` | .796 |"),
        ("serve-fp8-int8-h200", "kvsplice:v_only", "| `v_only` | .853 |"),
        ("serve-fp8-cut-h200", "fp8", "| fp8, beside the next | .923 / .859 |"),
        ("serve-fp8-cut-h200", "kvsplice:v_cut_132.toml", "| `v_cut_132`, again | .703 / .575 |"),
    ):
        shares = RESULTS[file]["summary"]["settings"][setting]["tpot_ratio"].values()
        shown = quoted.split("|")[2].strip().split(" / ")
        assert quoted in PERFORMANCE
        assert shown == [f"{x:.{len(s.split('.')[1])}f}".lstrip("0") for x, s in zip(shares, shown, strict=True)]


def test_launch_parameters_of_an_h200_are_quoted_as_measured():
    entries = json.loads((ROOT / "configs/launch/NVIDIA_H200.json").read_text())["entries"]
    gain = {e["measured"]["preset"]: f"{100 * (e['measured']['speedup'] - 1):.1f} %" for e in entries if e["launch"]}
    assert f"`v_only` {gain.pop('v_only')}, `max` {gain.pop('max')} and `int8` {gain.pop('int8')} faster" in PERFORMANCE
    assert not gain


def test_launch_parameters_are_quoted_as_measured():
    entries = json.loads((ROOT / "configs/launch/NVIDIA_H100_80GB_HBM3.json").read_text())["entries"]
    gain = {e["measured"]["preset"]: f"{100 * (e['measured']['speedup'] - 1):.1f} %" for e in entries}
    assert f"`int8` {gain['int8']} and `v_only` {gain['v_only']} faster" in PERFORMANCE
    assert f"and no limit of registers: {gain['near_lossless']}, below" in PERFORMANCE
    assert [e["measured"]["preset"] for e in entries if e["launch"]] == ["int8", "v_only"]


def test_fresh_throughput_is_quoted_as_measured():
    (bf16, fp8, ours) = [s["sweep"][0] for s in RESULTS["fresh-h200"]["settings"]]
    users, rates = ([value(p) for p in (bf16, fp8, ours)] for value in (lambda p: p["users"], fresh_rate))
    assert "| users that fit | {} | {} | {} |".format(*users) in README
    gains = [rate / rates[0] for rate in rates]
    cells = f"{rates[0]:.0f} | {rates[1]:.0f} ({gains[1]:.2f}x) | {rates[2]:.0f} ({gains[2]:.2f}x)"
    assert f"| output tokens per second | {cells} |" in README
    steady = " | ".join(f"{p['fresh']['steady_tpot_ms']:.1f}" for p in (bf16, fp8, ours))
    assert f"| ms per token while all decode | {steady} |" in README
    text = f"bf16 {rates[0]:.0f} tokens per second with {users[0]} users, fp8 {rates[1]:.0f} with {users[1]}"
    assert f"{text}, `near_lossless` {rates[2]:.0f} with {users[2]}, {gains[2]:.2f} times bf16's" in PERFORMANCE


def fresh_rate(point):
    """Output tokens per second of new prompts."""
    return point["fresh"]["vllm"]["output_throughput"]


@pytest.mark.parametrize("preset", ["near_lossless", "balanced"])
def test_steps_in_the_engine_are_quoted_as_measured(preset):
    step = RESULTS[f"step-{preset}-h200"]
    cells = [step["us_per_layer"][f"{kernel}_kernel"] for kernel in ("write_and_project", "decode", "reduce_expand")]
    cells += [step["attention_us"], step["layer_us"]]
    assert f"| `{preset}` | {' | '.join(f'{us:.1f}' for us in cells)} |" in PERFORMANCE
    assert round(step["layer_us"] - step["attention_us"]) in (151, 153, 154) and "layer is 151 to 153 us" in PERFORMANCE


def test_clocks_are_quoted_as_measured():
    files = ("serve-fp8-int8-h200", "serve-fp8-cut-h200")
    points = [point for file in files for setting in RESULTS[file]["settings"] for point in setting["points"]]
    decode = [call["gpu"]["sm_mhz"] for point in points for call in point["decode"]]
    prefill = [point["prefill"]["gpu"]["sm_mhz"] for point in points]
    assert f"{min(decode):.0f} to {max(decode):.0f} MHz with every setting" in PERFORMANCE
    assert f"falls to {min(prefill):.0f} to {max(prefill):.0f} MHz" in PERFORMANCE


def test_greedy_answers_are_quoted_as_measured():
    found = RESULTS["greedy-ref-d128-h200"]
    ways = found["ways"]
    assert found["failures"] == [] and ways["graphs"]["equal"] == 12 and "all 12 answers are equal" in PERFORMANCE
    for way, quoted in (("everything, graphs", "{} and {} of 12 are equal, the others part where the fp32 simulation has the two tokens within {:.2f} nats"),
                        ("everything, eager", "against plain eager: {} and {}, within {:.2f} nats")):  # fmt: skip
        passes = ways[way], ways[f"{way}, again"]
        gap = max(gap for one in passes for gap in one["gap_where_they_part_nats"])
        assert quoted.format(*(one["equal"] for one in passes), gap) in PERFORMANCE
    behind = [way["behind_best_nats"]["mean"] for way in ways.values()]
    assert f"lie {min(behind):.5f} to {max(behind):.5f} nats behind" in PERFORMANCE


def test_throughput_is_quoted_as_measured():
    settings = {s["name"]: s["sweep"] for s in RESULTS["saturation-h200"]["settings"]}
    for users, kind, shown in (
        (48, "fresh", "new"),
        (152, "fresh", "new"),
        *((n, "returning", "sent again") for n in (48, 96, 152)),
    ):
        found = [
            [p[kind]["vllm"]["output_throughput"] for p in sweep if p["users"] == users] for sweep in settings.values()
        ]
        cells = " | ".join(f"{one[0]:.0f}" if one else "" for one in found)
        assert f"| {users}, {shown} | {cells} |".replace("|  |", "| |") in README
    ours = RESULTS["saturation-h200"]["summary"]["settings"]["kvsplice:near_lossless"]
    assert f"{ours['throughput_ratio']:.1f}x bf16. Prompts sent again: {ours['returning_ratio']:.1f}x" in README


def test_steps_of_many_users_are_quoted_as_measured():
    steady = {
        (s["name"], p["users"]): p["returning"]["steady_tpot_ms"]
        for s in RESULTS["saturation-h200"]["settings"]
        for p in s["sweep"]
    }
    bf16, fp8, ours, balanced = (
        steady[name, 48] for name in ("bf16", "fp8", "kvsplice:near_lossless", "kvsplice:balanced")
    )
    cells = " | ".join(f"{ms:.2f} ({ms / bf16:.2f}x)" for ms in (fp8, ours, balanced))
    assert f"| 48 | {bf16:.2f} | {cells} |" in PERFORMANCE
    assert (
        f"{bf16:.1f} ms with bf16, {fp8:.1f} with fp8, {ours:.1f} with `near_lossless` ({ours / bf16:.2f}x)" in README
    )
    for users in (96, 152):
        cells = " | ".join(
            f"{ms:.2f}" if ms else "-"
            for ms in (steady[n, users] for n in ("fp8", "kvsplice:near_lossless", "kvsplice:balanced"))
        )
        assert f"| {users} | - | {cells} |" in PERFORMANCE


def test_peaks_of_memory_are_quoted_as_measured():
    memory = {s["name"]: s["memory"] for s in RESULTS[BALANCED]["settings"]}
    bf16, ours = (memory[n]["peak_bytes"] / memory[n]["total_bytes"] for n in ("bf16", "kvsplice:balanced"))
    assert f"{ours:.1%} with `balanced` and\n{bf16:.1%} with bf16".replace("%", " %") in README


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


def test_the_loop_is_quoted_as_compiled():
    loop = RESULTS["decode-loop"]
    assert f"{loop['before']['loop']} to {loop['now']['loop']} for 32 tokens (`decode-loop`" in PERFORMANCE
    before, now = (loop["columns_64"][key] for key in ("before", "now"))
    quoted = f"{before['loop']}\ninstructions and {before['stack']} bytes of stack, now {now['loop']} and {now['stack']} (`decode-loop`)"
    assert quoted in PERFORMANCE


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
