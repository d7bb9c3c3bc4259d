# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench kernels`: the whole command on tiny shapes in Triton's interpreter, where its times mean nothing, and
the gate that keeps wrong kernels from being timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vllm_kvsplice import cli
from vllm_kvsplice.bench import (
    kernels,
    kernels_build,
    kernels_data,
    kernels_jobs,
    kernels_report,
    kernels_timing,
)
from vllm_kvsplice.bench import kernels_rehearsal as rehearsal
from vllm_kvsplice.bench.kernels_build import Outcome, Stage
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_request import KernelsRequest
from vllm_kvsplice.bench.kernels_timing import Device, Times, time_calls
from vllm_kvsplice.errors import KVSpliceError

CPU = Device("cpu", cold_bytes=1e4, replays=2)
DECODE = Job("decode", "kvsplice", "near_lossless", (4, 2), 32, 2, 40, 1, 16)
FA3 = "flash-attention-3"


def job(**changes) -> Job:
    return Job(**({name: getattr(DECODE, name) for name in DECODE.__dataclass_fields__} | changes))


# ---------------------------------------------------------------- the whole command
RUN = """
import inspect
import sys
from kvsplice_kernels import attention, cache_write
from vllm_kvsplice.bench import kernels
from vllm_kvsplice.bench.kernels_timing import Device

right_attention, right_write = attention.paged_attention, cache_write.cache_write

def wrong_attention(*args, **kwargs):
    given = inspect.signature(right_attention).bind(*args, **kwargs).arguments
    right_attention(*args, **kwargs)
    if given["kv_cache"].shape[3] == 66:  # int8 alone
        given["out"].mul_(1.03)

def wrong_write(key, value, cache, slots, *args):
    wrong = cache.shape[3] == 66
    right_write(key, value * 1.02 if wrong else value, cache, slots, *args)

attention.paged_attention, cache_write.cache_write = wrong_attention, wrong_write
request = kernels.KernelsRequest(
    ("near_lossless", "int8"), ((2, 1),), 32, ((1, 20),), ("decode", "write"), peers=True, json=sys.argv[1],
    block_sizes=(16,), write_tokens=(3,),
)
sys.exit(kernels.run_on(request, Device("cpu", cold_bytes=300, replays=2)))
"""


@pytest.fixture(scope="module")
def wrong_run(tmp_path_factory):
    """A run in which int8's attention is 3 % too large and its write stores values 2 % too large: (process, result)."""
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", RUN, out], capture_output=True, text=True, timeout=200, env=env)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


def test_wrong_kernels_are_reported_and_not_timed(wrong_run):
    done, result = wrong_run
    failed = [row for row in result["failed"] if row["kernel"] == "kvsplice"]
    assert done.returncode == 1
    assert {(row["what"], row["preset"]) for row in failed} == {("decode", "int8"), ("write", "int8")}
    assert all("wrong result: relative error" in row["error"] for row in failed)
    assert not [row for row in result["rows"] if row["preset"] == "int8"]
    assert done.stdout.count("FAILED kvsplice int8") == 2


def test_right_kernels_are_timed_beside_wrong_ones(wrong_run):
    done, result = wrong_run
    rows = {(row["what"], row["kernel"]): row for row in result["rows"]}
    assert ("decode", "kvsplice") in rows and ("write", "kvsplice") in rows and ("decode", "kvsplice: decode") in rows
    row = rows["decode", "kvsplice"]
    assert row["bytes"] == 20 * 2 * (8 + 1 + 12 + 1)  # of 20 tokens: K and V, 8 dimensions in 8 bits, 24 in 4
    assert (row["heads"], row["batch"], row["context"], row["block_size"], row["num_splits"]) == ("2/1", 1, 20, 16, 1)
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3)
    assert row["pct_of_copy"] == pytest.approx(100 * row["gb_s"] / max(result["copy_gb_s"].values()))
    assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["relative_error"] < 0.01
    assert {"command", "date", "hardware", "versions", "settings"} <= result.keys()
    assert "decode, 1 x 20 tokens, 2/1 heads x 32" in done.stdout


def test_peers_that_are_not_here_are_named_and_no_failure(wrong_run):
    done, result = wrong_run
    absent = {(row["kernel"], row["preset"]) for row in result["absent"]}
    assert set(kernels_jobs.DECODE_PEERS) == absent
    assert "not here: flash-attention-3 bf16 (" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert cli.main(["bench", "kernels"]) == 2
    assert capsys.readouterr().err.startswith("kvsplice: kvsplice bench kernels found no NVIDIA GPU: expected one")


@pytest.mark.parametrize(
    "given",
    [
        {"what": ("decode", "sleep")},
        {"query_lens": (0,)},
        {"query_lens": (2, 41), "shapes": ((1, 40),)},
        {"what": ()},
        {"heads": ((28, 5),)},
        {"shapes": ((0, 10),)},
        {"write_tokens": (0,)},
        {"chunks": ((1, 8, -1),)},
        {"splits": "many"},
    ],
)
def test_a_request_that_is_none_is_refused(given):
    with pytest.raises(KVSpliceError):
        kernels.run(KernelsRequest(**given))


def test_an_unknown_preset_or_a_bad_file_stops_before_the_work(tmp_path):
    with pytest.raises(KVSpliceError, match="preset 'none_such'"):
        kernels.run_on(KernelsRequest(("none_such",)), CPU)
    with pytest.raises(KVSpliceError, match="cannot be written"):
        kernels.run_on(KernelsRequest(json=str(tmp_path / "no" / "file.json")), CPU)


# ---------------------------------------------------------------- jobs, data, times
def test_default_jobs_cover_every_preset_shape_and_peer():
    jobs = kernels_jobs.list_jobs(KernelsRequest(), 132)
    assert len(set(jobs)) == len(jobs) == 5 * (10 + 3 * 2) + 5 * (7 + 3) + 4 * (4 + 3)
    assert {j.block_size for j in jobs if j.kernel == "kvsplice" and j.what == "decode"} == {16, 64}
    ours = [j for j in kernels_jobs.list_jobs(KernelsRequest(peers=False), 132) if j.kernel != "kvsplice"]
    assert not ours


def test_query_lengths_are_decode_steps_of_their_own():
    request = KernelsRequest(("int8",), shapes=((4, 40),), query_lens=(1, 5), what=("decode",), block_sizes=(16,))
    jobs = kernels_jobs.list_jobs(request, 132)
    assert [j.query_len for j in jobs] == [1] * 11 + [5] * 7
    assert {j.kernel for j in jobs[11:]} == {"kvsplice", "flash-attention-3", "vllm-triton"}  # of several query tokens
    assert kernels_report.point_title(jobs[0]) == "decode, 4 x 40 tokens, 28/4 heads x 128"
    assert kernels_report.point_title(jobs[-1]) == "decode, 4 x 40 tokens, the last 5 of each new, 28/4 heads x 128"


@pytest.mark.parametrize("rows", [None, 16], ids=["columns", "rows"])
def test_a_decode_step_of_several_tokens_is_checked(rows):
    from kvsplice_kernels.launch import Launch

    launch = Launch(4, rows=16) if rows else None
    outcome = kernels_build.attempt(job(query_len=3, launch=launch), CPU, timed=True)
    assert outcome.kind == "ok", outcome.text
    assert [stage.name for stage in outcome.stages] == ["project_query", "decode", "reduce_expand"]


def test_a_sweep_goes_around_the_chosen_split_count():
    from kvsplice_kernels.attention import choose_num_splits

    request = KernelsRequest(("int8",), shapes=((4, 8192),), what=("decode",), peers=False, splits="sweep")
    counts = [j.num_splits for j in kernels_jobs.list_jobs(request, 132) if j.block_size == 16]
    chosen = choose_num_splits(4, 4, 8192, 132)
    assert counts == sorted(set(counts)) and {max(1, chosen // 2), chosen, 2 * chosen} <= set(counts)


@pytest.mark.parametrize("tokens", [1, 5, 1024, 1500])
def test_write_slots_never_meet(tokens):
    at = kernels_data.Shape(2, 1, 16, 1, tokens, tokens, 16)
    slots = torch.cat(kernels_data.write_slots(at, 100, 1e6, None, "cpu"))
    assert len(slots.unique()) == len(slots) >= min(64 * tokens, 10_000)
    assert slots.dtype == torch.int64 and slots.min() >= 0


def test_every_page_of_a_cache_is_filled(monkeypatch):
    monkeypatch.setattr(kernels_data, "FILL_TOKENS", 64)
    cache = torch.zeros(11, 16, 3)

    def write(slots):
        cache[slots // 16, slots % 16] = torch.rand(len(slots), 3) + 1

    kernels_data.fill_pages((cache,), 16, write)
    assert (cache >= 1).all() and torch.equal(cache[4], cache[0]) and not torch.equal(cache[1], cache[0])


def test_block_tables_of_all_copies_share_no_block():
    batch = kernels_data.make_batch(kernels_data.Shape(2, 1, 16, 3, 20, 1, 16), 4, "cpu")
    blocks = torch.cat([table.flatten() for table in batch.tables])
    assert sorted(blocks.tolist()) == list(range(4 * 3 * 2)) and batch.num_blocks == 24
    assert batch.out.isnan().all() and batch.query.dtype == torch.bfloat16


def test_exact_attention_is_torch_s():
    query, key, value = (torch.randn(n, h, 8) for n, h in ((3, 4), (9, 2), (9, 2)))
    mask = torch.arange(9)[None, :] <= torch.arange(6, 9)[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    got = kernels_data.exact_attention(query, key, value, 0.3)
    torch.testing.assert_close(got.float(), expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_an_error_that_is_not_a_number_is_infinite():
    exact = torch.ones(3, dtype=torch.float64)
    assert kernels_data.relative_error(torch.tensor([1.0, float("nan"), 1.0]), exact) == float("inf")
    assert kernels_data.relative_error(torch.full((3,), 1.5), exact) == pytest.approx(0.5)


def test_times_are_percentiles_of_one_call():
    runs = []
    times = time_calls([lambda: runs.append(1)] * 3, Device("cpu", replays=10))
    assert len(runs) == 30 and 0 < times.p20 <= times.p50 <= times.p80


# ---------------------------------------------------------------- the gate, without kernels
def prepared(error: float, tolerance: float, runs: list[int]) -> kernels_data.Prepared:
    return kernels_data.Prepared([lambda: runs.append(1)], lambda: error, tolerance, 100)


@pytest.mark.parametrize(
    "error, kind", [(0.0099, "ok"), (0.0101, "failed"), (float("inf"), "failed"), (float("nan"), "failed")]
)
def test_only_what_is_right_is_timed(monkeypatch, error, kind):
    runs: list[int] = []
    monkeypatch.setattr(kernels_build, "build", lambda *_: prepared(error, 0.01, runs))
    outcome = kernels_build.attempt(DECODE, CPU, timed=True)
    assert outcome.kind == kind and bool(runs) == (kind == "ok") == (outcome.times is not None)


@pytest.mark.parametrize(
    "kernel, error, kind",
    [
        (FA3, ImportError("no vllm"), "absent"),
        ("kvsplice", ImportError("no triton"), "failed"),
        (FA3, RuntimeError("boom"), "failed"),
    ],
)
def test_a_peer_that_cannot_be_imported_is_absent_and_everything_else_failed(monkeypatch, kernel, error, kind):
    def build(*_):
        raise error

    monkeypatch.setattr(kernels_build, "build", build)
    outcome = kernels_build.attempt(job(kernel=kernel, preset="bf16"), CPU, timed=True)
    assert outcome.kind == kind and str(error) in outcome.text


def measured(jobs, known):
    """What a run of these jobs puts into its result."""
    found = {"rows": [], "failed": [], "absent": []}
    for _ in kernels._measure(jobs, known, CPU, 1.0, found):
        pass
    return found


def test_after_a_lost_cuda_context_the_rest_is_reported_not_run(monkeypatch):
    jobs = [job(preset="int8"), DECODE, job(batch=3)]
    monkeypatch.setattr(kernels_build, "attempt", lambda *_, **__: Outcome("failed", "illegal memory access"))
    monkeypatch.setattr(kernels_build, "usable", lambda _: False)
    found = measured(jobs, {})
    assert found["rows"] == [] and len(found["failed"]) == 3
    assert [row["error"].startswith("not run: decode kvsplice int8") for row in found["failed"]] == [
        False,
        True,
        True,
    ]


def test_what_failed_in_the_rehearsal_is_not_run_again(monkeypatch):
    monkeypatch.setattr(kernels_build, "attempt", lambda *_, **__: pytest.fail("ran"))
    found = measured([DECODE], {DECODE: Outcome("failed", "hangs")})
    assert [row["error"] for row in found["failed"]] == ["hangs"]


def test_a_run_that_is_cut_off_leaves_what_it_has_measured(monkeypatch, tmp_path):
    def cut_off(jobs, known, device):
        yield None, [(DECODE, Outcome("failed", "hangs"))]
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "_outcomes", cut_off)
    monkeypatch.setattr(kernels_timing, "copy_speeds", lambda _: {"copy_": 1.0})
    out = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        kernels.run_on(kernels.KernelsRequest(peers=False, json=str(out)), CPU)
    found = json.loads(out.read_text())
    assert [row["error"] for row in found["failed"]] == ["hangs"] and found["seconds"] >= 0 and found["versions"]


# ---------------------------------------------------------------- the rehearsal
def dies_at_int8(jobs, device, pipe):
    for one in jobs:
        pipe.send((one, None))
        if one.preset == "int8":
            os._exit(9)
        pipe.send((one, Outcome("ok" if one.batch == 2 else "absent", one.preset)))


def test_a_job_that_kills_its_process_is_failed_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(rehearsal, "_work", dies_at_int8)
    jobs = [DECODE, job(preset="int8"), job(preset="int8", batch=9), job(batch=5)]
    found = rehearsal.rehearse(jobs, CPU, 100)
    assert {(one.preset, one.batch): outcome.kind for one, outcome in found.items()} == {
        ("int8", 2): "failed",
        ("int8", 9): "failed",
        ("near_lossless", 5): "absent",
    }
    assert "ended the process" in found[jobs[1]].text


def test_a_process_of_its_own_finds_what_this_one_would():
    found = rehearsal.rehearse([job(kernel=FA3, preset="bf16")], CPU, 100)
    assert [outcome.kind for outcome in found.values()] == ["absent"]


# ---------------------------------------------------------------- rows
def outcome(p50: float, moved: int = 4000, stages: tuple[Stage, ...] = ()) -> Outcome:
    return Outcome("ok", error=0.001, times=Times(p50 * 0.9, p50, p50 * 1.1), bytes=moved, num_splits=4, stages=stages)


def test_rows_are_compared_with_the_fastest_flash_attention_3_over_bf16():
    stage = Stage("decode", Times(1.0, 1.5, 2.0), 4000)
    jobs = [
        (job(kernel=FA3, preset="bf16"), outcome(10.0)),
        (job(kernel=FA3, preset="bf16", block_size=128), outcome(8.0)),
        (job(kernel=FA3, preset="fp8"), outcome(5.0)),
        (DECODE, outcome(2.0, 3000, (stage, Stage("project_query", Times(1, 1, 1), None)))),
        (job(preset="int8"), Outcome("failed", "wrong")),
    ]
    rows = kernels_report.rows_of(jobs, copy_gb_s=4.0)
    assert [(row["kernel"], row["ratio_to_fa3_bf16"]) for row in rows] == [
        (FA3, 0.8), (FA3, 1.0), (FA3, 1.6), ("kvsplice", 4.0), ("kvsplice: decode", None), ("kvsplice: project_query", None),
    ]  # fmt: skip
    ours = rows[3]
    assert ours["gb_s"] == 1.5 and ours["pct_of_copy"] == 37.5 and rows[5]["gb_s"] is None
    text = kernels_report.point_table(rows)
    assert text.splitlines()[4].split() == [
        "kvsplice",
        "near_lossless",
        *["16", "4", "1.8", "2.0", "2.2", "0.00", "2", "37.5", "4.00"],
    ]
