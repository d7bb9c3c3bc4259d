# SPDX-License-Identifier: Apache-2.0
"""From sums per window to the rows of the comparison: means, standard errors over windows, spread over calibration samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from vllm_kvsplice.lab.codec import Bytes, Codec, Geometry
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.scoring.needle import Needle, by_depth, fraction
from vllm_kvsplice.scoring.results import table

Row = dict[str, Any]
HEADER = ("codec", "K", "V", "K+V", "ratio", "dPPL %", "se", "sd", "KLD", "se", "sd", "top-1 %")


def row_of(
    codec: Codec,
    geometry: Geometry,
    scores: Sequence[Sequence[Scores]],
    needles: Sequence[Needle],
    hits: Sequence[Sequence[bool]],
) -> Row:
    """One codec's row.

    Args:
        scores: [sample][window], one sample for every calibration. hits: [sample][needle], empty without needles.
    """
    size = codec.bytes(geometry)
    losses = [[(s.nll - s.nll_base) / s.tokens for s in windows] for windows in scores]
    klds = [[s.kld for s in windows] for windows in scores]
    loss, loss_se = mean_se(_over_samples(losses))
    kld, kld_se = mean_se(_over_samples(klds))
    delta = 100.0 * math.expm1(loss)
    return {
        "name": codec.name,
        "family": codec.family,
        "paper": codec.paper,
        "bytes_per_token_head": {"k": size.k, "v": size.v, "kv": size.k + size.v},
        "ratio": ratios(size, geometry.head_dim),
        "delta_ppl_pct": {
            "mean": delta,
            "se": (100.0 + delta) * loss_se,
            "sd": deviation([100.0 * math.expm1(statistics.fmean(windows)) for windows in losses]),
        },
        "kld": {"mean": kld, "se": kld_se, "sd": deviation([statistics.fmean(windows) for windows in klds])},
        "top1": statistics.fmean([s.top1 for windows in scores for s in windows]),
        "needle": fraction([hit for found in hits for hit in found]) if needles else None,
        "needle_by_depth": depths(needles, hits) if needles else None,
        "samples": len(scores),
    }


def ratios(size: Bytes, head_dim: int) -> dict[str, float]:
    """Compression against 16 bits."""
    dense = 2.0 * head_dim
    return {"k": dense / size.k, "v": dense / size.v, "kv": 2 * dense / (size.k + size.v)}


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation, None for one value: a codec that depends on no sample."""
    return statistics.stdev(values) if len(values) > 1 else None


def depths(needles: Sequence[Needle], hits: Sequence[Sequence[bool]]) -> list[dict[str, float]]:
    """Share right in each fifth of the depth, mean over samples."""
    bands = by_depth(needles, {str(i): found for i, found in enumerate(hits)})
    return [
        {
            "depth": band["depth"],
            "samples": band["samples"],
            "right": statistics.fmean([band[str(i)] for i in range(len(hits))]),
        }
        for band in bands
    ]


def comparison_table(result: dict[str, Any]) -> str:
    """The human form of a comparison, fewest bytes last."""
    header = [*HEADER] + (["needle %", "by depth"] if result["needle_samples"] else [])
    lines = [
        f"model {result['model']['name']}, {result['dtype']} on {result['device']}, {result['windows']} windows x "
        f"{result['seq_len']} tokens of {result['text']['name']}, perplexity {result['baseline']['ppl']:.4f}",
        f"calibrated on {result['calibration']['name']}; bytes per token and KV head, all in; se over windows, sd over "
        f"{result['seeds']} calibration samples",
        "",
        table([header, *(cells(row) for row in result["codecs"])]),
    ]
    lines += [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """A row as HEADER names it, and needles where they were scored."""
    size, ppl, kld = row["bytes_per_token_head"], row["delta_ppl_pct"], row["kld"]
    found = [row["name"], *(f"{size[side]:.1f}" for side in ("k", "v", "kv")), f"{row['ratio']['kv']:.2f}"]
    found += [f"{ppl['mean']:+.3f}", _number(ppl["se"], 3), _number(ppl["sd"], 3)]
    found += [f"{kld['mean']:.5f}", _number(kld["se"], 5), _number(kld["sd"], 5), f"{100 * row['top1']:.2f}"]
    if row["needle"] is not None:
        bands = "/".join(f"{100 * band['right']:.0f}" for band in row["needle_by_depth"])
        found += [f"{100 * row['needle']:.0f}", bands]
    return found


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _over_samples(values: Sequence[Sequence[float]]) -> list[float]:
    """[sample][window] -> mean over samples of every window."""
    return [statistics.fmean(window) for window in zip(*values, strict=True)]
