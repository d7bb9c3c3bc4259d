# SPDX-License-Identifier: Apache-2.0
"""Launch parameters: the default of every case, the files of configs/launch/, and that serving asks for them everywhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from kvsplice_kernels import launch as kernels_launch
from vllm_kvsplice import config_files, launch
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.errors import KVSpliceError

GPU = "NVIDIA H100 80GB HBM3"
CUDA = torch.device("cuda", 0)
LAYOUT = LatentLayout.of(128, [(8, 32), (4, 96)], [(8, 32), (4, 96)])
PARAMETERS = {"num_warps": 1, "num_stages": 4, "maxnreg": 168, "programs": 12}
ENTRY = {"head_dim": 128, "columns": 8, "layout": str(LAYOUT), "launch": PARAMETERS, "measured": {}}


def content(*entries: dict, **changes) -> dict:
    facts = {"gpu": GPU, "command": "", "date": "", "hardware": {}, "versions": {}, "method": "", "settings": {}}
    return facts | {"seconds": 1.0, "entries": list(entries)} | changes


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """configs/ of its own on a machine whose GPU is GPU."""
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(config_files, "find_spec", lambda _: Spec([str(tmp_path)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    caches = launch._tuned, launch._of_gpu, kernels_launch.takes_64_rows
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "launch"
    for cache in caches:
        cache.cache_clear()


class Spec:
    def __init__(self, places: list[str]) -> None:
        self.submodule_search_locations = places


def put(folder: Path, data: dict, name: str = "NVIDIA_H100_80GB_HBM3") -> None:
    (folder / f"{name}.json").write_text(json.dumps(data))


# ---------------------------------------------------------------- the default
@pytest.mark.parametrize(
    "columns, v, expected",
    [
        (8, [(8, 32), (4, 96)], (1, 3, 200, 8)),
        (8, [(8, 128)], (1, 3, 200, 8)),
        (8, [(8, 32), (4, 32), (2, 64)], (1, 3, None, 8)),  # 24 accumulators, more than 20
        (16, [(8, 128)], (1, 3, None, 8)),
        (32, [(8, 128)], (2, 3, None, 8)),
        (64, [(8, 128)], (4, 3, None, 8)),
        (16, [(4, 64), (2, 64)], (2, 3, None, 8)),  # 20 accumulators, twice of which would spill
        (64, [(8, 32), (4, 32), (2, 64)], (8, 3, None, 8)),
    ],
)
def test_the_default_is_a_warp_for_as_many_columns_as_registers_hold(columns, v, expected):
    from kvsplice_kernels.launch import Launch, default_launch

    plan = LatentLayout.of(128, [(8, 128)], v).plan("v", 16)
    assert default_launch(columns, 256, plan) == Launch(*expected)
    assert default_launch(columns, 264, plan) == Launch(max(1, columns // 8))


def test_the_default_options_are_what_a_launch_without_parameters_has():
    from kvsplice_kernels.launch import Launch

    assert Launch(2).options() == {"num_warps": 2, "num_stages": 3}
    assert Launch(1, 4, 168, 12).options() == {"num_warps": 1, "num_stages": 4, "maxnreg": 168}


def test_programs_of_a_launch_decide_the_splits():
    from kvsplice_kernels.attention import choose_num_splits
    from kvsplice_kernels.launch import Launch

    assert choose_num_splits(64, 4, 4096, 132) == choose_num_splits(64, 4, 4096, 132, Launch(1)) == 4
    assert choose_num_splits(64, 4, 4096, 132, Launch(1, programs=16)) == 8
    assert choose_num_splits(16, 4, 32768, 132, Launch(1, programs=12)) == 24


# ---------------------------------------------------------------- files
def test_a_file_is_found_by_gpu_head_dim_columns_and_layout(folder):
    from kvsplice_kernels.launch import Launch

    put(folder, content(ENTRY, ENTRY | {"columns": 16, "launch": None}))
    assert launch.tuned(LAYOUT, 7, 1, CUDA) == launch.tuned(LAYOUT, 4, 2, CUDA) == Launch(1, 4, 168, 12)
    assert launch.tuned(LAYOUT, 16, 1, CUDA) is None  # measured, and the default kept
    assert launch.tuned(LAYOUT, 7, 4, CUDA) is None  # 32 columns
    assert launch.tuned(LatentLayout.of(128, [(8, 128)], [(8, 128)]), 7, 1, CUDA) is None
    assert launch.tuned(LAYOUT, 7, 1, torch.device("cpu")) is None


def test_a_launch_with_queries_as_rows_is_read(folder):
    from kvsplice_kernels.launch import Launch

    put(folder, content(ENTRY | {"columns": 64, "launch": PARAMETERS | {"num_warps": 4, "rows": 64}}))
    assert launch.tuned(LAYOUT, 7, 5, CUDA) == launch.tuned(LAYOUT, 7, 1024, CUDA) == Launch(4, 4, 168, 12, rows=64)


@pytest.mark.parametrize("capability, expected", [((9, 0), 64), ((8, 9), None), ((10, 0), None)])
def test_many_columns_have_queries_as_rows_on_hopper_unless_a_file_says_otherwise(
    folder, monkeypatch, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    put(folder, content(ENTRY | {"columns": 64}))

    def rows(layout, query_len):
        found = launch.tuned(layout, 7, query_len, CUDA)
        return found and found.rows

    wide = LatentLayout.of(256, [(8, 256)], [(8, 256)])
    int8 = LatentLayout.of(128, [(8, 128)], [(8, 128)])
    assert (rows(LAYOUT, 2), rows(LAYOUT, 4)) == (None, expected)  # 16 columns, 32
    assert (rows(int8, 2), rows(int8, 4), rows(int8, 5)) == (None, expected, expected)
    assert (rows(LAYOUT, 1), rows(LAYOUT, 5), rows(wide, 5)) == (None, None, None)  # 64 of LAYOUT are measured
    small, programs = LatentLayout.of(64, [(8, 64)], [(8, 64)]), 4 if expected else None
    assert getattr(launch.tuned(small, 7, 5, CUDA), "programs", None) == programs


def test_an_unknown_gpu_gets_the_default(folder, monkeypatch):
    put(folder, content(ENTRY))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 NVL")
    assert launch.tuned(LAYOUT, 7, 1, CUDA) is None


def test_a_file_is_read_once(folder, monkeypatch):
    put(folder, content(ENTRY))
    first = launch.tuned(LAYOUT, 7, 1, CUDA)
    put(folder, {})
    launch._tuned.cache_clear()
    assert launch.tuned(LAYOUT, 7, 1, CUDA) is first


@pytest.mark.parametrize(
    "data, named",
    [
        (content(ENTRY | {"launch": PARAMETERS | {"num_warps": 3}}), "num_warps"),
        (content(ENTRY | {"launch": PARAMETERS | {"num_stages": 0}}), "num_stages"),
        (content(ENTRY | {"launch": PARAMETERS | {"maxnreg": 256}}), "maxnreg"),
        (content(ENTRY | {"launch": PARAMETERS | {"programs": 12.5}}), "programs"),
        (content(ENTRY | {"launch": PARAMETERS | {"waves": 1}}), "waves"),
        (content(ENTRY | {"launch": PARAMETERS | {"rows": 63}}), "rows"),
        (content(ENTRY | {"launch": {"num_warps": 1}}), "num_stages"),
        (content(ENTRY | {"columns": 7}), "columns"),
        (content(ENTRY | {"layout": "int8"}), "layout"),
        (content(ENTRY, ENTRY), "twice"),
        (content(ENTRY, gpu="NVIDIA H200"), "NVIDIA H200"),
        (content(ENTRY, more=1), "more"),
        ({"gpu": GPU, "entries": []}, "command"),
        ([], "JSON"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(folder, data, named):
    put(folder, data)
    with pytest.raises(KVSpliceError, match=r"launch file NVIDIA_H100_80GB_HBM3\.json.*kvsplice bench launch") as error:
        launch.tuned(LAYOUT, 7, 1, CUDA)
    assert named in str(error.value)


def test_the_name_of_a_file_is_the_gpu_s():
    assert launch.file_name(GPU) == "NVIDIA_H100_80GB_HBM3"
    assert launch.file_name("NVIDIA RTX 6000 Ada (48 GB)") == "NVIDIA_RTX_6000_Ada_48_GB"


def test_installed_files_are_of_the_gpu_that_they_are_named_after():
    for name, path in config_files.installed("launch/*.json").items():
        assert launch.file_name(launch.read(path).gpu) == name


# ---------------------------------------------------------------- serving
TUNED = (1, 4, 168, 40)


@pytest.fixture
def serving(monkeypatch):
    """triton_path on 132 multiprocessors where steps of one token are tuned, and (bytes asked for, launches) so far."""
    pytest.importorskip("vllm")
    from kvsplice_kernels.launch import Launch
    from vllm_kvsplice.serving import triton_path

    asked: list[int] = []
    launched: list[tuple[int, Launch | None]] = []

    def workspace(*shapes):
        asked.append(sum(-(-torch.Size(s).numel() * d.itemsize // 256) * 256 for s, d in shapes))
        return [torch.empty(s, dtype=d) for s, d in shapes]

    def nothing(*tensors) -> None:
        """A bound attention that launches nothing."""

    def tuned(layout, group, max_query_len, device):
        return Launch(*TUNED) if max_query_len == 1 else None

    monkeypatch.setattr(triton_path, "tuned", tuned)
    monkeypatch.setattr(triton_path, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(triton_path, "workspace", workspace)
    monkeypatch.setattr(
        triton_path, "bind_attention", lambda *args: launched.append((args[11], args[-1])) or (nothing, ())
    )
    return triton_path, asked, launched


def layer_codec():
    from vllm_kvsplice.serving.attention_layer import LayerCodec

    return LayerCodec(LAYOUT, LAYOUT.bytes_per_token_head, torch.bfloat16, 28, 4, 0.1, None, None)


def step(triton_path, num_reqs: int, query_len: int) -> None:
    from vllm_kvsplice.serving.metadata import Requests

    query = torch.empty(num_reqs * query_len, 28, 128, dtype=torch.bfloat16)
    cache = torch.empty(1, 4, 16, LAYOUT.bytes_per_token_head, dtype=torch.uint8)
    numbers = torch.zeros(num_reqs + 1, dtype=torch.int32)
    requests = Requests(num_reqs, len(query), query_len, 32768, numbers, numbers, numbers[:, None])
    triton_path.decode(layer_codec(), triton_path.Tensors(None, None), query, None, cache, requests, query)


def test_a_step_is_launched_with_the_splits_of_its_own_launch(serving):
    from kvsplice_kernels.launch import Launch

    triton_path, _, launched = serving
    step(triton_path, 16, 1), step(triton_path, 16, 2)
    assert launched == [(82, Launch(*TUNED)), (16, None)]


def test_scratch_is_reserved_for_the_splits_of_every_launch(serving):
    triton_path, asked, _ = serving
    triton_path.reserve(layer_codec(), 24, 2, 64, 32768, torch.device("cpu"))
    reserved = asked.pop()
    for num_reqs in range(1, 25):
        step(triton_path, num_reqs, 1), step(triton_path, num_reqs, 2)
    assert len(asked) == 48 and max(asked) <= reserved


@pytest.mark.parametrize("rows", [None, 64])
def test_warm_up_meets_every_tile_of_queries(serving, monkeypatch, rows):
    """For groups that do not fill a tile, and query lengths on both sides of what does."""
    from kvsplice_kernels.decode import launched_tile, query_tile
    from kvsplice_kernels.launch import Launch
    from vllm_kvsplice.serving import warm_up
    from vllm_kvsplice.serving.attention_layer import LayerCodec, Limits

    def tuned(layout, group, max_query_len, device):
        return Launch(8, rows=rows) if rows and query_tile(group, max_query_len)[1] >= 32 else None

    def variant(group, query_len):
        tokens, columns = launched_tile(group, query_len, tuned(None, group, query_len, None))
        return tokens, columns, query_len <= tokens

    monkeypatch.setattr(serving[0], "tuned", tuned)
    for group, longest in itertools.product((1, 5, 7, 9, 12, 16, 71), (1, 3, 5, 6, 8, 10, 15)):
        codec = LayerCodec(LAYOUT, LAYOUT.bytes_per_token_head, torch.bfloat16, group, 1, 0.1, None, None)
        steps = warm_up.decode_steps(codec, 16, longest, Limits(2, 64, 4096), torch.device("cpu"))
        met = {variant(group, query_len) for _, query_len in steps}
        assert met == {variant(group, query_len) for query_len in range(1, longest + 1)}, (group, longest)


def test_warm_up_meets_the_splits_of_every_launch(serving):
    from vllm_kvsplice.serving import warm_up
    from vllm_kvsplice.serving.attention_layer import Limits

    triton_path, codec, cpu = serving[0], layer_codec(), torch.device("cpu")
    steps = warm_up.decode_steps(codec, 16, 2, Limits(64, 8192, 32768), cpu)
    for query_len in (1, 2):
        kinds = [
            {(triton_path.num_splits(codec, n, query_len, 32768, cpu) - 1).bit_length() for n in counts}
            for counts in ([n for n, q in steps if q == query_len], range(1, 65))
        ]
        assert kinds[0] >= kinds[1]


def compiled_variants(codec, num_reqs: int, query_len: int, splits: int, found) -> set[object]:
    """Constants of a decode step's three kernels, as their launchers choose them."""
    from kvsplice_kernels.decode import bind_decode, latent_ranks
    from kvsplice_kernels.encode import Prepared
    from kvsplice_kernels.reduce_expand import bind_reduce
    from kvsplice_kernels.write_and_project import bind_write_and_project

    layout, heads, H, D, T = codec.layout, codec.num_heads, codec.num_kv_heads, 128, num_reqs * query_len
    plans, rows = (layout.plan("k", 16), layout.plan("v", 16)), found is not None
    k, v = latent_ranks(*plans, found)

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def planes(*shape):
        return meta(H, 2, *shape, dtype=torch.bfloat16)

    ranks = layout.rank("k"), layout.rank("v")
    (ke, ko), (ve, vo) = ((planes(r, D), meta(H, r)) for r in ranks)
    prepared = Prepared(ke, ko, ve, vo, planes(ranks[0], D), meta(H, D), planes(D, ranks[1]), meta(H, D))
    if rows:
        prepared = prepared._replace(k_columns=planes(k, D), v_columns=planes(D, v))
    cache = meta(1, H, 16, layout.bytes_per_token_head, dtype=torch.uint8)
    numbers, slots = meta(num_reqs + 1, dtype=torch.int32), meta(T, dtype=torch.int64)
    query, key = (meta(T, n, D, dtype=torch.bfloat16) for n in (heads, H))
    q_latent, q_bias, latent, lse = meta(T, heads, k), meta(T, heads), meta(T, heads, splits, v), meta(T, heads, splits)
    table = meta(num_reqs, 8, dtype=torch.int32)
    _, v_decode = prepared.decodes(rows)
    bounds = (
        bind_write_and_project(query, key, key, cache, slots, prepared, *plans, q_latent, q_bias, rows=rows),
        bind_decode(
            q_latent, q_bias, cache, *plans, table, numbers[1:], numbers, latent, lse, 0.1, query_len, launch=found
        ),
        bind_reduce(latent, lse, v_decode, prepared.v_mean, numbers[1:], numbers, query, query_len),
    )
    return {(name, *bound.launch[3].items()) for name, (bound, _) in zip("wdr", bounds, strict=True)}


@pytest.mark.parametrize("dropped", [0, 48])
@pytest.mark.parametrize("heads, H", [(14, 2), (7, 1), (4, 1), (10, 2), (16, 2)])
def test_warm_up_meets_every_variant_of_rows(serving, monkeypatch, heads, H, dropped):
    """V has 128 or 80 dimensions and, as rows, 128 columns: the same step is another variant by its launch, whose decode starts
    early or not."""
    from kvsplice_kernels.decode import query_tile
    from kvsplice_kernels.launch import Launch
    from vllm_kvsplice.serving import warm_up
    from vllm_kvsplice.serving.attention_layer import LayerCodec, Limits

    def tuned(layout, group, max_query_len, device):
        return Launch(4, programs=2, rows=64) if query_tile(group, max_query_len)[1] >= 32 else None

    triton_path, cpu = serving[0], torch.device("cpu")
    monkeypatch.setattr(triton_path, "tuned", tuned)
    monkeypatch.setattr("kvsplice_kernels.reduce_expand.takes_64_rows", lambda device: True)
    monkeypatch.setattr(warm_up, "takes_64_rows", lambda device: True)
    monkeypatch.setattr(
        "kvsplice_kernels.write_and_project.pdl_options", lambda device, early: {"PDL": 1 if early else 2}
    )
    layout = LatentLayout.of(
        128, [(8, 32), (4, 96)], [(8, 16), (4, 112 - dropped), (0, dropped)][: 3 if dropped else 2]
    )
    codec = LayerCodec(layout, layout.bytes_per_token_head, torch.bfloat16, heads, H, 0.1, None, None)

    def variants(num_reqs: int, query_len: int) -> set[object]:
        splits = triton_path.num_splits(codec, num_reqs, query_len, 32768, cpu)
        return compiled_variants(codec, num_reqs, query_len, splits, tuned(layout, heads // H, query_len, cpu))

    steps = warm_up.decode_steps(codec, 16, 8, Limits(250, 8192, 32768), cpu)
    warm = set().union(*(variants(*step) for step in steps))
    met = set().union(*(variants(n, q) for n in range(1, 251) for q in range(1, 9)))
    assert met <= warm and len(steps) < 90
