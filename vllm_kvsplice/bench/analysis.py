# SPDX-License-Identifier: Apache-2.0
"""Numbers from what vLLM measured: steady decode time, lines of time against context, break-even, results side by side.

In: the JSON of `vllm bench serve --save-detailed`, records of measure.py. Out: plain dicts and floats for the result,
report.py and plots.py. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from vllm_kvsplice.errors import KVSpliceError

# What a pass keeps of vLLM's JSON: everything but one number per chunk and the texts.
_LISTS = (
    "input_lens",
    "output_lens",
    "start_times",
    "ttfts",
    "itls",
    "latencies",
    "queue_times",
    "generated_texts",
    "errors",
)
MERGED = 1.5  # times the usual gap between chunks: two merged ones are 2 apart
ASIDE = ("settings", "provenance", "summary")


class Line(NamedTuple):
    """Time per output token = intercept + slope * context: ms, and microseconds per 1,000 tokens of each request."""

    intercept_ms: float
    slope_us_per_1k: float


def steady_tpot_ms(raw: dict[str, Any], chunk: int) -> list[float]:
    """Milliseconds per token of each request while all requests decode: from the last first token to the first end.

    Args:
        raw: vLLM's detailed JSON; ``chunk``: tokens per streamed chunk after the first token, which comes alone.
    Returns:
        One number per request that has two chunks in that window. A request some of whose chunks were merged on the way (a
        client busy with sending prompts) is left out, unless its chunks in the window are evenly spaced: none is merged then.
    """
    begins = [start + ttft for start, ttft in zip(raw["start_times"], raw["ttfts"], strict=True)]
    ends = [start + latency for start, latency in zip(raw["start_times"], raw["latencies"], strict=True)]
    first, last = max(begins), min(ends) + 1e-9
    found = []
    for begin, itls, tokens in zip(begins, raw["itls"], raw["output_lens"], strict=True):
        inside = [t for t in accumulate(itls, initial=begin) if first - 1e-9 <= t <= last]
        gaps = [b - a for a, b in pairwise(inside)]
        if gaps and (chunk * len(itls) == tokens - 1 or max(gaps) < MERGED * median(gaps)):
            found.append(1e3 * fmean(gaps) / chunk)
    return found


def summarise(raw: dict[str, Any], chunk: int) -> dict[str, Any]:
    """The record of one `vllm bench serve`: its scalars as they are, per-request times, steady decode time.

    Raises:
        KVSpliceError: requests failed, or answers were shorter than asked, so that the times mean nothing.
    """
    if raw["failed"] or raw["completed"] != raw["num_prompts"]:
        reason = next((line for error in raw["errors"] for line in str(error).splitlines()[-1:]), "no reason given")
        raise KVSpliceError(
            f"{raw['failed']} of {raw['num_prompts']} requests failed ({reason}): see the server's log."
        )
    steady = steady_tpot_ms(raw, chunk)
    enough = 2 * len(steady) >= raw["completed"]
    return {
        "steady_tpot_ms": median(steady) if enough else None,
        "steady_requests": len(steady),
        "requests": {
            "ttft_s": [round(t, 6) for t in raw["ttfts"]],
            "latency_s": [round(t, 6) for t in raw["latencies"]],
            "steady_tpot_ms": [round(t, 5) for t in steady],
        },
        "vllm": {key: value for key, value in raw.items() if key not in _LISTS},
    }


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares over (context in tokens, ms per token); None with fewer than two contexts."""
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return Line(mean_y - slope * mean_x, 1e6 * slope)


def break_even(base: Line, ours: Line) -> float:
    """The context in tokens from which ``ours`` is faster: 0 if everywhere, infinity if nowhere from some context on."""
    saved_ms_per_token = (base.slope_us_per_1k - ours.slope_us_per_1k) / 1e6
    extra_ms = ours.intercept_ms - base.intercept_ms
    if saved_ms_per_token > 0:
        return max(0.0, extra_ms / saved_ms_per_token)
    return 0.0 if saved_ms_per_token == 0 and extra_ms < 0 else math.inf


def tpot_lines(result: dict[str, Any], batch: int) -> dict[str, tuple[list[tuple[float, float]], Line | None]]:
    """Per setting the (context, ms) of one batch size and the line through them; context is that of the middle token."""
    lines = {}
    for setting in result["settings"]:
        points = [
            (p["context"] + (p["output"] - 1) / 2, p["tpot_ms"])
            for p in setting["points"]
            if p["batch"] == batch and p["tpot_ms"] is not None
        ]
        lines[setting["name"]] = (sorted(points), fit(points))
    return lines


def batches(result: dict[str, Any]) -> list[int]:
    """Batch sizes of the measured points."""
    return sorted({p["batch"] for setting in result["settings"] for p in setting["points"]})


def summarise_result(result: dict[str, Any]) -> dict[str, Any]:
    """Everything against the first setting: capacity, time per token and prefill by point, lines and break-even by batch,
    best throughput and goodput of the sweep. Ratios are of the setting to the first one; None where either is missing."""
    settings = result["settings"]
    base = settings[0]
    summary: dict[str, Any] = {"baseline": base["name"], "settings": {}}
    lines = {batch: tpot_lines(result, batch) for batch in batches(result)}
    for setting in settings:
        summary["settings"][setting["name"]] = {
            "capacity_ratio": ratio(tokens(setting), tokens(base)),
            "tpot_ratio": _by_point(setting, base, "tpot_ms"),
            "prefill_ratio": _by_point(setting, base, "prefill_tok_s"),
            "lines": {str(batch): _line(of[base["name"]][1], of[setting["name"]][1]) for batch, of in lines.items()},
            "best": best(setting),
            "throughput_ratio": ratio(best(setting)["output_tok_s"], best(base)["output_tok_s"]),
            "returning_ratio": ratio(best(setting)["returning_tok_s"], best(base)["returning_tok_s"]),
            "goodput_ratio": ratio(best(setting)["good_tok_s"], best(base)["good_tok_s"]),
        }
    return summary


def tokens(setting: dict[str, Any]) -> int | None:
    """Tokens that the setting's cache holds, None if its engine did not start."""
    return setting["capacity"]["tokens"] if setting["capacity"] else None


def best(setting: dict[str, Any]) -> dict[str, float | None]:
    """The most output tokens per second over the sweep's concurrencies: fresh prompts, within the SLA, returning ones."""
    passes = {
        "output_tok_s": [p["fresh"]["vllm"]["output_throughput"] for p in setting["sweep"]],
        "good_tok_s": [good_tok_s(p["fresh"]) for p in setting["sweep"]],
        "returning_tok_s": [p["returning"]["vllm"]["output_throughput"] for p in setting["sweep"] if p["returning"]],
    }
    return {name: max((v for v in values if v is not None), default=None) for name, values in passes.items()}


def good_tok_s(record: dict[str, Any]) -> float | None:
    """Output tokens per second of requests within the SLA, from vLLM's goodput in requests per second."""
    vllm = record["vllm"]
    if vllm.get("request_goodput") is None:
        return None
    return float(vllm["request_goodput"]) * vllm["total_output_tokens"] / vllm["completed"]


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base, None where either is missing or the base is 0."""
    return value / base if value is not None and base else None


def merge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings of several runs as one result; the runs must agree in model, conditions, hardware and versions.

    Raises:
        KVSpliceError: they do not, or a setting is in two of them.
    """
    first = results[0]
    for other in results[1:]:
        differing = [key for key in first if key not in ASIDE and first[key] != other.get(key)]
        places = (("hardware", first["provenance"][0]), ("versions", first["provenance"][0]))
        differing += [key for key, of in places if of[key] != other["provenance"][0][key]]
        if differing:
            raise KVSpliceError(
                f"results of different {' and '.join(differing)} cannot stand in one table: give --from files of equal runs."
            )
    settings = [setting for result in results for setting in result["settings"]]
    names = [setting["name"] for setting in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KVSpliceError(f"setting {twice[0]} is in two results: give --from each of them once.")
    merged = first | {
        "settings": settings,
        "provenance": [p for result in results for p in result["provenance"]],
    }
    return merged | {"summary": summarise_result(merged)}


def point_name(point: dict[str, Any]) -> str:
    """BATCHxCONTEXT."""
    return f"{point['batch']}x{point['context']}"


def _by_point(setting: dict[str, Any], base: dict[str, Any], key: str) -> dict[str, float | None]:
    of_base = {point_name(p): p[key] for p in base["points"]}
    return {point_name(p): ratio(p[key], of_base.get(point_name(p))) for p in setting["points"]}


def _line(base: Line | None, ours: Line | None) -> dict[str, float | None] | None:
    if ours is None:
        return None
    even = break_even(base, ours) if base is not None and base is not ours else None
    return ours._asdict() | {"break_even_tokens": even}
