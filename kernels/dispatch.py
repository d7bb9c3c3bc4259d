# SPDX-License-Identifier: Apache-2.0
"""Launching a kernel again costs the host little: by what Triton compiled, without searching for the variant anew.

In: a jit function, its grid, arguments and constants. Triton binds, specialises and prints all of them into a string for every
launch, some 25 us on the host for a kernel of ours: more than most take on the GPU, and prefills are launched, not replayed. From the second
launch of a kind on, its compiled kernel is called by Triton's own ``compiled[grid](*args)``. Triton's debugging knobs that change what
is compiled are therefore read once.
"""

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# (kernel, device, kinds of arguments, constants) -> compiled kernel and its constants in the order of its signature
_compiled: dict[tuple[Any, ...], tuple[Any, CompiledKernel, tuple[Any, ...]]] = {}


def dispatch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants); ``args`` are all that is not constexpr, in the order of the signature."""
    if not isinstance(kernel, JITFunction):  # the interpreter's, or a test's
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), driver.active.get_current_device(), *map(kind, args), *constants.items())
    found = _compiled.get(key)
    if found is not None and found[0] is kernel:
        found[1][(*grid, 1, 1)[:3]](*args, *found[2])
        return
    compiled = kernel[grid](*args, **constants)
    # Elsewhere Triton may specialise on more than ``kind`` tells apart (on AMD, a tensor's bytes).
    if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = kernel, compiled, rest


def kind(argument: Any) -> Any:
    """What Triton may compile a variant for, or a finer distinction: equal kinds are served by one compiled kernel."""
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31, argument < 1 << 63
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)
