# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench launch`: the launch parameters of the decode kernel that this GPU likes best.

In: a request. Out: a table, and a file as configs/launch/ holds them (``vllm_kvsplice.launch``). A candidate has to be right
before it is timed; times are of a decode step's attention, cold L2, CUDA graph replay (``kernels_timing``), random data.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    from kvsplice_kernels.launch import Launch
    from vllm_kvsplice.bench.kernels_jobs import Job
    from vllm_kvsplice.bench.kernels_timing import Device
    from vllm_kvsplice.bench.launch_sweep import Sweep
    from vllm_kvsplice.launch import LaunchFile

METHOD = (
    "Each candidate was checked before it was timed: attention of a decode step (project_query, decode, reduce_expand), cold "
    "L2, CUDA graph replay, p50. The fastest by the geometric mean over the points were timed again in turn with the default, "
    "which is kept (launch null) where none is 2 % faster."
)
SMALL = 1, 512  # of a rehearsal: requests, tokens of each
Key = tuple[int, int, str]  # head_dim, columns, layout


@dataclass(frozen=True)
class LaunchRequest:
    """A run of the launch tuner.

    Args:
        presets: names or .toml files; presets of one layout at a head_dim are one entry. heads: (query heads, KV heads);
            those of equal columns are points of one entry. shapes: (requests, tokens of each). query_lens: new tokens of each
            request, which make the columns too.
        seconds: after which no further candidate is begun; about a third goes to compiling. json: file for the result.
        add: to the entries that ``json`` has, of which those measured again are replaced.
    """

    presets: tuple[str, ...] = ("near_lossless", "balanced", "max", "int8", "v_only")
    heads: tuple[tuple[int, int], ...] = ((28, 4),)
    head_dims: tuple[int, ...] = (128,)
    shapes: tuple[tuple[int, int], ...] = ((64, 4096), (16, 32768), (8, 8192))
    query_lens: tuple[int, ...] = (1,)
    seconds: float = 300.0
    json: str | None = None
    add: bool = False

    def check(self) -> None:
        """Raise KVSpliceError for what cannot be measured; presets and the file are checked where they are read."""
        if any(kv < 1 or query < 1 or query % kv for query, kv in self.heads):
            raise KVSpliceError(
                f"heads {self.heads} do not fit: expected query heads that are a multiple of the KV heads."
            )
        if any(n < 1 for shape in self.shapes for n in shape):
            raise KVSpliceError(
                f"shapes {self.shapes} are not all positive: expected requests and tokens of at least 1."
            )
        if not self.query_lens or any(q < 1 or q > n for q in self.query_lens for _, n in self.shapes):
            raise KVSpliceError(
                f"query lengths {self.query_lens} do not fit: expected 1 to the tokens of a request, for example 5."
            )
        if self.add and not self.json:
            raise KVSpliceError("--add was given without a file to add to: expected --json FILE.")
        if not self.seconds > 0:
            raise KVSpliceError(f"--seconds {self.seconds:g} is no time: expected more than 0, for example 300.")


def run(request: LaunchRequest) -> int:
    """Measure, print the table, write the file. Returns 0.

    Raises:
        KVSpliceError: there is no NVIDIA GPU, the request is not one, the default launch fails, or the file cannot be
        written.
    """
    import torch

    from vllm_kvsplice.bench.kernels_timing import Device

    request.check()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise KVSpliceError(
            "kvsplice bench launch found no NVIDIA GPU: expected one that torch.cuda can use, see `nvidia-smi`."
        )
    return run_on(request, Device(), torch.cuda.get_device_name(0))


def run_on(request: LaunchRequest, device: Device, gpu: str) -> int:
    """``run`` on a device that is there; tests give it the CPU, where kernels are interpreted."""
    from vllm_kvsplice.launch import LaunchFile, file_name
    from vllm_kvsplice.scoring import results

    earlier = _earlier(request, gpu)
    if request.json:
        results.check_writable(request.json)
    began = time.monotonic()
    groups = _groups(request)
    rejected = _rehearse(groups, device, request.seconds / 3)
    entries = []
    for left, (key, jobs) in zip(range(len(groups), 0, -1), groups.items(), strict=True):
        now = time.monotonic()
        deadline = now + max(0.0, began + request.seconds - now) / left
        entries.append(_entry(key, jobs, rejected, device, deadline))
        print(_table(entries[-1]), flush=True)
    result = {
        "gpu": gpu,
        **results.provenance(),
        "method": METHOD,
        "settings": asdict(request),
        "seconds": time.monotonic() - began,
        "entries": entries,
    }
    if earlier is not None:
        result = _added(earlier, result)
    LaunchFile.model_validate_json(results.to_json(result))  # what is written can be read
    print(f"\n{METHOD}\n{len(entries)} entries, {result['seconds']:.0f} s; place: configs/launch/{file_name(gpu)}.json")
    if request.json:
        results.write_json(result, request.json)
    return 0


def _earlier(request: LaunchRequest, gpu: str) -> LaunchFile | None:
    """The file to add to, if there is one."""
    from vllm_kvsplice.launch import read

    if not (request.add and request.json and Path(request.json).exists()):
        return None
    found = read(Path(request.json))
    if found.gpu != gpu:
        raise KVSpliceError(f"launch file {request.json} is of {found.gpu}, expected {gpu}: give another --json FILE.")
    return found


def _added(earlier: LaunchFile, result: dict[str, Any]) -> dict[str, Any]:
    """The entries of both, those that were measured again once; how the earlier ones were made is kept beside."""
    new = {(entry["head_dim"], entry["columns"], entry["layout"]) for entry in result["entries"]}
    kept = [entry.model_dump() for entry in earlier.entries if entry.key not in new]
    return result | {
        "command": f"{earlier.command}; {result['command']}",
        "settings": {"earlier": earlier.settings, "earlier_date": earlier.date, **result["settings"]},
        "seconds": earlier.seconds + result["seconds"],
        "entries": kept + result["entries"],
    }


def _groups(request: LaunchRequest) -> dict[Key, list[Job]]:
    """The points of every entry; its preset is the first of that layout."""
    from kvsplice_kernels.decode import query_tile
    from vllm_kvsplice.bench.kernels_jobs import OURS, Job
    from vllm_kvsplice.calibration.presets import resolve
    from vllm_kvsplice.codec.layout import PREFERRED_BLOCK_SIZE

    found: dict[Key, dict[object, Job]] = defaultdict(dict)
    for head_dim in request.head_dims:
        for preset in request.presets:
            layout = str(resolve(preset, head_dim)[0])
            for heads, query_len in product(request.heads, request.query_lens):
                key = head_dim, query_tile(heads[0] // heads[1], query_len)[1], layout
                for batch, context in request.shapes:
                    job = Job("decode", OURS, preset, heads, head_dim, batch, context, query_len, PREFERRED_BLOCK_SIZE)
                    found[key].setdefault((heads, batch, context, query_len), job)
    return {key: list(jobs.values()) for key, jobs in found.items()}


def _variants(key: Key, job: Job, device: Device) -> list[Launch]:
    """What is tried, the default first."""
    import torch

    from kvsplice_kernels.launch import default_launch
    from vllm_kvsplice.bench.launch_choice import variants
    from vllm_kvsplice.calibration.presets import resolve
    from vllm_kvsplice.launch import many_columns

    layout, _ = resolve(job.preset, job.head_dim)
    ranks = layout.rank("k") + layout.rank("v")
    with_columns = default_launch(key[1], ranks, layout.plan("v", job.block_size))
    return variants(many_columns(layout, key[1], torch.device(device.name)) or with_columns, with_columns, key[1])


def _rehearse(groups: dict[Key, list[Job]], device: Device, seconds: float) -> dict[tuple[Key, Launch], str]:
    """On a GPU: every variant compiled and checked at a small shape, in processes of their own; those that are no good."""
    if not device.on_gpu:
        return {}
    from vllm_kvsplice.bench.kernels_rehearsal import rehearse

    small = {
        replace(jobs[0], batch=SMALL[0], context=SMALL[1], launch=launch): (key, launch)
        for key, jobs in groups.items()
        for launch in _variants(key, jobs[0], device)
    }
    return {small[job]: outcome.text for job, outcome in rehearse(list(small), device, seconds).items()}


def _entry(
    key: Key, jobs: Sequence[Job], rejected: dict[tuple[Key, Launch], str], device: Device, deadline: float
) -> dict[str, Any]:
    from vllm_kvsplice.bench.launch_choice import choose, programs_of
    from vllm_kvsplice.bench.launch_sweep import sweep

    tried = _variants(key, jobs[0], device)
    default = tried[0]
    bad = {launch: text for (k, launch), text in rejected.items() if k == key and launch != default}
    found = sweep(jobs, default, [v for v in tried if v not in bad], device, deadline)
    for launch, text in bad.items():
        found.outcomes[_outcome(text)] += len(programs_of(launch))
    choice = choose(default, found.times)
    return {
        **dict(zip(("head_dim", "columns", "layout"), key, strict=True)),
        "launch": asdict(choice.launch) if choice.launch else None,
        "measured": {
            "preset": jobs[0].preset,
            "default": asdict(default),
            "best": asdict(choice.best),
            "speedup": choice.speedup,
            "candidates": dict(found.outcomes),
            "points": _points(jobs, found, choice.best),
        },
    }


def _outcome(text: str) -> str:
    """What became of the candidates of a variant that its rehearsal rejected, in the words of ``Sweep``."""
    from vllm_kvsplice.bench.kernels_rehearsal import LATE

    return "not reached" if text == LATE else "wrong" if "wrong result" in text else "failed"


def _points(jobs: Sequence[Job], found: Sweep, best: Launch) -> list[dict[str, Any]]:
    times = zip(jobs, found.times[found.default], found.times[best], strict=True)
    return [
        {
            "heads": f"{job.heads[0]}/{job.heads[1]}",
            "batch": job.batch,
            "context": job.context,
            "query_len": job.query_len,
            "default_us": default_us,
            "best_us": best_us,
        }
        for job, default_us, best_us in times
    ]


def _point_name(point: dict[str, Any]) -> str:
    new = f", {point['query_len']} new" if point["query_len"] > 1 else ""
    return f"{point['batch']}x{point['context']}{new} us"


def _table(entry: dict[str, Any]) -> str:
    """An entry as a few lines."""
    from vllm_kvsplice.scoring.results import table

    facts = entry["measured"]
    rows = [("", "warps", "stages", "registers", "programs", "rows", *(_point_name(p) for p in facts["points"]))]
    for name in ("default", "best"):
        launch = [str(value) if value else "-" for value in facts[name].values()]
        rows.append((name, *launch, *(f"{point[f'{name}_us']:.1f}" for point in facts["points"])))
    counts = ", ".join(f"{count} {name}" for name, count in sorted(facts["candidates"].items()))
    kept = "taken" if entry["launch"] else "the default is kept"
    title = f"\n{entry['layout']}, head_dim {entry['head_dim']}, {entry['columns']} columns ({facts['preset']})"
    return f"{title}\n{table(rows)}\nbest {facts['speedup']:.3f} x as fast: {kept}; candidates: {counts}"
