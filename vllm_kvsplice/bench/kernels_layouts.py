# SPDX-License-Identifier: Apache-2.0
"""What `--layout` of `kvsplice bench kernels` names: a preset, or the layouts of a projector file's layers.

In: names and paths. Out: (name in the table, layout of a file or None for a preset). Next: ``kernels_jobs``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from vllm_kvsplice.calibration.presets import resolve
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError

SUFFIX = ".safetensors"


class FileLayout(NamedTuple):
    """One layout of a projector file, and how many of the file's layers have it."""

    file: str
    layout: LatentLayout
    layers: int

    @property
    def name(self) -> str:
        """For example "tuned[K 8x8+24x4 V 32x4]"."""
        return f"{Path(self.file).stem}[{self.layout}]"


def mean_name(file: str, layers: int) -> str:
    """Name of the row that is the mean over a file's ``layers``."""
    return f"{Path(file).stem} (mean of {layers} layer{'s' * (layers != 1)})"


def named_layouts(given: tuple[str, ...], head_dim: int) -> list[tuple[str, FileLayout | None]]:
    """Each preset by its name, each projector file as its distinct layouts; what is given twice is there once.

    Raises:
        KVSpliceError: no such preset, no sound projector file, or one of another head_dim.
    """
    found: list[tuple[str, FileLayout | None]] = []
    for name in dict.fromkeys(given):
        if name.endswith(SUFFIX):
            found += [(each.name, each) for each in _file_layouts(name, head_dim)]
        else:
            resolve(name, head_dim)
            found.append((name, None))
    return found


def _file_layouts(path: str, head_dim: int) -> list[FileLayout]:
    layers = Projector.load(path).layers
    counts = Counter(layer.layout for _, layer in sorted(layers.items()))
    own = next(iter(counts)).head_dim  # the same in every layer of a sound file
    if own != head_dim:
        raise KVSpliceError(
            f"{path} is of head_dim {own}, expected {head_dim} as the kernels are asked for: give --head-dim {own}."
        )
    return [FileLayout(path, layout, n) for layout, n in counts.items()]
