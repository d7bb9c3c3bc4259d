# SPDX-License-Identifier: Apache-2.0
"""Watching and replacing keys and values of transformers models: same logits when nothing changes, restored after."""

import pytest
import torch
from hf_models import FAMILIES, save, tiny, tokens
from transformers import BloomConfig, BloomForCausalLM, GptOssConfig, GptOssForCausalLM, RwkvConfig, RwkvForCausalLM

from vllm_kvsplice.calibration.hf_attention import load_model, output_weights, transformed_kv
from vllm_kvsplice.errors import KVSpliceError


def same(layer_idx, q, k, v):
    return k, v


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_keys_and_values_give_the_models_own_logits(family, attn):
    model, eager, ids = tiny(family, attn=attn), tiny(family, attn="eager"), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding
    with transformed_kv(model, same):
        got, masked = logits(model, ids), logits(model, ids, attention_mask=mask)
    want = logits(eager, ids)
    floor = 64 * torch.finfo(torch.float32).eps * want.abs().max().item()  # eager's sums, in another order
    torch.testing.assert_close(got, want, atol=floor, rtol=0)
    kept = mask.bool()
    torch.testing.assert_close(masked[kept], logits(eager, ids, attention_mask=mask)[kept], atol=floor, rtol=0)
    assert model.config._attn_implementation == attn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_seen_with_its_shapes_and_what_it_returns_is_used(family):
    model, ids = tiny(family), tokens(batch=2, length=9)
    config = model.config
    seen = []

    def shuffled(layer_idx, q, k, v):
        seen.append((layer_idx, q.shape, k.shape, v.shape))
        return k, v.flip(-1)

    with transformed_kv(model, shuffled):
        changed = logits(model, ids)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    D = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert seen == [(i, (2, heads, 9, D), (2, kv_heads, 9, D), (2, kv_heads, 9, D)) for i in range(3)]
    assert (changed - logits(model, ids)).abs().max() > 0.05


def test_keys_come_after_rope():
    """The same token at two positions: the value is equal, the rotated key is not, and only its norm is kept."""
    model, seen = tiny("llama"), []

    def watch(layer_idx, q, k, v):
        seen.append((k, v))
        return k, v

    with transformed_kv(model, watch):
        logits(model, torch.full((1, 6), 7))
    k, v = seen[0]
    torch.testing.assert_close(v[:, :, 0], v[:, :, 5])
    torch.testing.assert_close(k[:, :, 0].norm(dim=-1), k[:, :, 5].norm(dim=-1))
    assert (k[:, :, 0] - k[:, :, 5]).abs().max() > 0.1


def test_a_cache_holds_untransformed_keys_and_values():
    model, ids = tiny("mistral"), tokens(batch=1, length=12)
    with torch.no_grad(), transformed_kv(model, lambda i, q, k, v: (k, 2 * v)):
        whole = logits(model, ids)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        rest = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 8:], atol=1e-4, rtol=0)


def test_soft_cap_is_honoured():
    capped, free = (tiny("gemma2", attn_logit_softcapping=cap) for cap in (0.5, None))
    ids = tokens()
    with transformed_kv(capped, same), transformed_kv(free, same):
        assert (logits(capped, ids) - logits(free, ids)).abs().max() > 0.05


def test_models_do_not_see_each_others_transforms():
    a, b, ids = tiny("qwen2"), tiny("qwen2", seed=1), tokens()
    own = logits(b, ids)
    with transformed_kv(a, lambda i, q, k, v: (k, -v)), transformed_kv(b, same):
        torch.testing.assert_close(logits(b, ids), own, atol=1e-4, rtol=0)


def test_the_model_is_restored_after_an_error():
    model, ids = tiny("qwen3", attn="sdpa"), tokens()
    before = logits(model, ids)
    with pytest.raises(ZeroDivisionError), transformed_kv(model, lambda i, q, k, v: 1 / 0):
        logits(model, ids)
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits(model, ids), before)
    with pytest.raises(ValueError, match="expected"), transformed_kv(model, lambda i, q, k, v: (k, v[..., :4])):
        logits(model, ids)


SMALL = dict(vocab_size=99, hidden_size=32)
REFUSED = [
    (BloomForCausalLM, BloomConfig(**SMALL, n_layer=1, n_head=2), "AttentionInterface"),
    (RwkvForCausalLM, RwkvConfig(**SMALL, num_hidden_layers=2), "AttentionInterface"),
    (
        GptOssForCausalLM,
        GptOssConfig(**SMALL, num_hidden_layers=1, intermediate_size=32, num_local_experts=4, num_attention_heads=2,
                     num_key_value_heads=2, pad_token_id=0),
        "attention sinks",
    ),
]  # fmt: skip


@pytest.mark.parametrize("cls, config, says", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_models_that_cannot_be_watched_are_refused(cls, config, says):
    model = cls(config).eval()
    with pytest.raises(KVSpliceError, match=says) as caught, transformed_kv(model, same):
        logits(model, tokens(length=5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_weights_are_what_the_layer_multiplies_by(family):
    model, ids = tiny(family), tokens(batch=1, length=4)
    weights = output_weights(model)
    config = model.config
    heads = config.num_attention_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // heads
    assert {i: w.shape for i, w in weights.items()} == dict.fromkeys(range(3), (config.hidden_size, heads * D))
    name = "h.0.attn.c_proj" if family == "gpt2" else "layers.0.self_attn.o_proj"
    projection = model.base_model.get_submodule(name)
    x = torch.randn(1, heads * D)
    bias = 0 if projection.bias is None else projection.bias
    torch.testing.assert_close(projection(x), x @ weights[0].T + bias)
    assert logits(model, ids).isfinite().all()


def test_load_model(tmp_path):
    folder = save(tmp_path / "model")
    model, tokenizer = load_model(folder)
    assert not model.training and tokenizer("ab").input_ids == [65, 66]
    assert model.dtype == torch.float32 and load_model(folder, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    for arguments, says in [
        ((str(tmp_path),), "no config.json"),
        ((str(tmp_path / "missing"),), "no config.json"),
        (("no/such-model-anywhere",), "cannot be loaded"),
        ((folder, "tpu9"), "device 'tpu9' is not known"),
        ((folder, "cuda:99"), "device 'cuda:99' cannot be used here"),
        ((folder, "cpu", "float8"), "dtype 'float8' is not known"),
    ]:
        with pytest.raises(KVSpliceError, match=says) as caught:
            load_model(*arguments)
        assert "\n" not in str(caught.value)
