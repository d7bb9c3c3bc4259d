# SPDX-License-Identifier: Apache-2.0
"""Launching a kernel again costs the host little: by what Triton compiled, without searching for the variant anew.

In: a jit function, its grid, arguments and constants. Triton binds, specialises and prints all of them into a string for every
launch, some 25 us on the host for a kernel of ours: more than most take on the GPU, and prefills are launched, not replayed. From the second
launch of a kind on, its compiled kernel is called by Triton's own ``compiled[grid](*args)``. Triton's debugging knobs that change what
is compiled are therefore read once.

``Bound`` is a launch without its tensors: what the layers of a step have in common, checked and looked up once for all of them.
Kernels have a ``bind_...``, which checks tensors and returns the launch for their like, and them; ``launcher`` makes of it what
launches at once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Compiled(NamedTuple):
    """A variant, and its constants in the order of the signature; ``function`` keeps its id from being given to another."""

    function: Any
    kernel: CompiledKernel
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], Compiled] = {}  # of (function, device, kinds of arguments, constants)


def dispatch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Compiled | None:
    """kernel[grid](*args, **constants); ``args`` are all that is not constexpr, in the order of the signature.

    Returns what serves the same kinds of arguments again, if there is such a thing.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's, or a test's
        kernel[grid](*args, **constants)
        return None
    key = (id(kernel), driver.active.get_current_device(), *map(kind, args), *constants.items())
    found = _compiled.get(key)
    if found is not None:
        found.kernel[_three(grid)](*args, *found.constants)
        return found
    compiled = kernel[grid](*args, **constants)
    # Elsewhere Triton may specialise on more than ``kind`` tells apart (on AMD, a tensor's bytes).
    if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return _compiled.setdefault(key, Compiled(kernel, compiled, rest))
    return None


def kind(argument: Any) -> Any:
    """What Triton may compile a variant for, or a finer distinction: equal kinds are served by one compiled kernel."""
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31, argument < 1 << 63
    if isinstance(argument, Tensor):
        return kind_of_tensor(argument)
    return type(argument)


def kind_of_tensor(tensor: Tensor) -> tuple[Any, bool]:
    return tensor.dtype, tensor.data_ptr() % 16 == 0


class Bound:
    """A kernel with its grid, its numbers and its constants: a launch but for the tensors, which lead the signature.

    Shapes and strides are in the numbers, so it serves tensors of those alone; dtypes and alignments may differ from call
    to call. For one device. Nothing is launched where the grid is empty.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **constants: Any) -> None:
        self.launch = kernel, grid, numbers, constants
        self._kinds: list[tuple[Any, bool]] | None = None  # of the tensors that _run serves
        self._run: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        kinds = [*map(kind_of_tensor, tensors)]
        if kinds == self._kinds:
            self._run(*tensors, *self._rest)
            return
        kernel, grid, numbers, constants = self.launch
        if 0 in grid:
            return
        found = dispatch(kernel, grid, *tensors, *numbers, **constants)
        if found is not None:
            self._run, self._rest = found.kernel[_three(grid)], (*numbers, *found.constants)
            self._kinds = kinds


P = ParamSpec("P")
Binding = tuple[Bound, tuple[Tensor, ...]]  # a launch, and the tensors that it was bound for in the order that it takes


def launcher(bind: Callable[P, tuple[Callable[..., None], tuple[Any, ...]]]) -> Callable[P, None]:
    """What binds a launch and makes it: the arguments of ``bind``, and what it raises."""

    @wraps(bind)
    def launch(*args: P.args, **kwargs: P.kwargs) -> None:
        bound, tensors = bind(*args, **kwargs)
        bound(*tensors)

    return launch


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]
