# SPDX-License-Identifier: Apache-2.0
"""The two texts of a tuning, and their windows: one to calibrate on, another that no statistic has seen to verify on."""

from __future__ import annotations

import re

from vllm_kvsplice.calibration.texts import Text, load_text, refuse_overlap

HELD_OUT_SHARE = 0.2  # of a given text, from its end


def choose(text: str | None, dataset: str | None, verify: str | None) -> tuple[Text, Text]:
    """The calibration text and the verification text.

    Without ``verify`` the built-in text's held-out part is verified on, or the last fifth of a given file or data set, cut
    at a paragraph, which then is not calibrated on. Raises KVSpliceError if one of them holds the other.
    """
    given = load_text(text, dataset)
    if verify:
        other = load_text(verify)
        refuse_overlap(other, given, "--verify-text")
        return given, other
    if text or dataset:
        return split(given)
    return given, load_text(held_out=True)


def split(text: Text) -> tuple[Text, Text]:
    """A text up to its last fifth, and that fifth; the cut is at the first empty line after it, or just there."""
    start = round(len(text.content) * (1 - HELD_OUT_SHARE))
    gap = re.compile(r"\n\s*\n").search(text.content, start)
    cut = gap.end() if gap and gap.end() < len(text.content) else start
    return (
        Text(f"{text.name} (first part)", text.content[:cut]),
        Text(f"{text.name} (held-out part)", text.content[cut:]),
    )
