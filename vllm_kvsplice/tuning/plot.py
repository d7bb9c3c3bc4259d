# SPDX-License-Identifier: Apache-2.0
"""The picture of a tuning, from its result alone: loss against bytes, tuned and with one layout for all layers."""

from __future__ import annotations

from typing import Any

DPI = 144
SIZE = (7.0, 4.8)


def draw(found: dict[str, Any], path: str) -> None:
    """Write a PNG."""
    from matplotlib.figure import Figure

    tune = found["tune"]
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot(*_xy(tune["front"], "expected_kld"), color="C0", linewidth=1, label="tuned, expected")
    axes.errorbar(*_xy(tune["tried"], "kld"), yerr=_errors(tune["tried"]), fmt="o", color="C0", label="tuned, measured")
    axes.plot(*_xy([found], "kld"), "*", color="C3", markersize=14, label="chosen")
    rows = tune["uniform"]
    axes.errorbar(*_xy(rows, "kld"), yerr=_errors(rows), fmt="s", color="C1", label="one layout for all layers")
    for row in rows:
        at = (row["bytes_per_token_head"], row["kld"])
        axes.annotate(row["name"], at, textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set(yscale="log", xlabel="bytes per token and KV head, K+V, mean over layers", ylabel="KLD per token, nats")
    if limit := tune["budget"].get("kld"):
        axes.axhline(limit, color="grey", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{found['model']['name']}, {found['windows']} windows of {found['text']['name']}", fontsize=9)
    figure.savefig(path, dpi=DPI)


def _xy(rows: list[dict[str, Any]], y: str) -> tuple[list[float], list[float]]:
    return [row["bytes_per_token_head"] for row in rows], [row[y] for row in rows]


def _errors(rows: list[dict[str, Any]]) -> list[float]:
    return [row["kld_se"] for row in rows]
