# SPDX-License-Identifier: Apache-2.0
"""A model that is scored: loaded once, with windows and needles cut for it.

In: a model's id or folder. Out: ``Loaded``, from which the comparison and the studies take what they score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_kvsplice.calibration.hf_attention import load_model
from vllm_kvsplice.calibration.texts import Text, special_prefix
from vllm_kvsplice.codec.fingerprint import model_shape, shown_name
from vllm_kvsplice.lab.codec import Geometry
from vllm_kvsplice.scoring.evaluate import choose_seq_len, cut_windows
from vllm_kvsplice.scoring.needle import Needle, NeedleTask, make_samples


class Loaded(NamedTuple):
    """A model, its tokenizer, and what bytes depend on."""

    model: Any
    tokenizer: Any
    geometry: Geometry

    def ids(self, text: Text) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids)

    def windows(self, ids: Sequence[int], count: int) -> list[list[int]]:
        """The first ``count`` windows, 0 for all; KVSpliceError if there is none."""
        return cut_windows(ids, special_prefix(self.tokenizer), self.geometry.seq_len, count)

    def needles(self, ids: Sequence[int], count: int, length: int | None) -> list[Needle]:
        """Retrieval samples of ``length`` tokens, None for as long as a window."""
        if not count:
            return []
        length = choose_seq_len(self.model.config, length or self.geometry.seq_len)
        return make_samples(self.tokenizer, ids, NeedleTask(count, length))

    def described(self, name: str) -> dict[str, Any]:
        """What a result says of the model: it was asked for by ``name``."""
        return {
            "model": {
                "name": shown_name(name),
                "digest": model_shape(self.model.config).digest,
                "revision": getattr(self.model.config, "_commit_hash", None),
            },
            "seq_len": self.geometry.seq_len,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }


def load(name: str, device: str, dtype: str, seq_len: int | None) -> Loaded:
    """Load a model for windows of ``seq_len`` tokens, None for 2048 or what it can hold; KVSpliceError if it cannot be."""
    model, tokenizer = load_model(name, device, dtype)
    shape = model_shape(model.config)
    length = choose_seq_len(model.config, seq_len)
    return Loaded(model, tokenizer, Geometry(shape.num_hidden_layers, shape.num_kv_heads, shape.head_dim, length))
