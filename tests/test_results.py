# SPDX-License-Identifier: Apache-2.0
"""Figures: each result file says how it was made, and what the README quotes is what the files hold."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("*.json")}
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_says_how_it_was_made(name):
    origin = RESULTS[name].get("provenance", RESULTS[name])
    assert origin["command"] and re.match(r"\d{4}-\d\d-\d\dT", origin["date"])
    assert origin["hardware"]["gpus"] or origin["hardware"]["cpu"]
    assert {"kvsplice", "torch", "python"} <= origin["versions"].keys()


def row(file):
    """The row of the README's table of measurements that names this file."""
    (line,) = [line for line in README.splitlines() if line.startswith("|") and f"`{file}`" in line]
    return line


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ref-d128-near_lossless-hf", "ref-d128-near_lossless-hf"),
        ("-hf-whole", "ref-d128-near_lossless-hf-whole"),
        ("-hf-bf16", "ref-d128-near_lossless-hf-bf16"),
        ("-vllm", "ref-d128-near_lossless-vllm"),
        ("demo-h200", "demo-h200"),
    ],
)
def test_the_readme_quotes_its_files(file, name):
    found, line = RESULTS[name].get("scores", RESULTS[name]), row(file)
    assert f"{found['ratio']['kv']:.2f}x" in line
    assert f"{found['ppl']['delta_pct']:+.2f} %" in line
    kld = found["kld_topk"] if found["engine"] == "vllm" else found["kld"]
    assert f"{kld:.5f}".lstrip("0") in line
    if found["needle"]:
        assert found["needle"]["kvsplice"] == found["needle"]["baseline"] == 1.0


def test_the_readme_quotes_speeds_and_failures_too():
    for name in ("demo-h200", "demo-cpu"):
        served = RESULTS[name]
        ratio = served["kvsplice"]["tokens_per_s"] / served["stock"]["tokens_per_s"]
        assert f"{ratio:.2f}x as fast" in README
    moved = [t["gb_s"] / 1000 for t in RESULTS["kernels-h200"]["times"] if t["kernel"] == "attention" and t["chosen"]]
    assert f"{min(moved):.1f} to {max(moved):.2f} TB/s" in README
