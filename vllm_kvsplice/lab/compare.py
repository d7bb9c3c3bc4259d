# SPDX-License-Identifier: Apache-2.0
"""``kvsplice compare``: every codec of the laboratory on the same model, text and tokens.

In: a ``CompareRequest``. Out: the result as a dict, which ``rows`` prints, ``plot`` draws and ``results`` writes. What
needs calibration is calibrated here, on text that is not scored, once for each of a few samples of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvsplice.calibration.hf_attention import load_model
from vllm_kvsplice.calibration.texts import Text, load_text, refuse_overlap, special_prefix, token_windows
from vllm_kvsplice.codec.fingerprint import model_shape, shown_name
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import registry
from vllm_kvsplice.lab.codec import Codec, Geometry, Setup
from vllm_kvsplice.lab.rows import row_of
from vllm_kvsplice.lab.score import Candidate, score_needles, score_windows
from vllm_kvsplice.lab.statistics import LayerStatistics, collect, with_fisher
from vllm_kvsplice.scoring.evaluate import choose_seq_len, cut_windows
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.scoring.needle import Needle, NeedleTask, fraction, make_samples
from vllm_kvsplice.scoring.results import provenance


@dataclass(frozen=True)
class CompareRequest:
    """One comparison. ``text`` is scored (default: the held-out built-in English), ``calibration`` (a file) or ``dataset``
    calibrated on (default: the built-in English). ``codecs`` are names, families or .toml presets, empty is all;
    ``windows`` 0 is the whole text; ``samples`` is the most windows of one calibration, ``seeds`` how many calibrations."""

    model: str
    text: str | None = None
    calibration: str | None = None
    dataset: str | None = None
    codecs: tuple[str, ...] = ()
    projectors: tuple[str, ...] = ()
    samples: int = 32
    seq_len: int | None = None
    windows: int = 0
    needle: int = 0
    needle_len: int | None = None
    seeds: int = 3
    device: str = "auto"
    dtype: str = "auto"


def run(request: CompareRequest) -> dict[str, Any]:
    """Score the codecs; raises KVSpliceError on a bad request."""
    if request.seeds < 1:
        raise KVSpliceError(f"--seeds {request.seeds} leaves nothing to calibrate with: expected at least 1.")
    codecs = registry.choose(request.codecs, request.projectors)
    text, calibration = texts(request)
    model, tokenizer = load_model(request.model, request.device, request.dtype)
    shape = model_shape(model.config)
    seq_len = choose_seq_len(model.config, request.seq_len)
    geometry = Geometry(shape.num_hidden_layers, shape.num_kv_heads, shape.head_dim, seq_len)
    codecs, left_out = _that_fit(codecs, geometry, refuse=bool(request.codecs))
    ids = list(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids)
    windows = cut_windows(ids, special_prefix(tokenizer), seq_len, request.windows)
    needles = _needles(request, model, tokenizer, ids, seq_len)
    candidates, unprepared = prepare(request, codecs, model, tokenizer, calibration, geometry)
    scores = score_windows(model, candidates, windows)
    base_hits, hits = score_needles(model, candidates, needles)
    total = sum(scores[0], Scores())
    return {
        "model": {
            "name": shown_name(request.model),
            "digest": shape.digest,
            "revision": getattr(model.config, "_commit_hash", None),
        },
        "text": {"name": text.name, "sha256": text.sha256},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "samples": request.samples},
        "seeds": request.seeds,
        "seq_len": seq_len,
        "windows": len(windows),
        "tokens": total.tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "needle_samples": len(needles),
        "needle_length": len(needles[0].prompt) + len(needles[0].answer) if needles else None,
        "baseline": {
            "ppl": math.exp(total.nll_base / total.tokens),
            "needle": fraction(base_hits) if needles else None,
        },
        "codecs": _rows(codecs, candidates, geometry, scores, needles, hits),
        "left_out": left_out | unprepared,
        **provenance(),
    }


def texts(request: CompareRequest) -> tuple[Text, Text]:
    """The text to score and the one to calibrate on; KVSpliceError if one holds the other."""
    text = load_text(request.text, held_out=True)
    calibration = load_text(request.calibration, request.dataset)
    refuse_overlap(text, calibration, "--calibration")
    return text, calibration


def prepare(
    request: CompareRequest, codecs: Sequence[Codec], model: Any, tokenizer: Any, text: Text, geometry: Geometry
) -> tuple[list[Candidate], dict[str, str]]:
    """Every codec, those that need calibration once per sample of the text; and why a codec cannot be had for this model,
    which is an error where it was asked for."""
    plain, asking = ([c for c in codecs if (c.needs != "nothing") is wanted] for wanted in (False, True))
    candidates: list[Candidate] = []
    left_out: dict[str, str] = {}

    def add(chosen: Sequence[Codec], seed: int, seen: dict[int, LayerStatistics]) -> None:
        for codec in chosen:
            try:
                candidates.append(Candidate(codec, seed, codec.prepare(Setup(model, geometry, seen))))
            except KVSpliceError as error:
                if request.codecs:
                    raise
                left_out[codec.name] = str(error)

    add(plain, 0, {})
    for seed in range(request.seeds if asking else 0):
        add(asking, seed, calibrate(request, model, tokenizer, text, geometry, seed, asking))
    return candidates, left_out


def calibrate(
    request: CompareRequest,
    model: Any,
    tokenizer: Any,
    text: Text,
    geometry: Geometry,
    seed: int,
    codecs: Sequence[Codec],
) -> dict[int, LayerStatistics]:
    """Statistics of one sample of the calibration text, in windows as long as the scored ones."""
    windows = token_windows(text, tokenizer, geometry.seq_len, request.samples, seed)
    seen = collect(model, windows)
    return with_fisher(model, windows, seen) if any(c.needs == "gradients" for c in codecs) else seen


def _that_fit(codecs: Sequence[Codec], geometry: Geometry, refuse: bool) -> tuple[list[Codec], dict[str, str]]:
    """Codecs that can store this geometry, and why the others cannot; those are an error where they were asked for."""
    fitting, left_out = [], {}
    for codec in codecs:
        try:
            codec.bytes(geometry)
        except KVSpliceError as error:
            if refuse:
                raise
            left_out[codec.name] = str(error)
        else:
            fitting.append(codec)
    return fitting, left_out


def _needles(request: CompareRequest, model: Any, tokenizer: Any, ids: Sequence[int], seq_len: int) -> list[Needle]:
    if not request.needle:
        return []
    length = choose_seq_len(model.config, request.needle_len or seq_len)
    return make_samples(tokenizer, ids, NeedleTask(request.needle, length))


def _rows(
    codecs: Sequence[Codec],
    candidates: Sequence[Candidate],
    geometry: Geometry,
    scores: Sequence[Sequence[Scores]],
    needles: Sequence[Needle],
    hits: Sequence[Sequence[bool]],
) -> list[dict[str, Any]]:
    """One row per codec, most bytes first."""
    rows = []
    for codec in codecs:
        places = [i for i, candidate in enumerate(candidates) if candidate.codec is codec]
        if places:
            rows.append(row_of(codec, geometry, [scores[i] for i in places], needles, [hits[i] for i in places]))
    return sorted(rows, key=lambda row: (-row["bytes_per_token_head"]["kv"], row["kld"]["mean"]))
