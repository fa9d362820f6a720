"""The command line, run in this process: for all tests but those of what it imports and how it ends."""

from __future__ import annotations

import io
import re
import signal
import sys
import unicodedata
from typing import NamedTuple
from unittest import mock

from weightops.cli.main import run

# What rich says to a terminal: colours and styles, and no more.
STYLES = re.compile("\x1b\\[[0-9;]*m")


class Done(NamedTuple):
    code: int
    out: str
    err: str


def weightops_here(*words: object) -> Done:
    """Exit code, stdout and stderr of `weightops words…`."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    code = 0
    try:
        with mock.patch.object(sys, "stdout", streams[0]), mock.patch.object(sys, "stderr", streams[1]):
            run([str(word) for word in words])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return Done(code, out, err)


def harmful(text: str) -> set[str]:
    """Every character by which a file could act on a terminal: control, escape, format, bidi, surrogate, separator."""
    bad = {c for c in STYLES.sub("", text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    return bad - {"\n"}
