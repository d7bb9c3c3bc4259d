# SPDX-License-Identifier: Apache-2.0
"""The options of every subcommand, by name the fields of its request. Parsing only; cli.py runs what was asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


def calibrate_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice calibrate`."""
    _model(command)
    command.add_argument("--out", required=True, metavar="FILE", help="projector file to write")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: built-in English)")
    text.add_argument("--dataset", choices=("wikitext2", "c4"), help="data set to calibrate on, through `datasets`")
    command.add_argument(
        "--preset",
        metavar="NAME",
        help="near_lossless (default), balanced, max, int8, v_only, orthogonal, orthogonal_int8, orthogonal_int4, none; a mode: default, high_compression, memory_emergency; or a .toml file",
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


def eval_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice eval`."""
    _model(command)
    command.add_argument(
        "--projector",
        metavar="FILE",
        help="projector file (default: what serving would pick: kvsplice/kvsplice.safetensors in the model's folder, else calibration-free int8)",
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
        "--seq-len", type=int, metavar="N", help="tokens per window (default: 2048, or one less than the model holds)"
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


def compare_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice compare`."""
    _model(command)
    add = command.add_argument
    add("--text", metavar="FILE", help="UTF-8 text to score on (default: held-out part of the built-in English)")
    names = "names, families or .toml presets, with commas or repeated (default: all)"
    add("--codecs", action="extend", type=_words, metavar="LIST", help=names)
    add("--projector", dest="projectors", action="append", metavar="FILE", help="projector file to add, repeatable")
    add(
        "--seeds",
        type=int,
        metavar="N",
        help="calibrations, each on windows drawn anew, which overlap where the text is short (default: 3)",
    )
    _scored(command)


def study_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice study`."""
    add = command.add_argument
    add("model", nargs="?", metavar="MODEL", help="Hugging Face id, or folder (default: the recipe's)")
    add(
        "--recipe", metavar="FILE", help="TOML file of options, see configs/recipes/; what is given here goes before it"
    )
    names = "rank, bits, sides, nullspace, gamma, calibration, domain, seeds, joint, refinements, modes; with commas or repeated (default: all)"
    add("--study", dest="studies", action="extend", type=_words, metavar="LIST", help=names)
    scored = command.add_mutually_exclusive_group()
    scored.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to score on (default: held-out part of the built-in English)"
    )
    scored.add_argument("--score-dataset", choices=("wikitext2", "c4"), help="test part of a data set to score on")
    add("--seeds", type=int, metavar="N", help="calibrations of the study `seeds` (default: 3)")
    _scored(command)


def tune_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice tune`."""
    _model(command)
    add = command.add_argument
    budget = command.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-ppl", type=float, metavar="PCT", help="most that perplexity may rise, percent")
    budget.add_argument("--budget-kld", type=float, metavar="X", help="most KL divergence per token, nats")
    budget.add_argument("--target-ratio", type=float, metavar="R", help="dense bytes over compressed bytes, K+V")
    text = command.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: built-in English)")
    text.add_argument("--dataset", choices=("wikitext2", "c4"), help="data set to calibrate on, through `datasets`")
    text_help = "UTF-8 text to verify on (default: held-out part of the built-in English, or the last fifth of --text)"
    add("--verify-text", metavar="FILE", help=text_help)
    even_help = "pages of one size for all layers, as models with several attention windows have anyway"
    add("--even-layers", action="store_true", help=even_help)
    fast_help = (
        "only tiers that the decode kernel reads fastest: two a side, no short runs; a little more loss at equal bytes"
    )
    add("--fast", action="store_true", help=fast_help)
    add("--samples", type=int, metavar="N", help="windows of calibration text (default: 32)")
    add("--windows", type=int, metavar="N", help="windows of verification text, 0 for all (default: 12)")
    add("--seq-len", type=int, metavar="N", help="tokens per window (default: 2048, or what the model holds)")
    _seed_and_place(command)
    add("--out", metavar="FILE", help="projector file to write")
    add("--json", metavar="OUT", default=None, help="write the result as JSON")
    add("--plot", metavar="OUT", default=None, help="write a plot as PNG (needs matplotlib)")


def inspect_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice inspect`."""
    command.add_argument("path", metavar="FILE", help="projector file")
    command.add_argument("--json", action="store_true", default=False, help="print JSON")


def plan_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice plan`."""
    _model(command)
    command.add_argument("--projector", metavar="FILE", help="projector file (default: what serving would pick)")
    command.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one GPU")
    command.add_argument("--context", type=int, required=True, metavar="N", help="tokens per user")
    command.add_argument("--dtype", choices=DTYPES, help="of weights and dense cache (default: the checkpoint's)")
    command.add_argument("--tp", type=int, metavar="N", help="GPUs that share the model (default: 1)")
    command.add_argument("--utilization", type=float, metavar="F", help="vLLM's gpu_memory_utilization (default: 0.9)")
    command.add_argument("--json", action="store_true", default=False, help="print JSON")


def demo_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice demo`."""
    command.add_argument("--model", metavar="DIR", help="another model (default: the bundled one)")
    command.add_argument("--port", type=int, metavar="N", help="port of the servers (default: a free one)")
    command.add_argument("--keep", action="store_true", help="keep the working folder with logs and projector")
    command.add_argument("--json", metavar="OUT", help="write the result as JSON")


def bench_kernels_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice bench kernels`."""
    add = command.add_argument
    text = (
        "preset, .toml file, or projector file (each of its layouts, and the mean over its layers), repeatable "
        "(default: near_lossless, int8, v_only)"
    )
    add("--layout", dest="presets", action="append", metavar="NAME", help=text)
    add(
        "--heads",
        action="append",
        type=_numbers(2, "/"),
        metavar="Q/KV",
        help="query and KV heads, repeatable (default: 28/4)",
    )
    add("--head-dim", type=int, metavar="N", help="dimensions of a head (default: 128)")
    text = "of the decode kernel, repeatable (default: 64x4096 256x2048 16x32768 8x8192 1x32768)"
    add("--shape", dest="shapes", action="append", type=_numbers(2, "x"), metavar="BATCHxCONTEXT", help=text)
    text = "new tokens of each request in a decode step, repeatable (default: 1)"
    add("--query-len", dest="query_lens", action="append", type=int, metavar="N", help=text)
    add("--what", action="extend", type=_words, metavar="LIST", help="of decode,write,prefill (default: all)")
    add(
        "--splits",
        choices=("chosen", "sweep"),
        help="as serving chooses (default), or a sweep around the untuned choice",
    )
    add("--block-size", dest="block_sizes", action="append", type=int, metavar="N", help="repeatable (default: 16, 64)")
    add(
        "--write-tokens",
        action="extend",
        type=_list(int),
        metavar="LIST",
        help="tokens of a cache write (default: 1,64,256,2048,8192)",
    )
    text = "of the prefill, repeatable (default: 4x2048x0 1x8192x0 1x8192x32768 1x16x32768)"
    add("--chunk", dest="chunks", action="append", type=_numbers(3, "x"), metavar="BATCHxNEWxCACHED", help=text)
    add(
        "--peer",
        action="append",
        metavar="NAME",
        help="flash-attention-3, vllm-triton, ... alone, repeatable (default: all)",
    )
    add("--no-peers", dest="peers", action="store_false", help="time kvsplice alone")
    add("--json", metavar="OUT", help="write the result as JSON")


def bench_launch_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice bench launch`."""
    add = command.add_argument
    text = "preset or .toml file, repeatable (default: near_lossless, balanced, max, int8, v_only)"
    add("--preset", dest="presets", action="append", metavar="NAME", help=text)
    text = "query and KV heads, repeatable (default: 28/4)"
    add("--heads", action="append", type=_numbers(2, "/"), metavar="Q/KV", help=text)
    text = "dimensions of a head, repeatable (default: 128)"
    add("--head-dim", dest="head_dims", action="append", type=int, metavar="N", help=text)
    text = "repeatable (default: 64x4096 16x32768 8x8192)"
    add("--shape", dest="shapes", action="append", type=_numbers(2, "x"), metavar="BATCHxCONTEXT", help=text)
    text = "new tokens of each request, repeatable (default: 1)"
    add("--query-len", dest="query_lens", action="append", type=int, metavar="N", help=text)
    text = "after which no further candidate is begun (default: 300)"
    add("--seconds", type=float, metavar="S", help=text)
    add("--json", metavar="OUT", help="write the result, a file for configs/launch/")
    add("--add", action="store_true", help="to the entries that OUT has; those measured again are replaced")


def bench_serve_options(command: argparse.ArgumentParser) -> None:
    """`kvsplice bench serve`."""
    add = command.add_argument
    add("model", nargs="?", metavar="MODEL", help="Hugging Face id, or folder")
    add(
        "--model-shape",
        metavar="NAME",
        help="instead of MODEL: qwen2.5-7b, qwen2.5-0.5b or llama-3.1-8b with dummy weights",
    )
    add("--dummy", action="store_true", help="dummy weights; MODEL needs no more than a config.json")
    text = "bf16, fp8, cache:KV_CACHE_DTYPE, kvsplice, kvsplice:FILE or (dummy weights) kvsplice:PRESET; repeatable, the first is what the others are compared with (default: bf16, fp8, kvsplice)"
    add("--setting", dest="settings", action="append", metavar="NAME", help=text)
    text = "BATCHxCONTEXT, with commas or repeated (default: 1x1024,64x1024,64x4096,16x8192,16x32768)"
    add("--point", dest="points", action="extend", type=_list(_numbers(2, "x")), metavar="POINTS", help=text)
    add("--no-points", dest="points", action="store_const", const=(), help="the sweep alone")
    add("--point-output", type=int, metavar="N", help="tokens decoded at a point (default: 129)")
    add("--repeats", type=int, metavar="N", help="times a point is decoded (default: 3)")
    text = (
        "users of the saturation sweep, or fit: as many as the cache holds; with commas or repeated (default: no sweep)"
    )
    add("--concurrency", action="extend", type=_list(_users), metavar="LIST", help=text)
    add("--sweep-input", type=int, metavar="N", help="tokens of a prompt of the sweep (default: 16384)")
    add("--sweep-output", type=int, metavar="N", help="tokens of an answer of the sweep (default: 512)")
    add("--sweep-rounds", type=int, metavar="N", help="prompts per user of the sweep (default: 2)")
    add("--sweep-returning", action="store_true", help="send every prompt of the sweep a second time, timed by itself")
    text = "latency limit of the sweep in ms, NAME:MS of ttft, tpot, e2el; repeatable (default: ttft:10000 tpot:50)"
    add("--goodput", action="append", metavar="LIMIT", help=text)
    add(
        "--also",
        action="extend",
        type=_words,
        metavar="LIST",
        help="of latency,throughput: those `vllm bench` commands too, an engine each",
    )
    _bench_serve_engines(command)


def _bench_serve_engines(command: argparse.ArgumentParser) -> None:
    """What all engines of a serving benchmark share, and where results go."""
    add = command.add_argument
    add("--gpu-memory-utilization", type=float, metavar="F", help="of every engine (default: 0.9)")
    add(
        "--kv-cache-memory-bytes",
        type=int,
        metavar="N",
        help="cache of every engine (default: what the utilization leaves)",
    )
    add("--max-num-batched-tokens", type=int, metavar="N", help="of every engine (default: vLLM's)")
    add(
        "--stream-interval",
        type=int,
        metavar="N",
        help="tokens per streamed chunk, so that the client keeps up (default: 8)",
    )
    add("--serve-args", metavar="TEXT", help="further arguments of every engine, in one string")
    add("--seed", type=int, metavar="N", help="of the prompts and the bases (default: 0)")
    add("--json", metavar="OUT", help="write the result as JSON, whenever it has grown")
    add(
        "--from",
        dest="results",
        action="append",
        metavar="FILE",
        help="run nothing: print and plot results of earlier runs, merged; repeatable",
    )
    add("--plot", metavar="DIR", help="write plots as PNG (needs matplotlib)")
    add("--kernels-json", metavar="FILE", help="with --plot: draw the kernel times of `kvsplice bench kernels --json`")
    add("--logs", metavar="DIR", help="keep vLLM's logs and JSON there")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="Hugging Face id, or folder")


def _scored(command: argparse.ArgumentParser) -> None:
    """What a comparison and a study calibrate on, how much they score, and where results go."""
    add = command.add_argument
    text = command.add_mutually_exclusive_group()
    text.add_argument("--calibration", metavar="FILE", help="UTF-8 text to calibrate on (default: built-in English)")
    text.add_argument("--dataset", choices=("wikitext2", "c4"), help="data set to calibrate on, through `datasets`")
    add("--samples", type=int, metavar="N", help="windows of text in a calibration (default: 32)")
    add("--seq-len", type=int, metavar="N", help="tokens per window (default: 2048, or one less than the model holds)")
    add("--windows", type=int, metavar="N", help="windows scored (default: the whole text)")
    add("--needle", type=int, metavar="N", help="retrieval samples (default: none)")
    add("--needle-len", type=int, metavar="L", help="tokens per retrieval sample (default: as --seq-len)")
    _place(command)
    add("--json", metavar="OUT", default=None, help="write the result as JSON")
    add("--plot", metavar="OUT", default=None, help="write a plot as PNG (needs matplotlib)")


def _seed_and_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, metavar="N", help="of every random choice (default: 0)")
    _place(command)


def _place(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:N; of the transformers model"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the model's arithmetic (default: auto)")


def _numbers(count: int, separator: str) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(separator))
        except ValueError:
            found = ()
        if len(found) != count:
            example = separator.join(["16", "8", "4"][:count])
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers like {example}")
        return found

    return parse


def _list(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def items(text: str) -> list[Any]:
        try:
            return [parse(item) for item in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list with commas") from None

    return items


_words = _list(str)


def _users(text: str) -> int | str:
    """A number, or "fit"."""
    return text if text == "fit" else int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value
