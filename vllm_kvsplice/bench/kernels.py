# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench kernels`: our kernels and their peers at the same shapes, checked, then timed in one run.

In: a request. Out: a table, JSON, and the exit status. Every kernel has to be right before it is timed; one that fails is
reported and the others are measured. Method: cold L2, CUDA graph replay, percentiles (``kernels_timing``), random data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vllm_kvsplice.bench.kernels_request import KernelsRequest
from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    from vllm_kvsplice.bench.kernels_build import Outcome
    from vllm_kvsplice.bench.kernels_jobs import Job
    from vllm_kvsplice.bench.kernels_timing import Device

__all__ = ["KernelsRequest", "run"]
METHOD = (
    "Every kernel was checked before it was timed. Cold L2; decode and write: CUDA graph replay, prefill: as launched; "
    "bytes: of the cached tokens, scales counted (write, prefill: activations too); GB = 1e9 bytes; "
    "copy: the faster of torch copy_ and an elementwise kernel, read and written; "
    "x FA3 bf16: speed relative to the fastest FlashAttention-3 row over bf16."
)


def run(request: KernelsRequest) -> int:
    """Measure, print the table, write the JSON. Returns 0, or 1 if a kernel failed or was wrong.

    Raises:
        KVSpliceError: there is no NVIDIA GPU, the request is not one, or the file cannot be written.
    """
    import torch

    from vllm_kvsplice.bench.kernels_timing import Device

    request.check()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise KVSpliceError(
            "kvsplice bench kernels found no NVIDIA GPU: expected one that torch.cuda can use, see `nvidia-smi`."
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of the command alone, not of who calls run_on
    return run_on(request, Device())


def run_on(request: KernelsRequest, device: Device) -> int:
    """``run`` on a device that is there; tests give it the CPU, where kernels are interpreted."""
    from vllm_kvsplice.bench.kernels_jobs import list_jobs
    from vllm_kvsplice.bench.kernels_timing import copy_speeds
    from vllm_kvsplice.scoring import results

    jobs = list_jobs(request, device.num_sms)
    if request.json:
        results.check_writable(request.json)
    began = time.monotonic()
    known = _rehearse(request, jobs, device)
    copies = copy_speeds(device)
    print("device copy: " + ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in copies.items()), flush=True)
    result: dict[str, Any] = {
        **results.provenance(),
        "method": METHOD,
        "settings": asdict(request),
        "copy_gb_s": copies,
        "rows": [],
        "failed": [],
        "absent": [],
    }
    for _ in _measure(jobs, known, device, max(copies.values()), result):
        result["seconds"] = time.monotonic() - began
        if request.json:  # after every point, so that a run that is cut off leaves what it has measured
            results.write_json(result, request.json)
    print(_summary(result))
    return 1 if result["failed"] else 0


def _rehearse(request: KernelsRequest, jobs: Sequence[Job], device: Device) -> dict[Job, Outcome]:
    """On a GPU: what the rehearsal found failed or absent. Peers are imported here meanwhile."""
    if not device.on_gpu:
        return {}
    from vllm_kvsplice.bench import peers
    from vllm_kvsplice.bench.kernels_rehearsal import rehearse

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(rehearse, jobs, device)
        if request.peers:
            peers.preload()
        return future.result()


def _measure(
    jobs: Sequence[Job], known: dict[Job, Outcome], device: Device, copy_gb_s: float, result: dict[str, Any]
) -> Iterator[None]:
    """Point by point into ``result``: "rows" of what was timed; "failed" and "absent". Prints every block."""
    from vllm_kvsplice.bench import kernels_report

    for _, outcomes in _outcomes(jobs, known, device):
        block = kernels_report.rows_of(outcomes, copy_gb_s)
        result["rows"] += block
        print(f"\n{kernels_report.point_title(outcomes[0][0])}")
        print(kernels_report.point_table(block), flush=True)
        for job, outcome in outcomes:
            if outcome.kind != "ok":
                result[outcome.kind].append(kernels_report.failure(job, outcome))
            if outcome.kind == "failed":
                print(f"FAILED {job.kernel} {job.preset}, block size {job.block_size}: {outcome.text}", flush=True)
        yield


def _outcomes(
    jobs: Sequence[Job], known: dict[Job, Outcome], device: Device
) -> Iterator[tuple[object, list[tuple[Job, Outcome]]]]:
    """The outcomes of every point. Once a kernel has broken the GPU's context, the jobs after it can only be reported."""
    from vllm_kvsplice.bench.kernels_build import Outcome, attempt, usable

    broken: Job | None = None
    for point, group in groupby(jobs, key=lambda job: job.point):
        outcomes = []
        for job in group:
            if broken is not None:
                text = f"not run: {broken.what} {broken.kernel} {broken.preset} before it broke the CUDA context"
                outcome = known.get(job) or Outcome("failed", text)
            else:
                outcome = known.get(job) or attempt(job, device, timed=True)
                if outcome.kind == "failed" and not usable(device):
                    broken = job
            outcomes.append((job, outcome))
        yield point, outcomes


def _summary(result: dict[str, Any]) -> str:
    lines = ["", METHOD]
    absent = {f"{row['kernel']} {row['preset']}": row["error"] for row in result["absent"]}
    lines += [f"not here: {name} ({error})" for name, error in absent.items()]
    failed = len(result["failed"])
    lines.append(f"{len(result['rows'])} rows, {failed} failed, {result['seconds']:.0f} s")
    return "\n".join(lines)
