"""Where a descent stands, in a file beside what it makes, so that the same call goes on when one was interrupted."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from weightops.errors import WeightopsError
from weightops.synthesis.descent import State
from weightops.synthesis.tensor_file import FORMAT, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from weightops.diffusion.processes import Processes

EVERY = 200  # steps
_TENSORS = ("weights", "first", "second", "averaged", "losses")


class KeptDescent:
    """The state after every so many steps; of other numbers or other words it is begun anew, and that is said."""

    def __init__(
        self, target: Path, latents: Tensor, words: Mapping[str, Any], processes: Processes,
        conditions: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        digest = hashlib.sha256(latents.contiguous().numpy().tobytes())
        digest.update(b"" if conditions is None else conditions.tobytes())
        self.path = target.with_name(f"{target.stem}-unfinished.safetensors")
        self.words = {"learnt from": digest.hexdigest(), "shape": list(latents.shape), **words}
        self.processes = processes
        self.step = 0
        self.resumed_at = 0
        self.warnings: list[str] = []

    def load(self) -> State | None:
        """What was kept of the same words; None where there is none. All processes have read it when this returns."""
        found = self._found()
        self.processes.wait()
        return found

    def _found(self) -> State | None:
        if not self.path.is_file():
            return None
        try:
            tensors, said = read_tensors(str(self.path))
            if said["words"] == self.words:
                state = State(int(said["step"]), *(tensors[name] for name in _TENSORS))
                self.step = self.resumed_at = state.step
                return state
            reason = "it is of another space, or of other words"
        except (WeightopsError, KeyError, TypeError, ValueError) as e:
            reason = e.what if isinstance(e, WeightopsError) else "it is not whole"
        self.warnings.append(f"{self.path}: begun anew: {reason}")
        return None

    def save(self, state: State) -> None:
        """After each step; what was kept before is replaced in one. Raises OutputError."""
        self.step = state.step
        if state.step % EVERY or not self.processes.is_main:
            return
        tensors = {name: getattr(state, name) for name in _TENSORS}
        write_tensors(self.path, tensors, {"format": FORMAT, "words": self.words, "step": state.step}, force=True)

    def remove(self) -> None:
        """It is done: what was kept goes."""
        self.path.unlink(missing_ok=True)
