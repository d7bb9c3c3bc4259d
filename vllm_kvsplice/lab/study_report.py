# SPDX-License-Identifier: Apache-2.0
"""The studies' tables and picture. In: a result of study.run. Out: text, and a PNG with one panel for each study."""

from __future__ import annotations

import math
from typing import Any

from vllm_kvsplice.lab.rows import HEADER, cells
from vllm_kvsplice.scoring.results import table

DPI = 110
COLUMNS = 3
PANEL = (4.6, 3.4)  # inches
LEAST = 1e-7  # KLD below this is drawn there: the rounding of fp32


def study_tables(result: dict[str, Any]) -> str:
    """The human form: a table for each study."""
    texts = "; ".join(
        f"{text['windows']} windows x {result['seq_len']} tokens of {text['name']}, perplexity {text['ppl']:.4f}"
        for text in result["texts"].values()
    )
    sources = ", ".join(f"{source}: {text['name']}" for source, text in result["calibration"].items())
    lines = [
        f"model {result['model']['name']}, {result['dtype']} on {result['device']}, {texts}",
        f"calibrated on {sources}; {result['samples']} windows unless a row says otherwise",
        "bytes per token and KV head, all in; se over windows, sd over calibration samples",
    ]
    for name, study in result["studies"].items():
        lines += ["", f"{name}: {study['about']}", study_table(study["rows"])]
        for scope, saved in study.get("ranks_saved", {}).items():
            lines.append(f"LayerNorm's nullspace saves {saved['saved']:g} of {saved['numbers']} numbers, scope {scope}")
        if "spread" in study:
            k, v = (study["spread"][side] for side in ("k", "v"))
            lines.append(f"largest over least variance of a head's dimensions, median over heads: K {k:.0f}, V {v:.0f}")
    lines += [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def study_table(rows: list[dict[str, Any]]) -> str:
    """One study's rows, its axes first."""
    axes = list(rows[0]["at"])
    header = [*axes, *HEADER[1:]] + (["needle %", "by depth"] if rows[0]["needle"] is not None else [])
    products = rows[0]["products"] is not None
    body = [
        [str(row["at"][axis]) for axis in axes] + cells(row)[1:] + ([str(row["products"])] if products else [])
        for row in rows
    ]
    return table([header + (["products"] if products else []), *body])


def draw(result: dict[str, Any], path: str) -> None:
    """Write the picture: KL divergence along each study's axis, one line for each combination of its other axes."""
    from matplotlib.figure import Figure

    count = len(result["studies"])
    columns = min(COLUMNS, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(columns * PANEL[0], lines * PANEL[1]), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (name, study) in zip(panels, result["studies"].items(), strict=False):
        _panel(panel, name, study)
    for panel in panels[count:]:
        panel.axis("off")
    where = ", ".join(dict.fromkeys(result["hardware"]["gpus"])) or result["hardware"]["cpu"]
    figure.suptitle(
        f"{result['model']['name']}, {result['dtype']}, {where}: KL divergence from uncompressed, nats a token",
        fontsize=9,
    )
    figure.savefig(path, dpi=DPI)


def series(study: dict[str, Any]) -> dict[str, list[tuple[Any, float, float]]]:
    """Lines of a panel by their label: (place on the axis, KLD, its standard error) of each row."""
    found: dict[str, list[tuple[Any, float, float]]] = {}
    for row in study["rows"]:
        label = ", ".join(str(value) for axis, value in row["at"].items() if axis != study["axis"])
        error = row["kld"]["sd"] or row["kld"]["se"]
        point = row["at"][study["axis"]], max(row["kld"]["mean"], LEAST), 0.0 if math.isnan(error) else error
        found.setdefault(label, []).append(point)
    return found


def _panel(axes: Any, name: str, study: dict[str, Any]) -> None:
    places = list(dict.fromkeys(row["at"][study["axis"]] for row in study["rows"]))
    numeric = all(isinstance(place, int) for place in places)
    for label, points in series(study).items():
        x = [place if numeric else places.index(place) for place, _, _ in points]
        axes.errorbar(
            x, [y for _, y, _ in points], [e for _, _, e in points], marker="o", markersize=3, linewidth=1, label=label
        )
    axes.set_yscale("log")
    if numeric:
        axes.set_xscale("log", base=2)
    ticks = places if numeric else range(len(places))
    axes.set_xticks(list(ticks), [str(place) for place in places], fontsize=6, rotation=0 if numeric else 20)
    axes.minorticks_off()
    axes.set_title(name, fontsize=8)
    axes.set_xlabel(study["axis"], fontsize=7)
    axes.tick_params(axis="y", labelsize=6)
    if len(study["rows"][0]["at"]) > 1:
        axes.legend(fontsize=4.5, framealpha=0.3)
