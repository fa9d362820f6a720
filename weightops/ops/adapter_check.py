"""Read a written adapter file back, and compare what it does to each module with the file that it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightops.errors import ValueRefused, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.lora.dialects import DIALECTS
from weightops.naming.keymap import ARCHITECTURES
from weightops.ops.dialect import State, pieces_of, read_source

if TYPE_CHECKING:
    from pathlib import Path

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.pieces import Piece

_Pieces = dict[tuple[str, str, str], "Piece"]


def check_adapters(
    opened: Checkpoint, written: Path, *, drop: tuple[str, ...], architecture: str | None
) -> dict[str, int]:
    """Compare every module of `written`, opened as any file is, with `opened`: each factor byte for byte, and alpha.

    Returns {"tensors", "bytes"}. Raises ValueRefused, which names the first module that differs.
    """
    with open_checkpoint(written) as output:
        mine, own = _modules(opened, drop, architecture)
        theirs, other = _modules(output, (), mine.architecture.name)
        seen = nbytes = 0
        for place, piece in own.items():
            found = other.pop(place, None)
            what = f"{place[0]}.{place[1]}"
            if found is None or found.parts.keys() != piece.parts.keys():
                raise _differs(written, what, "is not there as it was")
            if (piece.alpha or piece.rank) != (found.alpha or found.rank):
                raise _differs(written, what, f"has alpha {found.alpha}, and had {piece.alpha}")
            for part, source in piece.parts.items():
                data = read_source(mine, source)
                if data != read_source(theirs, found.parts[part]):
                    raise _differs(written, what, f"has another {part} than it had")
                seen, nbytes = seen + 1, nbytes + len(data)
        for place, piece in other.items():  # rows of zeros, where a packed tensor has modules that nothing changes
            if any(any(read_source(theirs, piece.parts[p])) for p in piece.family.rows if p in piece.parts):
                raise _differs(written, f"{place[0]}.{place[1]}", "was not changed before")
        return {"tensors": seen, "bytes": nbytes}


def _modules(opened: Checkpoint, drop: tuple[str, ...], architecture: str | None) -> tuple[State, _Pieces]:
    found = read_adapters(opened, architecture=architecture)
    name = found.architecture or (found.possible[0] if found.possible else "")
    if found.architecture is None and name:
        found = read_adapters(opened, architecture=name)
    state = State(opened, found, DIALECTS["kohya"], ARCHITECTURES.get(name))
    return state, {(p.component, p.name, p.family.name): p for p in pieces_of(state, drop)}


def _differs(written: Path, module: str, what: str) -> ValueRefused:
    return ValueRefused(
        str(written), f"{quote(module)} {what}",
        "the disk or the memory of this machine may be failing; run again, and report it if it stays",
    )  # fmt: skip
