# SPDX-License-Identifier: Apache-2.0
"""Text to calibrate and score on: a file, a data set, or the English that every CPython carries.

In: a path, a data set's name, or neither. Out: ``Text`` with its name and digest, and windows of token ids from it.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.codec.fingerprint import one_line
from vllm_kvsplice.codec.projector import Calibration
from vllm_kvsplice.errors import KVSpliceError

MAX_CHARS = 32 << 20  # of one text; the rest of a longer file or data set is not read
BUILTIN = "pydoc_data.topics"
HELD_OUT_EVERY = 5  # of the built-in topics, by name: scored on, never calibrated on
# name: path, configuration, data files, split
DATASETS: dict[str, tuple[str, str | None, str | None, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "train"),
    "c4": ("allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train"),
}
HELD_OUT_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test"),
    "c4": ("allenai/c4", None, "en/c4-validation.00000-of-00008.json.gz", "train"),
}
# Modules of the standard library, written in Python: to calibrate on, and to score on.
CODE = ("argparse", "doctest", "inspect", "tarfile", "typing", "zipfile")
HELD_OUT_CODE = ("configparser", "optparse", "pickle", "subprocess", "threading")
_RULE = re.compile(r"[\W_]+")  # a line of punctuation: underlines, table borders


@dataclass(frozen=True)
class Text:
    """A text, what to call it, and the SHA-256 of its UTF-8 bytes in hex."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(path: str | None = None, dataset: str | None = None, held_out: bool = False) -> Text:
    """The text of a UTF-8 file, or of a data set ("wikitext2", "c4"), or the built-in one; at most 32 Mi characters.

    ``held_out`` asks for the part of the built-in text, or of the data set, that is never calibrated on. Raises
    KVSpliceError if both are given, the file is not readable text, or the data set cannot be had.
    """
    if path and dataset:
        raise KVSpliceError(
            f"both a text file ({path}) and a data set ({dataset}) are given: pass --text or --dataset."
        )
    if dataset:
        return Text(dataset + (" (held out)" if held_out else ""), _dataset(dataset, held_out))
    if path:
        return Text(one_line(Path(path).name), _file(Path(path)))
    return Text(BUILTIN + (" (held out)" if held_out else ""), builtin_text(held_out))


def builtin_text(held_out: bool = False) -> str:
    """The language reference in ``pydoc_data.topics`` as running prose: about 60,000 words of English and some code.

    Paragraphs are unwrapped, underlines and tables dropped, and a paragraph that several topics share is kept once.
    Every fifth topic is held out for scoring; what it shares with the others is not in the held-out text.
    """
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    names = sorted(topics)
    scored = names[::HELD_OUT_EVERY]
    seen = prose(topics[name] for name in names if name not in scored)
    if not held_out:
        return seen
    known = set(seen.split("\n\n"))
    return "\n\n".join(p for p in prose(topics[name] for name in scored).split("\n\n") if p not in known)


def code_text(held_out: bool = False) -> Text:
    """Source code: some modules of this Python's standard library, or others of it, ``held_out``."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = HELD_OUT_CODE if held_out else CODE
    name = "Python's standard library" + (" (held out)" if held_out else "")
    return Text(name, "\n".join(_file(_source(folder, module)) for module in names))


def _source(folder: Path, module: str) -> Path:
    """File of a module, or of a package's own code: zipfile is a package from Python 3.12 on."""
    file = folder / f"{module}.py"
    return file if file.is_file() else folder / module / "__init__.py"


def prose(documents: Iterable[str]) -> str:
    """Unwrapped paragraphs of plain-text documents, each once, in order."""
    seen: dict[str, None] = {}
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            lines = [
                line for line in paragraph.splitlines() if not _RULE.fullmatch(line) and line.strip()[:1] not in "|+"
            ]
            indents = {len(line) - len(line.lstrip()) for line in lines}
            separator = " " if len(indents) <= 1 else "\n"  # code and lists keep their lines
            seen.setdefault(separator.join(line.strip() for line in lines))
    return "\n\n".join(paragraph for paragraph in seen if paragraph) + "\n"


def special_prefix(tokenizer: Any) -> list[int]:
    """The BOS token if this tokenizer opens every text with one, else nothing."""
    first = list(tokenizer("a").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []


def token_windows(text: Text, tokenizer: Any, seq_len: int, samples: int, seed: int) -> Tensor:
    """Windows of a text in a seeded random order.

    Args:
        seq_len: tokens per window, the tokenizer's BOS (where it opens texts with one) included.
        samples: most windows returned; windows do not overlap, so a short text gives fewer.
    Returns:
        [n, seq_len] int64, 1 <= n <= samples, equal for equal arguments.
    Raises:
        KVSpliceError: the text is shorter than one window, or a number is out of range.
    """
    prefix = special_prefix(tokenizer)
    if samples < 1 or seq_len < 2 + len(prefix):
        raise KVSpliceError(
            f"--samples {samples} and --seq-len {seq_len} leave nothing to read: expected at least 1 and {2 + len(prefix)}."
        )
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    length = seq_len - len(prefix)
    count = len(ids) // length
    if count == 0:
        raise KVSpliceError(
            f"text {text.name} has {len(ids)} tokens, less than one window of {length}: give a longer text or a smaller --seq-len."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    windows = ids[: count * length].view(count, length)[order]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)


def _file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as f:
            content = f.read(MAX_CHARS)
    except OSError as error:
        raise KVSpliceError(
            f"text file {path} cannot be read ({error.strerror}): give --text a readable UTF-8 file."
        ) from None
    except UnicodeDecodeError:
        raise KVSpliceError(f"text file {path} is not UTF-8: convert it, for example with `iconv -t utf-8`.") from None
    if not content.strip():
        raise KVSpliceError(f"text file {path} is empty: give --text a file with text in it.")
    return content


def _dataset(name: str, held_out: bool) -> str:
    if name not in DATASETS:
        raise KVSpliceError(
            f"data set {name!r} is not known: expected {' or '.join(DATASETS)}, or a file by --text FILE."
        )
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise KVSpliceError(
            f"data set {name} needs the datasets package: `pip install datasets`, or give a file by --text FILE."
        ) from None
    path, configuration, files, split = (HELD_OUT_DATASETS if held_out else DATASETS)[name]
    try:
        rows = load_dataset(path, configuration, data_files=files, split=split, streaming=True)
        return _joined(row["text"] for row in rows)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KVSpliceError(
            f"data set {name} cannot be loaded ({reason}): go online, or give a file by --text FILE."
        ) from None


def _joined(parts: Iterable[str]) -> str:
    """Parts as one text, no more of them than fill MAX_CHARS."""
    kept, size = [], 0
    for part in parts:
        kept.append(part if part.endswith("\n") else part + "\n")
        size += len(kept[-1])
        if size >= MAX_CHARS:
            break
    return "".join(kept)[:MAX_CHARS]


def refuse_overlap(scored: Text, calibration: Text, option: str) -> None:
    """Raise KVSpliceError if one text holds the other: a codec would be scored on what it was made from."""
    short, long = sorted((scored.content.strip(), calibration.content.strip()), key=len)
    if short in long:
        raise KVSpliceError(
            f"the scored text {scored.name} and the calibration text {calibration.name} overlap: give another {option} FILE."
        )


def refuse_own(scored: Text, calibration: Calibration | None, projector: str) -> None:
    """Raise KVSpliceError if a projector file was calibrated on the text that it is to be scored on."""
    if calibration is not None and calibration.text_sha256 == scored.sha256:
        raise KVSpliceError(
            f"{projector} was calibrated on {scored.name}, the text to score: give another --text FILE, or calibrate on another."
        )
