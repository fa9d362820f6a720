"""What every verb reports: inputs with hashes, keys accounted for, bytes, seconds, memory, warnings."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightops import __version__
from weightops.errors import MismatchError, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightops.files.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Unused:
    """A key of `source` that the output does not use, and why; `asked`: the user's own words leave it out."""

    key: str
    source: str
    reason: str
    asked: bool


@dataclass(slots=True)
class Account:
    """Every key of every input: used, copied on purpose, or unused with a reason.

    `kept` are the copies that were not asked for, with reasons: a key that another model lacks, an integer
    tensor that cannot be averaged. They and the unasked of `unused` are what --strict refuses.
    """

    used: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)

    def surprises(self) -> list[str]:
        """Keys, each once: what is kept from the first model is mostly left out of another."""
        return list(dict.fromkeys([key for key, _ in self.kept] + [u.key for u in self.unused if not u.asked]))

    def refuse_surprises(
        self, what: str = "cannot be merged", otherwise: str = "kept from the first model or left out"
    ) -> None:
        """Raise MismatchError where there are any. what: is the matter with them; otherwise: what becomes of them."""
        found = self.surprises()
        if found:
            reasons = sorted({r for _, r in self.kept} | {u.reason for u in self.unused if not u.asked})
            raise MismatchError(
                "--strict",
                f"{tensors(len(found))} {what}: {listing(found)}",
                f"{'; '.join(reasons[:3])}. Without --strict they are {otherwise}, and named",
            )


@dataclass(slots=True)
class Report:
    """What a verb did. `summary` is one line in words; `groups` counts keys by component for the table.

    details: what only this verb has to say, by the JSON's own field names.
    """

    command: str
    inputs: list[dict[str, Any]]
    output: str | None
    account: Account
    summary: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    dry_run: bool = False
    verified: dict[str, Any] | None = None
    checked: dict[str, int] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found: dict[str, Any] = {
            "command": self.command,
            "version": __version__,
            "inputs": self.inputs,
            "output": self.output,
            "bytes_written": self.bytes_written,
            "keys": {
                "used": len(self.account.used),
                "copied": len(self.account.copied) + len(self.account.kept),
                "kept": [{"key": key, "reason": reason} for key, reason in self.account.kept],
                "unused": [
                    {"key": u.key, "source": u.source, "reason": u.reason, "asked": u.asked}
                    for u in self.account.unused
                ],
            },
            "summary": self.summary,
            "components": self.groups,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": self.warnings,
            "dry_run": self.dry_run,
        }
        if self.verified is not None:
            found["verified"] = self.verified
        if self.checked is not None:
            found["checked"] = self.checked
        return found | self.details


def tensors(count: int, what: str = "") -> str:
    """1 tensor, 1,234 tensors, 2 ema tensors."""
    return f"{count:,} {what}{' ' if what else ''}tensor{'' if count == 1 else 's'}"


def modules(count: int) -> str:
    """1 module, 1,234 modules."""
    return f"{count:,} module{'' if count == 1 else 's'}"


def input_entries(sources: Sequence[Checkpoint], hashes: Sequence[str | None]) -> list[dict[str, Any]]:
    return [
        {"path": source.label, "hash": found, "bytes": source.nbytes}
        for source, found in zip(sources, hashes, strict=True)
    ]


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had resident, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
