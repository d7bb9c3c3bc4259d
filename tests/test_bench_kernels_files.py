# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench kernels --layout FILE.safetensors`: every distinct layout of a projector file, and their mean."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_kvsplice.bench import kernels_jobs, kernels_layouts, kernels_report
from vllm_kvsplice.bench.kernels_build import Outcome, Stage
from vllm_kvsplice.bench.kernels_request import KernelsRequest
from vllm_kvsplice.bench.kernels_timing import Times
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, build_metadata
from vllm_kvsplice.errors import KVSpliceError

SMALL = LatentLayout.of(32, [(4, 32)], [(4, 16), (0, 16)])
LARGE = LatentLayout.of(32, [(8, 8), (4, 24)], [(16, 32)])
NAMES = {SMALL: "mixed[K 32x4 V 16x4+16x0]", LARGE: "mixed[K 8x8+24x4 V 32x16]"}
MEAN = "mixed (mean of 3 layers)"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A projector file of three layers with one KV head: SMALL, LARGE, SMALL."""
    config = SimpleNamespace(
        model_type="qwen2", vocab_size=9, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    layers = {
        i: LayerProjector(layout, *(Basis.orthogonal(torch.eye(32)[None, : layout.rank(s)]) for s in ("k", "v")))
        for i, layout in enumerate((SMALL, LARGE, SMALL))
    }
    path = tmp_path_factory.mktemp("projector") / "mixed.safetensors"
    Projector(build_metadata(config, "tuned"), layers).save(path)
    return str(path)


def list_jobs(mixed, **changes):
    request = KernelsRequest((mixed, "int8", mixed), ((2, 1),), 32, ((1, 20),), peers=False, write_tokens=(3,))
    return kernels_jobs.list_jobs(KernelsRequest(**(vars(request) | {"chunks": ((1, 4, 0),)} | changes)), 1)


def test_distinct_layouts_are_found_and_counted(mixed):
    found = kernels_layouts.named_layouts(("int8", mixed), 32)
    assert [name for name, _ in found] == ["int8", NAMES[SMALL], NAMES[LARGE]]
    assert [part and (part.layout, part.layers) for _, part in found] == [None, (SMALL, 2), (LARGE, 1)]


def test_every_layout_is_a_job_wherever_a_preset_is(mixed):
    jobs = list_jobs(mixed)
    assert len(set(jobs)) == len(jobs) == 3 * (2 + 1 + 1)  # two block sizes, a write, a prefill
    assert {j.layout for j in jobs if j.preset == NAMES[LARGE]} == {LARGE}
    assert {j.what for j in jobs if j.layout == SMALL} == {"decode", "write", "prefill"}
    assert pickle.loads(pickle.dumps(jobs)) == jobs  # as the rehearsal's processes get them


def test_a_file_of_another_head_dim_is_refused(mixed):
    with pytest.raises(KVSpliceError, match="is of head_dim 32, expected 128 .*: give --head-dim 32.$"):
        list_jobs(mixed, head_dim=128)


def outcomes(mixed):
    """Decode at two block sizes: SMALL in 10 us from 1000 bytes, LARGE in 40 us from 4000, int8 in 5."""
    times = {NAMES[SMALL]: (10.0, 1000, 4), NAMES[LARGE]: (40.0, 4000, 8), "int8": (5.0, 1, 4)}
    for job in list_jobs(mixed, what=("decode",)):
        us, moved, splits = times[job.preset]
        stages = (Stage("decode", Times(us, us, us), moved),)
        yield job, Outcome("ok", "", 0.001 * us, Times(us - 1, us, us + 4), moved, splits, stages)


def test_the_mean_row_is_weighted_by_layers(mixed):
    baseline = kernels_jobs.Job("decode", "flash-attention-3", "bf16", (2, 1), 32, 1, 20, 1, 16)
    timed = [(baseline, Outcome("ok", error=0.0, times=Times(80.0, 80.0, 80.0), bytes=1)), *outcomes(mixed)]
    rows = kernels_report.rows_of(timed, copy_gb_s=0.5)
    assert len(rows) == 1 + 2 * 6 + 2
    for row, block_size in zip(rows[-2:], (16, 64), strict=True):
        assert (row["kernel"], row["preset"], row["block_size"]) == ("kvsplice", MEAN, block_size)
        assert (row["p20_us"], row["p50_us"], row["p80_us"]) == pytest.approx((19, 20, 24))  # (2 * 10 + 40) / 3
        assert (row["bytes"], row["layers"], row["num_splits"], row["relative_error"]) == (2000, 3, None, 0.04)
        assert (row["gb_s"], row["pct_of_copy"], row["ratio_to_fa3_bf16"]) == pytest.approx((0.1, 20, 4))
    layers = {row["preset"]: row["layers"] for row in rows}
    assert layers == {"bf16": None, NAMES[SMALL]: 2, NAMES[LARGE]: 1, "int8": None, MEAN: 3}


def test_no_mean_where_a_layout_failed(mixed):
    broken = [
        (job, Outcome("failed", "wrong") if (job.layout, job.block_size) == (LARGE, 16) else outcome)
        for job, outcome in outcomes(mixed)
    ]
    means = [row for row in kernels_report.rows_of(broken, 1.0) if row["preset"] == MEAN]
    assert [row["block_size"] for row in means] == [64]


RUN = """
import sys
from vllm_kvsplice.bench import kernels
from vllm_kvsplice.bench.kernels_timing import Device

request = kernels.KernelsRequest(
    (sys.argv[1],), ((2, 1),), 32, ((1, 20),), ("decode", "write"), peers=False, json=sys.argv[2],
    block_sizes=(16,), write_tokens=(3,),
)
sys.exit(kernels.run_on(request, Device("cpu", cold_bytes=300, replays=2)))
"""


def test_a_run_measures_a_mixed_projector(mixed, tmp_path):
    out = tmp_path / "kernels.json"
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", RUN, mixed, out], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(out.read_text())["rows"] if row["kernel"] == "kvsplice"]
    assert [(row["what"], row["preset"], row["layers"]) for row in rows] == [
        (what, *row) for what in ("decode", "write") for row in ((NAMES[SMALL], 2), (NAMES[LARGE], 1), (MEAN, 3))
    ]
    small, large, mean = rows[:3]
    assert (small["bytes"], large["bytes"]) == (20 * SMALL.bytes_per_token_head, 20 * LARGE.bytes_per_token_head)
    assert mean["p50_us"] == pytest.approx((2 * small["p50_us"] + large["p50_us"]) / 3)
    assert MEAN in done.stdout
