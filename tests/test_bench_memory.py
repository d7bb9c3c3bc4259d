# SPDX-License-Identifier: Apache-2.0
"""The peak of a GPU's memory, from a stand-in for `nvidia-smi` that says what it was asked."""

from __future__ import annotations

import sys
import time

import pytest

from vllm_kvsplice.bench import memory
from vllm_kvsplice.bench.report import report


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


def test_the_peak_is_the_greatest_of_the_samples(smi, monkeypatch):
    smi("100, 1000", "700, 1000", "300, 1000")
    monkeypatch.setattr(memory, "INTERVAL_S", 0.01)
    with memory.PeakMemory() as peak:
        until = time.monotonic() + 30
        while peak.peak_bytes != 700 << 20 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)
    assert (peak.peak_bytes, peak.total_bytes) == (700 << 20, 1000 << 20)


@pytest.mark.parametrize(("visible", "expected"), [(None, "0"), ("3,1", "3"), ("GPU-5f", "GPU-5f"), ("", "0")])
def test_the_first_visible_gpu_is_asked(smi, monkeypatch, visible, expected):
    asked = smi("1, 2")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert memory.used_and_total() == (1 << 20, 2 << 20)
    assert f"--id={expected} " in asked.read_text()


@pytest.mark.parametrize("line", ["fail", "[N/A], 2", "no devices"])
def test_what_cannot_be_read_is_unknown(smi, line):
    smi(line)
    assert memory.used_and_total() is None
    with memory.PeakMemory() as peak:
        pass
    assert peak.peak_bytes is None


def test_without_the_program_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory.used_and_total() is None


def test_the_table_shows_the_share_of_the_gpu():
    record = dict(name="bf16", codec=None, start_s=None, capacity=None, points=[], sweep=[], also={}, error=None)
    conditions = dict(dtype="bfloat16", kv_cache_memory_bytes=None, gpu_memory_utilization=0.9)
    provenance = dict(hardware=dict(gpus=["a GPU"]), date="today")
    result = dict(model=dict(name="m", weights="dummy"), conditions=conditions, provenance=[provenance])
    measured = record | dict(memory=dict(peak_bytes=903, total_bytes=1000))
    assert "90.3%" in report(result | dict(settings=[measured]))
    assert "%" not in report(result | dict(settings=[record]))
