# SPDX-License-Identifier: Apache-2.0
"""The result of a tuning as a dict with the keys of ``kvsplice eval``, its table, and what the projector file keeps of it.

Bytes are those that vLLM pages: where all pages have one size, every layer counts as the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_kvsplice.calibration.texts import Text
from vllm_kvsplice.codec.fingerprint import model_shape
from vllm_kvsplice.codec.layout import dense_bytes, ratios
from vllm_kvsplice.codec.projector import Calibration
from vllm_kvsplice.scoring.evaluate import STATISTIC
from vllm_kvsplice.scoring.inspect_file import summary
from vllm_kvsplice.scoring.results import provenance, table
from vllm_kvsplice.tuning import codecs, search
from vllm_kvsplice.tuning.allocate import Pair, Point
from vllm_kvsplice.tuning.search import Budget, Factor, Use
from vllm_kvsplice.tuning.trials import Bench, Rival
from vllm_kvsplice.tuning.verify import TOPK, Measured

DRAWN = 200  # points of the front in the result


class Facts(NamedTuple):
    """What a run decided and found, besides what its bench holds."""

    model_name: str
    budget: Budget
    held_out: Text
    even: bool
    chosen: Point
    factor: Factor
    rivals: dict[str, Rival]
    calibration: Calibration
    seconds: dict[str, float]


def result(facts: Facts, bench: Bench) -> dict[str, Any]:
    """The whole result: at the top what ``kvsplice eval`` would say of the chosen layers, under "tune" how they were found."""
    shape = model_shape(bench.model.config)
    layouts = list(codecs.layouts_of(facts.chosen, bench.indices).values())
    measured = bench.tried[facts.chosen]
    total, few = measured.total, bench.few
    size = sizes(shape.head_dim, len(bench.indices))
    return {
        "ppl": total.ppl | {"delta_pct_se": measured.ppl_pct_se},
        "kld": total.kld,
        "kld_se": measured.kld_se,
        "kld_statistic": STATISTIC["hf"],
        "kld_topk": total.kld_topk,
        "topk": TOPK,
        "top1": total.top1,
        **size(facts.chosen.bytes),
        "ratio": ratios(layouts)._asdict() | {"kv": size(facts.chosen.bytes)["ratio"]},
        "tokens": total.tokens,
        "engine": "hf",
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "device": str(bench.model.device),
        "model": {"name": facts.model_name, "digest": shape.digest},
        "projector": {"layout": summary(layouts), "preset": "tuned", "calibration": facts.calibration.model_dump()},
        "seq_len": facts.calibration.seq_len,
        "windows": len(measured.windows),
        "text": {"name": facts.held_out.name, "sha256": facts.held_out.sha256},
        "tune": {
            "budget": {facts.budget.kind: facts.budget.value},
            "verdict": _verdict(facts, bench),
            "nll_rise_per_kld": {"value": facts.factor.value, "se": facts.factor.error},
            "even_layers": facts.even,
            "padding_bytes": facts.chosen.bytes / len(layouts) - sum(x.bytes_per_token_head for x in layouts) / len(layouts),
            "layouts": len(set(layouts)),
            "layers": [_layer(i, pair) for i, pair in zip(bench.indices, facts.chosen.layers, strict=True)],
            "tried": [size(p.bytes) | {"predicted_kld": p.loss} | scores(m) for p, m in sorted(bench.tried.items())],
            "uniform": [
                {"name": name, "layout": r.layout} | size(r.bytes) | scores(r.measured) | {"tuned": size(r.tuned.bytes) | scores(bench.tried[r.tuned].first(few))}
                for name, r in facts.rivals.items()
            ],
            "front": [size(p.bytes) | {"predicted_kld": p.loss, "expected_kld": search.expected_kld(p.loss, bench.seen())} for p in _thinned(bench.front)],
            "seconds": facts.seconds,
        },
        **provenance(),
    }  # fmt: skip


def _thinned(front: list[Point]) -> list[Point]:
    """At most about DRAWN points, evenly, the last among them."""
    return front[:: -max(1, len(front) // DRAWN)][::-1]


def sizes(head_dim: int, layers: int) -> Callable[[int], dict[str, float]]:
    """A function from bytes summed over layers to bytes per token and head, mean over layers, and the K+V ratio."""

    def of(total: int) -> dict[str, float]:
        return {"bytes_per_token_head": total / layers, "ratio": 2 * dense_bytes(head_dim) * layers / total}

    return of


def scores(measured: Measured) -> dict[str, Any]:
    """The measured part of a row."""
    return {
        "kld": measured.total.kld,
        "kld_se": measured.kld_se,
        "ppl_delta_pct": measured.ppl_pct,
        "ppl_delta_pct_se": measured.ppl_pct_se,
        "top1": measured.total.top1,
        "windows": len(measured.windows),
    }


def quality(found: dict[str, Any]) -> dict[str, Any]:
    """What the projector file says of its own quality."""
    kept = {name: found[name] for name in ("kld", "kld_se", "top1", "tokens", "windows", "seq_len", "text", "dtype")}
    return kept | {"ppl_delta_pct": found["ppl"]["delta_pct"], "ppl_delta_pct_se": found["ppl"]["delta_pct_se"]}


def tune_table(found: dict[str, Any]) -> str:
    """The human form of a result."""
    tune, calibration, ratio = found["tune"], found["projector"]["calibration"], found["ratio"]
    padding = f", {tune['padding_bytes']:.1f} of them padding" if tune["padding_bytes"] else ""
    lines = [
        f"model {found['model']['name']}, {found['dtype']}; calibrated on {calibration['samples']} windows of {calibration['text']}, "
        f"scored on {found['windows']} windows x {found['seq_len']} tokens of {found['text']['name']}",
        tune["verdict"]["text"],
        f"bytes per token and KV head {found['bytes_per_token_head']:.1f} as paged{padding}; all-in ratio against 16 bit: "
        f"K {ratio['k']:.2f} x, V {ratio['v']:.2f} x, K+V {ratio['kv']:.2f} x; {tune['layouts']} layouts",
        f"KLD {found['kld']:.6f} +- {found['kld_se']:.6f} nats, perplexity {found['ppl']['delta_pct']:+.3f} +- {found['ppl']['delta_pct_se']:.3f} %, "
        f"same most likely token {100 * found['top1']:.2f} %",
        "",
        table([["layer", "K tiers", "V tiers", "bytes", "KLD of K", "KLD of V"], *map(_layer_row, tune["layers"])]),
        "",
        "points scored",
        table([["bytes", "K+V", "predicted", *_SCORED], *([*_size_row(r), f"{r['predicted_kld']:.6f}", *_score_row(r)] for r in tune["tried"])]),
        "",
        "one layout for all layers, and the tuned one at equal loss",
        table([["", "bytes", "K+V", *_SCORED, "tuned", "K+V", "KLD", "saved"], *map(_uniform_row, tune["uniform"])]),
    ]  # fmt: skip
    return "\n".join(lines)


_SCORED = ("KLD", "+-", "ppl %", "+-", "windows")


def _verdict(facts: Facts, bench: Bench) -> dict[str, Any]:
    """Whether the budget is met and how much of it is used, with a sentence that says so."""
    budget, measured = facts.budget, bench.tried[facts.chosen]
    if budget.kind == "ratio":
        reached = sizes(model_shape(bench.model.config).head_dim, len(bench.indices))(facts.chosen.bytes)["ratio"]
        return {"within": True, "used": budget.value / reached, "text": f"target {budget.value:g} x: {reached:.3f} x"}
    use = search.use_of(budget, measured, facts.factor)
    name = f"perplexity +{budget.value:g} %" if budget.kind == "ppl" else f"KLD {budget.value:g}"
    held = "met" if search.is_within(use) else "NOT met by any point scored"
    why = ""
    if search.is_within(use) and not search.is_accepted(use):
        small = facts.chosen == bench.front[0]
        why = (
            "; no smaller layout of this model was found" if small else "; no layout that was scored came nearer to it"
        )
    return {
        "within": search.is_within(use),
        "used": use.measured,
        "used_se": use.error,
        "used_expected": use.expected,
        "text": f"budget {name}: {held}, {_used(budget, use, facts.factor)}{why}",
    }


def _used(budget: Budget, use: Use, factor: Factor) -> str:
    text = f"{100 * use.measured:.0f} +- {100 * use.error:.0f} % of it used"
    if budget.kind == "kld":
        return text
    return f"{text}, {100 * use.expected:.0f} % by KLD x {factor.value:.2f} +- {factor.error:.2f}"


def _layer(index: int, pair: Pair) -> dict[str, Any]:
    return {
        "layer": index,
        **{side: [list(tier) for tier in option.tiers] for side, option in zip("kv", (pair.k, pair.v), strict=True)},
        "bytes_per_token_head": pair.bytes,
        "predicted_kld": {"k": pair.k.loss, "v": pair.v.loss},
    }


def _layer_row(layer: dict[str, Any]) -> list[str]:
    tiers = ["+".join(f"{dims}x{bits}" for bits, dims in layer[side]) for side in "kv"]
    loss = [f"{layer['predicted_kld'][side]:.6f}" for side in "kv"]
    return [str(layer["layer"]), *tiers, str(layer["bytes_per_token_head"]), *loss]


def _size_row(row: dict[str, Any]) -> list[str]:
    return [f"{row['bytes_per_token_head']:.1f}", f"{row['ratio']:.2f} x"]


def _score_row(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['kld']:.6f}",
        f"{row['kld_se']:.6f}",
        f"{row['ppl_delta_pct']:+.3f}",
        f"{row['ppl_delta_pct_se']:.3f}",
        str(row["windows"]),
    ]


def _uniform_row(row: dict[str, Any]) -> list[str]:
    tuned = row["tuned"]
    saved = f"{100 * (1 - tuned['bytes_per_token_head'] / row['bytes_per_token_head']):.1f} %"
    name = f"{row['name']}: {row['layout']}" if row["name"].startswith("best") else row["name"]
    return [name, *_size_row(row), *_score_row(row), *_size_row(tuned), f"{tuned['kld']:.6f}", saved]
