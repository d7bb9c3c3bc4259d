# SPDX-License-Identifier: Apache-2.0
"""On a machine with an NVIDIA GPU: every kernel compiled and checked, then timed. Needs torch and triton alone.

``python tests/gpu_check.py [--only checks|times] [--match REGEX] [--json FILE]`` prints every case and exits with 1 if one failed. Times are medians of
CUDA graph replays over more cache than L2 holds; GB are 1e9 bytes of codes and scales, beside those that a copy moves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kernel_cases import (
    ATTENTION,
    EXPAND,
    EXPAND_CACHED,
    LARGE,
    PROJECT,
    PROJECT_LARGE,
    WRITE,
    WRITE_LARGE,
    LatentLayout,
    attention,
    cache_write,
    decode,
    encode,
    reference,
    triton,
    write_and_project,
)
from kernel_checks import (
    check_attention,
    check_expand_cached,
    check_fused_expand,
    check_project_query,
    check_write,
)

from kvsplice_kernels.launch import Launch
from vllm_kvsplice import __version__

NUM_HEADS, H, HEAD_DIM = 28, 4, 128
LAYOUT = LatentLayout.of(HEAD_DIM, k=[(8, 32), (4, 96)], v=[(8, 32), (4, 96)])
SHAPES = ((64, 4096), (256, 2048), (16, 32768), (8, 8192), (1, 32768), (1, 1024))
COLD_BYTES = 400e6  # cache that one replay goes through at least, several times the L2 of an H200


def checks_of(match: str) -> list[tuple[str, Callable[[], None]]]:
    """(name, check) of the cases whose name has a match of a regular expression."""
    return [(name, check) for name, check in all_checks() if re.search(match, name)]


def all_checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in (WRITE | WRITE_LARGE).items():
        yield f"cache_write {name}", lambda case=case: check_write(case)
    for name, case in (WRITE | WRITE_LARGE | PROJECT_LARGE).items():
        yield f"write_and_project {name}", lambda case=case: check_write(case, fused=True)
    for name, case in (PROJECT | PROJECT_LARGE).items():
        yield f"project_query {name}", lambda case=case: check_project_query(case)
    for name, case in (ATTENTION | LARGE).items():
        yield f"attention {name}", lambda case=case: check_attention(case)
        yield f"attention {name}, 64 rows", lambda case=case: check_attention(case, launch=Launch(4, rows=64))
    for name, args in EXPAND.items():
        yield f"fused_expand {name}", lambda args=args: check_fused_expand(*args)
    for name, args in EXPAND_CACHED.items():
        yield f"expand_cached {name}", lambda args=args: check_expand_cached(*args)


def run_checks(jobs: int, match: str) -> list[str]:
    """Every check that matches, dealt to processes, since compiling takes most of the time; returns the lines of those that failed."""
    command = [sys.executable, __file__, "--only", "checks", "--jobs", "1", "--match", match, "--share"]
    shares = [subprocess.Popen([*command, f"{i}/{jobs}"], stdout=subprocess.PIPE, text=True) for i in range(jobs)]
    failed = []
    for process in shares:
        lines = process.communicate()[0].splitlines()
        print("\n".join(lines), flush=True)
        failed += [line for line in lines if line.startswith("FAILED")]
        if process.returncode and not any(line.startswith("FAILED") for line in lines):
            failed.append(f"FAILED: a process of checks ended with status {process.returncode}")
    return failed


def run_share(index: int, of: int, match: str) -> int:
    failed = 0
    for name, check in checks_of(match)[index::of]:
        start = time.time()
        try:
            check()
            check()  # launched by what the first compiled, see kernels/dispatch.py
            torch.cuda.synchronize()
            print(f"ok     {name} ({time.time() - start:.1f} s)", flush=True)
        except Exception as error:  # a wrong answer or a compile error: report it and go on
            failed += 1
            line = (str(error).strip().splitlines() or [""])[0][:300]
            print(f"FAILED {name}: {type(error).__name__}: {line}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc(limit=-4)
    return failed


def graph_us(calls: list[Callable[[], None]]) -> float:
    """Median microseconds of one call; the calls are captured in one CUDA graph, each on other memory."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def copy_gb_s() -> float:
    """GB/s of the fastest device copy, bytes read and written: by the copy engine, or by a kernel."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.add(source, 0, out=target))
    return max(2 * source.nbytes / graph_us([way] * 3) / 1e3 for way in ways)


def make_cache(num_blocks: int, block_size: int) -> torch.Tensor:
    """Random codes with scales of 2**-6."""
    shape = (num_blocks, H, block_size, LAYOUT.bytes_per_token_head)
    cache = torch.empty(shape, dtype=torch.uint8, device="cuda").random_(0, 256)
    for side in ("k", "v"):
        for tier in LAYOUT.plan(side, block_size):
            if tier.bits < 16:
                reference.scale_plane(cache, tier)[:] = int(reference.scale_code(torch.tensor(2.0**-6)))
    return cache


def bases() -> tuple[torch.Tensor, ...]:
    full = torch.linalg.qr(torch.randn(H, HEAD_DIM, HEAD_DIM, device="cuda"))[0]
    return full.transpose(1, 2).contiguous(), full.contiguous(), torch.zeros(H, HEAD_DIM, device="cuda")


def time_decode(B: int, context: int, block_size: int, copy: float) -> list[dict[str, object]]:
    """Print and return the time of both stages, and of stage 1 alone, for the split counts around the chosen one."""
    per_seq, moved = -(-context // block_size), B * context * H * LAYOUT.bytes_per_token_head
    copies = max(1, round(COLD_BYTES / moved))
    cache = make_cache(copies * B * per_seq, block_size)
    tables = torch.randperm(copies * B * per_seq, device="cuda").int().view(copies, B, per_seq)
    lens = torch.full((B,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(B + 1, dtype=torch.int32, device="cuda")
    query = torch.randn(B, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16()
    full, expand, mean = bases()
    out, prepared = torch.empty_like(query), encode.prepare(full, expand, mean, full, expand, mean)
    k_plan, v_plan = LAYOUT.plan("k", block_size), LAYOUT.plan("v", block_size)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = attention.choose_num_splits(B, H, context, sms)
    rows: list[dict[str, object]] = []
    for splits in sorted({max(1, chosen // 4), max(1, chosen // 2), chosen, chosen * 2}):
        shapes = attention.workspace_shapes(B, NUM_HEADS, HEAD_DIM, HEAD_DIM, splits)
        work = attention.Workspace(*(torch.zeros(s, device="cuda") for s in shapes))

        def both(table: torch.Tensor, splits: int = splits, work: attention.Workspace = work) -> None:
            attention.paged_attention(
                query, cache, k_plan, v_plan, prepared, table, lens, starts, HEAD_DIM**-0.5, out, 1, splits, workspace=work
            )  # fmt: skip

        def stage_1(table: torch.Tensor, work: attention.Workspace = work) -> None:
            decode.decode(
                work.q_latent, work.q_bias, cache, k_plan, v_plan, table, lens, starts, work.latent, work.lse,
                HEAD_DIM**-0.5, 1,
            )  # fmt: skip

        total, alone = (graph_us([lambda t=t, f=f: f(t) for t in tables]) for f in (both, stage_1))
        mark = "*" if splits == chosen else " "
        print(
            f"attention reqs={B} ctx={context} block={block_size} splits={splits}{mark} all={total:.1f} us "
            f"stage 1={alone:.1f} us moved={moved / 1e6:.1f} MB {moved / total / 1e3:.0f} GB/s "
            f"({moved / total / 10 / copy:.0f} % of copy; stage 1 {moved / alone / 10 / copy:.0f} %)",
            flush=True,
        )
        row = {"kernel": "attention", "reqs": B, "context": context, "block_size": block_size, "num_splits": splits}
        rows.append(row | {"chosen": splits == chosen, "all_us": total, "stage1_us": alone, "moved_mb": moved / 1e6})
    return rows


def time_write(T: int, block_size: int, copy: float) -> list[dict[str, object]]:
    """Print and return the time of cache_write, and of write_and_project for a decode step."""
    plans = LAYOUT.plan("k", block_size), LAYOUT.plan("v", block_size)
    cache = make_cache(-(-T // block_size) + 1, block_size)
    x = torch.randn(2, T, H, HEAD_DIM, device="cuda").bfloat16()
    slots = torch.randperm(T, device="cuda")
    full, expand, mean = bases()
    args = (x[0], x[1], cache, slots, encode.prepare(full, expand, mean, full, expand, mean), *plans)
    us = graph_us([lambda: cache_write.cache_write(*args)] * 10)
    both = None
    if T <= 1024:
        query = torch.randn(T, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16()
        out = torch.empty(T, NUM_HEADS, HEAD_DIM, device="cuda"), torch.empty(T, NUM_HEADS, device="cuda")
        both = graph_us([lambda: write_and_project.write_and_project(query, *args, *out)] * 10)
        print(f"write_and_project tokens={T} {both:.1f} us (warm L2)", flush=True)
    moved = T * H * (4 * HEAD_DIM + LAYOUT.bytes_per_token_head)
    print(
        f"cache_write tokens={T} {us:.1f} us moved={moved / 1e6:.2f} MB {moved / us / 1e3:.0f} GB/s "
        f"({moved / us / 10 / copy:.0f} % of copy; warm L2)",
        flush=True,
    )
    return [{"kernel": "cache_write", "tokens": T, "us": us, "write_and_project_us": both, "moved_mb": moved / 1e6}]


def run_times() -> tuple[list[dict[str, object]], list[str]]:
    """(what was timed, lines of what failed)."""
    copy = copy_gb_s()
    print(f"copy {copy:.0f} GB/s; {LAYOUT}, {LAYOUT.bytes_per_token_head} bytes per token and head, 28/4 heads")
    jobs: list[tuple[Callable[..., list[dict[str, object]]], tuple[int, ...]]] = [
        (time_decode, (*shape, block_size)) for block_size in (16, 64) for shape in SHAPES
    ]
    rows, failed = [], []
    for run, args in [*jobs, *((time_write, (T, 16)) for T in (1, 64, 256, 2048, 8192))]:
        try:
            rows += run(*args, copy)
        except Exception as error:  # report it and time the others
            failed.append(f"FAILED {run.__name__} {args}: {error}")
            print(failed[-1])
            traceback.print_exc(limit=-4)
    return [{"kernel": "copy", "gb_s": copy}, *rows], failed


def write_json(path: str, only: str | None, match: str, checks: list[str], times: list[dict[str, object]]) -> None:
    names = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    result = {
        "what": f"kernels checked against the fp64 reference, then timed: {LAYOUT}, 28/4 heads x 128, bf16, graph replay, medians",
        "command": "python tests/gpu_check.py"
        + (f" --only {only}" if only else "")
        + (f" --match {shlex.quote(match)}" if match else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"gpus": [torch.cuda.get_device_name()]},
        "versions": {"kvsplice": __version__} | names,
        "checks": None if only == "times" else {"ok": len(checks_of(match)) - len(checks), "failed": checks},
        "times": times,
    }
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels on an NVIDIA GPU.")
    parser.add_argument("--only", choices=("checks", "times"))
    parser.add_argument("--match", default="", metavar="REGEX", help="check cases whose names match alone")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that check")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--share", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    only = args.only
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: expected one that torch.cuda can use")
        return 2
    torch.manual_seed(0)
    if args.share:
        return run_share(*map(int, args.share.split("/")), args.match)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    wrong = [] if only == "times" else run_checks(args.jobs, args.match)
    times, broken = ([], []) if only == "checks" else run_times()
    if args.json:
        write_json(args.json, only, args.match, wrong, times)
    failed = len(wrong) + len(broken)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
