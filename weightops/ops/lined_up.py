"""What LoRAs that are combined have in common: the values that lining them up makes, and who is asked for what."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from weightops.errors import MismatchError, quote
from weightops.ops.adapter_modules import OwnModules
from weightops.ops.dialect_settings import APART
from weightops.ops.report import Account

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from weightops.files.checkpoint import Checkpoint
    from weightops.lora.adapters import Adapter, AdapterFile
    from weightops.lora.dialects import Dialect
    from weightops.lora.family import Told
    from weightops.lora.pieces import Bands, Source
    from weightops.naming.keymap import Architecture
    from weightops.ops.blend import Blend
    from weightops.ops.factor_plan import Module
    from weightops.ops.sums import Placement

FileKey = tuple[int, str]


class Share(NamedTuple):
    """One adapter's change of one canonical module: which of its rows these are, in the module's order."""

    file: int
    adapter: Adapter
    bands: Bands

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.bands)


class Spelled(NamedTuple):
    """Whose names are written, of which model, after which file; homes: output key -> its component."""

    dialect: Dialect
    architecture: Architecture
    opened: Checkpoint
    homes: dict[str, str]


class Summand(NamedTuple):
    """factor · rows of a file's part, at the rows where they stand."""

    file: int
    source: Source
    factor: float
    placed: tuple[Placement, ...]


class Vector(NamedTuple):
    """A change of a bias or of a norm, a sum. beside: the module without whose factors it has no meaning."""

    key: str
    dtype: str
    rows: int
    summands: tuple[Summand, ...]
    beside: str | None = None


@dataclass(slots=True)
class Wish:
    """What was asked of a combination. strengths: of the files. blend: a way to combine other than the sum; compat: the
    tool whose numbers are repeated."""

    strengths: Sequence[float]
    dialect: str | None = None
    architecture: str | None = None
    exact: bool = False
    blend: Blend | None = None
    compat: str | None = None


@dataclass
class LinedUp:
    """The modules that are written, and what becomes of every key. known: the architecture, where it is known.

    keys: by a module's name, what it takes of which file. used: these, and what vectors take; lost: what nothing can
    take, and why.
    """

    files: Sequence[Checkpoint]
    wish: Wish
    found: list[AdapterFile]
    dialect: Dialect | None
    known: Architecture | None
    endings: Mapping[str, str]
    modules: list[Module] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    homes: dict[str, str] = field(default_factory=dict)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    embeddings: dict[str, int] = field(default_factory=dict)
    values: list[dict[str, tuple[float | None, Told]]] = field(default_factory=list)
    keys: dict[str, list[FileKey]] = field(default_factory=dict)
    used: set[FileKey] = field(default_factory=set)
    lost: dict[FileKey, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @functools.cached_property
    def own(self) -> OwnModules | None:
        """The first file, where its own names are kept; None where those of a dialect are written."""
        return OwnModules(self.files[0], self.found[0]) if self.dialect is None else None

    @property
    def opened(self) -> Checkpoint:
        return self.files[0]

    @property
    def architecture(self) -> Architecture:
        assert self.known is not None
        return self.known

    def spelled(self, outputs: Container[str]) -> Spelled | None:
        """What settings of these outputs are made from; None where the file's own names are kept."""
        if self.dialect is None or self.known is None:
            return None
        homes = {key: component for key, component in self.homes.items() if key in outputs}
        return Spelled(self.dialect, self.known, self.opened, homes)

    @property
    def is_folder(self) -> bool:
        return self.dialect is not None and self.dialect.folder

    def name(self, component: str, prefix: str, module: str) -> str:
        """A module's name in what is said of it: in a folder, components may have modules of one name."""
        return f"{component}.{prefix}{module}" if self.is_folder else prefix + module

    def claim(self, component: str, prefix: str, module: str, part: str) -> str:
        """The key of a part in the output. Raises MismatchError for one that is taken."""
        key = prefix + module + self.endings[part]
        key = f"{component}{APART}{key}" if self.is_folder else key
        if key in self.claimed:
            raise MismatchError(self.opened.label, f"two of the tensors would be called {quote(key)}")
        self.claimed.add(key)
        self.homes[key] = component
        return key
