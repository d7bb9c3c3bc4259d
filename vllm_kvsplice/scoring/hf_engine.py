# SPDX-License-Identifier: Apache-2.0
"""Fast scoring through transformers: a simulation of the served cache by the same reference codec.

In: a model, a projector (or None for the calibration-free codec), windows and needles of token ids. Out: an
``Outcome``. Every key and value is replaced, after RoPE, by what a reader of the cache would see: encode -> quantise ->
dequantise -> expand. Baseline and kvsplice run on the same window one after the other, so only two sets of logits are
held. ``kld`` is over the full vocabulary here, ``kld_topk`` the statistic that the vLLM engine can measure too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import Transform, load_model, transformed_kv
from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.layout import Side
from vllm_kvsplice.codec.projector import Folded, LayerProjector, Projector, default_layer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.metrics import Scores, score_logits
from vllm_kvsplice.scoring.needle import Needle
from vllm_kvsplice.scoring.results import Outcome

_CONSOLE = Console(stderr=True)  # progress; standard output is for results


def run(
    model_name: str,
    projector: Projector | None,
    windows: Sequence[Sequence[int]],
    needles: Sequence[Needle],
    device: str = "auto",
    dtype: str = "auto",
    topk: int = 128,
) -> Outcome:
    """Score the windows (teacher forced) and the needles with and without the codec; raises KVSpliceError if the model
    cannot be loaded or does not attend through transformers' interface."""
    model, _ = load_model(model_name, device, dtype)
    codec = Codec(projector, model.dtype)
    scores = Scores()
    for window in track(windows, "windows", console=_CONSOLE, disable=not windows):
        ids = torch.tensor(window, device=model.device)
        base, other = logits(model, ids, None), logits(model, ids, codec)
        scores += score_logits(base[:-1], other[:-1], ids[1:], topk)
    hits: dict[str, list[bool]] = {"baseline": [], "kvsplice": []} if needles else {}
    for needle in track(needles, "needles", console=_CONSOLE, disable=not needles):
        for run_name, fn in (("baseline", None), ("kvsplice", codec)):
            hits[run_name].append(answers(model, needle, fn))
    return Outcome(scores, hits, {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)})


@torch.inference_mode()
def logits(model: Any, ids: Tensor, codec: Transform | None) -> Tensor:
    """Next-token logits [T, vocab] of one window, its keys and values through ``codec`` if one is given."""
    with transformed_kv(model, codec) if codec else nullcontext():
        result: Tensor = model(ids[None], use_cache=False).logits[0]
    return result


def answers(model: Any, needle: Needle, codec: Transform | None) -> bool:
    """Whether greedy decoding gives the needle's answer, by one teacher-forced forward.

    Equivalent by induction: greedy decoding gives the first token of the answer exactly if it is the argmax after the
    prompt; given that, the context of the second token is the teacher-forced one, and so on. So all tokens come out
    right exactly if each is the argmax at its teacher-forced position.
    """
    answer = torch.tensor(needle.answer, device=model.device)
    ids = torch.tensor(needle.prompt + needle.answer, device=model.device)
    predicted = logits(model, ids, codec)[-len(answer) - 1 : -1].argmax(-1)
    return bool((predicted == answer).all())


class Codec:
    """What a reader of the cache sees in place of k and v: ``fn`` of ``transformed_kv``.

    Without a projector every layer has the calibration-free codec. Arithmetic is fp32, as in serving; the result has
    the dtype of the model. Raises KVSpliceError for a layer that the projector does not have.
    """

    def __init__(self, projector: Projector | None, dtype: torch.dtype) -> None:
        self.projector = projector
        self.wide_dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        self.ready: dict[int, tuple[LayerProjector, dict[Side, Folded]]] = {}

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.ready:
            self.ready[layer_idx] = self._prepare(layer_idx, k)
        layer, folded = self.ready[layer_idx]
        return self._decoded(k, layer, "k", folded["k"]), self._decoded(v, layer, "v", folded["v"])

    def _prepare(self, layer_idx: int, k: Tensor) -> tuple[LayerProjector, dict[Side, Folded]]:
        layer = self.projector.layers.get(layer_idx) if self.projector else default_layer(k.shape[-1], k.shape[1])
        if layer is None:
            raise KVSpliceError(
                f"the projector has no layer {layer_idx}: make one for this model with `kvsplice calibrate MODEL --out FILE`."
            )
        sides: tuple[Side, ...] = ("k", "v")
        return layer, {side: Folded(*(t.to(k.device) for t in layer.side(side).folded())) for side in sides}

    def _decoded(self, x: Tensor, layer: LayerProjector, side: Side, basis: Folded) -> Tensor:
        """[B, H, T, head_dim] -> the same, decoded from its codes."""
        z = reference.encode(x.transpose(1, 2).float(), basis.encode, basis.mean)
        z = reference.roundtrip(z, layer.layout, side, self.wide_dtype)
        return reference.expand(z, basis.decode, basis.mean).transpose(1, 2).to(x.dtype)
