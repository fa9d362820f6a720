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

from weightops.lineage import KEY, entries

if TYPE_CHECKING:
    from torch import Tensor

    from weightops.files.checkpoint import Checkpoint
    from weightops.files.folder import OutputFile
    from weightops.files.tensor import Slot, TensorSpec


class Grain(Enum):
    """May the engine cut the work into bands of rows, or is the whole tensor needed at once?

    VALUES: any value may be apart from the others. It is a method's word: who plans flattens the slots of such work,
    and its task is ROWS.
    """

    VALUES = "values"
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
# The same on bytes: of a whole tensor where it is shared or not to be cut, else those of the block.
RawCompute = Callable[["Sequence[memoryview]", "Sequence[memoryview]", Block], Any]


@dataclass(frozen=True, slots=True)
class Input:
    """A slot of source number `source`; `shared`: each block gets all of it, as with the factors of a LoRA."""

    source: int
    slot: Slot
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: `compute=None` copies the bytes of the one input to each output.

    No inputs: `compute` makes the outputs from nothing, as with constants. What outputs hold before is chance:
    it fills all of them. `raw`: it is a RawCompute, and torch is not needed.
    `work_nbytes` are the bytes of working copies that `compute` makes for a block, at most. `tolerance`: how far an
    output may be off the same work in float64, relative to the larger of it and of inputs of its shape. `repeated`: it
    decides between values (by a threshold, a vote), so that a check repeats it as it was, not in float64.
    With ROWS, all slots that are not shared have equally many rows.

    `gather`: makes one value of those of all blocks, given in order, once the last of them is there. `follows`: so many
    tasks directly before this one must be whole first; its compute takes what they gathered, in order, after the block,
    and its gather after the values.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Slot, ...]
    compute: Compute | RawCompute | None = None
    grain: Grain = Grain.ROWS
    work_nbytes: int = 0
    raw: bool = False
    tolerance: float = 0.0
    repeated: bool = False
    gather: Callable[..., Any] | None = None
    follows: int = 0

    def __post_init__(self) -> None:
        if self.grain is Grain.VALUES:
            raise ValueError(f"{self.name}: a task's grain is ROWS or TENSOR")
        if self.raw and self.grain is Grain.ROWS:
            for slot in (*self.outputs, *(i.slot for i in self.inputs if not i.shared)):
                if slot.spec.rows * slot.spec.row_nbytes != slot.spec.nbytes:
                    raise ValueError(f"{self.name}: the rows of {slot.spec} do not fill whole bytes")

    @property
    def needs_torch(self) -> bool:
        return self.compute is not None and not self.raw


@dataclass(frozen=True, slots=True)
class Plan:
    """`tasks` over `sources`, filling the tensors `outputs`; no outputs: a scan, whose values are returned.

    `metadata` is written as it stands; `recipe` joins it under the key `weightops`, with the name and the
    hash of each source filled in, and the recipe by which that one was made (`weightops.lineage`). With
    `refuse_nonfinite`, NaN or Inf among the outputs is an error. `files`: the output is a folder, in which each output
    stands in one of these, beside `extras`, files whose bytes are given by path. `data_hashes`: keys of the metadata,
    and the format of each ("0x{}"), for the SHA-256 of all bytes after the header of the file in which they stand.
    `header`: the first bytes of the one file as they are to stand, in place of a header of ours; the tensors follow in
    the order of `outputs`. `variants`: plans over the same sources, each of which alone would write the next of
    `files`; their metadata and recipes, with the hashes of what each alone would read, stand in these.
    """

    sources: tuple[Checkpoint, ...]
    outputs: Mapping[str, TensorSpec]
    tasks: tuple[Task, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    refuse_nonfinite: bool = False
    files: tuple[OutputFile, ...] = ()
    extras: Mapping[str, bytes] = field(default_factory=dict)
    data_hashes: Mapping[str, str] = field(default_factory=dict)
    header: bytes = b""
    variants: tuple[Plan, ...] = ()

    def __post_init__(self) -> None:
        if self.extras and not self.files:
            raise ValueError("extras stand in a folder, so they need `files` beside them")

    def file_metadata(
        self, hashes: Sequence[str], of_variants: Sequence[Sequence[str]] | None = None
    ) -> list[dict[str, str]]:
        """The finished metadata of each file of the output, in order: of each of `files`, or of the one file.

        hashes: of each source; of_variants: for each of `variants` the same, of what it alone would read.
        """
        if self.variants:
            told = [hashes] * len(self.variants) if of_variants is None else of_variants
            own = (plan.file_metadata(theirs) for plan, theirs in zip(self.variants, told, strict=True))
            return [metadata for of_one in own for metadata in of_one]
        return [self.finished_metadata(hashes, f.metadata) for f in self.files] or [self.finished_metadata(hashes)]

    def finished_metadata(self, hashes: Sequence[str], more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The output's metadata, given the hash of each source; its length does not depend on their digits.

        more: that of one file of a folder. `data_hashes` are not among it: who writes the file fills them in.
        """
        metadata = {**self.metadata, **(more or {})}
        if self.recipe is None:
            return metadata
        told = ((s.name, hashed, s.metadata) for s, hashed in zip(self.sources, hashes, strict=True))
        recipe = {**self.recipe, "inputs": entries(told)}
        return {**metadata, KEY: json.dumps(recipe, sort_keys=True, ensure_ascii=False)}
