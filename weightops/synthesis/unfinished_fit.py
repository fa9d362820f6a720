"""Where an iteration for components stands, in a file beside the output, that the same fit may go on with it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from weightops.errors import WeightopsError
from weightops.synthesis.subspace import Iterating
from weightops.synthesis.tensor_file import FORMAT, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightops.synthesis.space import Space


def digest_of(members: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, members)).encode()).hexdigest()


class KeptIteration:
    """Where an iteration stands, in a file beside the output; of another space or other words it is begun anew."""

    def __init__(self, target: Path, space: Space, words: Mapping[str, Any]) -> None:
        self.path = target.with_name(f"{target.stem}-unfinished.safetensors")
        self.words = {"space": space.digest, **words}
        self.resumed_at = 0
        self.warnings: list[str] = []

    def load(self) -> Iterating | None:
        """What was kept by the same words; None where there is none."""
        if not self.path.is_file():
            return None
        try:
            tensors, said = read_tensors(str(self.path))
            if said["words"] != self.words:
                reason = "it is of another space, or of other words"
            else:
                found = Iterating(
                    tensors["basis"], tensors.get("before"), tensors["mean"], int(said["passes"]),
                    float(said["reached"]), float(said["explained"]),
                )  # fmt: skip
                self.resumed_at = found.passes
                return found
        except (WeightopsError, KeyError, TypeError, ValueError) as e:
            reason = e.what if isinstance(e, WeightopsError) else "it is not whole"
        self.warnings.append(f"{self.path}: begun anew: {reason}")
        return None

    def save(self, state: Iterating) -> None:
        """Keep it, in place of what was kept before."""
        assert state.mean is not None
        tensors = {"basis": state.basis, "mean": state.mean}
        if state.before is not None:
            tensors["before"] = state.before
        said = {
            "format": FORMAT, "words": self.words, "passes": state.passes, "reached": state.reached,
            "explained": state.explained,
        }  # fmt: skip
        write_tensors(self.path, tensors, said, force=True)

    def remove(self) -> None:
        """It is done: what was kept goes."""
        self.path.unlink(missing_ok=True)
