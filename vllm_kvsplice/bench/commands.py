# SPDX-License-Identifier: Apache-2.0
"""Command lines of vLLM: the engine of a setting, and the `vllm bench` calls that measure it.

In: a request, a setting, a model folder. Out: argument lists for server.py and client.py. Nothing else knows vLLM's options.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_kvsplice.bench.request import DTYPE, ServeBenchRequest, Setting

SERVED_NAME = "bench"
PERCENTILES = "20,50,80,99"
WARMUP_PROMPTS = 2
MOST_PROMPTS = 1_000_000  # of a load; loads of different seeds share no prompt


@dataclass(frozen=True)
class Load:
    """One call of `vllm bench serve`: ``prompts`` random prompts of ``input_len``, ``users`` at a time."""

    users: int
    prompts: int
    input_len: int
    output_len: int
    seed: int
    goodput: tuple[str, ...] = ()


def engine_args(request: ServeBenchRequest, setting: Setting, projector: Path | None, tokenizer: str) -> list[str]:
    """Arguments of an engine, the same for `vllm serve`, `vllm bench latency` and `vllm bench throughput`.

    Args:
        projector: the file to serve with, None for the setting's default. tokenizer: its folder or id.
    """
    args = [
        "--tokenizer",
        tokenizer,
        "--dtype",
        DTYPE,
        "--seed",
        str(request.seed),
        "--max-model-len",
        str(_max_model_len(request)),
    ]
    args += ["--max-num-seqs", str(request.most_users)]
    args += ["--gpu-memory-utilization", str(request.gpu_memory_utilization)]
    if request.kv_cache_memory_bytes is not None:
        args += ["--kv-cache-memory-bytes", str(request.kv_cache_memory_bytes)]
    if request.max_num_batched_tokens is not None:
        args += ["--max-num-batched-tokens", str(request.max_num_batched_tokens)]
    if request.weights == "dummy":
        args += ["--load-format", "dummy"]
    args += setting.args
    if projector is not None:
        args += ["--additional-config", json.dumps({"kvsplice": {"projector": str(projector)}})]
    return args + shlex.split(request.serve_args)


def server_args(request: ServeBenchRequest, setting: Setting, projector: Path | None, tokenizer: str) -> list[str]:
    """Arguments of `vllm serve` behind the model. Tokens are streamed in chunks, so that the client keeps up."""
    chunks = ["--stream-interval", str(request.stream_interval), "--disable-uvicorn-access-log"]
    return [*engine_args(request, setting, projector, tokenizer), *chunks, "--enable-prefix-caching"] + [
        "--served-model-name",
        SERVED_NAME,
    ]


def write_trace(path: Path, load: Load) -> None:
    """The prompts of a load in the form of vLLM's timed_trace dataset: one hash id each, which seeds its random tokens."""
    first = load.seed * MOST_PROMPTS
    lines = [
        dict(timestamp=0, input_length=load.input_len, output_length=load.output_len, hash_ids=[first + i])
        for i in range(load.prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def bench_serve(url: str, tokenizer: str, load: Load, trace: Path, out: Path) -> list[str]:
    """`vllm bench serve` against a running server; its JSON goes to ``out``.

    Prompts are sent as token ids: tokenizing text would stand in the server's way for a tenth of the prefill.
    """
    args = ["bench", "serve", "--backend", "vllm", "--base-url", url, "--model", SERVED_NAME, "--tokenizer", tokenizer]
    args += ["--dataset-name", "timed_trace", "--dataset-path", str(trace), "--no-self-timed"]
    args += ["--timed-trace-chunk-hash-size", str(load.input_len), "--num-prompts", str(load.prompts)]
    args += ["--max-concurrency", str(load.users), "--seed", str(load.seed), "--ignore-eos", "--temperature", "0"]
    args += ["--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", PERCENTILES]
    args += ["--save-result", "--save-detailed", "--result-dir", str(out.parent), "--result-filename", out.name]
    return args + (["--goodput", *load.goodput] if load.goodput else [])


def bench_latency(model: str, engine: Sequence[str], batch: int, context: int, output: int, out: Path) -> list[str]:
    """`vllm bench latency`, an engine of its own: one batch from prompt to last token."""
    args = ["bench", "latency", "--model", model, "--batch-size", str(batch), "--input-len", str(context)]
    args += ["--output-len", str(output), "--num-iters-warmup", "1", "--num-iters", "3", "--disable-detokenize"]
    return [*args, "--output-json", str(out), *engine]


def bench_throughput(model: str, engine: Sequence[str], request: ServeBenchRequest, out: Path) -> list[str]:
    """`vllm bench throughput`, an engine of its own: all prompts at once, as the sweep's largest point has them."""
    prompts = request.sweep_rounds * max([int(n) for n in request.concurrency] or [request.most_users])
    args = ["bench", "throughput", "--model", model, "--dataset-name", "random", "--num-prompts", str(prompts)]
    args += ["--random-input-len", str(request.sweep_input), "--random-output-len", str(request.sweep_output)]
    return [*args, "--output-json", str(out), *engine]


def _max_model_len(request: ServeBenchRequest) -> int:
    return -(-(request.longest + 16) // 16) * 16
