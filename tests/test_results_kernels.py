# SPDX-License-Identifier: Apache-2.0
"""Figures of kernels: what the README and docs/performance.md quote is what the files hold."""

import json
import math
import re
from functools import partial

import pytest
from result_files import PERFORMANCE, QUALITY, README, RESULTS, ROOT

from vllm_kvsplice.calibration.presets import resolve


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


def test_few_new_tokens_are_quoted_as_measured():
    ways = {(r["chunk"], r["way"]): r["graph_us"] for r in RESULTS["prefill-ways-h200"]["rows"]}
    chunks = list(dict.fromkeys(chunk for chunk, _ in ways))
    speeds = {}
    for chunk in chunks:
        batch, new, cached = chunk.split("x")
        bf16, ours = ways[chunk, "flash-attention-3"], ways[chunk, "chosen"]
        shown, others = (
            f"{batch} x {new} after {cached}",
            " | ".join(f"{ways.get((chunk, way), 0):.1f}" for way in ("latent", "expanded")),
        )
        if cached == "0":
            shown, others = f"{batch} x {new}, nothing cached", "|"
        else:
            speeds[chunk] = bf16 / ours
        assert f"| {shown} | {bf16:.1f} | {ours:.1f} ({bf16 / ours:.2f}x) | {others} |" in PERFORMANCE
    shown = f"{min(speeds.values()):.2f} to {max(speeds.values()):.2f} times"
    assert len(chunks) == 13 and f"a **loss**: {shown} FlashAttention-3's speed on the GPU" in PERFORMANCE
    assert f"attended at {shown} its speed, the host's time left out (`prefill-ways-h200`)" in README
    rows = [r for r in RESULTS["prefill-tails-h200"]["rows"] if r["preset"] in ("bf16", "near_lossless")]
    us = {(r["kernel"], r["batch"], r["query_len"], r["context"]): r["p50_us"] for r in rows}
    pairs = {
        at: (us["flash-attention-3", *at], t)
        for (kernel, *at), t in us.items()
        if kernel == "kvsplice"
        for at in [tuple(at)]
    }
    bf16, ours = pairs.pop((1, 8192, 40960))
    assert f"took\n{ours:.1f} us, FlashAttention-3 {bf16:.1f}." in PERFORMANCE
    launched = [bf16 / ours for at, (bf16, ours) in pairs.items() if at[1] < at[2]]
    assert len(launched) == 7 and f"ours ran {min(launched):.2f} to {max(launched):.2f} times as fast" in PERFORMANCE


def test_head_dim_64_gains_less_on_an_h200():
    for gpu, quoted in (("h200", "smaller, {:.1f} to {:.1f} times"), ("h100", "H100 it was {:.1f} to {:.1f} (")):
        rows = [r for r in RESULTS[f"kernels-d64-{gpu}"]["rows"] if r["kernel"] == "kvsplice"]
        gains = [r["ratio_to_fa3_bf16"] for r in rows]
        assert quoted.format(min(gains), max(gains)) in PERFORMANCE


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
    for name, count in (("checks-h100", 98), ("checks-h200", 138), ("sanitizer-h200", 98), ("sanitizer-rows-h200", 47)):
        assert RESULTS[name]["checks"] == {"ok": count, "failed": []}
    for name in ("sanitizer-h200", "sanitizer-rows-h200"):
        assert RESULTS[name]["error_summary"] == "ERROR SUMMARY: 0 errors"
    assert "(138 on an H200, `checks-h200`," in PERFORMANCE and "`sanitizer-rows-h200`, 47 with" in PERFORMANCE


def test_launch_parameters_of_an_h200_are_quoted_as_measured():
    entries = json.loads((ROOT / "configs/launch/NVIDIA_H200.json").read_text())["entries"]
    gain = {
        (e["measured"]["preset"], e["columns"]): f"{100 * (e['measured']['speedup'] - 1):.1f} %"
        for e in entries
        if e["launch"]
    }
    one = [gain.pop((preset, 8)) for preset in ("v_only", "max", "int8")]
    assert "`v_only` {}, `max` {} and `int8` {} faster with one new token".format(*one) in PERFORMANCE
    several = [gain.pop(("int8", columns)) for columns in (32, 64)]
    assert "make `int8` {} faster at 32 columns and {} at 64 (".format(*several) in PERFORMANCE
    assert not gain


def test_launch_parameters_are_quoted_as_measured():
    entries = json.loads((ROOT / "configs/launch/NVIDIA_H100_80GB_HBM3.json").read_text())["entries"]
    gain = {e["measured"]["preset"]: f"{100 * (e['measured']['speedup'] - 1):.1f} %" for e in entries}
    assert f"`int8` {gain['int8']} and `v_only` {gain['v_only']} faster" in PERFORMANCE
    assert f"and no limit of registers: {gain['near_lossless']}, below" in PERFORMANCE
    assert [e["measured"]["preset"] for e in entries if e["launch"]] == ["int8", "v_only"]


def test_the_loop_is_quoted_as_compiled():
    loop = RESULTS["decode-loop"]
    assert f"{loop['before']['loop']} to {loop['now']['loop']} for 32 tokens (`decode-loop`" in PERFORMANCE
    before, now = (loop["columns_64"][key] for key in ("before", "now"))
    quoted = f"{before['loop']}\ninstructions and {before['stack']} bytes of stack, now {now['loop']} and {now['stack']} (`decode-loop`)"
    assert quoted in PERFORMANCE


def test_queries_as_rows_are_quoted_as_compiled():
    kernels = RESULTS["decode-loop"]["rows"]["kernels"]
    total = {}
    for columns, rows in zip(kernels[::2], kernels[1::2], strict=True):
        assert (columns["orientation"], columns["tokens"], rows["orientation"], rows["tokens"]) == (
            "columns",
            32,
            "rows",
            64,
        )
        before, now = 2 * columns["warps"] * columns["loop"], rows["warps"] * rows["loop"]
        name = f"`{rows['layout']}`" + (", head_dim 64" if rows["head_dim"] == 64 else "")
        cells = f"2 x {columns['warps']} x {columns['loop']} = {before} | {rows['warps']} x {rows['loop']} = {now}"
        assert f"| {name} | {cells} | {before / now:.1f}x |" in PERFORMANCE
        total[rows["layout"]] = now, before
    us = [64 * 4 * 64 * n / (4 * 132 * 1.935e3) for n in total["near_lossless"]]
    assert f"are {us[0]:.0f} us as rows and {us[1]:.0f} us as columns." in PERFORMANCE


def points(file, which):
    """us of an entry of `kvsplice bench launch`, by preset, requests and new tokens."""
    return {
        (e["measured"]["preset"], p["batch"], p["query_len"]): p[which]
        for e in RESULTS[file]["entries"]
        for p in e["measured"]["points"]
    }


def fastest(file, kernel, preset, heads="28/4"):
    """us by requests and new tokens, of the fastest block size."""
    found = {}
    for r in RESULTS[file]["rows"]:
        if (r["kernel"], r["preset"], r["heads"]) == (kernel, preset, heads):
            at = r["batch"], r["query_len"]
            found[at] = min(found.get(at, math.inf), r["p50_us"])
    return found


def test_several_new_tokens_are_quoted_as_measured():
    file = "kernels-several-h200"
    at = [(batch, new) for batch in (64, 16) for new in (4, 5, 8)]
    bf16, fp8 = (fastest(file, "flash-attention-3", p) for p in ("bf16", "fp8"))
    assert f"| FlashAttention-3 bf16 | {' | '.join(f'{bf16[x]:.1f}' for x in at)} |" in PERFORMANCE
    cells = " | ".join(f"{fp8[x]:.1f} ({bf16[x] / fp8[x]:.2f}x)" for x in at)
    assert f"| FlashAttention-3 fp8 | {cells} |" in PERFORMANCE
    ratios, before, gains = {}, points("launch-columns-h200", "default_us"), []
    for preset in ("near_lossless", "balanced", "max", "v_only", "int8"):
        ours = fastest(file, "kvsplice", preset)
        ratios[preset] = [bf16[x] / ours[x] for x in at]
        cells = " | ".join(f"{ours[x]:.1f} ({ratio:.2f}x)" for x, ratio in zip(at, ratios[preset], strict=True))
        assert f"| `{preset}` | {cells} |" in PERFORMANCE
        gains += [before[preset, *x] / ours[x] for x in at if (preset, *x) in before]
    every = [ratio for some in ratios.values() for ratio in some]
    shown = f"at {min(every):.2f} to {max(every):.2f} times FlashAttention-3's speed over bf16"
    assert shown in PERFORMANCE and shown in README
    file = "kernels-several-before-h200"
    bf16, ours = fastest(file, "flash-attention-3", "bf16"), fastest(file, "kvsplice", "int8")
    lost = [bf16[x] / ours[x] for x in at]
    times = f"{ours[64, 5]:.1f} us at 64 x 4096 with 5 new tokens and {ours[16, 5]:.1f} at 16 x 32768 (`{file}`)"
    shown = f"`int8` took {min(lost):.2f} to {max(lost):.2f} times FlashAttention-3's speed, {times}"
    assert shown in PERFORMANCE
    rows = [r for r in RESULTS[file]["rows"] if (r["preset"], r["batch"], r["query_len"]) == ("int8", 16, 5)]
    us = {r["kernel"]: r["p50_us"] for r in rows}
    alone = sum(us[f"kvsplice: {stage}"] for stage in ("project_query", "decode", "reduce_expand"))
    shown = f"took {us['kvsplice']:.1f} us at 16 x 32768 where its kernels, alone, took {alone:.1f} (`{file}`)"
    assert shown in PERFORMANCE
    assert len(gains) == 16 and f"took {min(gains):.1f} to {max(gains):.1f} times as long" in PERFORMANCE


def test_several_new_tokens_at_head_dim_64_are_quoted_as_measured():
    file, at, ratios = "kernels-several-d64-h200", [(batch, new) for batch in (64, 16) for new in (4, 8)], []
    for heads in ("14/2", "32/8"):
        bf16 = fastest(file, "flash-attention-3", "bf16", heads)
        assert f"| {heads} | FlashAttention-3 bf16 | {' | '.join(f'{bf16[x]:.1f}' for x in at)} |" in PERFORMANCE
        for preset in ("near_lossless", "int8"):
            ours = fastest(file, "kvsplice", preset, heads)
            ratios += [bf16[x] / ours[x] for x in at]
            cells = " | ".join(f"{ours[x]:.1f} ({bf16[x] / ours[x]:.2f}x)" for x in at)
            assert f"| {heads} | `{preset}` | {cells} |" in PERFORMANCE
    assert f"at head_dim 64 at {min(ratios):.2f} to {max(ratios):.2f} (`kernels-several-h200`, `{file}`" in README


def test_what_is_left_of_rows_is_quoted_as_measured():
    columns = points("launch-rows-h200", "default_us")
    four = [f"{columns[preset, batch, 4]:.1f}" for preset in ("v_only", "int8") for batch in (64, 16)]
    assert "`v_only` took {} and {} us as columns, `int8` {} and {}\n(".format(*four) in PERFORMANCE
    before = columns["near_lossless", 64, 5]
    now = fastest("kernels-several-h200", "kvsplice", "near_lossless")[64, 5]
    assert f"64 x 4096 tokens with 5 new ones took {before:.1f} us, now {now:.1f} (" in PERFORMANCE
    samples = RESULTS["profile-rows-h200"]["shapes"]["64x4096, 5 new"]["loop_samples_pct"]
    shown = "{selected:.0f} % issue, {barrier:.0f} % wait for barriers around the unpacked tile, {wait:.0f} % for fixed"
    assert shown.format(**samples) in PERFORMANCE and f"and {samples['long_sb']:.0f} % for memory" in PERFORMANCE
    wrong = {line.split(",")[0] for line in RESULTS["checks-rows-before-h200"]["checks"]["failed"]}
    assert len(wrong) == 11 and "11 of the kernel cases came out wrong" in PERFORMANCE


def test_host_time_is_quoted_as_measured():
    runs = RESULTS["host-time-cpu"]["runs"]
    before, now = ([run["us_a_layer"] for run in runs[i::2]] for i in (0, 1))
    assert [run["code"] for run in runs] == ["7ae4d6e", "launches bound once a step"] * 2 and len(before[0]) == 5
    for name in before[0]:
        cells = (" / ".join(f"{run[name]:.1f}" for run in side) for side in (before, now))
        assert f"| {name} | {' | '.join(cells)} |" in PERFORMANCE
