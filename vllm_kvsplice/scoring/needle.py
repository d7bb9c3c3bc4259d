# SPDX-License-Identifier: Apache-2.0
"""The retrieval test: one sentence hidden in a long text, asked for at the end.

In: a tokenizer and any text. Out: ``Needle`` samples, token ids of equal length with the sentence at depths spread
evenly from the first to the last token of the text. Both engines run the same samples and count answers given word for
word. After Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvsplice.calibration.texts import special_prefix
from vllm_kvsplice.errors import KVSpliceError

TEMPLATE = " The magic number for {word} is {digits}. "
QUESTION = "\n\nQuestion: What is the magic number for {word}? Answer: The magic number for {word} is"
DIGITS = 5
DEPTH_BANDS = 5
_WORDS = (
    "amber anchor apple arrow autumn basket beacon birch bottle bridge bronze candle canyon castle cedar cherry "
    "circle clover copper coral cotton dragon ember falcon feather fern forest garden ginger granite harbor hazel "
    "island ivory jasmine juniper lantern lemon lily maple marble meadow mirror mountain needle ocean olive orchid "
    "paper pepper pine planet quartz river saddle silver summit thistle thunder timber tulip valley velvet violet "
    "walnut willow window winter"
)
_WORD_STARTS = (
    "Ġ",
    "▁",
    " ",
)  # how byte-level BPE, SentencePiece and plain vocabularies mark a token that opens a word
_SEARCH = 64  # tokens looked through for the start of a word, so that the sentence does not cut one


@dataclass(frozen=True)
class Needle:
    """One sample: a prompt, and the tokens that a greedy reader must give next."""

    prompt: list[int]
    answer: list[int]
    depth: float  # of the sentence in the text: 0 is its start, 1 its end
    question_tokens: int = 0  # how many of the prompt's last tokens are the question


@dataclass(frozen=True)
class NeedleTask:
    """What to hide and how to ask. ``template`` holds {digits}; both texts may hold {word}. ``length`` in tokens."""

    count: int
    length: int
    template: str = TEMPLATE
    question: str = QUESTION
    seed: int = 0

    def __post_init__(self) -> None:
        if "{digits}" not in self.template or "{digits}" in self.question:
            raise KVSpliceError(
                f"needle template {self.template!r} with question {self.question!r} cannot be scored: "
                "expected {digits} in --needle-template and not in --needle-question."
            )


def make_samples(tokenizer: Any, haystack: Sequence[int], task: NeedleTask) -> list[Needle]:
    """``task.count`` samples of exactly ``task.length`` tokens, answer included.

    Args:
        haystack: token ids of the text, without special tokens; read from a new place for every sample, and again from
            its start where it is shorter than a sample.
    Raises KVSpliceError if the length leaves no room for text.
    """
    rng = random.Random(task.seed)
    return [_sample(tokenizer, haystack, task, rng, i) for i in range(task.count)]


def by_depth(samples: Sequence[Needle], hits: Mapping[str, Sequence[bool]]) -> list[dict[str, float]]:
    """Fraction right in each fifth of the depth: dicts of depth (the band's start), samples, and one key per run."""
    bands: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        bands.setdefault(min(int(sample.depth * DEPTH_BANDS), DEPTH_BANDS - 1), []).append(i)
    return [
        {"depth": band / DEPTH_BANDS, "samples": len(members)}
        | {run: fraction([found[i] for i in members]) for run, found in hits.items()}
        for band, members in sorted(bands.items())
    ]


def fraction(hits: Sequence[bool]) -> float:
    """Share of samples answered right."""
    return sum(hits) / len(hits)


def _sample(tokenizer: Any, haystack: Sequence[int], task: NeedleTask, rng: random.Random, index: int) -> Needle:
    word, digits = rng.choice(_WORDS.split()), "".join(rng.choice("0123456789") for _ in range(DIGITS))
    offset = rng.randrange(len(haystack))
    sentence = _ids(tokenizer, task.template.replace("{word}", word).replace("{digits}", digits))
    question, answer = _split_answer(tokenizer, task.question.replace("{word}", word), " " + digits)
    prefix = special_prefix(tokenizer)
    room = task.length - len(prefix) - len(sentence) - len(question) - len(answer)
    if room < 1:
        raise KVSpliceError(
            f"needle length {task.length} is too short: expected at least {task.length - room + 1} tokens (--needle-len)."
        )
    text = [haystack[(offset + i) % len(haystack)] for i in range(room)]
    depth = index / (task.count - 1) if task.count > 1 else 0.5
    place = _word_start(tokenizer, text, round(depth * room))
    return Needle(prefix + text[:place] + sentence + text[place:] + question, answer, depth, len(question))


def _split_answer(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokenise both as one text, so that the answer's tokens are those that a reader would write, and cut it there."""
    alone, both = _ids(tokenizer, question), _ids(tokenizer, question + answer)
    cut = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
    return both[:cut], both[cut:]


def _word_start(tokenizer: Any, text: Sequence[int], place: int) -> int:
    """The nearest token at or before ``place`` that opens a word; ``place`` itself if none is near."""
    for i in range(min(place, len(text) - 1), max(0, place - _SEARCH), -1) if place < len(text) else ():
        if tokenizer.convert_ids_to_tokens([text[i]])[0].startswith(_WORD_STARTS):
            return i
    return place


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
