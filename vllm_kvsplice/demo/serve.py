# SPDX-License-Identifier: Apache-2.0
"""One served half of the demo: start `vllm serve`, read its cache size, ask the needle question, stream an answer.

Comes in: the model, vLLM's arguments, the prompts. Goes out: `Served`. The caller is demo.py.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_kvsplice.demo.server import Capacity, Server


@dataclass(frozen=True)
class Questions:
    """What every server is asked, as token ids or text, and the lengths of the answers in tokens."""

    needle_prompt: list[int]
    needle_tokens: int
    stream_prompt: str
    stream_tokens: int


@dataclass(frozen=True)
class Served:
    """What one server showed. Times in seconds; `tokens_per_s` counts the tokens after the first of the streamed answer."""

    capacity: Capacity
    needle_answer: str
    streamed: str
    first_token_s: float
    tokens_per_s: float
    start_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def serve_and_ask(
    name: str, model: str, args: Sequence[str], questions: Questions, log: Path, port: int | None, console: Console
) -> Served:
    """Run one server from start to stop; raises KVSpliceError if it does not come up, or leaves processes behind."""
    started = time.monotonic()
    console.print(f"\n{name}: vllm serve {shlex.join(args)}", highlight=False, markup=False)
    status = console.status(f"starting {name}")

    def progress(elapsed_s: float, line: str) -> None:
        status.update(f"starting {name}, {elapsed_s:.0f} s: {_short(line)}")

    status.start()
    try:
        with Server(model, args, log=log, port=port, env={"HF_HUB_OFFLINE": "1"}, on_progress=progress) as server:
            status.stop()
            start_s = time.monotonic() - started
            capacity = server.capacity()
            console.print(f"up after {start_s:.0f} s, room for {capacity.tokens:,} tokens", highlight=False)
            return _ask(server, capacity, questions, start_s, console)
    finally:
        status.stop()


def _ask(server: Server, capacity: Capacity, questions: Questions, start_s: float, console: Console) -> Served:
    from openai import DefaultHttpxClient, OpenAI

    # trust_env: a proxy that the environment names must not stand between us and this machine.
    with OpenAI(base_url=server.base_url, api_key="none", http_client=DefaultHttpxClient(trust_env=False)) as client:
        asked = dict(model=server.model, timeout=120)
        reply = client.completions.create(
            prompt=questions.needle_prompt, max_tokens=questions.needle_tokens, temperature=0, **asked
        )
        answer = str(reply.choices[0].text).strip()
        console.print(f"needle answer: [bold]{answer}[/bold]", highlight=False)
        console.print(questions.stream_prompt, highlight=False, markup=False, end="")
        sent = time.monotonic()
        stream = client.completions.create(
            prompt=questions.stream_prompt,
            max_tokens=questions.stream_tokens,
            stream=True,
            temperature=0.7,
            seed=7,
            extra_body={"ignore_eos": True},
            **asked,
        )
        text, arrivals = _read_stream(stream, console)
    span_s = arrivals[-1] - arrivals[0]
    return Served(
        capacity=capacity,
        needle_answer=answer,
        streamed=text,
        first_token_s=arrivals[0] - sent,
        tokens_per_s=(questions.stream_tokens - 1) / span_s if span_s > 0 else 0.0,
        start_s=start_s,
    )


def _read_stream(stream: Any, console: Console) -> tuple[str, list[float]]:
    """Print pieces of an answer as they come; returns the text and the arrival time of each piece."""
    pieces: list[str] = []
    arrivals: list[float] = []
    for chunk in stream:
        if not chunk.choices:
            continue
        arrivals.append(time.monotonic())
        pieces.append(chunk.choices[0].text)
        console.print(pieces[-1], end="", style="cyan", markup=False, highlight=False)
    console.print()
    return "".join(pieces), arrivals


def _short(line: str, width: int = 70) -> str:
    """The part of a vLLM log line behind its prefix, cut to `width`; brackets would be read as markup."""
    return line.rsplit("] ", 1)[-1][:width].replace("[", "(")
