"""inspect: what is this file? From headers alone; `stats`, `hashes` and `spectrum` read it through once."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from weightops.engine.chunks import BLOCK_VALUES, DEFAULT_MEMORY
from weightops.errors import FormatError, UsageError, quote
from weightops.files.checkpoint import Checkpoint, open_checkpoint
from weightops.files.dtypes import ARITHMETIC
from weightops.files.tensor import Slot, TensorSpec
from weightops.lineage import recipe_of
from weightops.lora.adapters import AdapterFile, Problem, read_adapters, strengths
from weightops.naming.identify import Identity, identify
from weightops.plan import Block, Input, Plan, Task

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from weightops.engine.run import Progress
    from weightops.files.source import ByteSource


@dataclass(frozen=True, slots=True)
class Stats:
    """Of one tensor: `norm` is the Frobenius norm and, like `low` and `high`, of its finite values alone."""

    norm: float
    low: float | None
    high: float | None
    nan: int
    inf: int

    def to_dict(self) -> dict[str, Any]:
        norm = self.norm if math.isfinite(self.norm) else None
        return {"norm": norm, "min": self.low, "max": self.high, "nan": self.nan, "inf": self.inf}


@dataclass(slots=True)
class Inspection:
    """What a file is; `tensors` are those that were asked for, `hashes` are of each of its files.

    lineage: the recipe by which it was made, and within it those of its inputs, where there is one to be believed.
    """

    path: str
    kind: str
    architecture: str | None
    spelling: str | None
    variant: str | None
    possible: tuple[str, ...]
    container: str
    count: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    components: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    left_out: list[tuple[str, str]]
    lineage: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    strangers: tuple[str, ...] = ()
    tensors: dict[str, TensorSpec] | None = None
    stats: dict[str, Stats] | None = None
    hashes: list[dict[str, str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that scripts may rely on."""
        found: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "architecture": self.architecture,
            "spelling": self.spelling,
            "variant": self.variant,
            "possible": list(self.possible),
            "container": self.container,
            "tensors": self.count,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "components": self.components,
            "metadata": self.metadata,
            "left_out": [{"key": key, "reason": reason} for key, reason in self.left_out],
        }
        if self.lineage is not None:
            found["lineage"] = self.lineage
        if self.strangers:
            found["strangers"] = list(self.strangers)
        if self.lora is not None:
            found["lora"] = self.lora
        if self.tensors is not None:
            found["tensor_list"] = {
                name: {"dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes} for name, s in self.tensors.items()
            }
        if self.stats is not None:
            found["stats"] = {name: s.to_dict() for name, s in self.stats.items()}
        if self.hashes is not None:
            found["hashes"] = self.hashes
        return found


def inspect(
    path: str | os.PathLike[str],
    *,
    tensors: str | None = None,
    stats: bool = False,
    hashes: bool = False,
    spectrum: bool = False,
    base: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """Look at the file or folder `path`.

    tensors: a glob; the tensors whose names match are listed. stats: norms, extremes, NaN and Inf of each
    (of the listed ones, with `tensors`), in one pass. hashes: SHA-256 and its kin of each file.
    spectrum: of an adapter file, the singular values of each module's ΔW and what they say, as `lora["spectrum"]`;
    base: the model that it is for, beside whose weights ΔW then stands (see `weightops.ops.spectra.spectra_of`).
    memory: bytes in flight (None: 128 MiB, and for a spectrum up to 512 MiB where matrices are large).
    Raises WeightopsError. Never imports torch, except for `stats` and `spectrum`.
    """
    if base is not None and not spectrum:
        raise UsageError("--base", "is what --spectrum measures by", "inspect LORA --spectrum --base CHECKPOINT")
    with open_checkpoint(path) as opened:
        chosen = None
        if tensors is not None:
            chosen = {k: i.spec for k, i in sorted(opened.tensors.items()) if fnmatchcase(k, tensors)}
            if not chosen:
                raise UsageError("--tensors", f"no tensor of {opened.label} is named like {quote(tensors)}")
        identity = identify(opened.tensors)
        adapters = read_adapters(opened) if identity.kind == "lora" else None
        if spectrum and adapters is None:
            kind = f"a {identity.kind.replace('_', ' ')}" if identity.kind != "unknown" else "of no known kind"
            hint = "extract makes an adapter of the difference of two checkpoints"
            raise UsageError("--spectrum", f"is of adapter files, and {opened.label} is {kind}", hint)
        known = adapters or identity
        found = Inspection(
            path=opened.label,
            kind=identity.kind,
            architecture=known.architecture,
            spelling=known.spelling,
            variant=known.variant,
            possible=known.possible,
            container=opened.container,
            count=len(opened.tensors),
            parameters=sum(i.spec.values for i in opened.tensors.values()),
            nbytes=opened.nbytes,
            dtypes=dict(Counter(i.spec.dtype for i in opened.tensors.values()).most_common()),
            components=_components(opened, identity),
            metadata=dict(sorted(opened.metadata.items())),
            left_out=opened.left_out,
            lineage=recipe_of(opened.metadata),
            lora=_lora(opened, adapters) if adapters is not None else None,
            strangers=identity.strangers,
            tensors=chosen,
            stats=_stats(opened, chosen, memory or DEFAULT_MEMORY, threads) if stats else None,
            hashes=[file_hashes(f) for f in opened.files] if hashes else None,
        )
        if spectrum and found.lora is not None:
            from weightops.engine.run import ignore
            from weightops.ops.spectra import spectra_of

            show = on_progress or ignore
            found.lora["spectrum"] = spectra_of(opened, base, memory=memory, threads=threads, on_progress=show)
        return found


def _components(opened: Checkpoint, identity: Identity) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, component in identity.components.items():
        spec = opened.tensors[key].spec
        entry = found.setdefault(component, {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": Counter()})
        entry["tensors"] += 1
        entry["parameters"] += spec.values
        entry["bytes"] += spec.nbytes
        entry["dtypes"][spec.dtype] += 1
    for component, entry in found.items():
        entry["dtypes"] = dict(entry["dtypes"].most_common())
        match = identity.parts[component].match if component in identity.parts else None
        if match is not None:
            entry["network"] = match.variant or match.network.name
            entry["spelling"] = match.spelling
    return found


def _lora(opened: Checkpoint, adapters: AdapterFile) -> dict[str, Any]:
    """What `inspect` says of an adapter file; its counts are of modules."""
    scales = _alphas(opened, adapters)
    return {
        "dialect": adapters.dialect,
        "dialects": dict(adapters.schemes.most_common()),
        "families": dict(Counter(a.label for a in adapters.adapters).most_common()),
        "ranks": {str(r): n for r, n in Counter(a.rank for a in adapters.adapters).most_common() if r is not None},
        "alphas": dict(scales.most_common()),
        "modules": len({a.name for a in adapters.adapters}) or len(adapters.indexed) // 2,
        "targets": dict(Counter(a.component for a in adapters.adapters if a.component).most_common()),
        "unresolved": [a.name for a in adapters.adapters if a.target is None],
        "embeddings": adapters.embeddings,
        "problems": [{"name": name, "what": what} for name, what in adapters.problems],
        "unknown": adapters.left,
    }


def _alphas(opened: Checkpoint, adapters: AdapterFile) -> Counter[str]:
    """How many modules have which alpha. What is wrong with them is one of the file's problems, and no error."""
    try:
        scales = strengths(opened, adapters)
    except FormatError as e:
        adapters.problems.append(Problem(e.where, e.what))
        return Counter()
    return Counter(f"{alpha:g}" for alpha, _ in scales.values() if alpha is not None)


# ------------------------------------------------------------------------------------------------ statistics


def _stats(
    opened: Checkpoint, chosen: dict[str, TensorSpec] | None, memory: int, threads: int | None
) -> dict[str, Stats]:
    """One pass over the floating tensors; blocks are joined in order, so the figures do not depend on threads."""
    from weightops.engine.run import run

    names = [
        key
        for key in (chosen if chosen is not None else opened.tensors)
        if opened.tensors[key].spec.dtype in ARITHMETIC and opened.tensors[key].spec.nbytes
    ]
    tasks = tuple(
        Task(
            key,
            (Input(0, Slot(key, opened.tensors[key].spec.flat())),),
            (),
            _block_stats,
            work_nbytes=24 * min(opened.tensors[key].spec.values, BLOCK_VALUES),
        )
        for key in names
    )
    outcome = run(Plan((opened,), {}, tasks), None, memory=memory, threads=threads)
    found = {}
    for number, key in enumerate(names):
        lows, highs, norms, nans, infs = zip(*outcome.values[number], strict=True)
        low, high = min(lows), max(highs)
        found[key] = Stats(
            math.hypot(*norms),
            low if math.isfinite(low) else None,
            high if math.isfinite(high) else None,
            sum(nans),
            sum(infs),
        )
    return found


def _block_stats(
    inputs: Sequence[Tensor], _outputs: Sequence[Tensor], _block: Block
) -> tuple[float, float, float, int, int]:
    import torch

    values = inputs[0].double()
    low, high = torch.aminmax(values)
    nan = inf = 0
    if not (math.isfinite(low) and math.isfinite(high)):
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        values = values[values.isfinite()]
        if not len(values):
            return math.inf, -math.inf, 0.0, nan, inf
        low, high = torch.aminmax(values)
    # The squares of F64 can be too large, or too small, for F64.
    largest = max(-float(low), float(high))
    unit = 1.0 if 1e-100 < largest < 1e100 or not largest else largest
    values = values if unit == 1.0 else values / unit
    return float(low), float(high), unit * math.sqrt(values.dot(values)), nan, inf


# ------------------------------------------------------------------------------------------------ hashes


def file_hashes(source: ByteSource) -> dict[str, str]:
    """The names under which the field knows a file.

    sha256: of the whole file; autov2: its first 10 digits (A1111, Civitai). tensor_data: SHA-256 of all after
    the header, which kohya stores as sshs_model_hash; autov3: its first 12 digits. Source: FORMATS §8.
    """
    from weightops.files.source import read

    whole = hashlib.sha256()
    data = None
    start = read(source, 0, min(source.size, 9))
    data_start = 8 + int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and data_start <= source.size:
        data = hashlib.sha256()
    buffers = [bytearray(4 << 20), bytearray(4 << 20)]
    second: threading.Thread | None = None
    for number, position in enumerate(range(0, source.size, 4 << 20)):
        part = memoryview(buffers[number % 2])[: source.size - position]
        source.read_into(position, part)
        if second is not None:
            second.join()
        if data is not None:
            # The two digests are of nearly the same bytes: each on its own core.
            second = threading.Thread(target=data.update, args=(part[max(0, data_start - position) :],))
            second.start()
        whole.update(part)
    if second is not None:
        second.join()
    source.check_unchanged()
    found = {"file": source.label, "sha256": whole.hexdigest(), "autov2": whole.hexdigest()[:10]}
    if data is not None:
        found |= {"tensor_data": data.hexdigest(), "autov3": data.hexdigest()[:12]}
    return found
