# SPDX-License-Identifier: Apache-2.0
"""Figures: each result file says how it was made, and what the README quotes is what the files hold."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("*.json")}
README = (ROOT / "README.md").read_text()
QUALITY = (ROOT / "docs/quality.md").read_text()
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


@pytest.mark.parametrize("name", ["ref-d128-balanced-vllm", "demo-h200"])
def test_the_readme_quotes_its_files(name):
    found, line = RESULTS[name].get("scores", RESULTS[name]), row(name)
    assert f"{found['ratio']['kv']:.2f}x" in line
    assert f"{found['ppl']['delta_pct']:+.2f} %" in line
    kld = found["kld_topk"] if found["engine"] == "vllm" else found["kld"]
    assert f"{kld:.5f}".lstrip("0") in line
    if found["needle"]:
        assert found["needle"]["kvsplice"] == found["needle"]["baseline"] == 1.0


def codec_cells(codec):
    """A cell of the tables of codecs: ratio of K+V, perplexity, KLD, needles."""
    needles = f"{100 * codec['needle']:.0f} %"
    return f"{codec['ratio']['kv']:.2f}x {codec['delta_ppl_pct']['mean']:+.2f} % {codec['kld']['mean']:.5f} {needles}"


def test_presets_are_quoted_as_measured():
    ref, demo = ({c["name"]: c for c in RESULTS[f"presets-{m}"]["codecs"]} for m in ("ref-d128", "demo"))
    for name in ("v_only", "near_lossless", "balanced", "max"):
        assert f"| `{name}` | {codec_cells(ref[name])} | {codec_cells(demo[name])} |" in README


def test_the_readme_quotes_speeds_and_failures_too():
    for name in ("demo-h200", "demo-cpu"):
        served = RESULTS[name]
        ratio = served["kvsplice"]["tokens_per_s"] / served["stock"]["tokens_per_s"]
        assert f"{ratio:.2f}x as fast" in README


def decode_rows(batch, context):
    """p50 in microseconds: FlashAttention-3 bf16 and fp8 at their best, ours with pages of 16 and of 64 tokens."""
    rows = [
        r
        for r in RESULTS["kernels-h100"]["rows"]
        if r["what"] == "decode" and (r["batch"], r["context"]) == (batch, context)
    ]
    peers = [
        min(r["p50_us"] for r in rows if (r["kernel"], r["preset"]) == ("flash-attention-3", p))
        for p in ("bf16", "fp8")
    ]
    ours = {r["block_size"]: r["p50_us"] for r in rows if (r["kernel"], r["preset"]) == ("kvsplice", "near_lossless")}
    return *peers, ours[16], ours[64]


@pytest.mark.parametrize(("batch", "context"), [(64, 4096), (256, 2048), (16, 32768), (8, 8192), (1, 32768)])
def test_kernel_speeds_are_quoted_as_measured(batch, context):
    bf16, fp8, ours, ours_64 = decode_rows(batch, context)
    cells = f"| {batch} x {context} | {bf16:.1f} us | {fp8:.1f} us | {ours:.1f} us | {bf16 / ours:.2f}x |"
    assert cells in README
    cells = f"| {batch} x {context} | {bf16:.1f} | {fp8:.1f} | {ours:.1f} / {ours_64:.1f} | {bf16 / ours:.2f} / {bf16 / ours_64:.2f} |"
    assert cells in PERFORMANCE


def best_us(file, kernel, preset, batch, context, block_size=None):
    """p50 in microseconds of a decode, at its best page size or at one."""
    return min(
        r["p50_us"]
        for r in RESULTS[file]["rows"]
        if (r["what"], r["kernel"], r["preset"]) == ("decode", kernel, preset)
        and (r["batch"], r["context"]) == (batch, context)
        and block_size in (None, r["block_size"])
    )


@pytest.mark.parametrize(("batch", "context"), [(64, 4096), (256, 2048), (16, 32768), (8, 8192), (1, 32768)])
def test_kernel_speeds_on_an_h200_are_quoted_as_measured(batch, context):
    bf16, fp8 = (best_us("kernels-h200", "flash-attention-3", p, batch, context) for p in ("bf16", "fp8"))
    ours = [best_us("kernels-near_lossless-h200", "kvsplice", "near_lossless", batch, context, n) for n in (16, 64)]
    others = [bf16 / best_us("kernels-h200", "kvsplice", p, batch, context) for p in ("max", "int8", "v_only")]
    cells = [
        f"{bf16:.1f}",
        f"{fp8:.1f}",
        f"{ours[0]:.1f} / {ours[1]:.1f}",
        f"{bf16 / ours[0]:.2f} / {bf16 / ours[1]:.2f}",
    ]
    assert f"| {batch} x {context} | {' | '.join(cells + [f'{x:.2f}' for x in others])} |" in PERFORMANCE


def test_profiles_and_writes_are_quoted_as_measured():
    for reading in RESULTS["profile-decode-h200"]["readings"].values():
        quoted = f"| {reading['l2_sectors_per_16_tokens']} | {reading['shared_wavefronts_per_16_tokens']} |"
        assert quoted in PERFORMANCE
    writes = [t for t in RESULTS["checks-h100"]["times"] if t["kernel"] == "cache_write"]
    times = [f"{t['us']:.1f}" for t in writes]
    assert " / ".join(times[:3]) in PERFORMANCE and " / ".join(times[3:]) in PERFORMANCE
    assert " / ".join(f"{t['write_and_project_us']:.1f}" for t in writes[:3]) in PERFORMANCE
    checks = RESULTS["checks-h100"]["checks"]
    assert f"{checks['ok']}\nkernel cases right" in PERFORMANCE and not checks["failed"]


@pytest.mark.parametrize(
    ("file", "point"), [("serve-h100", 0), ("serve-h100", 1), ("serve-fp8-h100", 0), ("serve-fp8-h100", 2)]
)
def test_times_per_token_are_quoted_as_measured(file, point):
    points = [setting["points"][point] for setting in RESULTS[file]["settings"]]
    base, *others = (p["tpot_ms"] for p in points)
    cells = [f"{base:.2f}", *(f"{tpot:.2f} ({tpot / base:.2f}x)" for tpot in others)]
    name = f"{points[0]['batch']} x {points[0]['context']} (`{file}`)"
    assert f"| {name} | {' | '.join(cells)} |" in README


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
        assert f"| {point['bytes_per_token_head']:.1f} | {cells}" in QUALITY
    for row in result["tune"]["uniform"]:
        sizes = f"| {row['name']} | {row['bytes_per_token_head']:.0f} | {row['kld']:.6f} |"
        assert f"{sizes} {row['tuned']['bytes_per_token_head']:.1f} | {row['tuned']['kld']:.6f} |" in QUALITY


def test_the_loop_is_quoted_as_compiled():
    loop = RESULTS["decode-loop"]
    assert f"{loop['before']['loop']} to {loop['now']['loop']} for 32 tokens (`decode-loop`" in PERFORMANCE
