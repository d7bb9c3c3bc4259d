# SPDX-License-Identifier: Apache-2.0
"""vLLM's command line kept warm: one process that runs one `vllm ...` after another, as each would run by itself.

Importing vLLM costs ten seconds, and a benchmark is dozens of calls. In: argument lists, one JSON line each, on the child's
stdin. Out: one JSON line with the exit status on its stdout; all that vLLM prints goes to the log. Used by measure.py.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from vllm_kvsplice.demo.server import socket_folder, vllm_environment
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.processes import stop_group
from vllm_kvsplice.scoring.signals import deferred_signals

VLLM = "vllm.entrypoints.cli.main"
STOP_GRACE_S = 2.0
LOG_LINES = 25
WARM_UP = ("bench", "serve", "--help")  # imports all that a benchmark needs


class Client:
    """`with Client(log) as client: client.run(["bench", "serve", ...], 600)`; the import overlaps with what comes first."""

    def __init__(self, log: Path, offline: bool = False) -> None:
        self.log = log
        self._offline = offline
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._warm = False

    def __enter__(self) -> Client:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, args: Sequence[str], timeout_s: float) -> None:
        """Run `vllm ARGS`; raises KVSpliceError if it fails or takes longer than ``timeout_s`` seconds.

        A process that died or hangs is replaced by a new one at the next call.
        """
        if self._process is None:
            self._start()
        if not self._warm:
            self._receive(timeout_s, WARM_UP)
            self._warm = True
        self._send(args)
        self._receive(timeout_s, args)

    def _start(self) -> None:
        with deferred_signals():
            self._scratch = tempfile.TemporaryDirectory(prefix="kvsplice-client-", dir=socket_folder())
            env = vllm_environment(Path(self._scratch.name)) | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
            env["PYTHONHASHSEED"] = "0"  # vLLM's timed_trace dataset seeds its tokens by hash()
            if self._offline:
                env["HF_HUB_OFFLINE"] = "1"
            command = [sys.executable, "-P", "-m", "vllm_kvsplice.bench.client"]
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=env,
                    bufsize=0,
                    start_new_session=True,
                )
        self._warm = False
        self._send(WARM_UP)

    def _stop(self) -> None:
        with deferred_signals():
            process, self._process = self._process, None
            if process is not None:
                stop_group(process, STOP_GRACE_S)
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def _send(self, args: Sequence[str]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(list(args)).encode() + b"\n")
        except BrokenPipeError:
            self._stop()
            raise self._failure(args, "has no process to run in") from None

    def _receive(self, timeout_s: float, args: Sequence[str]) -> None:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._stop()
            late = f"was not done after {timeout_s:.0f} s"
            raise self._failure(args, "ended with the death of its process" if ready else late)
        status = json.loads(line)["status"]
        if status != 0:
            raise self._failure(args, f"ended with {status}")

    def _failure(self, args: Sequence[str], what: str) -> KVSpliceError:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        return KVSpliceError(f"`vllm {' '.join(args[:2])}` {what}; log {self.log} ends:\n{tail}")


def main() -> None:
    """The child: runs each line of stdin."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for the log
    for line in sys.stdin:
        status = _run(json.loads(line))
        replies.write(json.dumps({"status": status}) + "\n")
        replies.flush()


def _run(args: list[str]) -> int:
    """One `vllm ARGS` in this process; returns its exit status."""
    sys.argv = ["vllm", *args]
    try:
        runpy.run_module(VLLM, run_name="__main__")
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return done.code or 0
        sys.stderr.write(f"{done.code}\n")
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
