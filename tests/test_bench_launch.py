# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench launch`: the grid, the choice from times, and the whole command in Triton's interpreter, where a wrong
candidate must not be timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from vllm_kvsplice import cli
from vllm_kvsplice.bench import kernels_rehearsal, launch_choice, launch_sweep
from vllm_kvsplice.bench import launch as bench_launch
from vllm_kvsplice.bench.kernels_build import Outcome
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_timing import Device
from vllm_kvsplice.bench.launch import LaunchRequest
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.launch import read

kernels = pytest.importorskip("kvsplice_kernels.launch", reason="Triton is not installed")
Launch = kernels.Launch
DEFAULT = Launch(1, 3, 200, 8)
A, B = Launch(1, 4, 168, 12), Launch(1, 2, None, 8)


# ---------------------------------------------------------------- grid and choice
def test_the_grid_holds_the_default_first_and_nothing_twice():
    variants = launch_choice.variants(DEFAULT, DEFAULT, 8)
    assert variants[0] == DEFAULT and len(variants) == len(set(variants)) == 2 * 3 * 4
    found = launch_choice.candidates(DEFAULT, variants)
    assert found[0] == DEFAULT and len(found) == len(set(found)) == 24 * 5
    assert {launch.num_warps for launch in found[:60]} == {1}  # of more warps last
    assert {launch.programs for launch in found} == {6, 8, 10, 12, 16}
    assert {launch.num_warps for launch in launch_choice.variants(Launch(4), Launch(4), 16)} == {4, 8}


def test_many_columns_are_tried_as_rows_too_and_first():
    columns, rows = Launch(4), Launch(4, 3, 168, 3, 64)
    for default in (columns, rows):
        variants = launch_choice.variants(default, columns, 64)
        assert len(variants) == len(set(variants)) == 24 + 9 and variants[0] == default
        n = 9 + (default == columns)
        assert {v.rows for v in variants[n - 8 : n]} == {64} and {v.rows for v in variants[n:]} == {None}
    found = launch_choice.candidates(default, variants)
    assert len(found) == len(set(found)) == 24 * 5 + 9 * 4 and found[0] == rows
    assert {launch.programs for launch in found if launch.rows} == {1, 2, 3, 4}


def test_a_variant_that_is_not_usable_is_not_tried_but_the_default_is():
    found = launch_choice.candidates(DEFAULT, [A])
    assert found[0] == DEFAULT and {launch.num_stages for launch in found[1:]} == {4}


def test_the_geometric_mean_of_the_ratios_decides():
    times = {DEFAULT: [100.0, 10.0], A: [50.0, 10.5], B: [104.0, 5.0]}
    choice = launch_choice.choose(DEFAULT, times)
    assert choice.launch == choice.best == B  # A has the smaller sum
    assert choice.speedup == pytest.approx((100 / 104 * 2) ** 0.5)
    assert [c.best for c in launch_choice.ranked(DEFAULT, times)] == [B, A]


@pytest.mark.parametrize("us, taken", [(98.0, True), (98.2, False), (130.0, False)])
def test_the_default_is_kept_unless_something_is_two_percent_faster(us, taken):
    choice = launch_choice.choose(DEFAULT, {DEFAULT: [100.0], A: [us]})
    assert choice.best == A and choice.speedup == pytest.approx(100 / us)
    assert choice.launch == (A if taken else None)


def test_of_the_default_alone_the_default_is_chosen():
    choice = launch_choice.choose(DEFAULT, {DEFAULT: [100.0]})
    assert choice == (DEFAULT, 1.0) and choice.launch is None


# ---------------------------------------------------------------- the sweep, on times that are given
class Points:
    """Stands for a point: ``us`` of every launch, an exception instead of a number where it fails."""

    def __init__(self, us) -> None:
        self.us, self.calls = us, []

    def time(self, launch, device, again=False):
        self.calls.append((launch, again))
        us = self.us(launch)
        if isinstance(us, Exception):
            raise us
        return us


def swept(monkeypatch, us, deadline: float = 1e18):
    points = Points(us)
    monkeypatch.setattr(launch_sweep, "_point", lambda *_: points)
    job = bench_launch._groups(LaunchRequest(("int8",), shapes=((1, 40),)))
    tried = launch_choice.variants(DEFAULT, DEFAULT, 8)
    return launch_sweep.sweep(*job.values(), DEFAULT, tried, Device("cpu"), deadline), points


def test_what_fails_or_is_wrong_is_counted_and_the_fastest_are_timed_again(monkeypatch):
    def us(launch):
        if launch.num_warps == 2:
            return RuntimeError("out of resources")
        if launch.maxnreg == 128:
            return launch_sweep.WrongResultError("wrong")
        return 100.0 - launch.programs - launch.num_stages

    found, points = swept(monkeypatch, us)
    assert found.outcomes == {"failed": 60, "wrong": 15, "timed": 45}
    assert list(found.times) == [DEFAULT, *(Launch(1, 4, n, 16) for n in (200, 168, None))]
    assert [call for call in points.calls if call[1]] == [(launch, True) for launch in found.times] * 3
    assert launch_choice.choose(DEFAULT, found.times).best == Launch(1, 4, 200, 16)


def test_after_the_deadline_nothing_but_the_default_is_begun(monkeypatch):
    found, _ = swept(monkeypatch, lambda _: 1.0, time.monotonic() - 1)
    assert found.outcomes == {"timed": 1, "not reached": 119} and found.times == {DEFAULT: [1.0]}


def test_a_default_that_is_wrong_stops_the_command(monkeypatch):
    with pytest.raises(KVSpliceError, match="the default launch of int8 wrong"):
        swept(monkeypatch, lambda _: launch_sweep.WrongResultError("wrong"))


# ---------------------------------------------------------------- the rehearsal
def test_what_the_rehearsal_rejects_is_counted_and_not_tried_but_the_default_is(monkeypatch):
    ((key, jobs),) = bench_launch._groups(LaunchRequest(("int8",), shapes=((64, 4096),))).items()
    rehearsed = []

    def rehearse(small, device, seconds):
        rehearsed.extend(small)
        text = {1: "WrongResultError: wrong result: relative error 1", 2: "OutOfResources: shared memory"}
        bad = [job for job in small if job.launch.num_stages == 2 or job.launch == DEFAULT]
        return {job: Outcome("failed", text[job.launch.num_warps]) for job in bad}

    monkeypatch.setattr(kernels_rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(launch_sweep, "_point", lambda *_: Points(lambda launch: 100.0 - launch.programs))
    rejected = bench_launch._rehearse({key: jobs}, Device(), 1.0)
    assert len({job.group for job in rehearsed}) == 24 and {(job.batch, job.context) for job in rehearsed} == {(1, 512)}
    entry = bench_launch._entry(key, jobs, rejected, Device("cpu"), 1e18)
    assert entry["measured"]["candidates"] == {"timed": 16 * 5, "wrong": 4 * 5, "failed": 4 * 5}
    assert entry["launch"] == entry["measured"]["best"] == vars(Launch(1, 3, 200, 16))
    assert entry["measured"]["points"] == [
        {"heads": "28/4", "batch": 64, "context": 4096, "query_len": 1, "default_us": 92.0, "best_us": 84.0}
    ]


def test_a_process_of_its_own_launches_as_it_is_told():
    job = Job("decode", "kvsplice", "int8", (2, 1), 32, 1, 20, 1, 16, launch=Launch(2, 4, 168, 12))
    assert kernels_rehearsal.rehearse([job], Device("cpu", cold_bytes=300, replays=2)) == {}


# ---------------------------------------------------------------- the command
def test_layouts_and_columns_make_entries_and_heads_points():
    request = LaunchRequest(("near_lossless", "int8"), ((28, 4), (32, 8), (64, 4)), (128, 64), ((8, 100),))
    found = bench_launch._groups(request)
    assert [key[:2] for key in found] == [(128, 8), (128, 16)] * 2 + [(64, 8), (64, 16)] * 2
    assert [[job.heads for job in jobs] for jobs in found.values()] == [[(28, 4), (32, 8)], [(64, 4)]] * 4


def test_query_lengths_make_columns():
    request = LaunchRequest(("int8",), ((28, 4),), (128,), ((8, 100),), query_lens=(1, 5, 8))
    found = bench_launch._groups(request)
    assert [key[1] for key in found] == [8, 64]
    assert [[job.query_len for job in jobs] for jobs in found.values()] == [[1], [5, 8]]


RUN = """
import sys
from kvsplice_kernels import attention
from vllm_kvsplice.bench import launch, launch_choice
from vllm_kvsplice.bench.kernels_timing import Device

right = attention.bind_decode

def wrong_at_two_stages(*args):
    bound, tensors = right(*args)

    def launch(*tensors):
        bound(*tensors)
        if args[-1].num_stages == 2:
            tensors[6].mul_(1.03)

    return launch, tensors

attention.bind_decode = wrong_at_two_stages
launch_choice.WARPS, launch_choice.STAGES, launch_choice.REGISTERS = (1,), (3, 2), (200, 168)
request = launch.LaunchRequest(("near_lossless",), ((2, 1),), (32,), ((1, 20),), json=sys.argv[1])
sys.exit(launch.run_on(request, Device("cpu", cold_bytes=300, replays=2), "Some GPU, 2 GB"))
"""


def test_the_whole_command_writes_a_file_that_serving_can_read(tmp_path):
    out = tmp_path / "Some_GPU_2_GB.json"
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", RUN, out], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    found = read(out)
    (entry,) = found.entries
    assert found.gpu == "Some GPU, 2 GB" and entry.key == (32, 8, "K 8x8+24x4 V 8x8+24x4")
    assert entry.measured["candidates"] == {"timed": 10, "wrong": 10}
    assert entry.measured["default"] == vars(Launch(1, 3, 200, 8))
    assert entry.measured["best"]["num_stages"] == 3
    (point,) = entry.measured["points"]
    ratio = point["default_us"] / point["best_us"]
    assert entry.measured["speedup"] == pytest.approx(ratio) and (entry.launch is not None) == (ratio >= 1.02)
    assert "place: configs/launch/Some_GPU_2_GB.json" in done.stdout and "candidates: 10 timed, 10 wrong" in done.stdout


def measured(monkeypatch, columns: int, programs: int) -> None:
    """run_on with measurements that are given: one entry."""
    entry = {"head_dim": 32, "columns": columns, "layout": "K 8x32 V 8x32", "measured": {}}
    entry["launch"] = vars(Launch(1, 3, 200, programs))
    monkeypatch.setattr(bench_launch, "_groups", lambda request: {(32, columns, ""): []})
    monkeypatch.setattr(bench_launch, "_entry", lambda *args: entry)
    monkeypatch.setattr(bench_launch, "_table", lambda entry: "")


def test_entries_are_added_to_a_file_or_replaced(monkeypatch, tmp_path, capsys):
    out = tmp_path / "launch.json"
    request = LaunchRequest(json=str(out), add=True)
    for columns, programs in ((8, 6), (64, 2), (8, 10)):
        measured(monkeypatch, columns, programs)
        assert bench_launch.run_on(request, Device("cpu"), "Some GPU") == 0
    found = read(out)
    assert [(e.columns, e.launch.programs) for e in found.entries] == [(64, 2), (8, 10)]
    assert found.command.count(";") == 2 and found.settings["earlier"]["earlier_date"]
    with pytest.raises(KVSpliceError, match="is of Some GPU, expected Other GPU"):
        bench_launch.run_on(request, Device("cpu"), "Other GPU")
    assert bench_launch.run_on(LaunchRequest(json=str(out)), Device("cpu"), "Some GPU") == 0
    assert [e.columns for e in read(out).entries] == [8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert cli.main(["bench", "launch", "--preset", "int8", "--head-dim", "64", "--seconds", "9"]) == 2
    assert capsys.readouterr().err.startswith("kvsplice: kvsplice bench launch found no NVIDIA GPU: expected one")


@pytest.mark.parametrize(
    "given",
    [
        {"heads": ((28, 5),)},
        {"shapes": ((0, 10),)},
        {"seconds": 0.0},
        {"query_lens": (0,)},
        {"query_lens": ()},
        {"add": True},
    ],
)
def test_a_request_that_is_none_is_refused(given):
    with pytest.raises(KVSpliceError, match="expected"):
        bench_launch.run(LaunchRequest(**given))
