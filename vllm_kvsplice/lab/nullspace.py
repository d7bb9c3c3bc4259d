# SPDX-License-Identifier: Apache-2.0
"""LayerNorm's nullspace: one number less per vector, because what LayerNorm puts out has mean zero before its gain.

With gain g and bias b, y = W(g * u + b) + c where the elements of u add up to zero. So y lies in a hyperplane n.y = const
exactly if (W diag(g))^T n is a multiple of the all-ones vector. All heads' keys or values together (H * head_dim of them,
as many as the hidden size in a model without grouped heads) have such an n; one head's, of head_dim << hidden, have
none: ``ranks_saved`` measures it. Two codecs, both without calibration and in 16 bits:

"head" is the published trick, which drops the all-ones direction of each head's vector, of which nothing says that it is
empty. "joint" drops n of all heads, which loses nothing. Neither is for serving: RMSNorm subtracts no mean, and RoPE turns
keys out of their hyperplane.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.codec.fingerprint import model_shape
from vllm_kvsplice.codec.layout import SIDES, Side
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import KV, Attach, Bytes, Codec, Geometry, Setup, on_cache
from vllm_kvsplice.lab.dense import bf16
from vllm_kvsplice.lab.norms import AttentionInput, attention_inputs, projection

Scope = Literal["head", "joint"]
EXACT = 1e-6  # relative residual below which a normal is one
SEEN = 1e-2  # of the rms length of keys or values: most that a constant may vary, in bf16 too
PROBE_TOKENS = 32
NAMES = {"k": "keys", "v": "values"}


class Hyperplane(NamedTuple):
    """n.y = offset for every key or value y of all heads together."""

    normal: Tensor  # [n] fp64, length 1
    offset: float
    residual: float  # of (W diag(g))^T n against the all-ones vector, relative: 0 if the hyperplane exists


def nullspace_codec(scope: Scope, sides: str) -> Codec:
    """``sides``: "K", "V" or "K+V"; the others stay in 16 bits."""
    count = partial(_bytes, scope=scope, sides=sides)
    return Codec(
        f"nullspace {scope} {sides}", "nullspace", "this project", count, partial(_attach, scope=scope, sides=sides)
    )


def layer_norms(model: Any) -> dict[int, AttentionInput]:
    """The inputs of attention by layer; KVSpliceError where they are not LayerNorm's."""
    inputs = attention_inputs(model)
    for at in inputs.values():
        if not isinstance(at.norm, nn.LayerNorm):
            raise KVSpliceError(
                f"LN-nullspace does not apply to {type(model).__name__}, whose {type(at.norm).__name__} subtracts no mean: "
                "expected a model with LayerNorm (leave out --study nullspace)."
            )
    return inputs


def hyperplane(at: AttentionInput, side: Side, rows: slice = slice(None)) -> Hyperplane:
    """Of keys or values of some rows of their projection, all of them by default."""
    weight, bias = (part[rows] for part in projection(at, side))
    gain, shift = (p.detach().double() for p in (at.norm.weight, at.norm.bias))
    read = weight * gain  # [n, hidden]
    ones = torch.ones(read.shape[1], 1, dtype=torch.float64, device=read.device)
    n = torch.linalg.lstsq(read.T, ones, driver="gelsd" if read.device.type == "cpu" else None).solution
    residual = float((read.T @ n - ones).norm() / ones.norm())
    normal = n[:, 0] / n.norm()
    return Hyperplane(normal, float(normal @ (weight @ shift + bias)), residual)


def ranks_saved(model: Any, head_dim: int) -> dict[str, Any]:
    """How many of the numbers of a token LayerNorm's nullspace saves without loss, mean over layers and sides."""
    heads, joint, least = [], [], []
    for at in layer_norms(model).values():
        for side in SIDES:
            size = projection(at, side)[0].shape[0]
            found = [hyperplane(at, side, slice(i, i + head_dim)) for i in range(0, size, head_dim)]
            heads += [h.residual < EXACT for h in found]
            least += [h.residual for h in found]
            joint.append(hyperplane(at, side).residual < EXACT)
    return {
        "head": {"numbers": head_dim, "saved": sum(heads) / len(heads), "least_residual": min(least)},
        "joint": {"numbers": size, "saved": sum(joint) / len(joint)},
    }


def without(x: Tensor, normal: Tensor, offset: float) -> Tensor:
    """Vectors [..., n] as stored in 16 bits in n - 1 coordinates, the one along ``normal`` [n] taken for ``offset``.

    The coordinates are those of the Householder reflection that maps normal to the first axis.
    """
    w = normal.float().clone()
    w[0] += w[0].sign() if w[0] else 1.0  # the better conditioned of both signs: normal goes to -+ the first axis
    sign = -float(torch.sign(normal[0])) if normal[0] else -1.0
    w /= w.norm()

    def reflected(y: Tensor) -> Tensor:
        return y - 2.0 * (y @ w)[..., None] * w

    z = bf16(reflected(x.float())).float()
    z[..., 0] = sign * offset
    return reflected(z)


def _bytes(geometry: Geometry, scope: Scope, sides: str) -> Bytes:
    numbers = geometry.head_dim - 1 if scope == "head" else geometry.head_dim - 1 / geometry.num_kv_heads
    return Bytes(*(2.0 * (numbers if side in sides.split("+") else geometry.head_dim) for side in "KV"))


def _attach(setup: Setup, scope: Scope, sides: str) -> Attach:
    inputs = layer_norms(setup.model)
    wanted = [side for side in SIDES if side.upper() in sides.split("+")]
    if scope == "head":
        return on_cache(lambda i, k, v: _replaced(k, v, dict.fromkeys(wanted, _head)))
    planes = {(i, side): hyperplane(at, side) for i, at in inputs.items() for side in wanted}
    _check(setup.model, planes)
    return on_cache(lambda i, k, v: _replaced(k, v, {side: partial(_joint, plane=planes[i, side]) for side in wanted}))


def _replaced(k: Tensor, v: Tensor, fns: dict[Side, Any]) -> KV:
    return fns.get("k", bf16)(k), fns.get("v", bf16)(v)


def _head(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return without(x, torch.full((n,), n**-0.5, dtype=torch.float64, device=x.device), 0.0)


def _joint(x: Tensor, plane: Hyperplane) -> Tensor:
    rows = without(x.transpose(1, 2).flatten(2), plane.normal.to(x.device), plane.offset)
    return rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _check(model: Any, planes: dict[tuple[int, Side], Hyperplane]) -> None:
    """Raise KVSpliceError if a forward leaves a hyperplane: because there is none, or RoPE turns the keys."""
    seen: dict[tuple[int, Side], Tensor] = {}

    def watch(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> KV:
        seen[layer_idx, "k"], seen[layer_idx, "v"] = (x.transpose(1, 2).flatten(2).double() for x in (k, v))
        return k, v

    tokens = torch.arange(PROBE_TOKENS, device=model.device) % model_shape(model.config).vocab_size
    with torch.no_grad(), transformed_kv(model, watch):
        model(tokens[None], use_cache=False)
    for (i, side), plane in planes.items():
        y = seen[i, side]
        if ((y @ plane.normal - plane.offset).abs().max() > SEEN * y.square().sum(-1).mean().sqrt()).item():
            raise KVSpliceError(
                f"{NAMES[side]} of {type(model).__name__} layer {i} are in no hyperplane (relative residual "
                f"{plane.residual:.2g}): expected as many of them as the hidden size, and no RoPE."
            )
