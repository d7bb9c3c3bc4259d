# SPDX-License-Identifier: Apache-2.0
"""Every job once, small, in processes of their own beside each other: they compile what the timed run will find compiled.

In: jobs. Out: those that failed, with the reason. A kernel that takes its process down, or hangs, is found here and is
not run in the process that measures.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from vllm_kvsplice.bench.kernels_build import Outcome, attempt, usable
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_timing import Device

SECONDS = 100.0
LATE = "its rehearsal did not end in time"


def rehearse(jobs: Sequence[Job], device: Device, seconds: float = SECONDS) -> dict[Job, Outcome]:
    """Attempt all jobs, those that share compiled kernels in one process; returns what is not "ok".

    Jobs that no process came to in ``seconds`` are not in the result: they will compile when they are timed.
    """
    groups: dict[object, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.group].append(job)
    deadline = time.monotonic() + seconds
    found: dict[Job, Outcome] = {}
    with ThreadPoolExecutor(max(1, min(len(groups), os.cpu_count() or 1))) as pool:
        for outcomes in pool.map(lambda group: _rehearse_group(group, device, deadline), groups.values()):
            found |= outcomes
    return {job: outcome for job, outcome in found.items() if outcome.kind != "ok"}


def _rehearse_group(jobs: list[Job], device: Device, deadline: float) -> dict[Job, Outcome]:
    """One process after another until every job has an outcome: a job that ends its process is failed, the rest go on."""
    found: dict[Job, Outcome] = {}
    left = list(jobs)
    while left and time.monotonic() < deadline:
        outcomes, broken = _run_process(left, device, deadline)
        found |= outcomes
        if broken is not None:
            found[broken] = Outcome(
                "failed", LATE if time.monotonic() >= deadline else "its rehearsal ended the process"
            )
        left = [job for job in left if job not in found]
        if not outcomes and broken is None:
            break  # no process could be started
    return found


def _run_process(jobs: list[Job], device: Device, deadline: float) -> tuple[dict[Job, Outcome], Job | None]:
    """(outcomes, the job that was running when the process ended or the time was up)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(jobs, device, there), daemon=True)
    process.start()
    there.close()
    found: dict[Job, Outcome] = {}
    running: Job | None = None
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            job, outcome = here.recv()
            running = job if outcome is None else None
            if outcome is not None:
                found[job] = outcome
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
        here.close()
    return found, running


def _work(jobs: list[Job], device: Device, pipe: Connection) -> None:
    for job in jobs:
        pipe.send((job, None))
        outcome = attempt(job, device, timed=False)
        pipe.send((job, outcome))
        if outcome.kind == "failed" and not usable(device):
            return  # a kernel broke the CUDA context; the jobs after it get another process
