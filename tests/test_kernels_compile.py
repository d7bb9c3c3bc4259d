# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for NVIDIA GPUs, checked without one: launches are recorded and handed to Triton's compiler.

Run as a script, the file prints registers, spills and shared memory of each kernel:
``python tests/test_kernels_compile.py [--arch 90] [--case near-lossless-128]``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ARCHS = (80, 90, 100)  # of the tests
BY_HAND_ARCHS = (86, 89)  # between them; less shared memory, which no kernel comes near
# id -> (head_dim, K tiers, V tiers, wide dtype, group, block size, soft cap, window)
CASES = {
    "near-lossless-128": (128, [(8, 32), (4, 96)], [(8, 32), (4, 96)], torch.bfloat16, 7, 16, None, None),
    "balanced-128": (128, [(8, 16), (4, 80), (2, 32)], [(8, 32), (4, 32), (2, 64)], torch.bfloat16, 7, 16, None, None),
    "max-128": (128, [(4, 64), (2, 64)], [(4, 64), (2, 64)], torch.bfloat16, 7, 16, None, None),
    "int8-64": (64, [(8, 64)], [(8, 64)], torch.bfloat16, 3, 64, None, None),
    "v-only-128": (128, [(16, 128)], [(8, 96), (0, 32)], torch.bfloat16, 4, 16, None, None),
    "mixed-256": (256, [(8, 64), (4, 160), (2, 32)], [(4, 128), (2, 128)], torch.bfloat16, 8, 528, 50.0, 4096),
    "wide-fp16-80": (80, [(16, 40), (8, 40)], [(16, 40), (2, 40)], torch.float16, 1, 48, None, 512),
}

MAIN = ("near-lossless-128", "int8-64")  # in every architecture and with speculative tokens
BY_HAND = ("balanced-128", "max-128")  # a minute or more of compiling, for kernels like those of the others


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: object
    grid: object
    args: tuple[object, ...]
    options: dict[str, object]


def record(call: Callable[[], None]) -> list[Launch]:
    """Launches that ``call`` makes, none of them run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda fn, grid: lambda *args, **opts: launches.append(Launch(fn, grid, args, opts))
    try:
        call()
    finally:
        JITFunction.__getitem__ = original
    return launches


class NoDevice:
    """As much of a Triton driver as compiling asks for; the device number is the architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def launches_of(name: str) -> Iterator[tuple[str, Launch]]:
    """Launches of one case: a cache write, decode steps, speculative tokens, prefill over context, expansion."""
    from kvsplice_kernels import attention, cache_write, encode, expand_cached, fused_expand, write_and_project
    from kvsplice_kernels.row_operands import in_columns
    from vllm_kvsplice.codec.layout import LatentLayout

    head_dim, k, v, wide, group, block_size, soft_cap, window = CASES[name]
    layout, H, B = LatentLayout.of(head_dim, k, v), 2, 4
    cache = torch.empty(8, H, block_size, layout.bytes_per_token_head, dtype=torch.uint8)
    plans = layout.plan("k", block_size), layout.plan("v", block_size)
    ranks = layout.rank("k"), layout.rank("v")
    mean = torch.empty(H, head_dim)
    planes = [torch.empty(H, r, head_dim) for r in ranks]
    decode = [torch.empty(H, head_dim, r) for r in ranks]
    table = torch.empty(B, 64, dtype=torch.int32)
    lens, starts = torch.empty(B, dtype=torch.int32), torch.empty(B + 1, dtype=torch.int32)
    prepared = in_columns(encode.prepare(planes[0], decode[0], mean, planes[1], decode[1], mean), *plans)
    for T in (B, 1024, 16384):
        x, slots = torch.empty(T, H, head_dim, dtype=wide), torch.empty(T, dtype=torch.int64)
        args = (x, x, cache, slots, prepared, *plans)
        yield from named(f"T={T}", record(lambda args=args: cache_write.cache_write(*args, wide)))
    for T in (B, 256):
        q, x = torch.empty(T, H * group, head_dim, dtype=wide), torch.empty(T, H, head_dim, dtype=wide)
        args = (q, x, x, cache, torch.empty(T, dtype=torch.int64), prepared, *plans)
        args += torch.empty(T, H * group, ranks[0]), torch.empty(T, H * group), wide
        yield from named(f"T={T}", record(lambda args=args: write_and_project.write_and_project(*args)))
    for T, max_query_len, splits in ((B, 1, 16), (512, 4, 2), (1024, 1024, 1))[:: 1 if name in MAIN else 2]:
        q = torch.empty(T, H * group, head_dim, dtype=wide)
        args = (q, cache, *plans, prepared, table, lens, starts, 0.1, q, max_query_len, splits)
        options = dict(sliding_window=window, soft_cap=soft_cap, wide_dtype=wide)
        found = record(lambda args=args, options=options: attention.paged_attention(*args, **options))
        yield from named(f"T={T} q={max_query_len}", found)
    q = torch.empty(512, H * group, head_dim, dtype=wide)
    args = (q, cache, *plans, prepared, table, lens, starts, 0.1, q, 8, 2)
    options = dict(sliding_window=window, soft_cap=soft_cap, wide_dtype=wide, launch=attention.Launch(4, rows=64))
    found = record(lambda: attention.paged_attention(*args, **options))
    yield from named("T=512 rows=64", [launch for launch in found if "decode" in launch.kernel.__name__])
    out = torch.empty(1024, H, head_dim, dtype=wide)
    args = (cache, *plans, table, lens, starts, (decode[0], mean), (decode[1], mean), out, out, 512, wide)
    yield from named("context", record(lambda: expand_cached.expand_cached(*args)))
    scale = torch.empty(1024, H, dtype=torch.uint8)
    codes = torch.empty(1024, H, ranks[1], dtype=torch.int8)
    packed = torch.empty(1024, H, ranks[1] // 2, dtype=torch.uint8)
    yield from named("int8", record(lambda: fused_expand.fused_expand_int8(codes, scale, decode[1], mean, out)))
    yield from named("int4", record(lambda: fused_expand.fused_expand_int4(packed, scale, decode[1], mean, out)))


def named(label: str, launches: list[Launch]) -> Iterator[tuple[str, Launch]]:
    for launch in launches:
        yield f"{launch.kernel.__name__} {label}", launch


def ask(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton says about a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) that the assembler reports for a cubin."""
    text = ask("cuobjdump", "-res-usage", cubin)
    return tuple(int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK"))


def loop_instructions(cubin: bytes) -> int:
    """Machine instructions of the longest loop, branches inside it included; 0 without a loop."""
    lines = ask("nvdisasm", "-c", cubin).splitlines()
    labels = {found.group(1): i for i, line in enumerate(lines) if (found := re.match(r"(\.L_\S+):", line))}
    longest = 0
    for i, line in enumerate(lines):
        back = re.search(r"BRA.*`\((\.L_\S+)\)", line)
        if back and labels.get(back.group(1), i) < i:
            body = lines[labels[back.group(1)] : i + 1]
            longest = max(longest, sum(bool(re.search(r"/\*[0-9a-f]{4,}\*/ +\S", part)) for part in body))
    return longest if longest > 1 else 0  # a kernel ends in a branch to itself


def compile_one(arch: int, name: str, label: str, launch: Launch) -> str:
    """Compile through the JIT's own binder for the active architecture and describe the result in a line."""
    dependent = {"PDL": 1, "launch_pdl": True} if arch >= 90 and "PDL" in launch.options else {}
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **(launch.options | dependent))
    if "\ttrap;" in compiled.asm["ptx"]:  # all that Triton emits where tensor memory does not hold a kernel
        raise RuntimeError(f"a kernel of {launch.options.get('N')} rows that does not fit sm_{arch}")
    registers, spilled = resources(compiled.asm["cubin"])
    meta = compiled.metadata
    return (
        f"sm_{arch} {name:18s} {label:34s} warps {meta.num_warps} stages {meta.num_stages} "
        f"registers {registers:3d} stack {spilled:5d} shared {meta.shared:5d} loop {loop_instructions(compiled.asm['cubin'])}"
    )


def compile_all(arch: int, cases: list[str]) -> int:
    """Compile the cases for one architecture, a line for each kernel; returns how many failed."""
    from triton.runtime import driver

    driver.set_active(NoDevice(arch))
    jobs = [(arch, case, label, launch) for case in cases for label, launch in launches_of(case)]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, done in [(job, pool.submit(compile_one, *job)) for job in jobs]:
            try:
                print(done.result(), flush=True)
            except Exception as error:  # report every kernel, not the first that fails
                failed += 1
                root: BaseException = error
                while root.__cause__ or root.__context__:
                    root = root.__cause__ or root.__context__
                print(f"FAILED sm_{arch} {job[1]} {job[2]}: {error}\n{root!r}", flush=True)
    return failed


def host_calls(case: str) -> int:
    """Calls that launchers, launching again what they launched before, make of Triton's constexpr functions on the host.

    One takes microseconds, one of a plan a third of a millisecond: more than the kernel.
    """
    from triton.runtime import driver
    from triton.runtime.jit import ConstexprFunction

    driver.set_active(NoDevice(90))
    list(launches_of(case))
    calls = []
    original = ConstexprFunction.__call__
    ConstexprFunction.__call__ = lambda fn, *args, **kw: calls.append(fn) or original(fn, *args, **kw)
    list(launches_of(case))
    ConstexprFunction.__call__ = original
    return len(calls)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for NVIDIA GPUs, without one.")
    parser.add_argument("--host", action="store_true", help="instead: count calls that launchers waste on the host")
    parser.add_argument("--arch", type=int, action="append", choices=(*ARCHS, *BY_HAND_ARCHS))
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    args = parser.parse_args()
    if args.host:
        return sum(host_calls(case) for case in args.case or list(CASES))
    return 1 if sum(compile_all(arch, args.case or list(CASES)) for arch in args.arch or ARCHS) else 0


@pytest.mark.parametrize(
    ("case", "arch"),
    [(case, arch) for case in CASES if case not in BY_HAND for arch in (ARCHS if case in MAIN else (90,))],
)
def test_compiles(case: str, arch: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--case", case, "--arch", str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("registers") == (18 if case in MAIN else 15), done.stdout
    if arch == 90 and CASES[case][0] <= 128:  # a program's registers hold its rows
        rows = re.findall(r"decode_kernel T=512 rows=64 .* stack +(\d+) ", done.stdout)
        assert rows == ["0"], done.stdout


def test_launchers_do_not_call_tritons_functions_in_every_launch() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, "--host"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
