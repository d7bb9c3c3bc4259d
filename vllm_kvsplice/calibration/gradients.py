# SPDX-License-Identifier: Apache-2.0
"""Keys, values and what they matter: the gradients of the model's own log-likelihood by them. In: a window. Out: ``Pulled`` by slot.

With every next token y drawn from the model itself, the mean of g g^T, g the gradient of sum log p(y), is the Fisher
information: to second order an error e of the keys or values costs KL(p || q) = 1/2 e^T F e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.codec.layout import SIDES, Side

Slot = tuple[int, Side]  # layer and side


class Pulled(NamedTuple):
    """One side of one layer over a window: its vectors and the gradients of sum log p by them, [T, H, head_dim] each."""

    x: Tensor
    gradient: Tensor


def pull(model: Any, window: Tensor, generator: torch.Generator) -> dict[Slot, Pulled]:
    """Keys, values and their gradients of one window [T], for next tokens drawn from the model."""
    leaves: dict[int, tuple[Tensor, Tensor]] = {}
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held[layer_idx] = k.detach(), v.detach()
        leaves[layer_idx] = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
        return k + leaves[layer_idx][0], v + leaves[layer_idx][1]

    model.requires_grad_(False)
    with torch.enable_grad(), transformed_kv(model, watch):
        logprobs = model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
        total = logprobs.gather(1, drawn).sum()
    gradients = iter(torch.autograd.grad(total, [leaf for pair in leaves.values() for leaf in pair]))
    return {
        (i, side): Pulled(*(t[0].transpose(0, 1).float() for t in (x, next(gradients))))
        for i, pair in held.items()
        for side, x in zip(SIDES, pair, strict=True)
    }
