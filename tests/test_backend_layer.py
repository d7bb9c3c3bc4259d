# SPDX-License-Identifier: Apache-2.0
"""From a projector to a layer: heads per rank, page sizes, buffers; and from vLLM's batch to ours. No engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata

from kvsplice_kernels.encode import prepare
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, default_layer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving import attention_layer, startup
from vllm_kvsplice.serving.attention_layer import (
    LayerCodec,
    attach,
    bases_of,
    cell_bytes,
    local_kv_heads,
    prepared_of,
    projector_layer,
)
from vllm_kvsplice.serving.metadata import KVSpliceMetadataBuilder
from vllm_kvsplice.serving.startup import LayerFacts, summary
from vllm_kvsplice.serving.triton_path import graph_reqs

A = LatentLayout.of(64, k=[(8, 16), (4, 48)], v=[(8, 16), (4, 48)])  # 46 + 46 bytes
B = LatentLayout.of(64, k=[(16, 64)], v=[(4, 40), (0, 24)])  # 128 + 24


def projector(*layouts: LatentLayout, heads: int = 4) -> Projector:
    def basis(rank: int, salt: int) -> Basis:
        numbers = torch.arange(heads * rank * 64, dtype=torch.float32).view(heads, rank, 64) + salt
        return Basis(numbers, numbers.transpose(1, 2).contiguous(), numbers[:, 0], 1 + numbers[:, :, 0].abs())

    layers = {i: LayerProjector(x, basis(x.rank("k"), 1), basis(x.rank("v"), 2)) for i, x in enumerate(layouts)}
    return Projector(SimpleNamespace(), layers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "total, size, expected",
    [
        pytest.param(8, 2, [(0, 4), (4, 8)], id="slices"),
        pytest.param(2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], id="replicas"),
        pytest.param(1, 2, [(0, 1), (0, 1)], id="one-head"),
    ],
)
def test_kv_heads_of_a_rank(total: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [local_kv_heads(total, rank, size) for rank in range(size)] == expected


def test_a_rank_takes_its_heads_of_its_layer() -> None:
    whole = projector(A, B)
    part = projector_layer(whole, "model.layers.1.self_attn.attn", 64, 2, (2, 4))
    assert part.layout == B and torch.equal(part.k.encode, whole.layers[1].k.encode[2:])
    assert torch.equal(part.v.sigma, whole.layers[1].v.sigma[2:])


@pytest.mark.parametrize(
    "name, head_dim, heads, words",
    [
        pytest.param("model.layers.2.attn", 64, 4, "no layer for model.layers.2", id="missing-layer"),
        pytest.param("model.attn", 64, 4, "no layer for model.attn", id="no-index"),
        pytest.param("model.layers.0.attn", 128, 4, "head_dim 64 and KV heads 0..3", id="head-dim"),
        pytest.param("model.layers.0.attn", 64, 2, "2 KV heads on this worker", id="heads"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(name: str, head_dim: int, heads: int, words: str) -> None:
    with pytest.raises(KVSpliceError, match=words):
        projector_layer(projector(A, A), name, head_dim, heads, (0, 4))


def test_without_a_projector_any_layer_is_int8() -> None:
    found = projector_layer(None, "anything", 80, 3, (0, 3))
    assert str(found.layout) == "K 80x8 V 80x8" and found.k.encode.shape == (3, 80, 80)


def test_page_sizes_differ_by_layer_but_not_under_several_windows() -> None:
    both = projector(A, B)
    assert [cell_bytes(x, both, {None}) for x in (A, B)] == [84, 149]
    assert [cell_bytes(x, both, {256}) for x in (A, B)] == [84, 149]
    assert [cell_bytes(x, both, {None, 256}) for x in (A, B)] == [149, 149]
    assert cell_bytes(A, None, {None, 256}) == 84


def test_buffers_are_replaced_in_place_and_not_saved() -> None:
    layer = nn.Module()
    whole = projector(A, A)
    attach(layer, whole.layers[0], torch.device("cpu"))
    bases, where = bases_of(layer), addresses(layer)
    folded = whole.layers[0].k.folded()
    assert torch.equal(bases.k_encode, folded.encode) and torch.equal(bases.k_decode, folded.decode)
    assert not layer.state_dict() and len(dict(layer.named_buffers())) == len(set(where))
    attach(layer, default_layer(64, 4), torch.device("cpu"))
    assert addresses(layer) == where  # captured CUDA graphs read these addresses
    new = default_layer(64, 4).k.folded()
    assert torch.equal(bases_of(layer).k_encode, new.encode)
    prepared = prepared_of(layer)
    assert torch.allclose(prepared.k_encode.float().sum(1), new.encode, atol=2**-16)
    assert torch.allclose(prepared.k_decode.float().sum(1), new.decode.transpose(1, 2), atol=2**-16)
    assert torch.equal(prepared.k_mean, new.mean) and prepared.v_offset.shape == (4, 64)
    attach(layer, projector(B).layers[0], torch.device("cpu"))
    assert bases_of(layer).v_encode.shape == (4, 40, 64)


def test_buffers_of_queries_as_rows_are_replaced_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with such launches, where the bases are held in the kernel's order of columns too."""
    from kvsplice_kernels.row_operands import column_order, in_columns

    def with_columns(bases: Any, layout: LatentLayout, device: torch.device) -> Any:
        return in_columns(prepare(*bases), layout.plan("k", 16), layout.plan("v", 16))

    layer = nn.Module()
    attach(layer, projector(A).layers[0], torch.device("cpu"))
    assert prepared_of(layer).k_columns is None
    monkeypatch.setattr(attention_layer, "prepared_for", with_columns)
    attach(layer, projector(A).layers[0], torch.device("cpu"))
    where, prepared = addresses(layer), prepared_of(layer)
    for columns, natural, side in (
        (prepared.k_columns, prepared.k_decode, "k"),
        (prepared.v_columns, prepared.v_decode.mT, "v"),
    ):
        order = list(column_order(A.plan(side, 16)))
        assert sorted(d for d in order if d >= 0) == list(range(A.rank(side)))
        columns = columns if side == "k" else columns.mT
        assert torch.equal(
            columns[:, :, [i for i, d in enumerate(order) if d >= 0]], natural[:, :, [d for d in order if d >= 0]]
        )
        assert not columns[:, :, [i for i, d in enumerate(order) if d < 0]].any()
    attach(layer, projector(A, A).layers[1], torch.device("cpu"))
    assert addresses(layer) == where and not layer.state_dict()


def addresses(layer: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*bases_of(layer), *prepared_of(layer)) if tensor is not None]


def test_the_start_up_line_counts_everything() -> None:
    facts = [LayerFacts(A, 2, 64, 2, 84), LayerFacts(B, 2, 64, 2, 149)]
    line = summary(facts, 2, 2)
    assert line == (
        "K 16x8+48x4 V 16x8+48x4 (and 1 other codecs): 116.5 bytes per token and KV head all in, dense 256.0; "
        "ratio V 4.06x, K 1.51x, K+V 2.20x; active on 2 of 2 attention layers"
    )
    padded = summary([facts[0]._replace(cell_bytes=149), facts[1]], 2, 2)
    assert "149.0 bytes" in padded and "32.5 of them padding" in padded and "K+V 1.72x" in padded
    mixed = summary([facts[0], LayerFacts(None, 2, 64, 2, 256)], 1, 2)
    assert "170.0 bytes" in mixed and "V 3.05x, K 3.05x, K+V 1.51x; active on 1 of 2" in mixed


# ---------------------------------------------------------------- the step
def builder(decode_query_len: int = 1) -> KVSpliceMetadataBuilder:
    made = object.__new__(KVSpliceMetadataBuilder)
    made.reorder_batch_threshold = decode_query_len
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))  # type: ignore[assignment]
    return made


def batch(query_lens: list[int], seq_lens: list[int], **changes: Any) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    arguments: dict[str, Any] = dict(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lens, num_reqs=len(query_lens),
        num_actual_tokens=int(starts[-1]), max_query_len=max(query_lens), max_seq_len=max(seq_lens),
        block_table_tensor=torch.arange(len(query_lens) * 3, dtype=torch.int32).view(-1, 3),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64), causal=True, seq_lens_cpu_upper_bound=lens.clone(),
    )  # fmt: skip
    return CommonAttentionMetadata(**(arguments | changes))


def test_decodes_lead_and_prefills_are_renumbered_from_zero() -> None:
    m = builder().build(0, batch([1, 1, 5, 7], [9, 1, 5, 30]))
    assert (m.decodes.num_reqs, m.decodes.num_tokens, m.decodes.max_query_len) == (2, 2, 1)
    assert m.decodes.query_start_loc.tolist() == [0, 1, 2] and m.decodes.seq_lens.tolist() == [9, 1]
    p = m.prefills
    assert p is not None and (p.num_reqs, p.num_tokens, p.max_query_len) == (2, 12, 7)
    assert p.query_start_loc.tolist() == p.query_start_loc_cpu.tolist() == [0, 5, 12]
    assert p.query_start_loc.dtype == torch.int32  # the kernels take no other
    assert p.first_chunk == [True, False] and p.block_table.tolist() == [[6, 7, 8], [9, 10, 11]]


def test_verified_drafts_are_decodes() -> None:
    m = builder(4).build(0, batch([4, 4, 2], [9, 20, 12]))
    assert m.prefills is None and m.decodes.max_query_len == 4 and m.decodes.num_tokens == 10


def test_without_host_lengths_no_row_counts_as_a_first_chunk() -> None:
    m = builder().build(0, batch([5, 7], [5, 30], seq_lens_cpu_upper_bound=None))
    assert m.decodes.num_tokens == 0 and m.prefills is not None and m.prefills.first_chunk == [False, False]


def test_rows_of_a_draft_go_by_lengths_on_the_device() -> None:
    """A draft model's requests have a token more than the target's, in the lengths on the device alone."""
    made = builder(4)
    made.draft_slots = 1
    host = torch.tensor([19, 29, 8], dtype=torch.int32)
    m = made.build(0, batch([5, 5, 9], [20, 30, 9], seq_lens_cpu_upper_bound=host))
    assert m.decodes.num_reqs == 2 and m.decodes.max_query_len == 5 and m.prefills is not None
    assert m.prefills.seq_lens_cpu is None and m.prefills.first_chunk == [False]
    assert m.prefills.seq_lens.tolist() == [9]


def test_a_group_is_a_draft_s_where_all_its_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(slots: int) -> Any:
        codec = LayerCodec(A, 92, torch.bfloat16, 8, 2, 1.0, None, None, slots)
        return SimpleNamespace(impl=SimpleNamespace(codec=codec))

    layers = {"a": layer(0), "b": layer(3), "c": layer(3), "other": SimpleNamespace(impl=None)}
    monkeypatch.setattr(startup, "attention_layers", lambda config: layers)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=100),
        model_config=SimpleNamespace(max_model_len=4096),
    )
    found = [startup.draft_slots_of(config, names) for names in (["b", "c"], ["a", "b"], ["a"], ["b", "other"], [])]
    assert found == [3, 0, 0, 0, 0]
    assert [startup.limits_of(config, slots).max_num_batched_tokens for slots in (0, 1, 3)] == [100, 116, 148]


def test_capture_is_over_the_query_itself() -> None:
    given = batch([2, 2], [1, 1])
    builder(2).build_for_cudagraph_capture(given)
    assert given.seq_lens.tolist() == [2, 2]  # the runner's own buffer, refilled later


@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("max_num_seqs", [1, 7, 12, 64, 256])
def test_a_step_has_the_splits_of_the_graph_that_would_hold_it(max_num_seqs: int, query_len: int) -> None:
    """The graphs are those that vLLM itself would capture and replay."""
    graphs = vllm_graphs(max_num_seqs, query_len)
    assert len(graphs) > 0.9 * min(max_num_seqs, 512 // query_len)
    for num_reqs, of_graph in graphs.items():
        assert graph_reqs(num_reqs, query_len) == graph_reqs(of_graph, query_len) >= of_graph
        assert of_graph in (max_num_seqs, graph_reqs(num_reqs, query_len))


def test_a_step_is_planned_for_the_longest_sequence_of_the_engine() -> None:
    assert builder().build(0, batch([1, 1, 5], [9, 1, 5])).decodes.max_seq_len == 4096


def vllm_graphs(max_num_seqs: int, query_len: int) -> dict[int, int]:
    """Requests of a decode step -> requests of the graph that vLLM's own code finds for it, where it finds one."""
    from vllm.config.compilation import CompilationConfig, CUDAGraphMode
    from vllm.config.vllm import VllmConfig
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False), speculative_config=None, performance_mode="balanced",
        compilation_config=CompilationConfig(cudagraph_mode=mode), uniform_decode_query_len=query_len,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )  # fmt: skip
    VllmConfig._set_cudagraph_sizes(config)
    manager: Any = object.__new__(CudaGraphManager)
    vars(manager).update(
        vllm_config=config, compilation_config=config.compilation_config, cudagraph_mode=mode, max_num_reqs=max_num_seqs,
        decode_query_len=query_len, varlen_decode=False, ubatch_runner=None, lora_capture_cases=[0], _lora_dispatch_map={},
        _candidates={}, _capture_descs={}, _graphs_captured=True,
    )  # fmt: skip
    manager._init_candidates()
    found = {n: manager.dispatch(n, n * query_len, query_len, 0) for n in range(1, max_num_seqs + 1)}
    return {n: desc.num_reqs for n, desc in found.items() if desc.cg_mode == CUDAGraphMode.FULL}


def test_non_causal_batches_are_refused() -> None:
    for causal in (False, torch.tensor([True])):
        with pytest.raises(KVSpliceError, match="non-causal"):
            builder().build(0, batch([1], [1], causal=causal))


# ---------------------------------------------------------------- loading
class FakeLayer(nn.Module):
    """An attention layer as far as loading reads one."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        from vllm_kvsplice.serving.backend import KVSpliceBackend

        self.head_size = self.head_size_v = 64
        self.sliding_window, self.kv_cache_torch_dtype, self.attn_backend = window, torch.float32, KVSpliceBackend
        self._k_scale = torch.tensor(1.0)
        self.impl: Any = None


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds the layers of a model of two tensor-parallel ranks, the second being this one, and loads a projector."""
    from vllm_kvsplice.codec import projector_source
    from vllm_kvsplice.serving import attention_layer, impl

    def loaded(layers: dict[str, FakeLayer], given: Projector, sharing: dict[str, str]) -> dict[str, FakeLayer]:
        model = SimpleNamespace(model="m", revision=None, hf_text_config=None, get_total_num_kv_heads=lambda: 4)
        config = SimpleNamespace(model_config=model, speculative_config=None)
        monkeypatch.setattr(Projector, "verify", lambda self, config: None)
        monkeypatch.setattr(projector_source, "for_engine", lambda *args: given)
        monkeypatch.setattr(projector_source, "forget", lambda: None)
        monkeypatch.setattr(attention_layer, "is_plain_attention", lambda layer: True)
        monkeypatch.setattr(impl, "tensor_parallel", lambda: (1, 2))
        for module in (attention_layer, impl):
            monkeypatch.setattr(module, "attention_layers", lambda config: layers)
        for name, layer in layers.items():
            made = layer.impl = object.__new__(impl.KVSpliceImpl)
            made.vllm_config, made.settings = config, SimpleNamespace(projector=None)
            made.num_heads, made.num_kv_heads, made.head_size, made.scale = 8, 2, 64, 1.0
            made.sliding_window, made.soft_cap, made.path = layer.sliding_window, None, None
            made.kv_sharing_target_layer_name, made.codec = sharing.get(name), None
        for layer in [*layers.values()] * 2:  # a weight reload does it again
            layer.impl.process_weights_after_loading(torch.bfloat16)
        return layers

    return loaded


def test_loading_gives_each_layer_its_page_and_this_rank_its_heads(load: Any) -> None:
    given = projector(A, B)
    layers = load({f"layers.{i}.attn": FakeLayer() for i in range(2)}, given, {})
    for i, (layer, layout) in enumerate(zip(layers.values(), (A, B), strict=True)):
        assert layer.attn_backend.bytes_per_token_head == layout.bytes_per_token_head
        assert layer.attn_backend.__bases__[0].bytes_per_token_head is None  # no subclass of a subclass after a reload
        assert torch.equal(bases_of(layer).k_mean, given.layers[i].k.mean[2:])
        assert layer.impl.codec.wide_dtype == torch.bfloat16  # 16-bit tiers of an fp32 model


def test_a_layer_that_shares_a_cache_reads_it_with_its_target_s_projector(load: Any) -> None:
    given = projector(A, B)
    layers = load({f"layers.{i}.attn": FakeLayer() for i in range(2)}, given, {"layers.1.attn": "layers.0.attn"})
    shared = layers["layers.1.attn"]
    assert shared.impl.codec.layout == A and torch.equal(bases_of(shared).v_mean, given.layers[0].v.mean[2:])


def test_a_hybrid_model_gets_one_page_size_when_loaded(load: Any) -> None:
    layers = load({"layers.0.attn": FakeLayer(window=32), "layers.1.attn": FakeLayer()}, projector(A, B), {})
    assert {layer.attn_backend.bytes_per_token_head for layer in layers.values()} == {149}


def test_a_reload_of_the_target_does_not_mind_the_layers_of_a_draft(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They came after its first load: their window would give its layers one page size, and the last of all layers is theirs."""
    from vllm_kvsplice.codec import projector_source

    layers = load({"layers.0.attn": FakeLayer(), "layers.1.attn": FakeLayer()}, projector(A, B), {})
    target, read_anew = list(layers.values()), []
    layers["draft_model.layers.0.attn"] = FakeLayer(window=32)
    monkeypatch.setattr(projector_source, "forget", lambda: read_anew.append(1))
    for layer in target:
        layer.impl.process_weights_after_loading(torch.bfloat16)
    assert [layer.attn_backend.bytes_per_token_head for layer in target] == [
        A.bytes_per_token_head,
        B.bytes_per_token_head,
    ]
    assert read_anew == [1]


def test_another_layout_after_a_reload_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kvsplice.codec import projector_source

    layers = load({"layers.0.attn": FakeLayer(), "layers.1.attn": FakeLayer()}, projector(A, B), {})
    monkeypatch.setattr(projector_source, "for_engine", lambda *args: projector(B, A))
    with pytest.raises(KVSpliceError, match="for layers.0.attn, whose cache holds .*: restart the server"):
        layers["layers.0.attn"].impl.process_weights_after_loading(torch.bfloat16)
