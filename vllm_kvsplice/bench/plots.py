# SPDX-License-Identifier: Apache-2.0
"""The pictures of a serving benchmark. In: a result as serve.py writes it, optionally a kernel benchmark's JSON. Out: PNGs.

Drawn from a result file alone, so that a machine without matplotlib can measure and another one draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_kvsplice.bench import analysis
from vllm_kvsplice.bench.breakdown import Bar
from vllm_kvsplice.bench.report import break_even_text

DPI = 144
SIZE = (7.0, 4.4)

Paint = Callable[[Any], bool]  # draws into matplotlib Axes; False if there was nothing to draw


def draw(result: dict[str, Any], folder: Path, kernels: dict[str, list[Bar]] | None) -> list[Path]:
    """Write every picture that the result has numbers for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Paint]] = [
        (f"tpot_batch{batch}.png", partial(_tpot, result=result, batch=batch)) for batch in analysis.batches(result)
    ]
    if any(s["sweep"] for s in result["settings"]):
        pictures += [
            ("throughput_users.png", partial(_throughput, result=result)),
            ("capacity_throughput.png", partial(_capacity, result=result)),
        ]
    for shape, bars in (kernels or {}).items():
        name = re.sub(r"[^0-9a-z]+", "_", shape)
        pictures.append((f"kernels_{name}.png", partial(_kernels, shape=shape, bars=bars)))
    return [path for name, paint in pictures if (path := _save(folder / name, paint, result))]


def _save(path: Path, paint: Paint, result: dict[str, Any]) -> Path | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    if not paint(axes):
        return None
    hardware = result["provenance"][0]["hardware"]
    where = ", ".join(dict.fromkeys(hardware["gpus"])) or hardware["cpu"]
    axes.set_title(f"{result['model']['name']}, {result['model']['weights']} weights, {where}", fontsize=9)
    figure.savefig(path, dpi=DPI)
    return path


def _tpot(axes: Any, result: dict[str, Any], batch: int) -> bool:
    """Time per output token against context with the fitted lines and where they meet the first setting's."""
    summary = result["summary"]
    lines = analysis.tpot_lines(result, batch)
    if not any(points for points, _ in lines.values()):
        return False
    for number, (name, (points, line)) in enumerate(lines.items()):
        if not points:
            continue
        label, color = name, f"C{number}"
        if line is not None:
            label += f": {line.intercept_ms:.2f} ms {line.slope_us_per_1k:+.1f} us per 1k tokens"
            far = max(x for x, _ in points)
            ends = [line.intercept_ms + line.slope_us_per_1k * x / 1e6 for x in (0.0, far)]
            axes.plot([0.0, far], ends, color=color, linewidth=1)
            if name != summary["baseline"] and lines[summary["baseline"]][1] is not None:
                even = analysis.break_even(lines[summary["baseline"]][1], line)  # type: ignore[arg-type]
                label += f"; faster from: {break_even_text(even)}"
                if 0 < even <= far:
                    axes.axvline(even, color=color, linestyle=":", linewidth=1)
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=color, label=label)
    axes.set(xlabel="context of each request, tokens", ylabel=f"time per output token, ms, batch {batch}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return True


def _throughput(axes: Any, result: dict[str, Any]) -> bool:
    for number, setting in enumerate(result["settings"]):
        sweep = sorted(setting["sweep"], key=lambda p: p["users"])
        kinds = (("fresh", "-o", ""), ("returning", "--s", ", prompts sent a second time"))
        for kind, style, suffix in kinds:
            points = [(p["users"], p[kind]["vllm"]["output_throughput"]) for p in sweep if p[kind]]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=setting["name"] + suffix)
        good = [(p["users"], y) for p in sweep if (y := analysis.good_tok_s(p["fresh"])) is not None]
        if good:
            axes.plot(*zip(*good, strict=True), ":x", color=f"C{number}", label=f"{setting['name']}, within the SLA")
    c = result["conditions"]
    axes.set(xlabel="users at once", ylabel=f"output tokens/s ({c['sweep_input']} in, {c['sweep_output']} out)")
    users = sorted({p["users"] for s in result["settings"] for p in s["sweep"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(users, [str(n) for n in users])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # a dozen lines: beside, not over them
    return True


def _capacity(axes: Any, result: dict[str, Any]) -> bool:
    """A mark or two per setting: tokens that fit against the best throughput of the sweep, of fresh and returning prompts."""
    for number, setting in enumerate(result["settings"]):
        tokens, best = analysis.tokens(setting), analysis.best(setting)
        if tokens is None:
            continue
        for key, mark, suffix in (("output_tok_s", "o", ""), ("returning_tok_s", "s", ", second time")):
            if best[key] is not None:
                axes.plot(tokens / 1e6, best[key], mark, color=f"C{number}", label=setting["name"] + suffix)
    axes.margins(0.1)
    axes.set(xlabel="tokens that fit, millions", ylabel="best output tokens/s of the sweep")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _kernels(axes: Any, shape: str, bars: list[Bar]) -> bool:
    """Time of each kernel, those with stages cut into them; what the stages do not explain is left pale."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.stages))
    axes.barh(range(len(bars)), [bar.us for bar in bars], color="0.85")
    for number, name in enumerate(names):
        for y, bar in enumerate(bars):
            left = 0.0
            for stage, us in bar.stages:
                if stage == name:
                    label = name if name not in axes.get_legend_handles_labels()[1] else None
                    axes.barh(y, us, left=left, color=f"C{number}", label=label)
                left += us
    for y, bar in enumerate(bars):
        axes.annotate(f"{bar.us:.1f}", (bar.us, y), textcoords="offset points", xytext=(3, -3), fontsize=7)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"microseconds, one layer, {shape}")
    if names:
        axes.legend(fontsize=7)
    return True
