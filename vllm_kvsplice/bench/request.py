# SPDX-License-Identifier: Apache-2.0
"""What `kvsplice bench serve` is asked: the request, and the cache settings that it names. Next: serve.py.

A setting is one engine: the arguments of `vllm serve` that choose its cache, all else being equal. Its names:
``bf16`` and ``fp8`` on vLLM's default attention backend; ``cache:NAME`` for any other --kv-cache-dtype; ``kvsplice`` with
the codec that serving would pick; ``kvsplice:FILE`` with a projector file; ``kvsplice:PRESET`` for dummy weights only.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vllm_kvsplice.errors import KVSpliceError

DTYPE = "bfloat16"
ALSO = ("latency", "throughput")
SLA_NAMES = ("ttft", "tpot", "e2el")
KVSPLICE = "kvsplice"
FIT = "fit"  # in place of a number of users: as many as the setting's cache holds
MOST_FITTING = 1024  # of them, which is vLLM's own limit on large GPUs


@dataclass(frozen=True)
class ServeBenchRequest:
    """One benchmark. Lengths in tokens; ``points`` are (batch, context); an empty ``concurrency`` skips the sweep.

    Args:
        model: Hugging Face id or folder; with ``dummy`` its config alone is used. model_shape: a built-in shape instead,
            which implies ``dummy``. settings: see the module.
        concurrency: users of the sweep; "fit" is as many as the setting's own cache holds of whole requests.
        point_output: tokens decoded at a point, one more than a multiple of ``stream_interval``. repeats: decodes a point.
        sweep_rounds: prompts per user of the saturation sweep. sweep_returning: send every prompt a second time.
        goodput: latency limits of the sweep in ms, as vLLM's --goodput takes them. also: further `vllm bench` commands,
            of "latency" and "throughput", each with an engine of its own per setting (latency: per point).
        kv_cache_memory_bytes: the cache of every engine; None is what ``gpu_memory_utilization`` leaves.
        serve_args: further arguments of every engine, split as a shell would. results: JSON files of earlier runs: nothing
            is run, they are merged, printed and plotted. plot: folder for PNGs. logs: folder for the servers' logs.
    """

    model: str | None = None
    model_shape: str | None = None
    dummy: bool = False
    settings: tuple[str, ...] = ("bf16", "fp8", KVSPLICE)
    points: tuple[tuple[int, int], ...] = ((1, 1024), (64, 1024), (64, 4096), (16, 8192), (16, 32768))
    point_output: int = 129
    repeats: int = 3
    concurrency: tuple[int | str, ...] = ()
    sweep_input: int = 16384
    sweep_output: int = 512
    sweep_rounds: int = 2
    sweep_returning: bool = False
    goodput: tuple[str, ...] = ("ttft:10000", "tpot:50")
    also: tuple[str, ...] = ()
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int | None = None
    stream_interval: int = 8
    serve_args: str = ""
    seed: int = 0
    json: str | None = None
    plot: str | None = None
    kernels_json: str | None = None
    logs: str | None = None
    results: tuple[str, ...] = ()

    @property
    def weights(self) -> str:
        """ "dummy" or "real"."""
        return "dummy" if self.dummy or self.model_shape else "real"

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        points = [context + self.point_output for _, context in self.points]
        return max(points + ([self.sweep_input + self.sweep_output] if self.concurrency else []))

    @property
    def most_users(self) -> int:
        """Requests that run at once at most."""
        sweep = [MOST_FITTING if users == FIT else int(users) for users in self.concurrency]
        return max([batch for batch, _ in self.points] + sweep)


@dataclass(frozen=True)
class Setting:
    """One engine's cache: its name, its arguments, and for kvsplice the projector file or the preset to make one of."""

    name: str
    args: tuple[str, ...]
    projector: str | None = None
    preset: str | None = None


def check(request: ServeBenchRequest) -> None:
    """Raise KVSpliceError for a request that cannot be run."""
    if request.results:
        return
    if (request.model is None) == (request.model_shape is None):
        raise KVSpliceError(
            "bench serve needs one model: give MODEL, or --model-shape NAME for a built-in shape with dummy weights."
        )
    users = [int(n) for n in request.concurrency if n != FIT]
    numbers = (*(n for point in request.points for n in point), *users)
    counts = (request.point_output, request.repeats, request.sweep_rounds, request.stream_interval, *numbers)
    if not (request.points or request.concurrency) or min(counts) < 1:
        raise KVSpliceError(
            "bench serve has nothing to measure: expected --point BATCHxCONTEXT or --concurrency N, all numbers at least 1."
        )
    if FIT in request.concurrency and "throughput" in request.also:
        raise KVSpliceError(
            "--also throughput sends the prompts of the largest --concurrency, which fit leaves open: give it as a number."
        )
    if request.points and (request.point_output - 1) % request.stream_interval or request.point_output < 2:
        raise KVSpliceError(
            f"--point-output {request.point_output} does not fill whole chunks of --stream-interval {request.stream_interval}: "
            f"expected one more than a multiple of it, for example {1 + 16 * request.stream_interval}."
        )
    _check_words("--also", request.also, ALSO)
    _check_words("--goodput", tuple(limit.split(":")[0] for limit in request.goodput), SLA_NAMES)
    names = [parse_setting(name, request.weights).name for name in request.settings]
    if len(set(names)) < len(names):
        raise KVSpliceError(f"--setting names {', '.join(names)} repeat: give each setting once.")
    try:
        shlex.split(request.serve_args)
    except ValueError as error:
        raise KVSpliceError(
            f"--serve-args {request.serve_args!r} cannot be split ({error}): quote it as for a shell."
        ) from None


def parse_setting(name: str, weights: str) -> Setting:
    """The engine behind a setting's name; raises KVSpliceError if there is none."""
    kind, _, value = name.partition(":")
    if kind == "bf16" and not value:
        return Setting(name, ("--kv-cache-dtype", "auto"))
    if kind == "fp8" and not value:
        return Setting(name, ("--kv-cache-dtype", "fp8"))
    if kind == "cache" and value:
        return Setting(name, ("--kv-cache-dtype", value))
    if kind != KVSPLICE or name.endswith(":"):
        raise KVSpliceError(
            f"--setting {name} is not known: expected bf16, fp8, cache:KV_CACHE_DTYPE, kvsplice, kvsplice:FILE.safetensors or kvsplice:PRESET."
        )
    ours = ("--attention-backend", KVSPLICE)
    if not value:
        return Setting(name, ours)
    if value.endswith(".safetensors") or Path(value).is_dir():
        if not Path(value).exists():
            raise KVSpliceError(
                f"--setting {name}: {value} does not exist; make it with `kvsplice calibrate MODEL --out {value}`."
            )
        return Setting(name, ours, projector=value)
    if weights == "real":
        raise KVSpliceError(
            f"--setting {name}: a preset has no bases for real weights; run `kvsplice calibrate MODEL --preset {value} --out FILE` "
            "and give kvsplice:FILE, or add --dummy."
        )
    return Setting(name, ours, preset=value)


def _check_words(option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [word for word in given if word not in known]
    if unknown:
        raise KVSpliceError(f"{option} {unknown[0]} is not known: expected {', '.join(known)}.")
