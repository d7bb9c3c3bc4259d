# SPDX-License-Identifier: Apache-2.0
"""Process groups: who is in one, and how to empty one. In: a process that leads its group. Used by server.py, vllm_engine.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_kvsplice.errors import KVSpliceError


def group_members(group: int) -> list[int]:
    """Process ids in a process group, zombies left out (their parent may never reap them); Linux."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        state, _, process_group = stat[stat.rindex(")") + 2 :].split()[:3]
        if int(process_group) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def stop_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a group by SIGTERM to its leader, then to all after `grace_s` seconds, then by SIGKILL.

    Raises KVSpliceError if a process outlives that.
    """
    group = process.pid  # it was started with start_new_session

    def is_empty() -> bool:
        process.poll()  # reaps the leader
        return not group_members(group)

    if process.poll() is None:
        process.terminate()
        _wait_for(lambda: process.poll() is not None, grace_s)
    _wait_for(is_empty, 1.0)
    _signal(group_members(group), signal.SIGTERM)
    _wait_for(is_empty, 3.0)
    # Python's resource tracker ends by itself after the others, and frees their shared memory only if it may.
    _signal([pid for pid in group_members(group) if not _is_resource_tracker(pid)], signal.SIGKILL)
    _wait_for(is_empty, 3.0)
    _signal(group_members(group), signal.SIGKILL)
    if not _wait_for(is_empty, 5.0):
        raise KVSpliceError(f"processes {group_members(group)} are left, SIGKILL did not end them: check them with ps")


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal(pids: Sequence[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _wait_for(done: Callable[[], bool], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
