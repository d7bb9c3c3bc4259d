# SPDX-License-Identifier: Apache-2.0
"""The picture of a comparison: loss against compression, one marker per family. In: a result of compare.run. Out: a PNG."""

from __future__ import annotations

from typing import Any

DPI = 144
SIZE = (9.0, 5.2)
MARKERS = "osD^v<>PX*hdp8"
OURS = "KVSplice"


def draw(result: dict[str, Any], path: str) -> None:
    """Write the picture; codecs without any loss are left out of the logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in result["codecs"] if row["kld"]["mean"] > 0]
    for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        points = [(row["ratio"]["kv"], row["kld"]["mean"]) for row in rows if row["family"] == family]
        style: dict[str, Any] = (
            dict(color="black", s=70, zorder=3) if family == OURS else dict(color=f"C{number % 10}", s=30)
        )
        axes.scatter(*zip(*points, strict=True), marker=MARKERS[number % len(MARKERS)], label=family, **style)
    for row in best(rows):
        place = (row["ratio"]["kv"], row["kld"]["mean"])
        axes.annotate(row["name"], place, textcoords="offset points", xytext=(5, -8), fontsize=6)
    fp8 = [row["kld"]["mean"] for row in rows if row["name"] == "fp8"]
    if fp8:
        axes.axhline(fp8[0], color="0.6", linestyle=":", linewidth=1, label="fp8 per tensor")
    axes.set(
        xlabel="compression of K+V against 16 bits, all in", ylabel="KL divergence from uncompressed, nats a token"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 3, 4, 6, 8], ["1x", "2x", "3x", "4x", "6x", "8x"])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=7)
    axes.set_title(_title(result), fontsize=9)
    figure.savefig(path, dpi=DPI)


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in both bytes and loss, most bytes first."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bytes_per_token_head"]["kv"], row["kld"]["mean"])):
        if not front or row["kld"]["mean"] < front[-1]["kld"]["mean"]:
            front.append(row)
    return front[::-1]


def _title(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    where = ", ".join(dict.fromkeys(hardware["gpus"])) or hardware["cpu"]
    what = f"{result['windows']} x {result['seq_len']} tokens of {result['text']['name']}"
    return f"{result['model']['name']}, {result['dtype']}, {what}, {where}"
