# SPDX-License-Identifier: Apache-2.0
"""Runs the codecs: the uncompressed model once per window, then every codec on the same window. Two sets of logits are held.

In: a model, prepared codecs, windows and needles of token ids. Out: sums per codec and window, and needle hits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab.codec import KV, Attach, Codec, Run
from vllm_kvsplice.scoring.metrics import ROWS, Scores, score_logits
from vllm_kvsplice.scoring.needle import Needle

TOPK = 128  # of the KL divergence that a server could measure too
GPU_ROWS = 1024  # tokens scored at a time: fewer waits for the GPU, some gigabytes at a vocabulary of 150,000
_CONSOLE = Console(stderr=True)  # progress; standard output is for results


class Candidate(NamedTuple):
    """A codec prepared from one calibration sample."""

    codec: Codec
    seed: int
    attach: Attach


def score_windows(model: Any, candidates: Sequence[Candidate], windows: Sequence[Sequence[int]]) -> list[list[Scores]]:
    """Sums of every window for every candidate, teacher forced: [candidate][window]."""
    found: list[list[Scores]] = [[] for _ in candidates]
    needs_base = any(c.codec.needs_base for c in candidates)
    rows = GPU_ROWS if model.device.type == "cuda" else ROWS
    for window in track(windows, "windows", console=_CONSOLE, disable=not windows):
        ids = torch.tensor(window, device=model.device)
        base, seen = base_logits(model, ids, needs_base)
        for candidate, scores in zip(candidates, found, strict=True):
            other = logits(model, ids, candidate.attach, Run(None, seen))
            scores.append(score_logits(base[:-1], other[:-1], ids[1:], TOPK, rows))
    return found


def score_needles(
    model: Any, candidates: Sequence[Candidate], needles: Sequence[Needle]
) -> tuple[list[bool], list[list[bool]]]:
    """Whether each needle is answered word for word by the uncompressed model, and by every candidate: [candidate][needle].

    One teacher-forced forward each, as in hf_engine.answers. The cache of codecs that compress a prompt once is compressed
    after the text and before the question.
    """
    baseline: list[bool] = []
    found: list[list[bool]] = [[] for _ in candidates]
    needs_base = any(c.codec.needs_base for c in candidates)
    for needle in track(needles, "needles", console=_CONSOLE, disable=not needles):
        ids = torch.tensor(needle.prompt + needle.answer, device=model.device)
        base, seen = base_logits(model, ids, needs_base)
        baseline.append(_right(base, needle))
        run = Run(len(needle.prompt) - needle.question_tokens, seen)
        for candidate, hits in zip(candidates, found, strict=True):
            hits.append(_right(logits(model, ids, candidate.attach, run), needle))
    return baseline, found


@torch.inference_mode()
def logits(model: Any, ids: Tensor, attach: Attach, run: Run) -> Tensor:
    """Next-token logits [T, vocab] of token ids [T] with a codec attached."""
    with attach(model, run):
        result: Tensor = model(ids[None], use_cache=False).logits[0]
    return result


@torch.inference_mode()
def base_logits(model: Any, ids: Tensor, record: bool) -> tuple[Tensor, Mapping[int, KV]]:
    """Logits of the uncompressed model, and its keys and values by layer if they are to be recorded."""
    seen: dict[int, KV] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> KV:
        seen[layer_idx] = k, v
        return k, v

    with transformed_kv(model, watch) if record else nullcontext():
        result: Tensor = model(ids[None], use_cache=False).logits[0]
    return result, seen


def _right(found: Tensor, needle: Needle) -> bool:
    answer = torch.tensor(needle.answer, device=found.device)
    return bool((found[-len(answer) - 1 : -1].argmax(-1) == answer).all())
