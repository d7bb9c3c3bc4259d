# SPDX-License-Identifier: Apache-2.0
"""How the decode kernel is launched: warps, pipeline stages, registers, and programs on a multiprocessor.

In: a step's columns and the plan of V. Out: ``Launch``, which changes speed, and with ``rows`` the rounding. A default for every GPU, and
one for many columns on Hopper, are here; what a GPU likes better is measured by `kvsplice bench launch` and handed in by the caller.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvsplice_kernels.operands import num_accumulators
from kvsplice_kernels.plan import Plan

PROGRAMS = 8  # the fastest of a sweep on an H200 at 1 x 32k, 8 x 8k, 64 x 4k and 16 x 32k tokens
MOST_ACCUMULATORS = 20  # of 4 registers each, that 200 registers hold beside the rest
MOST_PAIRS = 16  # of accumulators, for 16 columns, that 255 registers hold beside the rest
MOST_RANKS = 256  # of K and V, whose queries and codes they hold too
ROWS_FROM = 32  # columns
FEW_RANKS = 128  # of K and V, for whose rows 128 registers are enough


@dataclass(frozen=True)
class Launch:
    """One way to launch decode.

    num_warps: of a program. num_stages: of the loop over tiles. maxnreg: most registers of a thread, None: up to 255.
    programs: on a multiprocessor, in one wave, that choose_num_splits cuts the keys for. rows: query rows of a program that has
        queries as rows (decode_rows), at least 64 for Hopper's tensor cores; None: tokens are the rows.
    """

    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None
    programs: int = PROGRAMS
    rows: int | None = None

    def options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def has_rows(launch: Launch | None) -> bool:
    """Whether a launch, None the default, has queries as rows."""
    return launch is not None and launch.rows is not None


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def rows_launch(columns: int, ranks: int, device: torch.device) -> Launch | None:
    """What many columns are launched with where the tensor cores take 64 rows at a time: queries as rows, two programs on a
    multiprocessor, or four where ranks are few. Three, of 168 registers, are faster at 16 x 32k tokens and slower at 64 x 4k,
    but for int8 (configs/launch). ``ranks``: stored dimensions of K and V together; more would spill.

    Not on Blackwell, whose tensor memory Triton 3.6 overruns with some layouts; nor with the mma of older GPUs, unmeasured.
    """
    if columns < ROWS_FROM or ranks > MOST_RANKS or not takes_64_rows(device):
        return None
    return Launch(4, maxnreg=128, programs=4, rows=64) if ranks <= FEW_RANKS else Launch(4, programs=2, rows=64)


@lru_cache(maxsize=8)
def takes_64_rows(device: torch.device) -> bool:
    """Whether there is wgmma: on Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=256)
def default_launch(columns: int, ranks: int, v_plan: Plan) -> Launch:
    """A warp for every 16 columns, or for every 8 where the registers would not hold more: spills cost more than codes
    unpacked by several warps. Ten warps of 200 registers fit a multiprocessor, eight
    without a limit, which the layouts of many narrow runs of V want. ``ranks``: stored dimensions of K and V together.
    Cached: Triton's constexpr functions take some 0.3 ms on the host, in every launch.
    """
    accumulators = num_accumulators(v_plan)
    wide = ranks <= MOST_RANKS and accumulators <= MOST_PAIRS
    limited = columns <= 8 and ranks <= MOST_RANKS and accumulators <= MOST_ACCUMULATORS
    return Launch(max(1, columns // (16 if wide else 8)), maxnreg=200 if limited else None)
