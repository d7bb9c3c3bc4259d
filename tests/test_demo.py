# SPDX-License-Identifier: Apache-2.0
"""`kvsplice demo`: its checks, its texts, its clean-up, and once the whole of it with two real servers."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from vllm_kvsplice.demo import run as demo
from vllm_kvsplice.demo.report import checks, print_report
from vllm_kvsplice.errors import KVSpliceError

MARK = "KVSPLICE_TEST_MARK"
RESULT = {
    "model": "bundled",
    "preset": "near_lossless",
    "needle": {"question": "?", "answer": "91417"},
    "scores": {
        "ppl": {"baseline": 30.1, "kvsplice": 30.2, "delta_pct": 0.33},
        "kld": 0.003,
        "top1": 0.97,
        "needle": {"baseline": 1.0, "kvsplice": 1.0},
        "bytes_per_token_head": 92.0,
        "ratio": {"k": 2.7, "v": 2.7, "kv": 2.78},
        "windows": 4,
        "seq_len": 2048,
    },
    "stock": {"capacity": {"tokens": 32768}, "needle_answer": "91417", "tokens_per_s": 100.0},
    "kvsplice": {"capacity": {"tokens": 91136}, "needle_answer": "91417", "tokens_per_s": 50.0},
    "capacity_ratio": 2.78,
    "seconds": 100.0,
    "provenance": {"hardware": {"cpu": "x", "cores": 2, "gpus": []}},
}


def changed(path: str, value: object) -> dict:
    """RESULT with one value replaced."""
    result = copy.deepcopy(RESULT)
    *parents, last = path.split(".")
    inner = result
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return result


def failures(result: dict) -> list[str]:
    return [check["name"] for check in checks(result) if not check["ok"]]


def processes_with(mark: str) -> list[int]:
    """Ids of live processes whose environment holds the mark; children inherit it, whatever group they are in."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_all_checks_pass_on_a_good_result():
    assert failures(RESULT) == []


@pytest.mark.parametrize(
    "path, value, name",
    [
        ("capacity_ratio", 2.6, "more tokens fit"),  # less than the codec's ratio: the page did not shrink
        ("capacity_ratio", 1.0, "more tokens fit"),
        ("stock.needle_answer", "1", "stock vLLM finds the needle"),
        ("kvsplice.needle_answer", "91418", "kvsplice finds the needle"),
        ("scores.needle", {"baseline": 1.0, "kvsplice": 0.9}, "retrieval is kept"),
        ("scores.ppl.delta_pct", -2.0, "perplexity is kept"),  # a gain is as suspect as a loss
        ("scores.kld", float("nan"), "distribution is kept"),
    ],
)
def test_each_check_can_fail(path, value, name):
    assert failures(changed(path, value)) == [name]


def test_another_model_is_held_to_what_stock_answers():
    result = changed("model", "/some/model")
    result["stock"]["needle_answer"] = result["kvsplice"]["needle_answer"] = "I do not know"
    assert failures(result) == []
    result["kvsplice"]["needle_answer"] = "91417"
    assert failures(result) == ["kvsplice finds the needle"]


@pytest.mark.parametrize("kld, failed", [(0.003, False), (0.5, True)])
def test_report_shows_both_and_tells_a_failure(kld, failed):
    result = changed("scores.kld", kld)
    out = io.StringIO()
    assert print_report(result | {"checks": checks(result)}, Console(file=out, width=80)) is failed
    text = out.getvalue()
    assert all(word in text for word in ("32,768", "91,136", "2.78x", "91417", "slower"))
    assert ("FAILED" in text) is failed


def test_calibration_and_scoring_share_no_paragraph():
    calibration, scoring = (text.split("\n\n") for text in demo.split_topics())
    assert not set(calibration) & set(scoring) - {"", "\n"}
    assert len(calibration) > len(scoring) > 100


@pytest.mark.parametrize(
    "request_, message",
    [
        (demo.DemoRequest(json="/nowhere/at/all.json"), "folder does not exist"),
        (demo.DemoRequest(port=99999), "cannot be used"),
    ],
    ids=["json", "port"],
)
def test_bad_requests_are_refused_before_the_work(request_, message):
    with pytest.raises(KVSpliceError, match=message):
        demo.run(request_, Console(file=io.StringIO()))


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_an_interrupt_while_a_server_starts_leaves_nothing(tmp_path, signum, status):
    """The first two steps are replaced by nothing, and vLLM by a process that never becomes healthy."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nsleep 600 & sleep 600\n")
    fake.chmod(0o755)
    script = f"""
        import sys
        from vllm_kvsplice.demo import run as demo
        from vllm_kvsplice import cli
        demo._calibrate = lambda model, work, console: work / "none"
        demo._score = lambda *arguments: {{}}
        sys.executable = {str(fake)!r}
        sys.exit(cli.main(["demo"]))
    """
    env = os.environ | {"TMPDIR": str(tmp_path), MARK: str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as user:
        deadline = time.monotonic() + 120
        while len(processes_with(str(tmp_path))) < 4 and time.monotonic() < deadline:  # itself, sh, two sleeps
            time.sleep(0.1)
        assert list(tmp_path.glob("kvsplice-demo-*"))
        user.send_signal(signum)
        output, _ = user.communicate(timeout=60)
    assert user.returncode == status, output.decode()
    assert processes_with(str(tmp_path)) == []
    assert list(tmp_path.glob("kvsplice-*")) == []


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_whole_demo(tmp_path):
    """In a folder without the checkout, offline, as a user would."""
    out = tmp_path / "demo.json"
    env = os.environ | {"TMPDIR": str(tmp_path), MARK: str(tmp_path)}
    command = [sys.executable, "-P", "-m", "vllm_kvsplice.cli", "demo", "--json", str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["stock"]["capacity"]["tokens"] == 32768  # 64 MiB at 4 layers x 2 KV heads x 256 bytes
    assert result["capacity_ratio"] > 2.7  # near_lossless at head_dim 64: 84 bytes for 256
    assert result["stock"]["needle_answer"] == result["kvsplice"]["needle_answer"] == result["needle"]["answer"]
    assert len(result["kvsplice"]["streamed"]) > 100
    assert result["kvsplice"]["tokens_per_s"] > 0
    assert result["scores"]["needle"]["kvsplice"] == 1.0
    assert processes_with(str(tmp_path)) == []
    assert list(tmp_path.glob("kvsplice-*")) == []
