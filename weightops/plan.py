"""WHAT to compute, as frozen values: Grain, Input, Task, Plan. Knows no thread, no device, no verb.

A Task reads Slots and fills Slots: reads and writes are the same thing, so renaming, packed projections and
row bands need no mechanism of their own. The output's header stands in the Plan (`outputs`), not in the
tasks, for several tasks may each fill a band of one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.tensor import Slot, TensorSpec


class Grain(Enum):
    """May the engine cut the work into bands of rows, or is the whole tensor needed at once?"""

    ROWS = "rows"
    TENSOR = "tensor"


class Block(NamedTuple):
    """The rows that one call of a compute function sees, and their number in the tensor.

    Blocks follow from the shape alone, never from memory or threads; randomness is drawn per block.
    """

    number: int
    start: int
    stop: int


# Reads the inputs of one block, fills the outputs of it, and returns a value to collect (a scan) or None.
Compute = Callable[["Sequence[Tensor]", "Sequence[Tensor]", Block], Any]


@dataclass(frozen=True, slots=True)
class Input:
    """A slot of source number `source`; `shared`: each block gets all of it, as with the factors of a LoRA."""

    source: int
    slot: Slot
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: `compute=None` copies the bytes of the one input to the one output.

    `work_nbytes` are the bytes of working copies that `compute` makes for a block, at most.
    With ROWS, all slots that are not shared have equally many rows.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Slot, ...]
    compute: Compute | None = None
    grain: Grain = Grain.ROWS
    work_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """`tasks` over `sources`, filling the tensors `outputs`; no outputs: a scan, whose values are returned.

    `metadata` is written as it stands; `recipe` joins it under the key `weightops`, with the name and the
    hash of each source filled in. With `refuse_nonfinite`, NaN or Inf among the outputs is an error.
    """

    sources: tuple[Checkpoint, ...]
    outputs: Mapping[str, TensorSpec]
    tasks: tuple[Task, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    refuse_nonfinite: bool = False

    def finished_metadata(self, hashes: Sequence[str]) -> dict[str, str]:
        """The output's metadata, given the hash of each source; its length does not depend on their digits."""
        if self.recipe is None:
            return dict(self.metadata)
        # A file's name may be any bytes, but a header is Unicode.
        names = [s.name.encode(errors="surrogateescape").decode(errors="replace") for s in self.sources]
        inputs = [{"name": name, "hash": h} for name, h in zip(names, hashes, strict=True)]
        recipe = {**self.recipe, "inputs": inputs}
        return {**self.metadata, "weightops": json.dumps(recipe, sort_keys=True, ensure_ascii=False)}
