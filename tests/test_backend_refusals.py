# SPDX-License-Identifier: Apache-2.0
"""What kvsplice lacks is refused by name when a layer is built, on CPU as on CUDA; and how a page gets its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms.interface import Platform
from vllm.v1.kv_cache_interface import AttentionSpec, ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving import refusals
from vllm_kvsplice.serving.attention_layer import backend_with_bytes, check_kind
from vllm_kvsplice.serving.backend import KVSpliceBackend
from vllm_kvsplice.serving.impl import KVSpliceImpl
from vllm_kvsplice.serving.vllm_compat import draft_slots, is_draft


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return VllmConfig()


@pytest.fixture
def current(config: VllmConfig) -> Iterator[VllmConfig]:
    before = dict(config.additional_config)
    with set_current_vllm_config(config):
        yield config
    config.additional_config = before


def build(**changes: Any) -> KVSpliceImpl:
    """The constructor as vLLM calls it: ten positional arguments, the rest by name."""
    arguments = dict(num_heads=4, head_size=64, scale=0.125, num_kv_heads=2, alibi_slopes=None, sliding_window=None,
                     kv_cache_dtype="auto", logits_soft_cap=None, attn_type="decoder",
                     kv_sharing_target_layer_name=None)  # fmt: skip
    extra = {name: changes.pop(name) for name in list(changes) if name not in arguments}
    return KVSpliceImpl(*(arguments | changes).values(), **extra)


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message.replace("e.g. ", "")
    return message


def test_a_plain_layer_is_served(current: VllmConfig) -> None:
    impl = build(sliding_window=7, logits_soft_cap=0.0, sinks=None)
    assert impl.soft_cap is None and impl.sliding_window == 7 and impl.exact_prefill
    assert not build(kv_sharing_target_layer_name="layers.0").exact_prefill  # its keys and values are nobody's


@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param(dict(alibi_slopes=[0.1] * 4), "ALiBi", id="alibi"),
        pytest.param(dict(sinks=torch.zeros(4)), "attention sinks", id="sinks"),
        pytest.param(dict(attn_type="encoder_only"), "encoder_only attention", id="encoder-only"),
        pytest.param(dict(attn_type="encoder"), "encoder attention", id="encoder"),
        pytest.param(dict(attn_type="encoder_decoder"), "encoder_decoder attention", id="cross"),
        pytest.param(dict(kv_cache_dtype="fp8"), "a fp8 KV cache", id="fp8"),
        pytest.param(dict(kv_cache_dtype="fp8_e5m2"), "a fp8_e5m2 KV cache", id="fp8-e5m2"),
        pytest.param(dict(kv_cache_dtype="int8_per_token_head"), "int8_per_token_head", id="int8"),
        pytest.param(dict(chunk_lookback=3), "chunk_lookback", id="unknown-extra"),
        pytest.param(dict(head_size=60), "head_dim 60", id="head-dim-60"),
        pytest.param(dict(head_size=576), "head_dim 576", id="head-dim-576"),
    ],
)
def test_layers_that_need_what_we_lack(current: VllmConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KVSpliceError) as error:
        build(**changes)
    assert words in one_sentence(error) and "kvsplice does not support" in str(error.value)


def test_an_unknown_setting_stops_the_start(current: VllmConfig) -> None:
    current.additional_config = {"kvsplice": {"rank": 64}}
    with pytest.raises(KVSpliceError, match="no setting 'rank'"):
        build()


def engine(**changes: Any) -> SimpleNamespace:
    """A VllmConfig as far as the refusals read it, one dotted name changed."""
    parts = SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        cache_config=SimpleNamespace(block_size=48, kv_cache_dtype_skip_layers=[]),
        model_config=SimpleNamespace(
            use_mla=False, is_mm_prefix_lm=False, rswa_window=None, is_hybrid=False, dtype=torch.bfloat16
        ),
        kv_transfer_config=None,
        attention_config=SimpleNamespace(use_non_causal=False),
        speculative_config=None,
    )
    for name, value in changes.items():
        target, _, attribute = name.rpartition("__")
        setattr(getattr(parts, target) if target else parts, attribute, value)
    return parts


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(parallel_config__decode_context_parallel_size=2), "decode context parallelism"),
        (dict(parallel_config__prefill_context_parallel_size=2), "prefill context parallelism"),
        (dict(kv_transfer_config=SimpleNamespace(is_kv_transfer_instance=True)), "KV connectors"),
        (dict(attention_config__use_non_causal=True), "non-causal attention"),
        (dict(parallel_config__use_ubatching=True), "micro-batches"),
        (dict(cache_config__kv_cache_dtype_skip_layers=["0"]), "layers left out"),
        (dict(cache_config__block_size=24), "block size 24"),
        (dict(speculative_config=SimpleNamespace(use_gemma4_mtp=lambda: True)), "Gemma 4 MTP drafts"),
        (dict(model_config__use_mla=True), "MLA"),
        (dict(model_config__is_mm_prefix_lm=True), "multimodal prefixes"),
        (dict(model_config__rswa_window=64), "R-SWA"),
        (dict(model_config__is_hybrid=True), "Mamba"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_engines_that_need_what_we_lack(changes: dict[str, Any], words: str) -> None:
    refusals.check_engine(engine(), False, "cpu")
    with pytest.raises(KVSpliceError) as error:
        refusals.check_engine(engine(**changes), False, "cpu")
    assert words in one_sentence(error)


def test_batch_invariance_devices_and_dtype() -> None:
    for arguments, words in (
        ((engine(), True, "cuda"), "batch-invariant"),
        ((engine(), False, "xpu"), "xpu devices"),
        ((engine(model_config__dtype=torch.float32), False, "cuda"), "float32 models on CUDA"),
    ):
        with pytest.raises(KVSpliceError, match=words):
            refusals.check_engine(*arguments)
    refusals.check_engine(engine(model_config__dtype=torch.float32), False, "cpu")


def test_exact_prefill_needs_a_head_that_flash_attention_takes() -> None:
    with pytest.raises(KVSpliceError, match="exact prefill at head_dim 512.*prefill latent"):
        refusals.check_kernels("exact", 512, "cuda")
    for arguments in (
        ("latent", 512, "cuda"),
        ("exact", 512, "cpu"),
        ("exact", 256, "cuda"),
    ):
        refusals.check_kernels(*arguments)


def test_the_refusals_read_names_that_this_vllm_has(config: VllmConfig) -> None:
    from vllm.config import ModelConfig

    refusals.check_engine(config, False, "cpu")
    assert all(hasattr(ModelConfig, name) for name in ("use_mla", "is_mm_prefix_lm", "rswa_window", "is_hybrid"))


def test_kinds_of_layer_that_vllm_builds_without_asking() -> None:
    class StaticSinkAttention:
        head_size = head_size_v = 64

    with pytest.raises(KVSpliceError, match="layer a.0 is a StaticSinkAttention"):
        check_kind("a.0", StaticSinkAttention())


# ---------------------------------------------------------------- the page
def spec(kind: type[AttentionSpec] = FullAttentionSpec, **changes: Any) -> AttentionSpec:
    arguments: dict[str, Any] = dict(block_size=48, num_kv_heads=2, head_size=64, dtype=torch.bfloat16) | changes
    if kind is not FullAttentionSpec:
        arguments["sliding_window" if kind is SlidingWindowSpec else "attention_chunk_size"] = 96
    return kind(**arguments)


@pytest.mark.parametrize("kind", [FullAttentionSpec, SlidingWindowSpec])
@pytest.mark.parametrize("block_size", [1, 16, 48], ids=lambda n: f"block-{n}")  # 1: vLLM's probe of sliding layers
def test_the_page_is_ours_and_customising_twice_is_customising_once(kind: type[AttentionSpec], block_size: int) -> None:
    backend = backend_with_bytes(KVSpliceBackend, 88)
    once = backend.customize_spec(spec(kind, block_size=block_size))
    assert once.page_size_bytes == 88 * 2 * block_size and once.dtype == torch.uint8
    assert backend.customize_spec(once) == once
    others = {f.name for f in fields(once)} - {"dtype", "state_content_bytes"}
    assert all(getattr(once, n) == getattr(spec(kind, block_size=block_size), n) for n in others)


def test_other_caches_are_refused() -> None:
    backend = backend_with_bytes(KVSpliceBackend, 88)
    with pytest.raises(KVSpliceError, match="ChunkedLocalAttentionSpec"):
        backend.customize_spec(spec(ChunkedLocalAttentionSpec))
    with pytest.raises(KVSpliceError, match=r"head_dim 64 \(values 32\)"):
        backend.customize_spec(spec(head_size_v=32))
    with pytest.raises(KVSpliceError, match="was not loaded"):
        KVSpliceBackend.customize_spec(spec())


def test_layers_of_one_size_share_a_class_and_a_reload_may_change_it() -> None:
    small, large = backend_with_bytes(KVSpliceBackend, 88), backend_with_bytes(KVSpliceBackend, 132)
    assert backend_with_bytes(KVSpliceBackend, 88) is small is not large
    assert small.full_cls_name() != large.full_cls_name()  # vLLM groups layers by it
    assert backend_with_bytes(small, 88) is small
    assert backend_with_bytes(small, 132) is large
    assert small.get_name() == "KVSPLICE"


def test_pages_are_of_64_tokens_unless_vllm_wants_more():
    sizes = [backend_with_bytes(KVSpliceBackend, n) for n in (88, 132)]
    config = VllmConfig()
    for classes in (sizes[:1], sizes):  # layers of one page size, and of two
        chosen = [Platform._preferred_block_size_for_backends(classes, n, config) for n in (16, 64, 128)]
        assert chosen == [64, 64, 128]
    with set_current_vllm_config(config):
        assert not sizes[0].supports_block_size(16)
        config.cache_config.user_specified_block_size = True
        assert sizes[0].supports_block_size(16) and not sizes[0].supports_block_size(24)
    assert sizes[0].supports_block_size(48) and sizes[0].get_supported_kernel_block_sizes("a spec")[0].base == 16


def test_layers_of_a_draft_are_told_from_the_target_s():
    target, draft = (SimpleNamespace(get_total_num_hidden_layers=lambda: 3) for _ in range(2))
    layer = "model.layers.{}.self_attn.attn".format

    def of(model, drafts):
        speculative = SimpleNamespace(target_model_config=target, draft_model_config=drafts) if drafts else None
        return SimpleNamespace(model_config=model, speculative_config=speculative)

    assert not is_draft(of(target, None), layer(0))
    assert [is_draft(of(target, target), layer(i)) for i in (0, 2)] == [False, False]  # n-grams
    assert [is_draft(of(target, draft), layer(i)) for i in (0, 2, 3)] == [False, False, True]  # EAGLE, MTP
    assert is_draft(of(draft, draft), "draft_model." + layer(0)) and is_draft(of(target, draft), "mtp.layers.0.attn")
    assert not is_draft(of(target, draft), "no.number")  # refused later, by name


def test_slots_that_a_draft_adds_are_vllms_own_count() -> None:
    from vllm.config.speculative import SpeculativeConfig

    def slots(method: str, parallel: bool = False, layer: str = "draft_model.layers.0.attn") -> int:
        speculative: Any = object.__new__(SpeculativeConfig)
        model = SimpleNamespace(get_total_num_hidden_layers=lambda: 1)
        vars(speculative).update(
            method=method,
            parallel_drafting=parallel,
            num_speculative_tokens=4,
            draft_model_config=model,
            target_model_config=0,
        )
        config: Any = SimpleNamespace(model_config=model, speculative_config=speculative)
        return draft_slots(config, layer)

    assert slots("draft_model") == 1 and slots("draft_model", True) == 4 and slots("eagle3") == 0
    assert draft_slots(SimpleNamespace(speculative_config=None), "layers.0.attn") == 0  # type: ignore[arg-type]


def test_what_the_backend_tells_vllm_on_cuda() -> None:
    ours = KVSpliceBackend
    wrong = dict(has_sink=True, use_mm_prefix=True, use_mla=True, use_non_causal=True, use_batch_invariant=True,
                 use_kv_connector=True, use_pcp=True, use_dcp=True, use_rswa=True, kv_cache_dtype="fp8", block_size=24,
                 head_size=60, dtype=torch.float32, attn_type="encoder_only")  # fmt: skip
    right: dict[str, Any] = dict(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=48, use_mla=False, has_sink=False,
                 use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False,
                 device_capability=SimpleNamespace(major=9), attn_type="decoder", has_sliding_window=True)  # fmt: skip
    assert ours.validate_configuration(**right) == []
    for name, value in wrong.items():
        assert ours.validate_configuration(**(right | {name: value})), name
    assert ours.validate_configuration(**(right | dict(device_capability=SimpleNamespace(major=7))))
    assert all(str(layout).endswith("HNC") for layout in (x.name for x in ours.supported_kv_cache_layouts()))
