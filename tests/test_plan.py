# SPDX-License-Identifier: Apache-2.0
"""Plans in numbers worked out by hand, and weights counted without loading them."""

import json

import pytest
import torch
from hf_models import save, tiny
from safetensors.torch import save_file
from transformers import AutoConfig

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring import plan
from vllm_kvsplice.scoring.plan import PlanRequest, capacity, count_weights, layer_windows, plan_table

QWEN_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "tiny-qwen", num_hidden_layers=2, head_dim=16)


@pytest.fixture
def shape_only(tmp_path):
    """A folder with the config of a 7B model and a tokenizer, no weights."""

    def make(**changes):
        folder = save(tmp_path / "shape")
        for weights in (tmp_path / "shape").glob("*.safetensors"):
            weights.unlink()
        AutoConfig.for_model("qwen2", **QWEN_7B | changes, dtype="bfloat16").save_pretrained(folder)
        return folder

    return make


def test_capacity_by_hand():
    # 10 + 20 bytes per head and token, 3 heads, 2 layers of full attention: 90 bytes per token.
    assert capacity([10, 20], [None, None], 3, 90_000, 100) == {"bytes_per_token": 90, "tokens": 1000, "users": 10}
    # The second layer keeps 25 of 100 tokens: 3 * (1000 + 500) = 4500 bytes per user.
    assert capacity([10, 20], [None, 25], 3, 90_000, 100) == {"bytes_per_token": 90, "tokens": 2000, "users": 20}
    assert capacity([10], [None], 1, -5, 100)["tokens"] == 0


def test_seven_billion_shape(shape_only):
    result = plan.run(PlanRequest(shape_only(), gpu_memory=80, context=4096))
    assert result["parameters"] == 7_615_616_512  # as published for Qwen2.5-7B
    assert result["weights_gib"] == pytest.approx(2 * 7_615_616_512 / 2**30)
    caches = result["caches"]
    # 28 layers x 4 KV heads x 128 dimensions x K and V.
    assert caches["bfloat16"]["bytes_per_token"] == 28 * 4 * 128 * 2 * 2 == 57_344
    assert caches["fp8"]["bytes_per_token"] == 57_344 // 2
    assert caches["kvsplice"]["bytes_per_token"] == 28 * 4 * 2 * (128 + 1)
    assert caches["kvsplice"]["tokens"] / caches["bfloat16"]["tokens"] == pytest.approx(256 / 129, rel=1e-4)
    free = (80 * 0.9 - result["weights_gib"]) * 2**30 - plan.activation_bytes(
        AutoConfig.for_model("qwen2", **QWEN_7B), 2, 1
    )
    assert caches["bfloat16"]["users"] == int(free / 57_344 / 4096)


def test_an_estimate_is_near_a_measured_engine(shape_only):
    """vLLM 0.32 on one H200 (139.8 GiB), gpu_memory_utilization 0.9, bfloat16: 2.03 million tokens."""
    result = plan.run(PlanRequest(shape_only(), gpu_memory=139.8, context=4096))
    assert result["caches"]["bfloat16"]["tokens"] == pytest.approx(2.03e6, rel=0.02)


def test_tensor_parallel_splits_weights_and_heads(shape_only):
    model = shape_only()
    one, two, eight = (plan.run(PlanRequest(model, 80, 1000, tp=tp)) for tp in (1, 2, 8))
    sizes = [p["caches"]["bfloat16"]["bytes_per_token"] for p in (one, two, eight)]
    assert sizes == [57_344, 28_672, 14_336]  # with 8 GPUs each of 4 heads is held twice
    assert one["cache_gib"] < two["cache_gib"] < eight["cache_gib"]


def test_weights_are_read_from_headers(folder):
    model = tiny("qwen2", num_hidden_layers=2, head_dim=16)
    wanted = sum(p.numel() for p in model.parameters())
    config = AutoConfig.from_pretrained(folder)
    assert count_weights(folder, config) == (wanted, 4 * wanted)
    assert count_weights(folder, config, dtype_bytes=2) == (wanted, 2 * wanted)


def test_projector_beside_the_weights_is_no_weight(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    save_file({"a": torch.zeros(5, 7, dtype=torch.int8)}, tmp_path / "model.safetensors")
    save_file({"b": torch.zeros(1000)}, tmp_path / "kvsplice.safetensors")
    assert count_weights(str(tmp_path), config) == (35, 35)


def test_weights_that_are_not_safetensors_are_refused(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(KVSpliceError, match="not a readable safetensors"):
        count_weights(str(tmp_path), AutoConfig.from_pretrained(folder))


def test_sliding_layers_keep_their_window():
    config = tiny("gemma3_text").config
    windows = layer_windows(config)
    assert len(windows) == 3 and set(windows) <= {None, 7} and 7 in windows
    assert layer_windows(tiny("mistral").config) == [7, 7, 7]
    assert layer_windows(tiny("llama").config) == [None] * 3


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("qwen3_next", num_hidden_layers=4),
        AutoConfig.for_model("deepseek_v3", num_hidden_layers=2),
    ],
    ids=["linear-attention", "latent-attention"],
)
def test_caches_of_another_kind_are_refused(config):
    with pytest.raises(KVSpliceError, match="cannot be planned"):
        layer_windows(config.get_text_config())


@pytest.mark.parametrize("wrong", [dict(gpu_memory=0), dict(context=0), dict(tp=0), dict(utilization=1.5)])
def test_bad_requests_are_refused(wrong):
    with pytest.raises(KVSpliceError):
        PlanRequest(**dict(model="m", gpu_memory=1, context=1) | wrong)


def test_a_model_that_does_not_fit_holds_nothing(shape_only):
    result = plan.run(PlanRequest(shape_only(), gpu_memory=8, context=4096))
    assert result["caches"]["kvsplice"] == result["caches"]["kvsplice"] | {"tokens": 0, "users": 0}
    assert "-" in plan_table(result)


def test_assumptions_are_told(folder):
    result = plan.run(PlanRequest(folder, gpu_memory=2, context=100, utilization=0.8))
    text = plan_table(result)
    assert "gpu_memory_utilization 0.8" in text and "activations" in text and "users of 100" in text
    json.dumps(result)
