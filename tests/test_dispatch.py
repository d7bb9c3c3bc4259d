# SPDX-License-Identifier: Apache-2.0
"""dispatch launches what Triton itself would: the same compiled kernel, grid and arguments, for arguments of every kind.

Compiled for a GPU that is not there; Triton's last step, the driver's launch, is recorded. As a script, the file prints how
many launches were compared.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["y_ptr"])
def scale_kernel(x_ptr, y_ptr, count, stride, factor, BLOCK: tl.constexpr, PLAN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < count, other=0.0)
    tl.store(y_ptr + i, x * factor + PLAN[0][0], mask=i < count)


def variants() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments and constants that Triton tells apart, and some that it does not."""
    room = torch.empty(64)
    pointers = room, room[1:], room[4:], room.to(torch.bfloat16)
    counts, strides, plans = (1, 7, 16), (1, 3, 16, 1 << 40, -(1 << 31)), (((8, 1),), ((4, 1), (2, 2)))
    found = []
    for x, y, count, stride in itertools.product(pointers, pointers[:2], counts, strides):
        found.append(((x, y, count, stride, 0.5), dict(BLOCK=16, PLAN=plans[0], num_warps=1)))
    for block, plan, warps in itertools.product((16, 32), plans, (1, 2)):
        found.append(((room, room, 5, 5, 2.0), dict(BLOCK=block, PLAN=plan, num_warps=warps)))
    return found


def main() -> int:
    """Launch every variant six times: by Triton, by dispatch for the first time and again, and bound: new, again, and one
    that served another variant's tensors before."""
    from test_kernels_compile import NoDevice
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kvsplice_kernels.dispatch import Bound, dispatch

    driver.set_active(NoDevice(90))
    launches, searches = [], []

    def init_handles(compiled: Any) -> None:
        compiled.module = compiled.function = 0
        compiled._run = lambda x, y, z, stream, function, packed, metadata, enter, leave, *args: launches.append(
            (compiled, (x, y, z), args)
        )

    CompiledKernel._init_handles = init_handles
    run = JITFunction.run
    JITFunction.run = lambda fn, *args, **options: searches.append(fn) or run(fn, *args, **options)
    for (args, constants), grid in itertools.product(variants(), ((3,), (3, 2), (3, 2, 4))):
        scale_kernel[grid](*args, **constants)
        step = partial(dispatch, scale_kernel, grid, *args, **constants)
        step()
        before = len(searches)
        step()
        (x, y, *numbers), other_x = args, torch.empty(64)[1 if args[0].data_ptr() % 16 == 0 else 0 :]
        bound = Bound(scale_kernel, grid, *numbers, **constants)
        bound(x, y)
        bound(x, y)
        assert len(searches) == before, f"Triton searched again for {args[2:]}, {constants}"
        bound(other_x, y)
        scale_kernel[grid](other_x, y, *numbers, **constants)
        assert launches.pop()[0] is launches.pop()[0], (other_x.data_ptr() % 16, args, constants)
        bound(x, y)
        (kernel, *expected), *others = launches[-6:]
        assert len(others) == 5
        for other, *given in others:
            assert other is kernel and given[0] == expected[0], (args, constants)
            assert all(a is b or a == b for a, b in zip(given[1], expected[1], strict=True)), (args, constants)
    before = len(launches)
    Bound(scale_kernel, (3, 0), 1, 1, 0.5, BLOCK=16, PLAN=((8, 1),))(torch.empty(1), torch.empty(1))
    assert len(launches) == before, "a launch of an empty grid"
    print(len(launches), "launches of", len({id(kernel) for kernel, *_ in launches}), "compiled kernels")
    return 0


def test_the_same_kernels_are_launched() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    launches, kernels = (int(word) for word in done.stdout.split() if word.isdigit())
    assert launches == 3 * 6 * len(variants()) and kernels >= 15


if __name__ == "__main__":
    sys.exit(main())
