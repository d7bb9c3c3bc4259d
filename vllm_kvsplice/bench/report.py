# SPDX-License-Identifier: Apache-2.0
"""What `kvsplice bench serve` prints. In: a result as serve.py writes it. Out: text. Every ratio is to the first setting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vllm_kvsplice.bench import analysis
from vllm_kvsplice.scoring.results import table

Cell = Callable[[dict[str, Any]], float | None]


def report(result: dict[str, Any]) -> str:
    """All tables of a result, the conditions above them."""
    settings = result["settings"]
    parts = [_head(result), _overview(result)]
    if any(s["points"] for s in settings):
        parts += [
            _by_point("time per output token, ms (all requests decoding)", settings, "tpot_ms", ".2f"),
            _by_point("prefill, tokens/s", settings, "prefill_tok_s", ",.0f"),
            _by_point("time to first token, median of the batch at once, ms", settings, "ttft_ms", ",.0f"),
            _lines(result),
        ]
    if any(s["sweep"] for s in settings):
        parts += _sweep(settings, result["conditions"])
    parts += _also(settings)
    parts += [f"{s['name']} FAILED: {s['error']}" for s in result["settings"] if s["error"] is not None]
    return "\n\n".join(part for part in parts if part)


def _head(result: dict[str, Any]) -> str:
    c, provenance = result["conditions"], result["provenance"][0]
    hardware = provenance["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    memory = (
        f"{c['kv_cache_memory_bytes']:,} bytes of cache"
        if c["kv_cache_memory_bytes"]
        else f"gpu_memory_utilization {c['gpu_memory_utilization']}"
    )
    return f"{result['model']['name']}, {result['model']['weights']} weights, {c['dtype']}, random prompts, {memory}; {where}; {provenance['date']}"


def _overview(result: dict[str, Any]) -> str:
    rows = [["setting", "tokens that fit", "", "bytes/token/head", "start s", "peak of GPU memory"]]
    base = result["settings"][0]
    for s in result["settings"]:
        size = f"{s['codec']['bytes_per_token_head']:.0f}" if s["codec"] else ""
        start = f"{s['start_s']:.0f}" if s["start_s"] is not None else "-"
        fit, of_base = analysis.tokens(s), analysis.tokens(base)
        rows.append([s["name"], *_cell(fit, of_base, ",.0f", s is base), size, start, _peak(s)])
    return table(rows)


def _peak(setting: dict[str, Any]) -> str:
    """Share of the GPU's memory in use at most; of a result from before it was measured, nothing."""
    memory = setting.get("memory")
    return f"{memory['peak_bytes'] / memory['total_bytes']:.1%}" if memory and memory["peak_bytes"] else ""


def _by_point(title: str, settings: list[dict[str, Any]], key: str, form: str) -> str:
    names = list(dict.fromkeys(analysis.point_name(p) for s in settings for p in s["points"]))
    found = {(s["name"], analysis.point_name(p)): p[key] for s in settings for p in s["points"]}
    return _matrix(title, "batch x context", names, settings, lambda s, name: found.get((s["name"], name)), form)


def _sweep(settings: list[dict[str, Any]], conditions: dict[str, Any]) -> list[str]:
    users = sorted({p["users"] for s in settings for p in s["sweep"]})
    found = {(s["name"], p["users"]): p for s in settings for p in s["sweep"]}

    def of(kind: str, value: Cell) -> Callable[[dict[str, Any], int], float | None]:
        def get(setting: dict[str, Any], count: int) -> float | None:
            record = found.get((setting["name"], count), {}).get(kind)
            return value(record) if record else None

        return get

    lengths = f"{conditions['sweep_input']} tokens in, {conditions['sweep_output']} out"
    limits = " ".join(conditions["goodput"])
    rows = [
        (f"output tokens/s, {lengths}", of("fresh", _throughput)),
        (f"the same within {limits} ms", of("fresh", analysis.good_tok_s)),
        ("the same, every prompt sent a second time", of("returning", _throughput)),
    ]
    texts = [_matrix(title, "users", users, settings, get, ",.0f") for title, get in rows]
    return texts if any(p["returning"] for s in settings for p in s["sweep"]) else texts[:2]


def _throughput(record: dict[str, Any]) -> float:
    return float(record["vllm"]["output_throughput"])


def _lines(result: dict[str, Any]) -> str:
    """Slopes, intercepts and break-even of each batch size with two contexts or more."""
    rows = [["time per output token against context", "intercept ms", "us per 1,000 tokens", "break-even, tokens"]]
    for name, of in result["summary"]["settings"].items():
        for batch, line in of["lines"].items():
            if line is None:
                continue
            even = "" if name == result["summary"]["baseline"] else break_even_text(line["break_even_tokens"])
            slope = f"{line['slope_us_per_1k']:.2f}"
            rows.append([f"{name}, batch {batch}", f"{line['intercept_ms']:.3f}", slope, even])
    return table(rows) if len(rows) > 1 else ""


def break_even_text(context: float | None) -> str:
    """The context from which a setting is faster than the first, in words; null in a file is infinity."""
    if context is None or math.isinf(context):
        return "none"
    return "any context" if context == 0 else f"{context:,.0f}"


def _also(settings: list[dict[str, Any]]) -> list[str]:
    latency = [
        f"  {s['name']} {name}: {run['avg_latency']:.3f} s"
        for s in settings
        for name, run in s["also"].get("latency", {}).items()
    ]
    throughput = [
        f"  {s['name']}: {s['also']['throughput']['tokens_per_second']:,.0f} tokens/s in and out"
        for s in settings
        if "throughput" in s["also"]
    ]
    parts = [("vllm bench latency, one batch from prompt to last token:", latency)]
    parts += [("vllm bench throughput, all prompts at once:", throughput)]
    return ["\n".join([title, *lines]) for title, lines in parts if lines]


def _matrix(
    title: str,
    corner: str,
    keys: list[Any],
    settings: list[dict[str, Any]],
    get: Callable[..., float | None],
    form: str,
) -> str:
    """A table of keys by settings, each value with its ratio to the first setting's."""
    head = [corner]
    for i, s in enumerate(settings):
        head += [s["name"]] if i == 0 else [s["name"], ""]
    rows = [head]
    for key in keys:
        base = get(settings[0], key)
        row = [str(key)]
        for i, s in enumerate(settings):
            cells = _cell(get(s, key), base, form, i == 0)
            row += cells[:1] if i == 0 else cells
        rows.append(row)
    return f"{title}\n{table(rows)}"


def _cell(value: float | None, base: float | None, form: str, is_base: bool) -> list[str]:
    of_base = analysis.ratio(value, base)
    shown = "-" if value is None else format(value, form)
    return [shown, "" if is_base or of_base is None else f"{of_base:.3f}x"]
