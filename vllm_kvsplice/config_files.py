# SPDX-License-Identifier: Apache-2.0
"""Where the files of configs/ lie once installed: presets, and launch parameters of GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "kvsplice_configs"


def installed(pattern: str) -> dict[str, Path]:
    """The installed files of a glob pattern relative to configs/, by name without ending."""
    spec = find_spec(PACKAGE)
    # Not importlib.resources: before Python 3.13 it fails on a namespace package of an editable install.
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return {path.stem: path for folder in folders if Path(folder).is_dir() for path in Path(folder).glob(pattern)}
