# SPDX-License-Identifier: Apache-2.0
"""Import contracts that import-linter cannot see: of the kernels, which it does not find, and of what a bare import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Top names of all modules that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import; kernels/ is no package"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", KERNELS, ids=[path.stem for path in KERNELS])
def test_kernels_import_torch_triton_and_each_other_only(path):
    foreign = imported(path) - set(sys.stdlib_module_names) - {"torch", "triton", "kvsplice_kernels"}
    assert not foreign


def test_there_are_kernels():
    assert {"cache_write", "decode", "reduce_expand"} <= {path.stem for path in KERNELS}


@pytest.mark.parametrize(
    "module, forbidden",
    [
        # vLLM imports the package in every process of every user, to find register().
        ("vllm_kvsplice", "torch triton vllm transformers"),
        ("vllm_kvsplice.cli", "torch triton vllm transformers rich"),
        ("vllm_kvsplice.codec.layout", "torch triton vllm transformers"),
        ("vllm_kvsplice.codec.reference", "triton vllm transformers kvsplice_kernels"),
        ("vllm_kvsplice.codec.projector", "triton vllm transformers kvsplice_kernels"),
        ("vllm_kvsplice.calibration.calibrate", "vllm kvsplice_kernels"),  # transformers loads triton by itself, late
        ("vllm_kvsplice.scoring.evaluate", "triton vllm kvsplice_kernels"),
        ("vllm_kvsplice.lab.compare", "vllm kvsplice_kernels matplotlib"),
        ("vllm_kvsplice.demo.server", "torch triton vllm transformers"),
    ],
)
def test_importing_a_module_does_not_load(module, forbidden):
    """torch and transformers may load triton themselves; what counts is what the module adds to those it may import."""
    allowed = [name for name in ("torch", "transformers") if name not in forbidden.split()]
    script = f"""
import importlib, sys
for name in {allowed!r}:
    importlib.import_module(name)
before = set(sys.modules)
importlib.import_module({module!r})
print(*(set({forbidden.split()!r}) & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
