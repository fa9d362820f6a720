"""Surgery on diffusion weights: `weightops.merge("a.safetensors", "b.safetensors", alpha=0.7)`.

Each verb of the command line is a function here, with the same words, that returns its report as a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightops.diffusion.caption import caption
    from weightops.diffusion.evaluate import evaluate
    from weightops.diffusion.generate import generate
    from weightops.diffusion.study import study
    from weightops.diffusion.train import train
    from weightops.ops.blocks import blocks
    from weightops.ops.combine import combine
    from weightops.ops.convert import convert
    from weightops.ops.extract import extract
    from weightops.ops.fuse import fuse
    from weightops.ops.inspect import inspect
    from weightops.ops.merge import merge
    from weightops.ops.replay import replay
    from weightops.ops.resize import resize
    from weightops.ops.unfuse import unfuse

__version__ = "0.1.0"
__all__ = [
    "__version__", "blocks", "caption", "combine", "convert", "evaluate", "extract", "fuse", "generate", "inspect",
    "merge", "replay", "resize", "study", "train", "unfuse",
]  # fmt: skip

# Imported when first asked for, so that `import weightops` costs nothing. No subpackage may have a verb's name:
# importing it would put the module in the function's place.
_VERBS = {
    "blocks": "weightops.ops.blocks",
    "caption": "weightops.diffusion.caption",
    "combine": "weightops.ops.combine",
    "convert": "weightops.ops.convert",
    "evaluate": "weightops.diffusion.evaluate",
    "extract": "weightops.ops.extract",
    "fuse": "weightops.ops.fuse",
    "generate": "weightops.diffusion.generate",
    "inspect": "weightops.ops.inspect",
    "merge": "weightops.ops.merge",
    "replay": "weightops.ops.replay",
    "resize": "weightops.ops.resize",
    "study": "weightops.diffusion.study",
    "train": "weightops.diffusion.train",
    "unfuse": "weightops.ops.unfuse",
}


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    verb = globals()[name] = getattr(importlib.import_module(_VERBS[name]), name)
    return verb


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
