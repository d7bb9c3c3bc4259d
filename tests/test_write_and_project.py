# SPDX-License-Identifier: Apache-2.0
"""write_and_project against cache_write's reference and reference.project_query; what it is made of: planes, launches."""

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = ("near-lossless-128", "four-tiers", "rank-40-fp16", "wide-fp32-model", "head-dim-256")


@pytest.mark.parametrize("name", FUSED)
def test_writes_and_projects_like_the_reference(name: str) -> None:
    checks.check_write(cases.WRITE[name], fused=True)


@pytest.mark.parametrize("name", cases.PROJECT)
def test_project_query_matches_reference(name: str) -> None:
    checks.check_project_query(cases.PROJECT[name])


def test_every_tile_size_is_projected_with() -> None:
    sizes = set()
    for case in cases.PROJECT.values():
        tiles = cases.project_query.query_tiles(sum(case.query_lens), case.group, case.head_dim, case.head_dim)
        sizes.add((tiles.block_m, tiles.block_r))
    assert {size[0] for size in sizes} == {16, 64, 128} and {size[1] for size in sizes} == {32, 64}


@pytest.mark.parametrize(("tokens", "queries"), [(0, 2), (3, 0), (0, 0)])
def test_tokens_and_queries_are_independent(tokens: int, queries: int) -> None:
    batch = cases.make_batch(cases.Case(seq_lens=(3,), query_lens=(2,)), filled=False)
    batch.slot_mapping, batch.query = batch.slot_mapping[:tokens], batch.query[:queries]
    checks.write_and_check_query(batch)
    assert (batch.storage != cases.POISON).any() == (tokens > 0)


def test_a_warm_up_meets_every_variant() -> None:
    batch = cases.make_batch(cases.WRITE["near-lossless-128"], filled=False)
    plans = batch.plan("k"), batch.plan("v")
    sizes = cases.write_and_project.step_sizes(4000, 28, 4, 128, *plans)

    def variant(tokens: int) -> tuple[tuple[int, ...], ...]:
        write = cases.cache_write.write_tiles(tokens, 4, 128, plans)
        return write[:2], cases.project_query.query_tiles(tokens, 7, 128, 128)[:3]

    assert len(sizes) < 10 and {variant(T) for T in sizes} == {variant(T) for T in range(1, 4001, 7)}


class Forbid(TorchDispatchMode):
    """Fails at any operation of torch on tensors: an allocation, a copy, a sync."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


class Launches:
    """Stands for a kernel and counts."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.grids.append(grid)


def test_one_launch_and_not_one_operation_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cases.make_batch(cases.Case(group=7, seq_lens=(64,), query_lens=(64,)), filled=False)
    prepared, shape = checks.prepared(batch), (*batch.query.shape[:2], 64)
    out = torch.empty(shape), torch.empty(shape[:2])
    kernel = Launches()
    monkeypatch.setattr(cases.write_and_project, "write_and_project_kernel", kernel)
    with Forbid():
        cases.write_and_project.write_and_project(
            batch.query, batch.key, batch.value, batch.kv_cache, batch.slot_mapping, prepared,
            batch.plan("k"), batch.plan("v"), *out,
        )  # fmt: skip
    # 2 heads: 4 tiles of 16 tokens for each side; 7 tiles of 64 rows by 2 of 32 dimensions
    assert kernel.grids == [(2 * (4 * 2 + 7 * 2),)]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda b, out: setattr(b, "query", b.query[:, :3])),
        ("query", lambda b, out: setattr(b, "query", b.query.double())),
        ("q_latent", lambda b, out: out.__setitem__(0, out[0][..., :-1])),
        ("q_bias", lambda b, out: out.__setitem__(1, out[1].bfloat16())),
    ],
)
def test_wrong_arguments_are_named(name: str, change) -> None:
    batch = cases.make_batch(cases.Case(), filled=False)
    prepared, out = checks.prepared(batch), [torch.empty(2, 4, 64), torch.empty(2, 4)]
    change(batch, out)
    if name == "query" and batch.query.shape[1] == 3:
        out = [x[:, :3].contiguous() for x in out]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cases.write_and_project.write_and_project(
            batch.query, batch.key, batch.value, batch.kv_cache, batch.slot_mapping, prepared,
            batch.plan("k"), batch.plan("v"), *out,
        )  # fmt: skip


def test_planes_hold_16_bits_of_a_matrix_and_its_product_with_the_mean() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, mean = torch.randn(2, 40, 64, generator=g), torch.randn(2, 64, generator=g) * 100
    planes = cases.encode.split(matrix)
    assert planes.shape == (2, 2, 40, 64) and planes.dtype == torch.bfloat16
    whole = planes.double().sum(1)
    assert ((whole - matrix).abs() <= 2**-16 * matrix.abs()).all()
    exact = torch.einsum("hrd,hd->hr", whole, mean.double())
    assert torch.equal(cases.encode.offset(planes, mean), exact.float())


def test_a_dependent_launch_is_for_hopper_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cases.pdl.pdl_options(torch.device("cpu")) == {"PDL": 0}
    monkeypatch.setattr(cases.triton.knobs.runtime, "interpret", False)
    for number, capability in enumerate(((8, 0), (8, 9), (9, 0), (10, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        device = torch.device("cuda", 90 + number)  # numbers that no other test asks about
        for early, value in ((True, 1), (False, 2)):
            options = cases.pdl.pdl_options(device, early)
            assert options == ({"PDL": value, "launch_pdl": True} if capability >= (9, 0) else {"PDL": 0})
