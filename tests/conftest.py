"""What several tests share: files made by other hands than ours, and a command line to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported anywhere: tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

CLI = Path(__file__).resolve().parent.parent / "cli.py"


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file written by the library."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    return path


def save_raw(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int], bytes]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file written by hand, name -> (dtype, shape, bytes): torch does not know every dtype."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))
    return path


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What `function` returns or raises; a failure, instead of a test that never ends, when it hangs."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append((function(), None))
        except BaseException as e:
            found.append((None, e))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"still running after {seconds} seconds"
    value, error = found[0]
    if error is not None:
        raise error
    return value


def no_workers_left() -> bool:
    """Have all threads of the engine ended, or are they about to?"""
    workers = [t for t in threading.enumerate() if t.name == "weightops"]
    for worker in workers:
        worker.join(0.5)
    return not any(worker.is_alive() for worker in workers)


def weightops(*arguments: object, cwd: Path, seconds: float = 60, **rest: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    words = [sys.executable, str(CLI), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False, **rest)
