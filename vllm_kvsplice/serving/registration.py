# SPDX-License-Identifier: Apache-2.0
"""Makes the name KVSPLICE known to vLLM, through its public registry only. Next: cpu_dispatch and backend, once selected.

Imports nothing heavy: it runs in every vLLM process, whether kvsplice is chosen or not.
"""

from __future__ import annotations

import logging
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_kvsplice.errors import KVSpliceError

NAME = "KVSPLICE"
BACKEND = "vllm_kvsplice.serving.backend.KVSpliceBackend"
UNSUPPORTED = "vllm_kvsplice.serving.registration.UnsupportedBackend"
CPU_DISPATCH = "vllm_kvsplice.serving.cpu_dispatch"
# vLLM's CPU platform ignores the selected backend and always asks for one of these.
CPU_BACKENDS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")
VLLM_MIN, VLLM_BELOW = (0, 32), (0, 34)

logger = logging.getLogger("vllm.kvsplice")


def register_with_vllm() -> None:
    """Add the enum member and the CPU dispatch; a second call changes nothing.

    With a vLLM outside the supported range the member is there too, so that selecting it answers with our sentence
    rather than "unknown backend", and vLLM's own backends stay untouched.
    """
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    refusal = version_refusal(vllm.__version__)
    if NAME not in AttentionBackendEnum.__members__:
        if refusal:
            logger.warning("kvsplice cannot be selected: %s", refusal)
        register_backend(NAME, UNSUPPORTED if refusal else BACKEND)
        make_picklable(AttentionBackendEnum[NAME])
    for name in CPU_BACKENDS:
        member = AttentionBackendEnum.__members__.get(name)
        if member is not None and not member.get_path().startswith(CPU_DISPATCH):
            from vllm_kvsplice.serving import cpu_dispatch

            cpu_dispatch.stock_paths[name] = member.get_path()
            register_backend(member, f"{CPU_DISPATCH}.{name}")


def version_refusal(version: str) -> str | None:
    """A sentence if this vLLM is not supported, else None."""
    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        release = (0, 0)
    if VLLM_MIN <= release < VLLM_BELOW:
        return None
    from vllm_kvsplice import __version__

    low, high = (".".join(map(str, bound)) for bound in (VLLM_MIN, VLLM_BELOW))
    return (
        f"kvsplice {__version__} works with vLLM >={low},<{high}, this is vLLM {version}: "
        f'install a matching one with `pip install "vllm>={low},<{high}"`.'
    )


def make_picklable(member: Any) -> None:
    """Let an enum member that was added at run time be pickled by name.

    vLLM pickles its config into engine-core and worker processes and unpickles it before any plugin is loaded there;
    Enum's own way, by value, would not find the member.
    """
    member.__reduce_ex__ = lambda _protocol: (_member, ())


def _member() -> Any:
    """What a pickled member calls in the process that reads it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register_with_vllm()
    return AttentionBackendEnum[NAME]


def __getattr__(name: str) -> Any:
    if name == "UnsupportedBackend":
        import vllm

        raise KVSpliceError(version_refusal(vllm.__version__) or "this vLLM is not supported.")
    raise AttributeError(name)
