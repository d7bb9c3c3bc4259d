# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models, one per family of attention that the tests care about."""

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 96
COMMON = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
FAMILIES = {
    "qwen2": COMMON,
    "qwen3": COMMON | dict(head_dim=24),  # head_dim is not hidden_size / heads, and not a power of two
    "llama": COMMON,
    "mistral": COMMON | dict(sliding_window=7),
    "phi3": COMMON,
    "gemma2": COMMON | dict(head_dim=32, sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=24),
    "gemma3_text": COMMON | dict(head_dim=16, sliding_window=7, sliding_window_pattern=2, query_pre_attn_scalar=16),
    "gpt2": dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2),
}


def tiny(family, seed=0, attn="eager", **changes):
    """A random fp32 model in eval mode; its weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    kind = FAMILIES[family] | dict(initializer_range=0.25) | changes
    config = AutoConfig.for_model(family, **kind)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()


def tokens(batch=2, length=21, seed=1):
    """[batch, length] token ids."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def save(folder, family="qwen2", **changes):
    """A folder with a tiny model and a tokenizer of one token per ASCII letter or sign; returns its path."""
    letters = {chr(32 + i): i for i in range(VOCAB - 1)} | {"\n": VOCAB - 1}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny(family, **changes).save_pretrained(folder)
    return str(folder)
