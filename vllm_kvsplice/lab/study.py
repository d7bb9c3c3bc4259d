# SPDX-License-Identifier: Apache-2.0
"""``kvsplice study``: the studies on one model, by the machinery of ``compare``.

In: a ``StudyRequest``. Out: the result as a dict, which ``study_report`` prints and draws and ``results`` writes. A codec
that several studies ask for is calibrated and scored once; each sample of a calibration text is read once.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from vllm_kvsplice.calibration.texts import Text, code_text, load_text, refuse_overlap
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import nullspace, studies
from vllm_kvsplice.lab.codec import Attach, Codec, Run, Setup
from vllm_kvsplice.lab.compare import calibrate
from vllm_kvsplice.lab.loaded import Loaded, load
from vllm_kvsplice.lab.rows import row_of
from vllm_kvsplice.lab.score import Candidate, score_needles, score_windows
from vllm_kvsplice.lab.statistics import LayerStatistics, spread
from vllm_kvsplice.lab.studies import Change, Source, Variant
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.scoring.needle import Needle, fraction
from vllm_kvsplice.scoring.results import provenance


@dataclass(frozen=True)
class StudyRequest:
    """Some studies of one model. ``text`` (a file) or ``score_dataset`` is scored, by default the held-out built-in English;
    ``calibration`` (a file) or ``dataset`` calibrated on, by default the built-in English. ``studies`` empty is all;
    ``windows`` 0 is the whole text; ``samples`` windows make a calibration, ``seeds`` of them the study of that name."""

    model: str
    studies: tuple[str, ...] = ()
    text: str | None = None
    score_dataset: str | None = None
    calibration: str | None = None
    dataset: str | None = None
    samples: int = 32
    seq_len: int | None = None
    windows: int = 0
    needle: int = 0
    needle_len: int | None = None
    seeds: int = 3
    device: str = "auto"
    dtype: str = "auto"


class Sample(NamedTuple):
    """What statistics are taken from."""

    source: Source
    samples: int
    seed: int
    change: Change


EITHER = (("text", "score_dataset"), ("calibration", "dataset"))
Key = tuple[str, Sample]  # a codec by name, and what it is calibrated on


class Outcome(NamedTuple):
    """What one scored text showed, by ``Key``: sums per window, and needle hits."""

    scores: dict[Key, list[Scores]]
    needles: list[Needle]
    hits: dict[Key, list[bool]]
    facts: dict[str, Any]


def request_of(given: Mapping[str, Any]) -> StudyRequest:
    """A request from options, over those of the TOML file under ``recipe``, if any; KVSpliceError if it makes none.

    A text's file that is given takes the place of a data set in the recipe, and the other way round.
    """
    options = dict(given)
    path = options.pop("recipe", None)
    if path:
        replaced = {other for pair in EITHER for one, other in (pair, pair[::-1]) if one in options}
        try:
            recipe = tomllib.loads(Path(path).read_text())
            options = {name: value for name, value in recipe.items() if name not in replaced} | options
        except (OSError, ValueError) as error:
            raise KVSpliceError(f"recipe {path} cannot be read ({error}): see the files in configs/recipes/.") from None
    unknown = options.keys() - StudyRequest.__dataclass_fields__.keys()
    if unknown:
        raise KVSpliceError(
            f"recipe {path} has a {min(unknown)!r}, which no option is: see the files in configs/recipes/."
        )
    if "model" not in options:
        raise KVSpliceError("no model is given: expected MODEL, or a recipe that names one by --recipe FILE.")
    try:
        return TypeAdapter(StudyRequest).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise KVSpliceError(
            f"recipe {path} has a bad {first['loc'][0]} ({first['msg']}): see configs/recipes/."
        ) from None


def run(request: StudyRequest) -> dict[str, Any]:
    """Run the studies; raises KVSpliceError on a bad request, or for a study that was asked for and does not apply."""
    if min(request.seeds, request.samples) < 1:
        raise KVSpliceError(f"--seeds {request.seeds} and --samples {request.samples}: expected at least 1 of each.")
    chosen = studies.choose(request.studies)
    texts, scored = _texts(request)
    loaded = load(request.model, request.device, request.dtype, request.seq_len)
    variants = {study.name: study.variants(loaded.geometry) for study in chosen}
    seen = Statistics(loaded, texts, _users(request, variants))
    candidates, left_out = _prepared(request, variants, seen)
    variants = {name: found for name, found in variants.items() if name not in left_out}
    outcomes = {
        source: _outcome(request, text, _keys(request, variants, source), candidates, loaded)
        for source, text in scored.items()
        if _keys(request, variants, source)
    }
    result = {
        **loaded.described(request.model),
        "texts": {source: _named(scored[source]) | outcome.facts for source, outcome in outcomes.items()},
        "calibration": {source: _named(texts[source]) for source in dict.fromkeys(s.source for s in seen.found)},
        "samples": request.samples,
        "seeds": request.seeds,
        "needle_samples": request.needle,
        "studies": {
            study.name: {
                "about": study.about,
                "axis": study.axis,
                "rows": [_row(request, v, outcomes[v.scored], seen) for v in variants[study.name]],
            }
            for study in chosen
            if study.name in variants
        },
        "left_out": left_out,
        **provenance(),
    }
    if "nullspace" in variants:
        result["studies"]["nullspace"]["ranks_saved"] = nullspace.ranks_saved(loaded.model, loaded.geometry.head_dim)
    if "sides" in variants:
        result["studies"]["sides"]["spread"] = spread(seen.of(_samples(request, variants["sides"][0])[0]))
    return result


# ---------------------------------------------------------------- texts and samples
def _texts(request: StudyRequest) -> tuple[dict[Source, Text], dict[Source, Text]]:
    """Texts to calibrate on and to score on; KVSpliceError if one of the first holds one of the others, or lies in it."""
    calibration: dict[Source, Text] = {
        "given": load_text(request.calibration, request.dataset),
        "english": load_text(),
        "code": code_text(),
    }
    scored: dict[Source, Text] = {
        "given": load_text(request.text, request.score_dataset, held_out=True),
        "code": code_text(held_out=True),
    }
    for one in scored.values():
        for other in calibration.values():
            refuse_overlap(one, other, "--calibration")
    return calibration, scored


def _named(text: Text) -> dict[str, Any]:
    return {"name": text.name, "sha256": text.sha256}


def _samples(request: StudyRequest, variant: Variant) -> list[Sample]:
    """What a variant is calibrated on, once for each row of sums that its means are of."""
    seeds = range(request.seeds if variant.stability else 1)
    samples = variant.samples or request.samples
    return [Sample(variant.calibration, samples, seed, variant.change) for seed in seeds]


def _users(request: StudyRequest, variants: Mapping[str, Sequence[Variant]]) -> dict[Sample, list[Codec]]:
    """Samples with the codecs that are calibrated on them."""
    users: dict[Sample, list[Codec]] = {}
    for found in variants.values():
        for variant in found:
            for sample in _samples(request, variant):
                users.setdefault(sample, []).append(variant.codec)
    return users


class Statistics:
    """Statistics by sample, taken when they are first asked for."""

    def __init__(self, loaded: Loaded, texts: Mapping[Source, Text], users: Mapping[Sample, Sequence[Codec]]) -> None:
        self.loaded, self.texts, self.users = loaded, texts, users
        self.found: dict[Sample, dict[int, LayerStatistics]] = {}

    def of(self, sample: Sample) -> dict[int, LayerStatistics]:
        """By layer."""
        if sample not in self.found:
            text, users = self.texts[sample.source], self.users[sample]
            with sample.change(self.loaded.model):
                self.found[sample] = calibrate(self.loaded, text, sample.samples, sample.seed, users)
        return self.found[sample]

    def windows(self, sample: Sample) -> int | None:
        """Windows that were read: fewer than wanted where the text is short; None if none were."""
        if sample not in self.found:
            return None
        return next(iter(self.found[sample].values())).moments.tokens // self.loaded.geometry.seq_len


# ---------------------------------------------------------------- preparing and scoring
def _prepared(
    request: StudyRequest, variants: Mapping[str, Sequence[Variant]], seen: Statistics
) -> tuple[dict[Key, Candidate], dict[str, str]]:
    """Every codec on every sample; and why a study does not apply to this model, which is an error where it was asked for.
    Studies that need no text come first: they are refused at once."""
    candidates: dict[Key, Candidate] = {}
    left_out: dict[str, str] = {}
    for name in sorted(variants, key=lambda name: any(v.codec.needs != "nothing" for v in variants[name])):
        try:
            for variant in variants[name]:
                for sample in _samples(request, variant):
                    key = variant.codec.name, sample
                    if key not in candidates:
                        candidates[key] = Candidate(variant.codec, sample.seed, _attach(variant.codec, sample, seen))
        except KVSpliceError as error:
            if request.studies:
                raise
            left_out[name] = str(error)
    return candidates, left_out


def _attach(codec: Codec, sample: Sample, seen: Statistics) -> Attach:
    """A codec prepared from a sample, in a model that is changed as the sample says."""
    loaded = seen.loaded
    codec.bytes(loaded.geometry)
    attach = codec.prepare(Setup(loaded.model, loaded.geometry, {} if codec.needs == "nothing" else seen.of(sample)))

    @contextmanager
    def changed(model: Any, run: Run) -> Iterator[None]:
        with sample.change(model), attach(model, run):
            yield

    return changed


def _keys(request: StudyRequest, variants: Mapping[str, Sequence[Variant]], source: Source) -> list[Key]:
    """What is scored on a text, each once."""
    found = [v for study in variants.values() for v in study if v.scored == source]
    return list(dict.fromkeys((v.codec.name, sample) for v in found for sample in _samples(request, v)))


def _outcome(
    request: StudyRequest, text: Text, keys: Sequence[Key], candidates: Mapping[Key, Candidate], loaded: Loaded
) -> Outcome:
    ids = loaded.ids(text)
    windows = loaded.windows(ids, request.windows)
    needles = loaded.needles(ids, request.needle, request.needle_len)
    chosen = [candidates[key] for key in keys]
    scores = score_windows(loaded.model, chosen, windows)
    base_hits, hits = score_needles(loaded.model, chosen, needles)
    total = sum(scores[0], Scores())
    facts = {
        "windows": len(windows),
        "tokens": total.tokens,
        "ppl": math.exp(total.nll_base / total.tokens),
        "needle": fraction(base_hits) if needles else None,
    }
    return Outcome(dict(zip(keys, scores, strict=True)), needles, dict(zip(keys, hits, strict=True)), facts)


def _row(request: StudyRequest, variant: Variant, outcome: Outcome, seen: Statistics) -> dict[str, Any]:
    """The comparison's row of a variant, with its place in the study."""
    samples = _samples(request, variant)
    keys = [(variant.codec.name, sample) for sample in samples]
    scores, hits = [outcome.scores[key] for key in keys], [outcome.hits[key] for key in keys]
    row = row_of(variant.codec, seen.loaded.geometry, scores, outcome.needles, hits)
    read = None if variant.codec.needs == "nothing" else seen.windows(samples[0])
    return {"at": variant.at} | row | {"calibration_windows": read, "products": variant.products}
