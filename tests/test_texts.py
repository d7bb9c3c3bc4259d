# SPDX-License-Identifier: Apache-2.0
"""Texts: the built-in one, files, data sets, and windows of them."""

import hashlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vllm_kvsplice.calibration import texts
from vllm_kvsplice.calibration.texts import Text, load_text, prose, token_windows
from vllm_kvsplice.errors import KVSpliceError


class Letters:
    """A tokenizer of one token per character, with or without a BOS of its own."""

    bos_token_id = 1

    def __init__(self, opens_with_bos):
        self.opens_with_bos = opens_with_bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        bos = [1] if self.opens_with_bos and add_special_tokens else []
        return SimpleNamespace(input_ids=bos + [ord(c) for c in text])


PLAIN, WITH_BOS = Letters(False), Letters(True)


def test_builtin_text_is_long_prose_and_the_same_every_time():
    text = load_text()
    assert text == load_text() and text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert len(text.content.split()) > 30_000
    paragraphs = text.content.strip().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert not any(set(line) <= set("*=-~+|") for paragraph in paragraphs for line in paragraph.splitlines())


def test_prose_unwraps_paragraphs_and_keeps_code_lines():
    raw = "Title\n*****\n\nTwo lines\nof prose.\n\n   def f():\n       return 1\n\n+---+\n| a |\n+---+\n\nTwo lines\nof prose.\n"
    assert prose([raw, "More."]) == "Title\n\nTwo lines of prose.\n\ndef f():\nreturn 1\n\nMore.\n"


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
def test_windows_are_cut_from_the_text_without_overlap(tokenizer):
    text = Text("t", "".join(chr(200 + i) for i in range(103)))
    windows = token_windows(text, tokenizer, 10, 99, seed=0)
    body = windows[:, 1:] if tokenizer.opens_with_bos else windows
    assert windows.shape == (11 if tokenizer.opens_with_bos else 10, 10) and windows.dtype == torch.int64
    assert not tokenizer.opens_with_bos or (windows[:, 0] == 1).all()
    assert (body.diff(dim=1) == 1).all() and len(body.unique()) == body.numel()


def test_seed_orders_and_samples_limits():
    text = Text("t", "".join(chr(200 + i) for i in range(400)))
    first, again, other = (token_windows(text, PLAIN, 8, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (6, 8)
    assert torch.equal(first[:3], token_windows(text, PLAIN, 8, 3, 0))


@pytest.mark.parametrize(
    "seq_len, samples, says", [(32, 4, "less than one window"), (8, 0, "--samples 0"), (2, 1, "2 leave")]
)
def test_windows_that_cannot_be(seq_len, samples, says):
    with pytest.raises(KVSpliceError, match=says):
        token_windows(Text("t", "x" * 20), WITH_BOS, seq_len, samples, 0)


def test_files(tmp_path):
    good, binary, empty = tmp_path / "a.txt", tmp_path / "b.bin", tmp_path / "c.txt"
    good.write_text("words é\n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    empty.write_text(" \n")
    assert load_text(str(good)) == Text("a.txt", "words é\n")
    for path, says in (
        (binary, "not UTF-8"),
        (empty, "is empty"),
        (tmp_path / "no", "cannot be read"),
        (tmp_path, "read"),
    ):
        with pytest.raises(KVSpliceError, match=says) as caught:
            load_text(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(KVSpliceError, match="both"):
        load_text(str(good), "c4")


def test_data_sets(monkeypatch):
    with pytest.raises(KVSpliceError, match="expected wikitext2 or c4"):
        load_text(dataset="pile")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KVSpliceError, match="pip install datasets"):
        load_text(dataset="wikitext2")
    module = ModuleType("datasets")
    asked = []

    def load_dataset(path, configuration, **options):
        asked.append((path, configuration, options["split"]))
        if path == "allenai/c4":
            raise ConnectionError("no route\nto host")
        return iter([{"text": " = Title = \n"}, {"text": ""}, {"text": "Body"}])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert load_text(dataset="wikitext2") == Text("wikitext2", " = Title = \n\nBody\n")
    assert load_text(dataset="wikitext2", held_out=True).name == "wikitext2 (held out)"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")]
    with pytest.raises(KVSpliceError, match=r"cannot be loaded \(no route\)") as caught:
        load_text(dataset="c4")
    assert "\n" not in str(caught.value)


def test_code_of_modules_that_are_packages_is_found_too(tmp_path):
    """zipfile is a file in Python 3.11 and a package from 3.12 on."""
    (tmp_path / "plain.py").write_text("a = 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("b = 2\n")
    assert texts._source(tmp_path, "plain") == tmp_path / "plain.py"
    assert texts._source(tmp_path, "package") == tmp_path / "package/__init__.py"
