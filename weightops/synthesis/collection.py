"""The folder of a space while rows are added to it: what is there counts once space.json says so, and not before.

A new space is made under a hidden name beside its own, and renamed when it is whole; to one that stands rows are
added behind those that its space.json counts. Either way what an interrupted run has left is gone on with.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops.diffusion.tables import write_whole
from weightops.errors import OutputError, ValueRefused, WeightopsError, listing, quote
from weightops.files.checkpoint import open_checkpoint
from weightops.files.tensor import TensorSpec
from weightops.files.writer import lock, sync_folder, uninterrupted
from weightops.synthesis.space import (
    CONDITIONS,
    FORMAT,
    INDEX,
    MEMBERS,
    REFERENCE,
    UNFINISHED,
    WIDTHS,
    rows_path,
    torch_dtype,
    unfinished,
)  # fmt: skip
from weightops.synthesis.tensor_file import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from weightops.synthesis.layout import Layout

_OWN = (INDEX, MEMBERS, REFERENCE, CONDITIONS, UNFINISHED)


@dataclass
class Collection:
    """Where rows go. target: the space's folder; before: members that it has already; made_of: what decides about them.

    lines: of the members in order, from the first, those of an interrupted run included.
    """

    target: Path
    layout: Layout
    dtype: str
    form: str
    before: int
    made_of: Mapping[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The folder in which the rows are written."""
        return self.target if self.before else unfinished(self.target)

    @property
    def row_nbytes(self) -> int:
        return self.layout.width * WIDTHS[self.dtype]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, or take up what an interrupted run of the same has left. Raises OutputError, UsageError."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.work, os.O_RDONLY) if os.name != "nt" else -1
        except OSError as e:
            raise OutputError(str(self.target), f"cannot be written: {e.strerror or e}") from None
        try:
            if handle >= 0 and not lock(handle, wait=False):
                raise OutputError(str(self.target), "another run is at work in it", "wait for its end")
            if self.before and self._counted() != self.before:
                # Rows of the other run stand behind those that were counted, and would be cut off.
                raise OutputError(str(self.target), "another run has added to it meanwhile", "the same call goes on")
            self._take_up()
            yield
        finally:
            if handle >= 0:
                os.close(handle)

    def _counted(self) -> Any:
        """The members that the space counts now."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((self.target / INDEX).read_bytes()).get("members")
        return None

    def _take_up(self) -> None:
        said = json.loads(json.dumps(self.made_of))
        mark = self.work / UNFINISHED
        found: Any = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(mark.read_bytes())
        kept, there = self.before, self._whole_lines()
        if self._goes_on(found, said, there):
            self.lines = there
            kept = len(self.lines)
        elif self.before:
            self.lines = self._whole_lines()[: self.before]
        else:
            for path in self.work.iterdir():
                path.unlink()
        self._cut(kept)
        write_whole(mark, json.dumps(said).encode())

    def _goes_on(self, found: Any, said: Mapping[str, Any], there: Sequence[Mapping[str, Any]]) -> bool:
        """Is it the same work, or that of files that were changed since, but for those whose rows are there?"""
        if found == said:
            return True
        if not isinstance(found, dict) or any(found.get(word) != said[word] for word in said.keys() - {"files"}):
            return False
        before = {line["name"] for line in there[: self.before]}
        new = [entry for entry in said["files"] if entry[0] not in before]
        done = [line["name"] for line in there[self.before :]]
        return [entry[0] for entry in new[: len(done)]] == done and all(
            entry in found.get("files", ()) for entry in new[: len(done)]
        )

    def drop(self) -> None:
        """Leave nothing of a new space of which no row was written."""
        if not self.before and not self.lines:
            shutil.rmtree(self.work, ignore_errors=True)

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines of members whose rows are there as well."""
        found: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):
            rows = rows_path(self.work, self.dtype).stat().st_size // self.row_nbytes
            for line in (self.work / MEMBERS).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]:
                if not line.endswith("\n"):
                    break
                try:
                    found.append(json.loads(line))
                except ValueError:
                    break
        return found

    def _cut(self, count: int) -> None:
        """Nothing behind the members that stand."""
        text = "".join(_line(entry) for entry in self.lines[:count])
        write_whole(self.work / MEMBERS, text.encode())
        with _told(self.target), rows_path(self.work, self.dtype).open("ab") as file:
            file.truncate(count * self.row_nbytes)

    # ---------------------------------------------------------------------------------------------- adding

    def reference(self) -> Tensor | None:
        """The reference that an interrupted run has found, if it came so far."""
        import torch

        from weightops.engine.tensors import as_tensor

        path = self.work / REFERENCE
        if not path.exists():
            return None
        with open_checkpoint(path) as opened:
            spec = opened.tensors["reference"].spec
            data = memoryview(bytearray(spec.nbytes))
            opened.read_bytes(opened.slot("reference"), 0, len(data), data)
        return as_tensor(data, spec).to(torch.float64)

    def keep_reference(self, reference: Tensor) -> None:
        """Write it, whole or not at all."""
        from weightops.files.header import encode_header

        spec = TensorSpec("F64", (self.layout.width,))
        header = encode_header({"reference": spec}, {"format": "pt"})
        write_whole(self.work / REFERENCE, header + reference.numpy().tobytes())

    def add(self, rows: Tensor, lines: Sequence[dict[str, Any]]) -> Tensor:
        """Write these rows [n, width] behind those that are there; what was written of them, in float64.

        Raises OutputError, and ValueRefused for a value beyond the dtype.
        """
        import torch

        stored = rows.to(torch_dtype(self.dtype)).contiguous()
        bad = (~stored.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            what = (
                f"{self.dtype} cannot hold the row of {quote(lines[bad[0]]['name'])}: it has a value beyond its range"
            )
            raise ValueRefused(str(self.target), what, "--dtype bf16 or fp32 holds it")
        data = stored.view(torch.uint8).numpy().tobytes() if stored.numel() else b""
        with _told(self.target), rows_path(self.work, self.dtype).open("r+b") as file:
            file.seek(len(self.lines) * self.row_nbytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A line says that its row is whole.
        with _told(self.target), (self.work / MEMBERS).open("a", encoding="utf-8") as text:
            text.write("".join(map(_line, lines)))
        self.lines += lines
        return stored.double()

    def finish(self, conditions: np.ndarray | None, said: Mapping[str, Any] | None, *, replace: bool) -> int:
        """Have the space count its members, under its own name. The bytes of its files. Raises OutputError."""
        import io

        import numpy as np

        index = {
            "format": FORMAT, "members": len(self.lines), "dtype": self.dtype, "form": self.form,
            "rows": rows_path(self.work, self.dtype).name, "width": self.layout.width, "conditions": said,
            "layout": self.layout.to_json(),
        }  # fmt: skip
        if not self.before:
            check_replaceable(self.target, replace=replace)  # it may have come meanwhile
        if conditions is not None:
            made = io.BytesIO()
            np.save(made, conditions.astype(np.float64), allow_pickle=False)
            write_whole(self.work / CONDITIONS, made.getvalue())
        with uninterrupted(), _told(self.target):
            write_whole(self.work / INDEX, (json.dumps(index, indent=1) + "\n").encode())
            if not self.before:
                self._take_name(replace=replace)
            # Last: should the name not be had, the same call goes on from here.
            (self.target / UNFINISHED).unlink()
        own = (*_OWN, rows_path(self.target, self.dtype).name)
        return sum(path.stat().st_size for path in self.target.iterdir() if path.name in own)

    def _take_name(self, *, replace: bool) -> None:
        old = self.target.with_name(f".{self.target.name}.weightops-old")
        if os.path.lexists(self.target):
            check_replaceable(self.target, replace=replace)
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
        self.work.rename(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(target: Path, *, replace: bool) -> None:
    """Refuse a target that stands, or that is something else than a space. Raises OutputError."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(str(target), "is a file, expected a folder for the space", "-o DIR names another")
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return
    strange = [n for n in names if n not in _OWN and not n.startswith("rows.") and not _is_fitted(target / n)]
    if INDEX not in names or strange:
        what = f"is no space of LoRAs: it holds {listing(strange or names)}"
        if INDEX in names:
            what = f"holds what is not the space's, and would be lost: {listing(strange)}"
        raise OutputError(str(target), what, "-o DIR names a folder that is new, empty, or a space")
    if not replace:
        raise OutputError(str(target), "exists", "use --force to replace it")


def _is_fitted(path: Path) -> bool:
    """Is it a model that was fitted to a space, which may lie beside the space's own files and goes with it?"""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with open_checkpoint(path) as opened:
            return KEY in opened.metadata
    except WeightopsError:
        return False


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=True) + "\n"


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(
            str(target), f"cannot be written: {e.strerror or e}", "what is collected so far stands"
        ) from None
