# SPDX-License-Identifier: Apache-2.0
"""The command line: parse into one frozen request, call one function, print.

Exit status: 0 done, 1 a check failed, 2 a bad request. Nothing heavy is imported before a subcommand runs. Options that
were not given are not passed on, so defaults live in the requests alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvsplice.errors import KVSpliceError

DTYPES = ("auto", "bfloat16", "float16", "float32")
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
    for name, run, add, text in (
        ("calibrate", _calibrate, _calibrate_options, "find the bases of a model and write its projector file"),
        ("eval", _eval, _eval_options, "score a model with and without the codec"),
        ("inspect", _inspect, _inspect_options, "show what a projector file holds and saves"),
        ("plan", _plan, _plan_options, "tokens and users that fit a GPU: dense, fp8, kvsplice"),
        ("demo", _demo, _demo_options, "calibrate, score and serve the bundled model, offline"),
        ("version", _version, lambda _: None, "print the versions of kvsplice and of what it runs on"),
    ):
        command = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        add(command)
        command.set_defaults(run=run)
    return top


# ---------------------------------------------------------------- options
def _calibrate_options(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("--out", required=True, metavar="FILE", help="projector file to write")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: built-in English)")
    text.add_argument("--dataset", choices=("wikitext2", "c4"), help="data set to calibrate on, through `datasets`")
    command.add_argument(
        "--preset",
        metavar="NAME",
        help="near_lossless (default), int8, v_only, orthogonal, orthogonal_int8, orthogonal_int4, none, or a .toml file",
    )
    command.add_argument("--samples", type=int, metavar="N", help="windows of text (default: 64)")
    command.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens per window (default: 2048, or what the model holds)"
    )
    _seed_and_place(command)
    command.add_argument("--rank", type=int, metavar="N", help="dimensions of V kept")
    command.add_argument("--v-bits", type=int, metavar="N", help="V in one tier of 16, 8, 4 or 2 bits")
    command.add_argument("--k-bits", type=int, metavar="N", help="K in one tier of 16, 8, 4 or 2 bits")
    for side, aware in (("k", "query-aware"), ("v", "output-aware")):
        cost = f"what a lost dimension of {side.upper()} costs (default: the preset's)"
        command.add_argument(f"--metric-{side}", choices=(aware, "plain"), help=cost)
    command.add_argument(
        "--equalise",
        choices=("gamma", "rotate", "sigma", "none"),
        help="how variances are evened out inside a tier (default: the preset's)",
    )


def _eval_options(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument(
        "--projector",
        metavar="FILE",
        help="projector file (default: what serving would pick: kvsplice.safetensors beside the weights, else calibration-free int8)",
    )
    command.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to score on (default: held-out part of the built-in English)"
    )
    command.add_argument(
        "--engine",
        choices=("hf", "vllm"),
        help="hf: fast simulation by the same codec (default); vllm: two real engines, as served",
    )
    command.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens per window (default: 2048, or what the model holds)"
    )
    command.add_argument("--windows", type=int, metavar="N", help="windows scored (default: the whole text)")
    command.add_argument("--needle", type=int, metavar="N", help="retrieval samples (default: none)")
    command.add_argument(
        "--needle-len", type=int, metavar="L", help="tokens per retrieval sample (default: as --seq-len)"
    )
    command.add_argument("--needle-template", metavar="TEXT", help="hidden sentence with {word} and {digits}")
    command.add_argument("--needle-question", metavar="TEXT", help="question with {word}; the digits must follow it")
    _seed_and_place(command)
    command.add_argument(
        "--topk", type=int, metavar="K", help="most likely tokens that both engines compare (default: 128)"
    )
    command.add_argument("--cache-gib", type=float, metavar="GIB", help="vllm: KV cache of either engine (default: 1)")
    command.add_argument(
        "--vllm-args", type=_json_object, metavar="JSON", help="vllm: further arguments of vllm.LLM for both engines"
    )
    command.add_argument("--json", metavar="OUT", default=None, help="write the result as JSON")


def _inspect_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="FILE", help="projector file")
    command.add_argument("--json", action="store_true", default=False, help="print JSON")


def _plan_options(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("--projector", metavar="FILE", help="projector file (default: what serving would pick)")
    command.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one GPU")
    command.add_argument("--context", type=int, required=True, metavar="N", help="tokens per user")
    command.add_argument("--dtype", choices=DTYPES, help="of weights and dense cache (default: the checkpoint's)")
    command.add_argument("--tp", type=int, metavar="N", help="GPUs that share the model (default: 1)")
    command.add_argument("--utilization", type=float, metavar="F", help="vLLM's gpu_memory_utilization (default: 0.9)")
    command.add_argument("--json", action="store_true", default=False, help="print JSON")


def _demo_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="DIR", help="another model (default: the bundled one)")
    command.add_argument("--port", type=int, metavar="N", help="port of the servers (default: a free one)")
    command.add_argument("--keep", action="store_true", help="keep the working folder with logs and projector")
    command.add_argument("--json", metavar="OUT", help="write the result as JSON")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="Hugging Face id, or folder")


def _seed_and_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, metavar="N", help="of every random choice (default: 0)")
    command.add_argument(
        "--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N; of the transformers model"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the model's arithmetic (default: auto)")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value


# ---------------------------------------------------------------- subcommands
def _calibrate(given: Given) -> int:
    from vllm_kvsplice.calibration import calibrate
    from vllm_kvsplice.scoring import inspect_file

    calibrate.run(calibrate.CalibrateRequest(**given))
    print(inspect_file.inspect_table(inspect_file.inspect(given["out"])))
    return 0


def _eval(given: Given) -> int:
    from vllm_kvsplice.scoring import evaluate, results

    out = given.pop("json")
    if out:
        results.check_writable(out)
    result = evaluate.run(evaluate.EvalRequest(**given))
    print(results.eval_table(result))
    if out:
        results.write_json(result, out)
    return 0


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


def _version(given: Given) -> int:
    from vllm_kvsplice.scoring import results

    print("\n".join(f"{name} {version}" for name, version in results.versions().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
