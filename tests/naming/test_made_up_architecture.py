"""A new architecture is one new file: a made-up one, dropped into the folder, is known to all that reads names."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CLI

if TYPE_CHECKING:
    from pathlib import Path

# All of the file that its author writes.
MODULE = '''
"""Imaginary: a model of two kinds of blocks, packed queries, keys and values, and one swapped modulation."""

from weightops.naming.keymap import (
    Architecture, Component, Config, Count, Dim, Network, Spelling, Variant, move, pack, register, swap, tensor, under
)

BLOCK = (
    pack("qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    move("out", "attn.to_out.0"),
    tensor("norm.scale", "attn.norm_q.weight"),
    pack("mlp_in", "gate", "up", heights=("in", "=")),
    swap("mod", "norm1.linear", when=2),
)
ORIGINAL = (
    move("patchify", "x_embedder"),
    *under("wide.{}", "wide_blocks.{}", BLOCK),
    *under("deep.{}.{}", "deep_blocks.{}.layers.{}", BLOCK),
    swap("last.mod", "norm_out.linear"),
)

register(
    Network(
        "imaginary_transformer",
        "transformer",
        (Spelling("original", ORIGINAL, extras=("seed",)),),
        variants=(
            Variant("imaginary_small", {"x_embedder.weight": (8, 4), "wide_blocks.{}.attn.to_q.weight": (8, 8)},
                    {"wide_blocks.{}": 2, "deep_blocks.{}": 1}),
        ),
        blocks=(
            ("in", ("x_embedder",)), ("wide.{}", ("wide_blocks.{}",)), ("deep.{}", ("deep_blocks.{}",)),
            ("out", ("norm_out",)),
        ),
        config=Config("ImaginaryModel", {"dim": Dim("x_embedder.weight", 0), "layers": Count("wide_blocks.{}")}),
    ),
    Architecture(
        "imaginary", "Imaginary",
        (
            Component("transformer", "imaginary_transformer", prefix="model.diffusion_model.", kohya="lora_unet",
                      kohya_spelling="original"),
            Component("vae", "autoencoder_kl", prefix="vae.", variant="sd_vae"),
        ),
    ),
)
'''

# Everything else is the package as it is.
PROGRAM = """
import json, sys
from dataclasses import asdict

import weightops.naming.architectures as folder
folder.__path__.append(sys.argv[1])

import weightops
from weightops.files.checkpoint import open_checkpoint
from weightops.lora.adapters import read_adapters
from weightops.naming.identify import identify
from weightops.naming.slots import place, write

with open_checkpoint("model.safetensors") as model:
    identity = identify(model.tensors)
    part = identity.parts["transformer"]
    placing = place(part.match.table, part.bodies, model.tensors)
    canonical = {name: at.spec for name, at in placing.places.items()}
    written = write(part.match.table, canonical)
    bodies = {body: key for key, body in part.bodies.items()}
    stored = {bodies[key]: spec for key, spec in written.outputs.items()}
    assert stored == {key: info.spec for key, info in model.tensors.items() if key in stored}
    for name, at in placing.places.items():
        back = written.places[name]
        assert bodies[back.slot.key] == at.slot.key
        assert back.slot.pieces(0, back.slot.spec.nbytes) == at.slot.pieces(0, at.slot.spec.nbytes), name
    loras = {}
    for file in sys.argv[2:]:
        with open_checkpoint(file) as opened:
            found = read_adapters(opened)
            targets = {a.name: a.target and a.target.names for a in found.adapters}
            loras[file] = [found.architecture, found.dialect, targets]
    print(json.dumps({
        "identity": [identity.kind, identity.architecture, identity.spelling, identity.variant, identity.strangers],
        "canonical": {name: spec.shape for name, spec in canonical.items()},
        "left": placing.left | written.left,
        "stored": len(stored),
        "loras": loras,
        "inspected": [weightops.inspect(file).to_dict() for file in ["model.safetensors", *sys.argv[2:]]],
    }))
"""

BLOCK = {
    "qkv.weight": (24, 8), "qkv.bias": (24,), "out.weight": (8, 8), "norm.scale": (8,), "mlp_in.weight": (20, 8),
    "mod.weight": (16, 8), "mod.bias": (16,),
}  # fmt: skip
MODEL = {
    "seed": (1,),
    "patchify.weight": (8, 4),
    **{f"wide.{i}.{key}": shape for i in range(2) for key, shape in BLOCK.items()},
    **{f"deep.0.{i}.{key}": shape for i in range(3) for key, shape in BLOCK.items()},
    "last.mod.weight": (16, 8),
}


def save(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)


def lora(prefix: str, modules: dict[str, tuple[int, int]], down: str, up: str) -> dict[str, tuple[int, ...]]:
    factors = {prefix + name + down: (2, shape[1]) for name, shape in modules.items()}
    return factors | {prefix + name + up: (shape[0], 2) for name, shape in modules.items()}


KOHYA = {"wide_0_qkv": (24, 8), "deep_0_2_mlp_in": (20, 8), "last_mod": (16, 8)}
COMFY = {key.replace("_", ".", 3).replace("mlp.in", "mlp_in"): shape for key, shape in KOHYA.items()}
DIFFUSERS = {"wide_blocks.0.attn.to_k": (8, 8), "deep_blocks.0.layers.2.up": (12, 8), "norm_out.linear": (16, 8)}
LORAS = {
    "kohya": lora("lora_unet_", KOHYA, ".lora_down.weight", ".lora_up.weight"),
    "comfy": lora("diffusion_model.", COMFY, ".lora_A.weight", ".lora_B.weight"),
    "diffusers": lora("transformer.", DIFFUSERS, ".lora_A.weight", ".lora_B.weight"),
    "peft": lora("base_model.model.", DIFFUSERS, ".lora_A.weight", ".lora_B.weight"),
}
PACKED = [
    ["wide_blocks.0.attn.to_q", "wide_blocks.0.attn.to_k", "wide_blocks.0.attn.to_v"],
    ["deep_blocks.0.layers.2.gate", "deep_blocks.0.layers.2.up"],
    ["norm_out.linear"],
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made_up")
    (folder / "more").mkdir()
    (folder / "more" / "imaginary.py").write_text(MODULE)
    save(folder / "model.safetensors", {f"model.diffusion_model.{key}": shape for key, shape in MODEL.items()})
    for name, shapes in LORAS.items():
        save(folder / f"{name}.safetensors", shapes)
    (folder / "program.py").write_text(PROGRAM)
    program = f"import sys; sys.path.insert(0, {str(CLI.parent)!r}); exec(open('program.py').read())"
    words = [sys.executable, "-c", program, str(folder / "more"), *(f"{name}.safetensors" for name in LORAS)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_checkpoint_of_it_is_known(found: dict[str, Any]) -> None:
    assert found["identity"] == ["checkpoint", "imaginary", "original", "imaginary_small", []]


def test_its_tensors_are_found_under_canonical_names_and_written_back_where_they_were(found: dict[str, Any]) -> None:
    assert found["left"] == {"model.diffusion_model.seed": "no tensor of imaginary_transformer is called so"}
    assert found["stored"] == len(MODEL) - 1
    canonical = found["canonical"]
    assert len(canonical) == 2 + 5 * 12
    assert canonical["wide_blocks.1.attn.to_v.weight"] == [8, 8]
    assert canonical["deep_blocks.0.layers.2.gate.weight"] == [8, 8]
    assert canonical["deep_blocks.0.layers.2.up.weight"] == [12, 8]
    assert canonical["norm_out.linear.weight"] == [16, 8]


@pytest.mark.parametrize("dialect", LORAS)
def test_a_lora_for_it_is_resolved_in_every_dialect(found: dict[str, Any], dialect: str) -> None:
    architecture, named, targets = found["loras"][f"{dialect}.safetensors"]
    assert (architecture, named) == ("imaginary", dialect)
    expected = PACKED if dialect in ("kohya", "comfy") else [[name] for name in DIFFUSERS]
    assert sorted(targets.values()) == sorted(expected)


def test_inspect_describes_all_of_them(found: dict[str, Any]) -> None:
    checkpoint, *loras = found["inspected"]
    assert (checkpoint["kind"], checkpoint["architecture"], checkpoint["variant"]) == (
        "checkpoint", "imaginary", "imaginary_small",
    )  # fmt: skip
    assert checkpoint["components"].keys() == {"transformer"}
    assert checkpoint["components"]["transformer"]["network"] == "imaginary_small"
    for document in loras:
        assert (document["kind"], document["architecture"]) == ("lora", "imaginary")
        assert document["lora"]["targets"] == {"transformer": 3}
        assert document["lora"]["unresolved"] == []
