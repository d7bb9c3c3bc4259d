# SPDX-License-Identifier: Apache-2.0
"""All codecs by name: a flat list, in families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab import dense, eviction, kivi, minicache, nvfp4, ours, palu, per_token, turboquant
from vllm_kvsplice.lab.codec import Codec

RIVALS = [
    *dense.CODECS,
    *per_token.CODECS,
    *nvfp4.CODECS,
    *turboquant.CODECS,
    *kivi.CODECS,
    *palu.CODECS,
    *minicache.CODECS,
    *eviction.CODECS,
]


def choose(names: Sequence[str], projectors: Mapping[str, Projector] | None = None) -> list[Codec]:
    """The codecs of these names, families or .toml presets, all if there are none, and of projectors by path; each name once.

    Raises KVSpliceError for a name that nothing has, or that two projectors would have.
    """
    known = RIVALS + ours.codecs()
    chosen = [] if names else list(known)
    for name in names:
        found = [c for c in known if name in (c.name, c.family)]
        if not found and name.endswith(".toml"):
            found = [ours.preset_codec(name)]
        if not found:
            raise KVSpliceError(
                f"codec {name!r} is not known: expected some of {', '.join(c.name for c in known)}, a family "
                f"({', '.join(dict.fromkeys(c.family for c in known))}) or a .toml preset."
            )
        chosen += found
    files = {path: ours.file_codec(path, projector) for path, projector in (projectors or {}).items()}
    for path, codec in files.items():
        other = next(p for p, c in files.items() if c.name == codec.name)
        if other != path:
            raise KVSpliceError(
                f"--projector {other} and {path} would both be called {codec.name}: rename one of them."
            )
    chosen += files.values()
    return list({c.name: c for c in chosen}.values())
