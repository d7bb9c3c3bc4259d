# SPDX-License-Identifier: Apache-2.0
"""Signals and clean-up: SIGTERM unwinds like Ctrl-C does, and no signal cuts a clean-up short. Used by the demo and vllm_engine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise SystemExit(128 + number), so that context managers close. Main thread."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    # A handler that is not the default (nohup ignores SIGHUP) was somebody's decision: leave it.
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    try:
        for signum in wanted:
            signal.signal(signum, leave)
        yield
    finally:
        for signum in wanted:
            signal.signal(signum, signal.SIG_DFL)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block has ended, then act on the first that came.

    Handlers instead of a signal mask: threads that a library started would still let the signal in. A no-op outside the
    main thread, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    # What is ignored stays ignored; None is a handler that was not set from Python.
    handlers = {s: h for s in _STOPPING if (h := signal.getsignal(s)) not in (signal.SIG_IGN, None)}
    try:
        for signum in handlers:
            signal.signal(signum, lambda number, frame: arrived.append(number))
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if arrived:
            signal.raise_signal(arrived[0])
