# SPDX-License-Identifier: Apache-2.0
"""What the demo shows at its end: one table, and the checks that decide its exit status. In: the result dict of demo.py."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

MAX_KLD = 0.02  # nats a token; near_lossless measures about 0.005 on the bundled model
MAX_PPL_PCT = 1.0
MIN_RATIO = 2.0
BLOCK_LOSS = 0.97  # the cache is cut into whole blocks


def checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of the demo as dicts of name, ok and the numbers compared."""
    scores, stock, ours = result["scores"], result["stock"], result["kvsplice"]
    expected, ratio = scores["ratio"]["kv"], result["capacity_ratio"]
    hidden = result["needle"]["answer"]
    found = scores["needle"]
    wanted = hidden if result["model"] == "bundled" else stock["needle_answer"]  # another model need not know the task
    return [
        _check(
            "more tokens fit",
            ratio >= max(MIN_RATIO, BLOCK_LOSS * expected),
            f"{ratio:.2f}x, the codec promises {expected:.2f}x",
        ),
        _check(
            "stock vLLM finds the needle", stock["needle_answer"] == wanted, f"{stock['needle_answer']}, is {wanted}"
        ),
        _check("kvsplice finds the needle", ours["needle_answer"] == wanted, f"{ours['needle_answer']}, is {wanted}"),
        _check(
            "retrieval is kept", found["kvsplice"] >= found["baseline"], f"{found['kvsplice']}, was {found['baseline']}"
        ),
        _check(
            "perplexity is kept", abs(scores["ppl"]["delta_pct"]) <= MAX_PPL_PCT, f"{scores['ppl']['delta_pct']:+.3f} %"
        ),
        _check("distribution is kept", scores["kld"] <= MAX_KLD, f"KLD {scores['kld']:.5f} nats"),
    ]


def print_report(result: dict[str, Any], console: Console) -> bool:
    """Print the table and the checks; True if a check failed."""
    console.rule("result")
    console.print(_table(result))
    console.print(_notes(result), highlight=False, markup=False)
    failed = [check for check in result["checks"] if not check["ok"]]
    for check in result["checks"]:
        mark = "[green]ok[/green]" if check["ok"] else "[red]FAILED[/red]"
        console.print(f"{mark}  {check['name']}: {check['detail']}", highlight=False)
    return bool(failed)


def _check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def _table(result: dict[str, Any]) -> Table:
    scores, stock, ours = result["scores"], result["stock"], result["kvsplice"]
    table = Table(show_lines=False)
    for heading in ("", "stock vLLM", "kvsplice", "change"):
        table.add_column(heading, justify="left" if heading in ("", "change") else "right", overflow="fold")
    tokens = (stock["capacity"]["tokens"], ours["capacity"]["tokens"])
    table.add_row(
        "tokens that fit, as vLLM reports", f"{tokens[0]:,}", f"{tokens[1]:,}", f"{result['capacity_ratio']:.2f}x"
    )
    dense, size = scores["bytes_per_token_head"] * scores["ratio"]["kv"], scores["bytes_per_token_head"]
    table.add_row("bytes per token and head, K+V", f"{dense:.0f}", f"{size:.0f}", f"{scores['ratio']['kv']:.2f}x")
    ppl = scores["ppl"]
    table.add_row("perplexity", f"{ppl['baseline']:.3f}", f"{ppl['kvsplice']:.3f}", f"{ppl['delta_pct']:+.2f} %")
    table.add_row("KLD from stock, nats", "0", f"{scores['kld']:.5f}", "")
    table.add_row("same most likely token", "100 %", f"{100 * scores['top1']:.1f} %", "")
    needle = scores["needle"]
    table.add_row(
        "needles found, simulated", f"{100 * needle['baseline']:.0f} %", f"{100 * needle['kvsplice']:.0f} %", ""
    )
    table.add_row(
        "needle answer, served", stock["needle_answer"], ours["needle_answer"], f"hidden: {result['needle']['answer']}"
    )
    speed = (stock["tokens_per_s"], ours["tokens_per_s"])
    table.add_row("decode tokens/s, one user", f"{speed[0]:.1f}", f"{speed[1]:.1f}", f"{speed[1] / speed[0]:.2f}x")
    return table


def _notes(result: dict[str, Any]) -> str:
    scores, hardware = result["scores"], result["provenance"]["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    lines = [
        f"preset {result['preset']}; {scores['windows']} windows of {scores['seq_len']} tokens scored; {where}; "
        f"{result['seconds']:.0f} s in all"
    ]
    if not hardware["gpus"]:
        lines.append(
            "On a CPU kvsplice decodes by its plain torch path, which is slower than vLLM's CPU attention: "
            "the speed row shows no more than that it runs. The kernels are for NVIDIA GPUs."
        )
    return "\n".join(lines)
