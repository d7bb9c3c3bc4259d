# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel starts, and loads its constants, while the one before it still runs.

In: the device of a launch. Out: its options, and the two jit helpers for the kernel's body. Rules for a kernel with PDL:
every program calls ``wait`` before its first load of what an earlier kernel wrote (activations, metadata, the cache) and
before its first store; before it only weights may be loaded, and what was complete when the kernel before it passed its own
wait (reduce_expand: the batch's lengths, since decode lets it start only then). ``launch_dependents`` is a hint, best given
once the inputs are loaded: whatever the dependent reads of ours it reads after its own ``wait``, which is for the whole of
this kernel.
CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, ``griddepcontrol``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl


@lru_cache(maxsize=16)
def _supported(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(device: torch.device, early: bool = True) -> dict[str, int]:
    """Keyword arguments of a launch on ``device``: the constexpr PDL of the kernel, and Triton's own option with it.

    ``early``: the kernel after this one may start while this one runs. Else it starts when this one's programs have ended, and finds
    the multiprocessors empty: where its programs do not fill them, those that start early would crowd on the ones that are free.
    """
    return {"PDL": 1 if early else 2, "launch_pdl": True} if _supported(device) else {"PDL": 0}


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernels before this one have finished and their writes can be read; nothing unless PDL."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """The kernel after this one may start once every program has come here; nothing unless PDL, and an early one."""
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
