# SPDX-License-Identifier: Apache-2.0
"""From outcomes to rows, the table and the JSON of `kvsplice bench kernels`.

A row's ``ratio_to_fa3_bf16`` is how many times as fast it is as the fastest FlashAttention-3 row over bf16 of the same
point; ``gb_s`` are 1e9 bytes a second, ``pct_of_copy`` their share of what a device copy moved in the same run.
``layers``: of a projector file that have this layout, or that a mean is over; None for presets and peers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vllm_kvsplice.bench.kernels_build import Outcome
from vllm_kvsplice.bench.kernels_jobs import BASELINE, Job
from vllm_kvsplice.bench.kernels_layouts import mean_name
from vllm_kvsplice.bench.kernels_timing import Times
from vllm_kvsplice.scoring.results import table

Row = dict[str, Any]
HEADER = ("kernel", "preset", "block", "splits", "p20 us", "p50 us", "p80 us", "MB", "GB/s", "% of copy", "x FA3 bf16")


def rows_of(outcomes: Sequence[tuple[Job, Outcome]], copy_gb_s: float) -> list[Row]:
    """Rows of one point: every job that was timed, each followed by its stages as "kernel: stage"; the means of files last."""
    outcomes = [*outcomes, *_means(outcomes)]
    timed = [(job, outcome) for job, outcome in outcomes if outcome.times is not None]
    baseline = [o.times.p50 for job, o in timed if o.times and (job.kernel, job.preset) == BASELINE]
    rows = []
    for job, outcome in timed:
        assert outcome.times is not None
        ratio = min(baseline) / outcome.times.p50 if baseline else None
        rows.append(_row(job, job.kernel, outcome, outcome.times, outcome.bytes, copy_gb_s, ratio))
        for stage in outcome.stages:
            name = f"{job.kernel}: {stage.name}"
            rows.append(_row(job, name, outcome, stage.times, stage.bytes, copy_gb_s, None))
    return rows


def _means(outcomes: Sequence[tuple[Job, Outcome]]) -> Iterator[tuple[Job, Outcome]]:
    """For each projector file, block size and asked split count: times and bytes of the mean layer, without stages.

    None of a file of which a layout was not timed. The error is the worst layout's.
    """
    files: dict[object, list[tuple[Job, Outcome]]] = defaultdict(list)
    for job, outcome in outcomes:
        if job.of_file:
            files[job.of_file.file, job.block_size, job.num_splits].append((job, outcome))
    for of in files.values():
        if all(outcome.times for _, outcome in of):
            yield _mean(of)


def _mean(of: Sequence[tuple[Job, Outcome]]) -> tuple[Job, Outcome]:
    weights = [job.of_file.layers for job, _ in of if job.of_file]
    each = [outcome for _, outcome in of]
    job, part, layers = of[0][0], of[0][0].of_file, sum(weights)
    assert part is not None

    def mean(values: Sequence[float]) -> float:
        return sum(n * value for n, value in zip(weights, values, strict=True)) / layers

    times = Times(*map(mean, zip(*(outcome.times for outcome in each if outcome.times), strict=True)))
    splits = {outcome.num_splits for outcome in each}
    outcome = Outcome(
        "ok",
        error=max(outcome.error or 0.0 for outcome in each),
        times=times,
        bytes=round(mean([outcome.bytes for outcome in each])),
        num_splits=splits.pop() if len(splits) == 1 else None,
    )
    return replace(job, preset=mean_name(part.file, layers), of_file=part._replace(layers=layers)), outcome


def failure(job: Job, outcome: Outcome) -> Row:
    """A job that was not timed, and why."""
    return _place(job, job.kernel, job.num_splits) | {"error": outcome.text}


def point_title(job: Job) -> str:
    """The line above a block of the table."""
    sizes = f"{job.batch} x {job.context} tokens"
    if job.what == "decode" and job.query_len > 1:
        sizes += f", the last {job.query_len} of each new"
    elif job.what == "write":
        sizes = f"{job.query_len} tokens"
    elif job.what == "prefill":
        sizes = f"{job.batch} x {job.query_len} new tokens, {job.context - job.query_len} cached before"
    return f"{job.what}, {sizes}, {job.heads[0]}/{job.heads[1]} heads x {job.head_dim}"


def point_table(rows: Sequence[Row]) -> str:
    """One block of the table."""
    return table([HEADER, *([_cell(row, name) for name in _COLUMNS] for row in rows)])


_COLUMNS = (
    "kernel",
    "preset",
    "block_size",
    "num_splits",
    "p20_us",
    "p50_us",
    "p80_us",
    "bytes",
    "gb_s",
    "pct_of_copy",
    "ratio_to_fa3_bf16",
)
_FORMATS = {
    "p20_us": "{:.1f}",
    "p50_us": "{:.1f}",
    "p80_us": "{:.1f}",
    "gb_s": "{:.0f}",
    "pct_of_copy": "{:.1f}",
    "ratio_to_fa3_bf16": "{:.2f}",
}


def _cell(row: Row, name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value / 1e6:.2f}"
    return _FORMATS.get(name, "{}").format(value)


def _place(job: Job, kernel: str, num_splits: int | None) -> Row:
    return {
        "what": job.what,
        "kernel": kernel,
        "preset": job.preset,
        "heads": f"{job.heads[0]}/{job.heads[1]}",
        "head_dim": job.head_dim,
        "batch": job.batch,
        "context": job.context,
        "query_len": job.query_len,
        "block_size": job.block_size,
        "num_splits": num_splits,
        "layers": job.of_file.layers if job.of_file else None,
    }


def _row(
    job: Job, kernel: str, outcome: Outcome, times: Times, moved: int | None, copy_gb_s: float, ratio: float | None
) -> Row:
    gb_s = moved / times.p50 / 1e3 if moved else None
    return _place(job, kernel, outcome.num_splits) | {
        "p20_us": times.p20,
        "p50_us": times.p50,
        "p80_us": times.p80,
        "bytes": moved,
        "gb_s": gb_s,
        "pct_of_copy": 100 * gb_s / copy_gb_s if gb_s else None,
        "ratio_to_fa3_bf16": ratio,
        "relative_error": outcome.error,
    }
