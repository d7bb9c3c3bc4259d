# SPDX-License-Identifier: Apache-2.0
"""A model folder without weights: config.json, a tokenizer that any text of its words survives, and projectors of a preset.

In: the name of a built-in shape, or a model's config. Out: a folder for `vllm serve --load-format dummy`, and projector
files with random orthogonal bases. Speed and capacity do not depend on the weights; quality is not measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_kvsplice.errors import KVSpliceError

BASES = "dummy weights, random orthogonal bases"
_QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    torch_dtype="bfloat16",
    bos_token_id=151643,
    eos_token_id=151643,
)
# From the models' published config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN2
    | dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": _QWEN2
    | dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        torch_dtype="bfloat16",
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=False,
    ),
}


def write_model(folder: Path, tokenizer: Path, shape: str | None, model: str | None) -> dict[str, Any]:
    """Write config.json into one folder and a tokenizer of as many words as its vocab_size into another; returns the config.

    Two folders: beside a config transformers would load the tokenizer class of its model_type instead.

    Raises:
        KVSpliceError: no such shape, or no config at ``model``.
    """
    if shape is not None and shape not in SHAPES:
        raise KVSpliceError(f"--model-shape {shape} is not known: expected {', '.join(SHAPES)}.")
    config = SHAPES[shape] if shape is not None else _config_of(str(model))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(tokenizer, _vocab_size(config))
    return config


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One word per token id, split at spaces: decoding and encoding again gives the same ids, so lengths are exact."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer_class="TokenizersBackend", clean_up_tokenization_spaces=False, unk_token="w0")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 1 << 30}))


def write_projector(folder: Path, model: Path, preset: str, seed: int = 0) -> Path:
    """A projector file of a preset's layout for a model folder; returns its path.

    Sides that a calibration would leave untouched or rotate by Hadamard are the same here; the others get random
    orthonormal rows and a random mean, as served speed asks for no more than their shapes.
    """
    import torch

    from vllm_kvsplice.calibration.presets import SideRecipe, resolve
    from vllm_kvsplice.codec.bases import hadamard
    from vllm_kvsplice.codec.layout import LatentLayout, Side
    from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, build_metadata
    from vllm_kvsplice.scoring.evaluate import read_config

    name = Path(preset).stem
    metadata = build_metadata(read_config(str(model)), name, model_name=BASES, recipe={"bases": BASES, "seed": seed})
    H, D = metadata.model.num_kv_heads, metadata.model.head_dim
    layout, recipe = resolve(preset, D)
    generator = torch.Generator().manual_seed(seed)

    def basis(side: SideRecipe, layout: LatentLayout, name: Side) -> Basis:
        if side.untouched:
            return Basis.orthogonal(torch.eye(D).expand(H, -1, -1))
        if side.basis == "hadamard":
            return Basis.orthogonal(hadamard(D).expand(H, -1, -1))
        rows = torch.linalg.qr(torch.randn(H, D, D, generator=generator))[0][:, : layout.rank(name)]
        return Basis.orthogonal(rows, 0.01 * torch.randn(H, D, generator=generator))

    layers = {
        i: LayerProjector(layout, basis(recipe.k, layout, "k"), basis(recipe.v, layout, "v"))
        for i in range(metadata.model.num_hidden_layers)
    }
    path = folder / f"{name}.kvsplice.safetensors"
    Projector(metadata, layers).save(path)
    return path


def _config_of(model: str) -> dict[str, Any]:
    from vllm_kvsplice.scoring.evaluate import read_config

    config: dict[str, Any] = read_config(model).to_dict()
    return config


def _vocab_size(config: dict[str, Any]) -> int:
    text = config.get("text_config") or config
    return int(text["vocab_size"])
