# SPDX-License-Identifier: Apache-2.0
"""The command line: parse into one frozen request, call one function, print.

Exit status: 0 done, 1 a check failed, 2 a bad request. Nothing heavy is imported before a subcommand runs. Options that
were not given are not passed on, so defaults live in the requests alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvsplice import options
from vllm_kvsplice.errors import KVSpliceError

Given = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status; a KVSpliceError becomes one line on stderr and status 2."""
    given = vars(parser().parse_args(argv))
    run: Callable[[Given], int] = given.pop("run")
    try:
        return run(given)
    except KVSpliceError as error:
        sys.stderr.write(f"kvsplice: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("kvsplice: stopped\n")
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="kvsplice",
        description="Compressed KV cache for vLLM: calibrate a model, score the result, inspect it, plan its memory.",
        epilog="Serve with: vllm serve MODEL --attention-backend kvsplice --additional-config.kvsplice.projector FILE",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    table: tuple[tuple[str, Callable[[Given], int] | None, Callable[[argparse.ArgumentParser], Any], str], ...] = (
        ("calibrate", _calibrate, options.calibrate_options, "find the bases of a model and write its projector file"),
        ("eval", _eval, options.eval_options, "score a model with and without the codec"),
        (
            "compare",
            _compare,
            options.compare_options,
            "score published KV cache codecs and kvsplice's on the same tokens",
        ),
        (
            "study",
            _study,
            options.study_options,
            "rank, bits, K against V, calibration and more: what each choice of the codec costs on a model",
        ),
        (
            "tune",
            _tune,
            options.tune_options,
            "choose the tiers of every layer, K and V apart, for a budget of loss or bytes",
        ),
        ("inspect", _inspect, options.inspect_options, "show what a projector file holds and saves"),
        ("plan", _plan, options.plan_options, "tokens and users that fit a GPU: dense, fp8, kvsplice"),
        ("bench", None, _bench_commands, "time kernels, or serving, against what vLLM has without kvsplice"),
        ("demo", _demo, options.demo_options, "calibrate, score and serve the bundled model, offline"),
        ("version", _version, lambda _: None, "print the versions of kvsplice and of what it runs on"),
    )
    for name, run, add, text in table:
        command = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        add(command)
        if run is not None:  # else it has commands of its own
            command.set_defaults(run=run)
    return top


# ---------------------------------------------------------------- options
def _bench_commands(command: argparse.ArgumentParser) -> None:
    kinds = command.add_subparsers(required=True, metavar="WHAT")
    for name, run, add, text in (
        (
            "kernels",
            _bench_kernels,
            options.bench_kernels_options,
            "kernels against the attention kernels that vLLM ships",
        ),
        (
            "launch",
            _bench_launch,
            options.bench_launch_options,
            "find the launch parameters of the decode kernel that this GPU likes best",
        ),
        ("serve", _bench_serve, options.bench_serve_options, "vLLM's own `vllm bench` over a list of cache settings"),
    ):
        kind = kinds.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        add(kind)
        kind.set_defaults(run=run)


# ---------------------------------------------------------------- subcommands
def _calibrate(given: Given) -> int:
    from vllm_kvsplice.calibration import calibrate
    from vllm_kvsplice.scoring import inspect_file

    calibrate.run(calibrate.CalibrateRequest(**given))
    print(inspect_file.inspect_table(inspect_file.inspect(given["out"])))
    return 0


def _eval(given: Given) -> int:
    from vllm_kvsplice.scoring import evaluate, results

    _reported(given, lambda: evaluate.run(evaluate.EvalRequest(**given)), results.eval_table)
    return 0


def _compare(given: Given) -> int:
    from vllm_kvsplice.lab import compare, plot, rows

    def run() -> dict[str, Any]:
        return compare.run(compare.CompareRequest(**_tuples(given)))

    _reported(given, run, rows.comparison_table, plot.draw)
    return 0


def _study(given: Given) -> int:
    from vllm_kvsplice.lab import study, study_report

    def run() -> dict[str, Any]:
        return study.run(study.request_of(_tuples(given)))

    _reported(given, run, study_report.study_tables, study_report.draw)
    return 0


def _tune(given: Given) -> int:
    from vllm_kvsplice.tuning import plot, report, tune

    result = _reported(given, lambda: tune.run(tune.TuneRequest(**given)), report.tune_table, plot.draw)
    return 0 if result["tune"]["verdict"]["within"] else 1


def _reported(
    given: Given,
    run: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], str], None] | None = None,
) -> dict[str, Any]:
    """Run and print; write --json and --plot, which leave ``given`` and are checked before the work."""
    from vllm_kvsplice.scoring import results

    out, picture = given.pop("json"), given.pop("plot", None)
    if picture:
        results.require_matplotlib()
        results.check_writable(picture, "--plot")
    if out:
        results.check_writable(out)
    result = run()
    print(table(result))
    if out:
        results.write_json(result, out)
    if draw and picture:
        draw(result, picture)
    return result


def _inspect(given: Given) -> int:
    from vllm_kvsplice.scoring import inspect_file, results

    facts = inspect_file.inspect(given["path"])
    print(results.to_json(facts) if given["json"] else inspect_file.inspect_table(facts))
    return 0


def _plan(given: Given) -> int:
    from vllm_kvsplice.scoring import plan, results

    as_json = given.pop("json")
    result = plan.run(plan.PlanRequest(**given))
    print(results.to_json(result) if as_json else plan.plan_table(result))
    return 0


def _demo(given: Given) -> int:
    from vllm_kvsplice.demo import run as demo

    return demo.run(demo.DemoRequest(**given))


def _bench_kernels(given: Given) -> int:
    from vllm_kvsplice.bench import kernels

    return kernels.run(kernels.KernelsRequest(**_tuples(given)))


def _bench_launch(given: Given) -> int:
    from vllm_kvsplice.bench import launch

    return launch.run(launch.LaunchRequest(**_tuples(given)))


def _bench_serve(given: Given) -> int:
    from vllm_kvsplice.bench import request, serve

    return serve.run(request.ServeBenchRequest(**_tuples(given)))


def _tuples(given: Given) -> Given:
    """Lists as the tuples that a frozen request holds."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _version(given: Given) -> int:
    from vllm_kvsplice.scoring import results

    print("\n".join(f"{name} {version}" for name, version in results.versions().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
