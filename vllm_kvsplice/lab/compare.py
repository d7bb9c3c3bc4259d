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

from vllm_kvsplice.calibration.texts import Text, load_text, refuse_overlap, refuse_own, token_windows
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import registry
from vllm_kvsplice.lab.codec import Codec, Geometry, Setup
from vllm_kvsplice.lab.loaded import Loaded, load
from vllm_kvsplice.lab.rows import row_of
from vllm_kvsplice.lab.score import Candidate, score_needles, score_windows
from vllm_kvsplice.lab.statistics import LayerStatistics, collect, with_fisher, with_joint, with_vectors
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.scoring.needle import Needle, fraction
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
    projectors = {path: Projector.load(path) for path in request.projectors}
    codecs = registry.choose(request.codecs, projectors)
    text = load_text(request.text, held_out=True)
    calibration = load_text(request.calibration, request.dataset)
    refuse_overlap(text, calibration, "--calibration")
    for path, projector in projectors.items():
        refuse_own(text, projector.metadata.calibration, path)
    loaded = load(request.model, request.device, request.dtype, request.seq_len)
    model, geometry = loaded.model, loaded.geometry
    codecs, left_out = _that_fit(codecs, geometry, refuse=bool(request.codecs))
    ids = loaded.ids(text)
    windows = loaded.windows(ids, request.windows)
    needles = loaded.needles(ids, request.needle, request.needle_len)
    candidates, unprepared = prepare(request, codecs, loaded, calibration)
    scores = score_windows(model, candidates, windows)
    base_hits, hits = score_needles(model, candidates, needles)
    total = sum(scores[0], Scores())
    return {
        **loaded.described(request.model),
        "text": {"name": text.name, "sha256": text.sha256},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "samples": request.samples},
        "seeds": request.seeds,
        "windows": len(windows),
        "tokens": total.tokens,
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


def prepare(
    request: CompareRequest, codecs: Sequence[Codec], loaded: Loaded, text: Text
) -> tuple[list[Candidate], dict[str, str]]:
    """Every codec, those that need calibration once per sample of the text; and why a codec cannot be had for this model,
    which is an error where it was asked for."""
    plain, asking = ([c for c in codecs if (c.needs != "nothing") is wanted] for wanted in (False, True))
    candidates: list[Candidate] = []
    left_out: dict[str, str] = {}

    def add(chosen: Sequence[Codec], seed: int, seen: dict[int, LayerStatistics]) -> None:
        for codec in chosen:
            try:
                candidates.append(Candidate(codec, seed, codec.prepare(Setup(loaded.model, loaded.geometry, seen))))
            except KVSpliceError as error:
                if request.codecs:
                    raise
                left_out[codec.name] = str(error)

    add(plain, 0, {})
    for seed in range(request.seeds if asking else 0):
        add(asking, seed, calibrate(loaded, text, request.samples, seed, asking))
    return candidates, left_out


def calibrate(
    loaded: Loaded, text: Text, samples: int, seed: int, codecs: Sequence[Codec]
) -> dict[int, LayerStatistics]:
    """Statistics of one sample of a text, in windows as long as the scored ones, with what the codecs need."""
    windows = token_windows(text, loaded.tokenizer, loaded.geometry.seq_len, samples, seed)
    seen = collect(loaded.model, windows)
    needs = {c.needs for c in codecs}
    seen = with_joint(loaded.model, windows, seen) if "joint" in needs else seen
    seen = with_vectors(loaded.model, windows, seen) if "vectors" in needs else seen
    return with_fisher(loaded.model, windows, seen) if "gradients" in needs else seen


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
