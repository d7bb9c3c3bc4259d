# SPDX-License-Identifier: Apache-2.0
"""One environment, one seed and two markers for every test."""

from __future__ import annotations

import os
import random
import signal

# Before triton, vLLM or transformers are imported: all three read their settings then.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the kv_cache_memory_bytes that the tests set

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core: threads of one would wait for the other's

import hypothesis
import numpy as np
import pytest
import torch

# A shell that starts pytest in the background ignores SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read by @triton.jit when a kernel's module is imported

hypothesis.settings.register_profile("kvsplice", deadline=None, derandomize=True)
hypothesis.settings.load_profile("kvsplice")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _engines_run_no_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes inherit the environment; there the interpreter would stand in for every kernel of vLLM's own."""
    if request.node.get_closest_marker("engine"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
