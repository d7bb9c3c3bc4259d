# SPDX-License-Identifier: Apache-2.0
"""One setting measured: one server, many `vllm bench serve` calls against it.

In: a request, a setting, a model folder. Out: the setting's record, filled while it is measured. Next: serve.py.
A point is two kinds of calls with the same prompts: the first prefills them and decodes one token; the others find them in
the prefix cache, so that all requests decode together from the start and nothing but decoding is timed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_kvsplice.bench import analysis
from vllm_kvsplice.bench.client import Client
from vllm_kvsplice.bench.commands import WARMUP_PROMPTS, Load, bench_serve, server_args, write_trace
from vllm_kvsplice.bench.gpu_watch import GpuWatch
from vllm_kvsplice.bench.request import FIT, MOST_FITTING, ServeBenchRequest, Setting
from vllm_kvsplice.demo.server import Server
from vllm_kvsplice.errors import KVSpliceError

READY_TIMEOUT_S = 1200.0  # a first torch.compile included
CALL_TIMEOUT_S = 3600.0
SEEDS = 100_000  # of a request; data of equal seed are equal in every setting

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """What is served: a folder or id, where its tokenizer is, and whether only local files may be used."""

    path: str
    tokenizer: str
    offline: bool


@dataclass
class Bench:
    """A server that runs, the client beside it, and the calls made so far."""

    request: ServeBenchRequest
    server: Server
    client: Client
    model: Model
    work: Path
    watch: GpuWatch
    calls: int = 0


def new_record(setting: Setting) -> dict[str, Any]:
    """The record of a setting before anything is known."""
    return {
        "name": setting.name,
        "server_args": [],
        "codec": None,
        "start_s": None,
        "capacity": None,
        "memory": None,
        "attention": [],
        "points": [],
        "sweep": [],
        "also": {},
        "error": None,
    }


def measure(
    request: ServeBenchRequest,
    setting: Setting,
    projector: Path | None,
    model: Model,
    client: Client,
    work: Path,
    record: dict[str, Any],
    progress: Progress,
) -> None:
    """Start the setting's server, measure all points and the sweep into ``record``; raises KVSpliceError on a failure."""
    args = server_args(request, setting, projector, model.tokenizer)
    record["server_args"] = args
    started = time.monotonic()
    env = {"HF_HUB_OFFLINE": "1"} if model.offline else {}
    server = Server(model.path, args, log=work / "server.log", env=env, ready_timeout_s=READY_TIMEOUT_S)
    with server:
        record["start_s"] = time.monotonic() - started
        record["capacity"] = asdict(server.capacity())
        record["attention"] = attention_lines(server.log.read_text(errors="replace"))
        progress(f"up after {record['start_s']:.0f} s, room for {record['capacity']['tokens']:,} tokens")
        with GpuWatch() as watch:
            _measure_loads(Bench(request, server, client, model, work, watch), record, progress)
        record["memory"] = watch.memory()


def _measure_loads(bench: Bench, record: dict[str, Any], progress: Progress) -> None:
    """All points and the sweep of a server that is up."""
    request = bench.request
    _warm_up(bench)
    for number, (batch, context) in enumerate(request.points):
        record["points"].append(_point(bench, number, batch, context, record["capacity"]["tokens"]))
        progress(_point_line(record["points"][-1]))
    for number, asked in enumerate(request.concurrency):
        users = fitting(request, record["capacity"]["tokens"]) if asked == FIT else int(asked)
        record["sweep"].append(_sweep(bench, number, users))
        progress(f"{users} users: {record['sweep'][-1]['fresh']['vllm']['output_throughput']:.0f} output tokens/s")


def fitting(request: ServeBenchRequest, capacity: int) -> int:
    """Users whose whole requests a cache of ``capacity`` tokens holds; raises KVSpliceError if there is none."""
    needed = request.sweep_input + request.sweep_output
    if capacity < needed:
        raise KVSpliceError(
            f"--concurrency fit: one request of {needed:,} tokens does not fit a cache of {capacity:,}; give shorter --sweep-input and --sweep-output."
        )
    return min(capacity // needed, MOST_FITTING)


def attention_lines(log: str) -> list[str]:
    """What the server says about its attention backend, without the log's prefixes."""
    found = re.findall(r"\] (Using [^\n]*?backend[^\n]*)", log)
    return list(dict.fromkeys(found))


def prefix_counts(metrics: str) -> tuple[float, float]:
    """Tokens that the prefix cache was asked for and tokens that it had, since the server started."""

    def total(name: str) -> float:
        return sum(float(v) for v in re.findall(rf"^vllm:{name}_total(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE))

    return total("prefix_cache_queries"), total("prefix_cache_hits")


def _warm_up(bench: Bench) -> None:
    """Every length once, so that no kernel is compiled in a measured call."""
    request = bench.request
    lengths = {context for _, context in request.points} | ({request.sweep_input} if request.concurrency else set())
    prompts = min(WARMUP_PROMPTS, request.most_users)
    for number, length in enumerate(sorted(lengths)):
        _call(bench, Load(prompts, prompts, length, 1 + 2 * request.stream_interval, _seed(request, 0, number)))


def _point(bench: Bench, number: int, batch: int, context: int, capacity: int) -> dict[str, Any]:
    """Prefill and decoding of ``batch`` prompts of ``context`` tokens."""
    request = bench.request
    point: dict[str, Any] = dict(batch=batch, context=context, output=request.point_output, skipped=None)
    point |= dict(tpot_ms=None, ttft_ms=None, prefill_s=None, prefill_tok_s=None, prefill=None, decode=[])
    needed = batch * (context + request.point_output)
    if needed > capacity:
        return point | {"skipped": f"{needed:,} tokens do not fit a cache of {capacity:,}"}
    seed = _seed(request, 1, number)
    prefill = _call(bench, Load(batch, batch, context, 1, seed))
    decode = [_call(bench, Load(batch, batch, context, request.point_output, seed)) for _ in range(request.repeats)]
    steady = [d["steady_tpot_ms"] for d in decode if d["steady_tpot_ms"] is not None]
    vllm = prefill["vllm"]
    return point | {
        "tpot_ms": median(steady) if steady else None,
        "ttft_ms": vllm["median_ttft_ms"],
        "prefill_s": vllm["duration"],
        "prefill_tok_s": vllm["total_input_tokens"] / vllm["duration"],
        "prefill": prefill,
        "decode": decode,
    }


def _sweep(bench: Bench, number: int, users: int) -> dict[str, Any]:
    """So many users in a closed loop; on request every prompt a second time, as users that return would send them."""
    request = bench.request
    load = Load(
        users,
        users * request.sweep_rounds,
        request.sweep_input,
        request.sweep_output,
        _seed(request, 2, number),
        request.goodput,
    )
    fresh = _call(bench, load)
    return {"users": users, "fresh": fresh, "returning": _call(bench, load) if request.sweep_returning else None}


def _call(bench: Bench, load: Load) -> dict[str, Any]:
    """One `vllm bench serve`, the share of its prompt tokens that the prefix cache had, and the GPU's clock meanwhile."""
    bench.calls += 1
    trace, out = bench.work / f"call{bench.calls}.trace.jsonl", bench.work / f"call{bench.calls}.json"
    write_trace(trace, load)
    queries, hits = prefix_counts(bench.server.metrics())
    started = time.monotonic()
    bench.client.run(bench_serve(bench.server.url, bench.model.tokenizer, load, trace, out), CALL_TIMEOUT_S)
    asked, had = prefix_counts(bench.server.metrics())
    record = analysis.summarise(json.loads(out.read_text()), bench.request.stream_interval)
    share = (had - hits) / (asked - queries) if asked > queries else None
    return {"load": asdict(load), "prefix_hit_share": share, "gpu": bench.watch.since(started)} | record


def _seed(request: ServeBenchRequest, kind: int, number: int) -> int:
    return request.seed * SEEDS + kind * 1000 + number


def _point_line(point: dict[str, Any]) -> str:
    name = analysis.point_name(point)
    if point["skipped"]:
        return f"{name}: skipped, {point['skipped']}"
    tpot = f"{point['tpot_ms']:.2f} ms" if point["tpot_ms"] is not None else "unknown"
    return f"{name}: prefill {point['prefill_tok_s']:,.0f} tokens/s, time per output token {tpot}"
