# SPDX-License-Identifier: Apache-2.0
"""Needle samples: exact lengths, depths, the answer only where it belongs, and refusals."""

from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.needle import NeedleTask, by_depth, fraction, make_samples


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(files("vllm_kvsplice") / "demo" / "model"))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    text = "The river was wide and slow, and nobody on the other side had seen the old ferry for a week. " * 40
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("length", [64, 257, 1500], ids=["barely-fits", "odd", "longer-than-the-text"])
def test_every_sample_has_the_length_asked_for(tokenizer, haystack, length):
    for sample in make_samples(tokenizer, haystack, NeedleTask(7, length)):
        assert len(sample.prompt) + len(sample.answer) == length


def test_depths_are_even_and_the_sentence_is_there_once(tokenizer, haystack):
    samples = make_samples(tokenizer, haystack, NeedleTask(5, 800))
    assert [s.depth for s in samples] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for sample in samples:
        text = tokenizer.decode(sample.prompt)
        digits = tokenizer.decode(sample.answer).strip()
        assert len(digits) == 5 and digits.isdigit()
        before, after = text.split(f" is {digits}. ")
        assert text.endswith(" is") and text.count("Question:") == 1
        at = len(tokenizer(before).input_ids) / 800
        assert abs(at - sample.depth) < 0.12, "the sentence is not where its depth says"
        # The sentence follows a whole word.
        head = before.rsplit(" The magic number", 1)[0]
        assert head == "" or head.endswith((".", ",")) or head.rsplit(" ", 1)[-1].isalpha()


def test_question_asks_for_the_hidden_word(tokenizer, haystack):
    for sample in make_samples(tokenizer, haystack, NeedleTask(6, 200, seed=3)):
        text = tokenizer.decode(sample.prompt)
        hidden = text.split("The magic number for ")[1].split()[0]
        asked = text.split("Question: What is the magic number for ")[1].split("?")[0]
        assert hidden == asked


def test_answer_tokens_are_those_of_the_whole_text(tokenizer, haystack):
    (sample,) = make_samples(tokenizer, haystack, NeedleTask(1, 300))
    tail = tokenizer.decode(sample.prompt).split("\n\n")[-1] + tokenizer.decode(sample.answer)
    assert tokenizer("\n\n" + tail).input_ids[-len(sample.answer) :] == sample.answer


def test_samples_are_a_function_of_the_seed(tokenizer, haystack):
    first, again, other = (make_samples(tokenizer, haystack, NeedleTask(3, 400, seed=s)) for s in (1, 1, 2))
    assert first == again and first != other
    assert len({tuple(s.answer) for s in first}) == 3


def test_own_template(tokenizer, haystack):
    task = NeedleTask(2, 300, template=" Platform {digits} serves {word}.", question=" {word} leaves from platform")
    for sample in make_samples(tokenizer, haystack, task):
        assert f"Platform {tokenizer.decode(sample.answer).strip()} serves" in tokenizer.decode(sample.prompt)


@pytest.mark.parametrize(
    "template, question",
    [("no digits here", "what is it?"), ("it is {digits}", "is it {digits}?")],
    ids=["nothing-hidden", "answer-in-the-question"],
)
def test_templates_that_cannot_be_scored_are_refused(template, question):
    with pytest.raises(KVSpliceError, match="--needle-template"):
        NeedleTask(1, 100, template, question)


def test_a_length_without_room_is_refused_with_the_shortest_that_works(tokenizer, haystack):
    with pytest.raises(KVSpliceError, match=r"expected at least (\d+) tokens") as caught:
        make_samples(tokenizer, haystack, NeedleTask(1, 20))
    shortest = int(str(caught.value).split("at least ")[1].split()[0])
    (sample,) = make_samples(tokenizer, haystack, NeedleTask(1, shortest))
    assert len(sample.prompt) + len(sample.answer) == shortest


def test_a_tokenizer_with_bos_opens_every_sample_with_it(tokenizer, haystack):
    class WithBos:
        bos_token_id = 8000

        def __call__(self, text, add_special_tokens=True):
            found = tokenizer(text, add_special_tokens=False)
            found["input_ids"] = [8000] * add_special_tokens + found["input_ids"]
            return found

        convert_ids_to_tokens = staticmethod(tokenizer.convert_ids_to_tokens)

    for sample in make_samples(WithBos(), haystack, NeedleTask(2, 200)):
        assert sample.prompt[0] == 8000 and sample.prompt.count(8000) == 1
        assert len(sample.prompt) + len(sample.answer) == 200


def test_by_depth_counts_every_sample_once(tokenizer, haystack):
    samples = make_samples(tokenizer, haystack, NeedleTask(11, 200))
    right = [i % 2 == 0 for i in range(11)]
    bands = by_depth(samples, {"baseline": [True] * 11, "kvsplice": right})
    assert sum(band["samples"] for band in bands) == 11 and len(bands) == 5
    assert all(band["baseline"] == 1.0 for band in bands)
    assert sum(band["samples"] * band["kvsplice"] for band in bands) == pytest.approx(sum(right))
    assert fraction(right) == 6 / 11
