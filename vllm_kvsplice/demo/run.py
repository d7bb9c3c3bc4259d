# SPDX-License-Identifier: Apache-2.0
"""`kvsplice demo`: calibrate, score and serve the bundled model, offline, and compare it with stock vLLM in one table.

Comes in: `DemoRequest`. Goes out: exit status 0, or 1 if a check failed, the table, and JSON on request. Two real
`vllm serve` run one after the other under the same cache memory; only the attention backend differs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvsplice.demo.report import checks, print_report
from vllm_kvsplice.demo.serve import Questions, Served, serve_and_ask
from vllm_kvsplice.demo.server import check_port, require_vllm
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.signals import deferred_signals, termination_as_exit

PRESET = "near_lossless"
TOKENS_STOCK = 32768  # the cache memory is what stock vLLM needs for so many
CONTEXT = 4096
NEEDLE_LENGTH = 2000
WINDOWS = 4  # of 2048 tokens, scored
NEEDLES = 6
STREAM_TOKENS = 96
STREAM_OPENING = (
    "It was a cold morning in November. The captain stood on the deck with his hands behind him and looked at the sea. "
    "For three days they had seen no land, and the men had begun to talk in low voices when he passed. At last the old "
    "sailor came up to him, took off his hat, and said:"
)
HELD_OUT_EVERY = 3  # of the topics, by name: scored, never calibrated on


@dataclass(frozen=True)
class DemoRequest:
    """`model`: a folder, or None for the bundled one. `port`: of both servers, None for free ones. `json`: a path."""

    model: str | None = None
    port: int | None = None
    keep: bool = False
    json: str | None = None


def run(request: DemoRequest, console: Console | None = None) -> int:
    """Run the demo; raises KVSpliceError with the reason where a step cannot be done."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    console = console or Console()
    _check(request)
    with termination_as_exit(), _model_folder(request.model) as model, _workspace(request.keep, console) as work:
        result = _measure(model, request, work, console)
        failed = print_report(result, console)
        if request.json:
            from vllm_kvsplice.scoring.results import write_json

            write_json(result, request.json)
            console.print(f"written: {request.json}", highlight=False)
    return 1 if failed else 0


def _check(request: DemoRequest) -> None:
    """What can be known to fail is told before the work, not after it."""
    require_vllm()
    if request.port is not None:
        check_port(request.port)
    if request.json and not Path(request.json).absolute().parent.is_dir():
        raise KVSpliceError(f"--json {request.json}: its folder does not exist; make it, or give another path.")


def _measure(model: str, request: DemoRequest, work: Path, console: Console) -> dict[str, Any]:
    from vllm_kvsplice.scoring.results import provenance

    started = time.monotonic()
    calibration_text, scoring_text = split_topics()
    (work / "calibration.txt").write_text(calibration_text)
    (work / "scoring.txt").write_text(scoring_text)
    projector = _calibrate(model, work, console)
    scores = _score(model, projector, work, console)
    served, needle = _serve_both(model, projector, request.port, scoring_text, work, console)
    result = {
        "model": "bundled" if request.model is None else model,
        "preset": PRESET,
        # The bundled model's folder is of this machine and says nothing elsewhere.
        "scores": {key: value for key, value in scores.items() if key != "model" or request.model},
        "needle": needle,
        "stock": served["stock"].as_dict(),
        "kvsplice": served["kvsplice"].as_dict(),
        "capacity_ratio": served["kvsplice"].capacity.tokens / served["stock"].capacity.tokens,
        "seconds": time.monotonic() - started,
        "provenance": provenance(),
    }
    return result | {"checks": checks(result)}


def _calibrate(model: str, work: Path, console: Console) -> Path:
    from vllm_kvsplice.calibration import calibrate

    console.rule("1 calibrate")
    started = time.monotonic()
    out = work / "demo.kvsplice.safetensors"
    projector = calibrate.run(
        calibrate.CalibrateRequest(model=model, out=str(out), text=str(work / "calibration.txt"), preset=PRESET)
    )
    seen = projector.metadata.calibration
    tokens = f" from {seen.tokens:,} tokens" if seen else ""
    console.print(
        f"projector of {out.stat().st_size:,} bytes{tokens}, {time.monotonic() - started:.0f} s", highlight=False
    )
    return out


def _score(model: str, projector: Path, work: Path, console: Console) -> dict[str, Any]:
    from vllm_kvsplice.scoring import evaluate

    console.rule("2 score on text that the calibration has not seen")
    started = time.monotonic()
    request = evaluate.EvalRequest(
        model=model,
        projector=str(projector),
        text=str(work / "scoring.txt"),
        windows=WINDOWS,
        needle=NEEDLES,
        needle_len=NEEDLE_LENGTH,
    )
    scores = evaluate.run(request)
    ppl = scores["ppl"]
    console.print(
        f"perplexity {ppl['baseline']:.3f} -> {ppl['kvsplice']:.3f}, {time.monotonic() - started:.0f} s",
        highlight=False,
    )
    return scores


def _serve_both(
    model: str, projector: Path, port: int | None, text: str, work: Path, console: Console
) -> tuple[dict[str, Served], dict[str, str]]:
    import torch

    console.rule("3 serve")
    questions, needle, memory_bytes = _prepare(model, text)
    console.print(
        f"{len(questions.needle_prompt):,} tokens of text hide {needle['answer']}; {needle['question']} ...",
        highlight=False,
    )
    shared = ["--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", str(memory_bytes)]
    shared += ["--gpu-memory-utilization", "0.5"]
    if not torch.cuda.is_available():
        shared.append("--enforce-eager")  # compiling for a CPU takes longer than this demo
    settings = json.dumps({"kvsplice": {"projector": str(projector)}})
    ours = ["--attention-backend", "kvsplice", "--additional-config", settings]
    served = {
        name: serve_and_ask(name, model, [*shared, *extra], questions, work / f"{name}.log", port, console)
        for name, extra in (("stock", []), ("kvsplice", ours))
    }
    return served, needle


def _prepare(model: str, text: str) -> tuple[Questions, dict[str, str], int]:
    """The prompts, what the needle says, and the cache memory in bytes."""
    from vllm_kvsplice.codec.fingerprint import model_shape
    from vllm_kvsplice.codec.layout import dense_bytes
    from vllm_kvsplice.scoring.evaluate import load_config
    from vllm_kvsplice.scoring.needle import NeedleTask, make_samples

    config, tokenizer = load_config(model)
    shape = model_shape(config)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    (sample,) = make_samples(tokenizer, ids, NeedleTask(1, NEEDLE_LENGTH, seed=1))
    questions = Questions(sample.prompt, len(sample.answer), STREAM_OPENING, STREAM_TOKENS)
    asked = tokenizer.decode(sample.prompt[-60:]).rsplit("\n", 1)[-1]
    digits = tokenizer.decode(sample.answer).strip()
    token_bytes = shape.num_hidden_layers * shape.num_kv_heads * 2 * dense_bytes(shape.head_dim)
    return questions, {"question": asked, "answer": digits}, TOKENS_STOCK * token_bytes


def split_topics() -> tuple[str, str]:
    """Text for calibration and text for scoring, without a paragraph in common, from what every CPython carries."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    from vllm_kvsplice.calibration.texts import prose

    names = sorted(topics)
    held_out = names[::HELD_OUT_EVERY]
    calibration = prose(topics[name] for name in names if name not in held_out)
    seen = set(calibration.rstrip().split("\n\n"))
    scoring = prose(topics[name] for name in held_out).rstrip().split("\n\n")
    return calibration, "\n\n".join(paragraph for paragraph in scoring if paragraph not in seen) + "\n"


@contextmanager
def _model_folder(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with as_file(files("vllm_kvsplice") / "demo" / "model") as folder:
        yield str(folder)


@contextmanager
def _workspace(keep: bool, console: Console) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix="kvsplice-demo-"))
    try:
        yield work
    finally:
        if keep:
            console.print(f"kept: {work}", highlight=False)
        else:
            with deferred_signals():
                shutil.rmtree(work, ignore_errors=True)
