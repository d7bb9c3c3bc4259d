# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench serve`: vLLM's own `vllm bench` over a list of cache settings, all else equal, in one table and one JSON.

In: a ``ServeBenchRequest``. Out: exit status 0, or 1 if a setting failed, the tables, the JSON, plots. One server per
setting (measure.py), one after the other; the JSON is written after each call's figures, so that what was measured is not lost.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvsplice.bench import analysis, breakdown, dummy_model, plots
from vllm_kvsplice.bench.client import Client
from vllm_kvsplice.bench.commands import bench_latency, bench_throughput, engine_args
from vllm_kvsplice.bench.measure import CALL_TIMEOUT_S, Model, Progress, measure, new_record
from vllm_kvsplice.bench.report import report
from vllm_kvsplice.bench.request import DTYPE, KVSPLICE, ServeBenchRequest, Setting, check, parse_setting
from vllm_kvsplice.codec.fingerprint import shown_name
from vllm_kvsplice.demo.server import require_vllm
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.results import check_writable, provenance, require_matplotlib, write_json
from vllm_kvsplice.scoring.signals import deferred_signals, termination_as_exit

DATA = (
    "random token ids (vLLM's timed_trace dataset without its times), all of a call sent at once; at a point the decoding "
    "calls find the prompts of the first call in the prefix cache"
)
# Of the request: what was measured how. The rest says where results go or which settings were asked for.
NOT_CONDITIONS = ("model", "model_shape", "dummy", "settings", "json", "plot", "kernels_json", "logs", "results")


def run(request: ServeBenchRequest, console: Console | None = None) -> int:
    """Measure, or read earlier results; print, write, draw. Raises KVSpliceError on a request that cannot be run."""
    console = console or Console(stderr=True)
    check(request)
    if request.json:
        check_writable(request.json)
    if request.plot:
        require_matplotlib()
    kernels = breakdown.read(request.kernels_json) if request.kernels_json else None
    if request.results:
        result = analysis.merge([_read(path) for path in request.results])
    else:
        result = _measure_all(request, console)
    Console(soft_wrap=True, highlight=False, markup=False).print(report(result))
    if request.json:
        write_json(result, request.json)
    if request.plot:
        for path in plots.draw(result, Path(request.plot), kernels):
            console.print(f"written: {path}", highlight=False, markup=False)
    return 1 if any(setting["error"] for setting in result["settings"]) else 0


def _measure_all(request: ServeBenchRequest, console: Console) -> dict[str, Any]:
    """All settings of a request, one after the other; the JSON is written whenever something new is in it."""
    require_vllm()
    settings = [parse_setting(name, request.weights) for name in request.settings]
    with ExitStack() as stack:
        stack.enter_context(termination_as_exit())
        work = stack.enter_context(_workspace(request.logs))
        model, config = _model(request, work)
        projectors = [_projector(number, setting, model, work, request.seed) for number, setting in enumerate(settings)]
        result = _new_result(request, config)
        client = stack.enter_context(Client(work / "client.log", model.offline))
        for number, (setting, projector) in enumerate(zip(settings, projectors, strict=True)):
            record = new_record(setting)
            result["settings"].append(record)

            def progress(text: str, name: str = setting.name) -> None:
                console.print(f"{name}: {text}", highlight=False, markup=False, soft_wrap=True)
                result["summary"] = analysis.summarise_result(result)
                if request.json:
                    write_json(result, request.json)

            folder = work / f"{number:02d}-{setting.name.partition(':')[0]}"
            folder.mkdir()
            _measure_one(request, setting, projector, model, client, folder, record, progress)
        return result


def _measure_one(
    request: ServeBenchRequest,
    setting: Setting,
    projector: Path | None,
    model: Model,
    client: Client,
    folder: Path,
    record: dict[str, Any],
    progress: Progress,
) -> None:
    """One setting into ``record``; a failure is noted there, so that the next setting gets its turn."""
    try:
        record["codec"] = _codec(setting, projector, model)
        progress("starting")
        measure(request, setting, projector, model, client, folder, record, progress)
        _also(request, setting, projector, model, folder, record)
        progress("done")
    except KVSpliceError as error:
        record["error"] = str(error)
        progress(f"FAILED: {error}")


def _also(
    request: ServeBenchRequest,
    setting: Setting,
    projector: Path | None,
    model: Model,
    work: Path,
    record: dict[str, Any],
) -> None:
    """`vllm bench latency` and `throughput`, each in a process and an engine of its own."""
    engine = engine_args(request, setting, projector, model.tokenizer)

    def call(name: str, args: list[str], out: Path) -> dict[str, Any]:
        with Client(work / f"{name}.log", model.offline) as client:
            client.run(args, CALL_TIMEOUT_S)
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    if "latency" in request.also:
        record["also"]["latency"] = latency = {}
        for batch, context in request.points:
            out = work / f"latency-{batch}x{context}.json"
            args = bench_latency(model.path, engine, batch, context, request.point_output, out)
            latency[f"{batch}x{context}"] = call("latency", args, out)
    if "throughput" in request.also:
        out = work / "throughput.json"
        args = bench_throughput(model.path, engine, request, out)
        record["also"]["throughput"] = call("throughput", args, out)


def _model(request: ServeBenchRequest, work: Path) -> tuple[Model, dict[str, Any]]:
    """What vLLM is given, and the part of the result that says so."""
    name = request.model_shape or str(request.model)
    shown = shown_name(name)
    if request.weights == "real":
        return Model(name, name, Path(name).is_dir()), {"name": shown, "weights": "real"}
    folder, tokenizer = work / "model", work / "tokenizer"
    config = dummy_model.write_model(folder, tokenizer, request.model_shape, request.model)
    return Model(str(folder), str(tokenizer), True), {"name": shown, "weights": "dummy", "config": config}


def _projector(number: int, setting: Setting, model: Model, work: Path, seed: int) -> Path | None:
    """The projector file of a setting: the one given, or one made of the preset's layout for dummy weights."""
    if setting.preset is None:
        return Path(setting.projector).resolve() if setting.projector else None
    folder = work / f"projector{number}"
    folder.mkdir()
    return dummy_model.write_projector(folder, Path(model.path), setting.preset, seed)


def _codec(setting: Setting, projector: Path | None, model: Model) -> dict[str, Any] | None:
    """Preset, layout, bytes and origin of what a kvsplice setting serves with; None for the others."""
    from vllm_kvsplice.codec.fingerprint import model_shape
    from vllm_kvsplice.codec.projector import Projector
    from vllm_kvsplice.codec.projector_source import locate
    from vllm_kvsplice.scoring.evaluate import read_config
    from vllm_kvsplice.scoring.inspect_file import describe, served_layouts, summary

    if not setting.name.startswith(KVSPLICE):
        return None
    config = read_config(model.path)
    path = locate(str(projector) if projector else None, model.path)
    loaded = Projector.load(path) if path else None
    if loaded is not None:
        loaded.verify(config)
    facts = describe(loaded, model_shape(config), str(path) if path else None)
    bases = "fixed Hadamard rotation" if loaded is None else "calibrated"
    kept = ("preset", "bytes_per_token_head", "ratio", "calibration", "sha256")
    return {key: facts[key] for key in kept if key in facts} | {
        "layout": summary(served_layouts(loaded, model_shape(config)).values()),
        "bases": dummy_model.BASES if setting.preset else bases,
    }


def _new_result(request: ServeBenchRequest, model: dict[str, Any]) -> dict[str, Any]:
    asked = {key: value for key, value in asdict(request).items() if key not in NOT_CONDITIONS}
    conditions = {"dtype": DTYPE, "data": DATA} | json.loads(json.dumps(asked))  # tuples as a file has them
    return {
        "kind": "bench serve",
        "model": json.loads(json.dumps(model)),
        "conditions": conditions,
        "provenance": [provenance()],
        "settings": [],
        "summary": {},
    }


def _read(path: str) -> dict[str, Any]:
    """An earlier result; raises KVSpliceError if it is none."""
    try:
        result = json.loads(Path(path).read_text())
        if result["kind"] == "bench serve" and result["settings"]:
            return dict(result)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise KVSpliceError(
        f"--from {path} is not a result of this command: expected a file of `kvsplice bench serve --json`."
    )


@contextmanager
def _workspace(kept: str | None) -> Iterator[Path]:
    """A folder for configs, calls and logs: a new one inside ``kept``, or one that is removed at the end."""
    if kept is not None:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="bench-serve-", dir=kept)).resolve()
        return
    work = Path(tempfile.mkdtemp(prefix="kvsplice-bench-"))
    try:
        yield work
    finally:
        with deferred_signals():
            shutil.rmtree(work, ignore_errors=True)
