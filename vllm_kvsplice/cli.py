# SPDX-License-Identifier: Apache-2.0
"""The command line: parse into one frozen request, call one function, print.

Exit status: 0 done, 1 a check failed, 2 a bad request. Nothing heavy is imported before a subcommand runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvsplice import __version__
from vllm_kvsplice.errors import KVSpliceError

ENGINES = ("hf", "vllm")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status; a KVSpliceError becomes one line on stderr and status 2."""
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KVSpliceError as error:
        sys.stderr.write(f"kvsplice: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("kvsplice: stopped\n")
        return 130
