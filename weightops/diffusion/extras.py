"""The optional packages: says in one line what to install, and keeps their warnings and logs from the terminal."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from weightops.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# What a package is called where it is installed, if not as it is imported.
_INSTALLED_AS = {"PIL": "pillow", "imageio_ffmpeg": "imageio-ffmpeg"}


def need(where: str, *packages: str, extra: str = "diffusion") -> None:
    """Refuse to begin without these packages, before anything is read. Raises UsageError, which begins with `where`."""
    missing = [_INSTALLED_AS.get(name, name) for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise UsageError(where, what, f"pip install 'weightops[{extra}]'")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """diffusers and transformers log and draw bars of their own: nothing of it passes, and what raises still raises.

    Not even errors: they log some, and then go on, for one where weights are in another form than the usual.
    """
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggings: list[Any] = [
            importlib.import_module("diffusers.utils.logging"), importlib.import_module("transformers.utils.logging"),
        ]  # fmt: skip
        before = [each.get_verbosity() for each in loggings]
        for each in loggings:
            each.set_verbosity(each.CRITICAL)
            each.disable_progress_bar()
        try:
            yield
        finally:
            for each, level in zip(loggings, before, strict=True):
                each.set_verbosity(level)


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Pillow warns of notes in a file that it cannot read, such as a camera's, and reads the image all the same."""
    import threading
    import warnings

    # Filters are the process's: two threads would undo each other's.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
