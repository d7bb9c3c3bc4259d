# SPDX-License-Identifier: Apache-2.0
"""What a projector costs and saves: perplexity, KL divergence, agreement, retrieval, bytes and capacity.

In: an ``EvalRequest``. Out: the result as a dict, which ``results`` prints and writes. This file cuts the text into
windows, makes the needles and hands both to one engine; ``hf_engine`` simulates, ``vllm_engine`` serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_kvsplice.calibration.texts import load_text, refuse_own, special_prefix
from vllm_kvsplice.codec.fingerprint import model_shape
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.codec.projector_source import locate
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.inspect_file import describe, served_layouts, summary
from vllm_kvsplice.scoring.needle import QUESTION, TEMPLATE, Needle, NeedleTask, by_depth, fraction, make_samples
from vllm_kvsplice.scoring.results import Outcome, provenance

DEFAULT_SEQ_LEN = 2048
STATISTIC = {
    "hf": "mean KL(base || kvsplice) per token over the full vocabulary",
    "vllm": "mean KL(base || kvsplice) per token over the shared top-k and a rest bucket, a lower bound of the full one",
}


@dataclass(frozen=True)
class EvalRequest:
    """One scoring run. ``None`` and 0 are defaults: the codec that serving would pick, the built-in text, all windows."""

    model: str
    projector: str | None = None
    text: str | None = None
    engine: Literal["hf", "vllm"] = "hf"
    seq_len: int | None = None
    windows: int = 0
    needle: int = 0
    needle_len: int | None = None
    needle_template: str = TEMPLATE
    needle_question: str = QUESTION
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    topk: int = 128
    cache_gib: float = 1.0
    vllm_args: dict[str, Any] = field(default_factory=dict)


def run(request: EvalRequest) -> dict[str, Any]:
    """Score a model with and without the codec; raises KVSpliceError on a bad request."""
    config, tokenizer = load_config(request.model)
    shape = model_shape(config)
    found = locate(request.projector, request.model)
    path = str(found) if found else None
    projector = Projector.load(path) if path else None
    if projector:
        projector.verify(config)
    seq_len = choose_seq_len(config, request.seq_len)
    text = load_text(request.text, held_out=True)
    if projector:
        refuse_own(text, projector.metadata.calibration, str(path))
    ids = list(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids)
    windows = cut_windows(ids, special_prefix(tokenizer), seq_len, request.windows)
    needles = _needles(request, tokenizer, ids, choose_seq_len(config, request.needle_len or seq_len))
    outcome = _run_engine(request, projector, path, windows, needles)
    codec = describe(projector, shape, path)
    return report(request, outcome, codec, needles) | {
        "model": {"name": request.model, "digest": shape.digest, "revision": getattr(config, "_commit_hash", None)},
        "projector": {"file": path, "layout": summary(served_layouts(projector, shape).values())}
        | {key: codec.get(key) for key in ("preset", "sha256", "recipe", "calibration", "versions")},
        "seq_len": seq_len,
        "windows": len(windows),
        "text": {"name": text.name, "sha256": text.sha256},
        **provenance(),
    }


def report(request: EvalRequest, outcome: Outcome, codec: dict[str, Any], needles: Sequence[Needle]) -> dict[str, Any]:
    """The measured part of the result. ``tokens`` are those scored; ``cache_tokens`` those that fit, as vLLM says."""
    scores, hits = outcome.scores, outcome.hits
    return {
        "ppl": scores.ppl,
        "kld": scores.kld_topk if request.engine == "vllm" else scores.kld,
        "kld_statistic": STATISTIC[request.engine],
        "kld_topk": scores.kld_topk,
        "topk": request.topk,
        "top1": scores.top1,
        "needle": {name: fraction(found) for name, found in hits.items()} or None,
        "needle_by_depth": by_depth(needles, hits) if hits else None,
        "needle_length": len(needles[0].prompt) + len(needles[0].answer) if needles else None,
        "bytes_per_token_head": codec["bytes_per_token_head"],
        "ratio": codec["ratio"],
        "tokens": scores.tokens,
        "cache_tokens": None,
        "engine": request.engine,
        **outcome.facts,
    }


def cut_windows(ids: Sequence[int], prefix: Sequence[int], seq_len: int, count: int) -> list[list[int]]:
    """Cut a text into windows of seq_len tokens that do not overlap, each opened by ``prefix``; what is left over is
    dropped. ``count`` 0 is all. Raises KVSpliceError if the text is shorter than one window."""
    step = seq_len - len(prefix)
    windows = [[*prefix, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    if not windows:
        raise KVSpliceError(
            f"the text has {len(ids)} tokens, expected at least one window of {step}: give a longer --text or a smaller --seq-len."
        )
    return windows[:count] if count else windows


def choose_seq_len(config: Any, wanted: int | None) -> int:
    """The window length: min(2048, what the model can hold) unless given. One position is left for the token that a
    server generates after a prompt. Raises KVSpliceError if the model cannot hold it."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_SEQ_LEN + 1) - 1
    if wanted is None:
        return min(DEFAULT_SEQ_LEN, longest)
    if not 2 <= wanted <= longest:
        raise KVSpliceError(
            f"length {wanted} does not fit the model: expected 2 to {longest} tokens (--seq-len, --needle-len)."
        )
    return wanted


def load_config(model: str) -> tuple[Any, Any]:
    """Config and tokenizer of a Hugging Face id or a folder; raises KVSpliceError if there is no such model."""
    from transformers import AutoTokenizer

    return read_config(model), _read(AutoTokenizer, model)


def read_config(model: str) -> Any:
    """The transformers config of a Hugging Face id or a folder; raises KVSpliceError if there is no such model."""
    from transformers import AutoConfig

    return _read(AutoConfig, model)


def _read(kind: Any, model: str) -> Any:
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KVSpliceError(
            f"model {model!r} cannot be read ({reason.rstrip('.')}): give a Hugging Face id or a folder with config.json and a tokenizer."
        ) from None


def _needles(request: EvalRequest, tokenizer: Any, ids: Sequence[int], length: int) -> list[Needle]:
    if not request.needle:
        return []
    task = NeedleTask(request.needle, length, request.needle_template, request.needle_question, request.seed)
    return make_samples(tokenizer, ids, task)


def _run_engine(
    request: EvalRequest, projector: Projector | None, path: str | None, windows: list[list[int]], needles: list[Needle]
) -> Outcome:
    if request.engine == "hf":
        from vllm_kvsplice.scoring import hf_engine

        return hf_engine.run(request.model, projector, windows, needles, request.device, request.dtype, request.topk)
    from vllm_kvsplice.scoring import vllm_engine

    return vllm_engine.run(
        request.model, path, windows, needles, request.dtype, request.topk, request.cache_gib, request.vllm_args
    )
