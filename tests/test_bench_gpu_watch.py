# SPDX-License-Identifier: Apache-2.0
"""Memory, clock and power of a GPU, from a stand-in for `nvidia-smi` that says what it was asked."""

from __future__ import annotations

import sys
import time

import pytest

from vllm_kvsplice.bench import gpu_watch
from vllm_kvsplice.bench.report import report

REST = "95, 1980, 500.5"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function that installs an `nvidia-smi` whose calls print these lines, the last one again and again."""

    def install(*lines: str):
        answers, asked = tmp_path / "answers", tmp_path / "asked"
        answers.write_text("\n".join(lines))
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            f"answers, asked = pathlib.Path({str(answers)!r}), pathlib.Path({str(asked)!r})\n"
            "asked.write_text(' '.join(sys.argv[1:]))\n"
            "first, *rest = answers.read_text().split('\\n')\n"
            "answers.write_text('\\n'.join(rest or [first]))\n"
            "sys.exit(3) if first == 'fail' else print(first)\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return asked

    return install


def watched(monkeypatch, count):
    """A watch that has taken at least so many samples."""
    monkeypatch.setattr(gpu_watch, "INTERVAL_S", 0.01)
    with gpu_watch.GpuWatch() as watch:
        until = time.monotonic() + 30
        while len(watch.samples) < count and time.monotonic() < until:
            time.sleep(0.01)
    return watch


def test_the_peak_is_the_greatest_of_the_samples(smi, monkeypatch):
    smi(*(f"{used}, 1000, {REST}" for used in (100, 700, 300)))
    assert watched(monkeypatch, 4).memory() == {"peak_bytes": 700 << 20, "total_bytes": 1000 << 20}


def test_clocks_are_of_busy_samples_since_the_call_began(smi, monkeypatch):
    smi("1, 2, 100, 1980, 400", "1, 2, 20, 345, 90", "1, 2, 90, 1500, 690", "1, 2, 0, 345, 80")
    watch = watched(monkeypatch, 4)
    first, last = watch.samples[0].at, watch.samples[-1].at
    assert watch.since(first) == {"samples": 2, "sm_mhz": 1740, "least_sm_mhz": 1500, "watts": 545}
    assert watch.since(watch.samples[1].at) == {"samples": 1, "sm_mhz": 1500, "least_sm_mhz": 1500, "watts": 690}
    assert watch.since(last) is None


@pytest.mark.parametrize(("visible", "expected"), [(None, "0"), ("3,1", "3"), ("GPU-5f", "GPU-5f"), ("", "0")])
def test_the_first_visible_gpu_is_asked(smi, monkeypatch, visible, expected):
    asked = smi(f"1, 2, {REST}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_watch.sample()[1:] == (1 << 20, 2 << 20, 95, 1980, 500.5)
    assert f"--id={expected} " in asked.read_text()


@pytest.mark.parametrize("line", ["fail", f"[N/A], 2, {REST}", "1, 2", "no devices"])
def test_what_cannot_be_read_is_unknown(smi, line):
    smi(line)
    assert gpu_watch.sample() is None
    with gpu_watch.GpuWatch() as watch:
        pass
    assert watch.memory() == {"peak_bytes": None, "total_bytes": None} and watch.since(0) is None


def test_without_the_program_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_watch.sample() is None


def test_the_table_shows_the_share_of_the_gpu():
    record = dict(name="bf16", codec=None, start_s=None, capacity=None, points=[], sweep=[], also={}, error=None)
    conditions = dict(dtype="bfloat16", kv_cache_memory_bytes=None, gpu_memory_utilization=0.9)
    provenance = dict(hardware=dict(gpus=["a GPU"]), date="today")
    result = dict(model=dict(name="m", weights="dummy"), conditions=conditions, provenance=[provenance])
    measured = record | dict(memory=dict(peak_bytes=903, total_bytes=1000))
    assert "90.3%" in report(result | dict(settings=[measured]))
    assert "%" not in report(result | dict(settings=[record]))
