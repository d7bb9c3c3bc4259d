# SPDX-License-Identifier: Apache-2.0
"""Launch parameters of the decode kernel that were measured on a GPU: the files of configs/launch/, one for each GPU.

In: a GPU's name, a layout, the columns of decode's dots. Out: the kernels' ``Launch``, or None where nothing faster than
the default is known. `kvsplice bench launch` writes the files. They change speed, and with ``rows`` the rounding.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvsplice_kernels.decode import query_tile
from kvsplice_kernels.launch import Launch, has_rows, rows_launch
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.config_files import installed
from vllm_kvsplice.errors import KVSpliceError

REMAKE = "write it anew with `kvsplice bench launch --json FILE`, or delete it"
Columns = Literal[8, 16, 32, 64, 128, 256]  # of decode's dots: query_tile's
Key = tuple[int, int, str]  # head_dim, columns, str(LatentLayout)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LaunchParameters(_Strict):
    """The fields of ``Launch``, in the bounds that a kernel can be compiled with."""

    num_warps: Literal[1, 2, 4, 8, 16, 32]
    num_stages: int = Field(ge=1, le=8)
    maxnreg: int | None = Field(ge=32, le=255)
    programs: int = Field(ge=1, le=64)
    rows: Literal[64] | None = None  # absent from files that were made before there was a choice


class Entry(_Strict):
    """What was found for one kind of step; ``launch`` None: nothing that is faster than the default by enough.

    ``columns``: of decode's dots, query_tile's: 8 for decode steps of up to 8 query heads per KV head. ``measured``:
    figures, for readers.
    """

    head_dim: int = Field(ge=8)
    columns: Columns
    layout: str = Field(pattern=r"^K \d+x\d+(\+\d+x\d+)* V \d+x\d+(\+\d+x\d+)*$")
    launch: LaunchParameters | None
    measured: dict[str, Any]

    @property
    def key(self) -> Key:
        """What the entry is looked up by."""
        return self.head_dim, self.columns, self.layout


class LaunchFile(_Strict):
    """A file of configs/launch/, its name that of the GPU: ``file_name``."""

    gpu: str
    command: str
    date: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    method: str
    settings: dict[str, Any]
    seconds: float
    entries: list[Entry]


def file_name(gpu: str) -> str:
    """Name without ending of a GPU's file: NVIDIA_H100_80GB_HBM3 for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_")


def read(path: Path) -> LaunchFile:
    """Read a file of configs/launch/; raises KVSpliceError, which names it, on anything that is not one."""
    try:
        found = LaunchFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise KVSpliceError(f"launch file {path.name} has a bad {where} ({first['msg']}): {REMAKE}.") from None
    twice = [key for key, count in Counter(entry.key for entry in found.entries).items() if count > 1]
    if twice:
        raise KVSpliceError(f"launch file {path.name} has {twice[0]} twice, expected once: {REMAKE}.")
    return found


def tuned(layout: LatentLayout, group: int, max_query_len: int, device: torch.device) -> Launch | None:
    """The launch to decode with on a device; None, the kernel's default, for a GPU, layout or step that no file knows, but for
    many columns on Hopper: those have queries as rows.

    Args:
        group: query heads of a KV head. max_query_len: upper bound of the requests' query tokens.
    Raises:
        KVSpliceError: the GPU's file is not one.
    """
    return _tuned(layout, query_tile(group, max_query_len)[1], device) if device.type == "cuda" else None


@lru_cache(maxsize=256)
def _tuned(layout: LatentLayout, columns: int, device: torch.device) -> Launch | None:
    """Cached: every layer asks in every step that no CUDA graph replays."""
    found = _of_gpu(torch.cuda.get_device_name(device)).get((layout.head_dim, columns, str(layout)))
    return found or many_columns(layout, columns, device)


def wants_rows(layout: LatentLayout, device: torch.device) -> bool:
    """Whether a device decodes any kind of step of a layout with queries as rows."""
    return device.type == "cuda" and any(has_rows(_tuned(layout, n, device)) for n in get_args(Columns))


def many_columns(layout: LatentLayout, columns: int, device: torch.device) -> Launch | None:
    """The default of steps of several tokens a request on Hopper, elsewhere and of others None."""
    return rows_launch(columns, layout.rank("k") + layout.rank("v"), device)


@lru_cache(maxsize=8)
def _of_gpu(gpu: str) -> dict[Key, Launch]:
    path = installed("launch/*.json").get(file_name(gpu))
    if path is None:
        return {}
    found = read(path)
    if found.gpu != gpu:
        raise KVSpliceError(f"launch file {path.name} is of {found.gpu}, expected {gpu}: {REMAKE}.")
    return {entry.key: Launch(**entry.launch.model_dump()) for entry in found.entries if entry.launch}
