"""Every adapter family does to a weight what the library that trained it does: LyCORIS, PEFT, diffusers, kohya.

The adapters are written by those libraries, not by us: their modules' own state dicts, under their own keys, through
the bytes of a safetensors file. A reference is run, not quoted: W' is what its forward acts with, and what its merge
makes.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from weightops.errors import MismatchError
from weightops.lora.dialects import ending_of
from weightops.lora.family import FAMILIES, Family, Parts, Told, can_change, change, change_bias, decompose, grain_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

torch.set_num_threads(1)

OUT, IN = 36, 30
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": functools.partial(nn.Conv1d, kernel_size=3),
    "conv2d": functools.partial(nn.Conv2d, kernel_size=3),
    "conv2d 1x1": functools.partial(nn.Conv2d, kernel_size=1),
    "conv3d": functools.partial(nn.Conv3d, kernel_size=(1, 2, 2)),
}
ANY = tuple(LAYERS)
KERNELS = ("conv1d", "conv2d", "conv3d")

RANKED = (LoConModule, LohaModule, LokrModule, GLoRAModule)

# The dtypes in which files hold adapters. Their values are exact in float32, where the arithmetic is done.
SOURCES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)

# How far we may be from a reference, relative to the largest value of W', by the coarser dtype of the two.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Of one product made in other bands, or undone: relative to the same.
SAME = {torch.float64: 1e-14, torch.float32: 1e-6}


@dataclass
class Made:
    """An adapter as a library wrote it, and what that library's code makes of W: its name -> (weight, bias).

    stored: the tensors of its file, keyed by what follows the module's name there. config: PEFT's, beside the file.
    half: what the library makes of W at half the strength, where it means by that what we do.
    """

    parts: dict[str, Tensor]
    alpha: float | None
    weight: Tensor
    bias: Tensor | None
    references: dict[str, tuple[Tensor, Tensor | None]]
    precision: torch.dtype
    rank: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    config: Any = None
    half: Tensor | None = None

    def given(self, dtype: torch.dtype) -> Parts:
        tensors = {part: tensor.to(dtype) for part, tensor in self.parts.items()}
        return Parts(tensors, self.alpha, tuple(self.weight.shape), Told(**self.settings))


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    make: Callable[..., Made]

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}"

    @property
    def of_bias_alone(self) -> bool:
        return self.name in ("diff_b alone", "b_norm alone", "set_bias")

    def made(self, source: torch.dtype = torch.float32) -> Made:
        return _made(self, source)


@functools.cache
def _made(case: Case, source: torch.dtype) -> Made:
    return case.make(source=source)


def family_of(case: Case) -> Family:
    return FAMILIES.get(case.family)


def seed(text: str) -> None:
    torch.manual_seed(sum(map(ord, text)))


def through_a_file(state: Mapping[str, Tensor], source: torch.dtype) -> dict[str, Tensor]:
    """Saved as the trainers do, all tensors in one dtype, and read again."""
    return safetensors.torch.load(
        safetensors.torch.save({key: tensor.detach().to(source).contiguous() for key, tensor in state.items()})
    )


def named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors under our names for their parts, by the endings of their keys."""
    found = {}
    for key, tensor in state.items():
        ending = ending_of("module." + key)
        part = "ia3" if ending is None and key == "weight" and "on_input" in state else ending and ending.part
        assert part, key
        if "magnitude" in key:  # PEFT's is of outputs, and our reader says so with LyCORIS' shape
            tensor = tensor.reshape(-1, *[1] * (max(tensor.dim(), 2) - 1))
        found[part] = tensor
    return found


def probe(forward: Callable[[Tensor], Tensor], layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias that a forward acts with: what it makes of unit inputs, the size of the kernel."""
    shape, dtype = layer.weight.shape, layer.weight.dtype
    values = math.prod(shape[1:])
    with torch.no_grad():
        nothing = forward(torch.zeros(1, *shape[1:], dtype=dtype))
        found = forward(torch.eye(values, dtype=dtype).reshape(values, *shape[1:])) - nothing
    return found.flatten(1).T.reshape(shape), nothing.flatten()


def storable(layer: nn.Module) -> nn.Module:
    """The layer with weights that are the same in each dtype of checkpoints: multiples of 1/128, few of them."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((parameter * 128).round() / 128)
    return layer


def randomised(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "oft" in name else 0.4))
            if any(word in name for word in ("dora", "magnitude", "rescale")):
                parameter.abs_().add_(0.5)


def lycoris(
    module: type, kind: str, source: torch.dtype, *, out: int = OUT, features: int = IN, **settings: Any
) -> Made:
    """An adapter that LyCORIS writes, and LyCORIS' own module with the values that were written."""
    # Its OFT inverts in float32, whatever it is given.
    precision = torch.float32 if module in (DiagOFTModule, ButterflyOFTModule) else torch.float64
    seed(f"{module.__name__} {kind} {settings}")
    layer = storable(LAYERS[kind](features, out, dtype=precision))
    written = module("module", layer, **settings).to(precision)
    randomised(written.named_parameters())
    # Before it is applied, a FullModule's weight is the difference, which its state dict would take for W'.
    state = {"diff": written.weight, "diff_b": written.bias} if module is FullModule else written.state_dict()
    if module is IA3Module:
        state["on_input"] = written.on_input
    stored = through_a_file(state, source)
    reference = module("module", layer, **settings).to(precision).eval()
    reference.load_state_dict({key: tensor.to(precision) for key, tensor in stored.items()}, strict=False)
    parts = named(stored)
    alpha = parts.pop("alpha", None)
    references = {"forward": probe(reference, layer)}
    if module not in (LohaModule, LokrModule):  # see test_lycoris_merges_loha_and_lokr_at_the_square_of_their_scale
        weight, bias = reference.get_merged_weight(1, layer.weight.shape)
        references["merge"] = weight.detach(), layer.bias if bias is None else bias.detach()
    elif not settings.get("weight_decompose"):
        references["functional"] = (layer.weight + reference.get_weight(layer.weight.shape)).detach(), layer.bias
    half = None
    other = settings.get("weight_decompose") or settings.get("rescaled")  # these it does not weaken
    if module in (LoConModule, GLoRAModule, IA3Module, DiagOFTModule) and not other:
        half = reference.get_merged_weight(0.5, layer.weight.shape)[0].detach()
    return Made(
        parts,
        None if alpha is None else alpha.item(),
        layer.weight.detach(),
        layer.bias.detach(),
        references,
        precision,
        None if module not in RANKED or {"lokr_w1", "lokr_w2"} <= stored.keys() else settings["lora_dim"],
        stored=stored,
        half=half,
    )


def norms(norm: Callable[[int], nn.Module], source: torch.dtype) -> Made:
    """A difference of a norm's weight and bias: no forward to probe, for it is not linear."""
    seed("norm")
    layer = norm(24).double()
    randomised(layer.named_parameters())
    storable(layer)
    written = NormModule("module", layer).double()
    randomised(written.named_parameters())
    stored = through_a_file(written.state_dict(), source)
    reference = NormModule("module", layer).double()
    reference.load_state_dict({key: tensor.double() for key, tensor in stored.items()})
    weight, bias = reference.get_merged_weight(1)
    references = {"merge": (weight.detach(), bias.detach())}
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return Made(named(stored), None, weight, bias, references, torch.float64, stored=stored)


def peft(
    config: Any, kind: str, source: torch.dtype, *, alpha: float | None = None, rank: int | None = None,
    ours: Mapping[str, Any] | None = None, features: int = IN, precision: torch.dtype = torch.float64,
) -> Made:  # fmt: skip
    """An adapter that PEFT writes; alpha, ours: what its adapter_config.json says, and no tensor."""
    seed(f"{config} {kind}")
    layer = storable(LAYERS[kind](features, OUT, dtype=torch.float64))
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = get_peft_model(nn.Sequential(OrderedDict(layer=layer)), config(target_modules=["layer"])).double().eval()
    randomised((name, p) for name, p in model.named_parameters() if "base_layer" not in name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter 'default': 1 LoRA tensor")  # it takes lora_B.bias for a torn weight
        stored = through_a_file(get_peft_model_state_dict(model), source)
    written = model.peft_config["default"]
    set_peft_model_state_dict(model, {key: tensor.double() for key, tensor in stored.items()})
    references = {"forward": probe(model, layer)}
    merged = model.merge_and_unload().layer
    references["merge"] = merged.weight.detach(), merged.bias.detach()
    stored = {key.removeprefix("base_model.model.layer."): tensor for key, tensor in stored.items()}
    parts = named(stored)
    return Made(parts, alpha, weight, bias, references, precision, rank, dict(ours or {}), stored, written)


def older(kind: str, features: int, source: torch.dtype) -> Made:
    """GLoRA as LyCORIS wrote it before 3.0: a1 and b1 for `down`, a2 and b2 for `up`."""
    made = lycoris(GLoRAModule, kind, source, features=features, lora_dim=3, alpha=2.0)
    pairs = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    stored = {pairs.get(key[:2], key[:2]) + key[2:]: tensor for key, tensor in made.stored.items()}
    return replace(made, parts={pairs[part]: tensor for part, tensor in made.parts.items()}, stored=stored)


def alone(make: Callable[..., Made], kept: str, source: torch.dtype) -> Made:
    """The same, with one part only: a change of the weight alone, or of the bias (the distilled Wan's diff_b)."""
    made = make(source=source)
    of_bias = kept in ("diff_b", "b_norm")
    references = {
        name: (made.weight, bias) if of_bias else (weight, made.bias)
        for name, (weight, bias) in made.references.items()
    }
    return replace(made, parts={kept: made.parts[kept]}, references=references, stored={kept: made.stored[kept]})


def set_by_comfy(parts: tuple[str, ...], source: torch.dtype) -> Made:
    """ComfyUI's `set`: the tensors are the weight and the bias."""
    seed("set")
    layer = storable(nn.Linear(IN, OUT)).double()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    given = {"set_weight": torch.randn(OUT, IN).to(source), "set_bias": torch.randn(OUT).to(source)}
    given = {part: given[part] for part in parts}
    changed = given.get("set_weight", weight).double(), given.get("set_bias", bias).double()
    return Made(given, None, weight, bias, {"definition": changed}, torch.float64, stored=given)


def kohya_oft(
    kind: str, source: torch.dtype, *, alpha: float, heights: tuple[int, ...] = (), out: int = OUT, features: int = IN
) -> Made:
    """sd-scripts, networks/oft.py: ‖Q‖ ≤ alpha·out, W' = Rᵀ W, and at a strength λ with λ(R − I) + I.

    Restated, for it is no package. heights: networks/oft_flux.py, each of these bands of a packed weight by itself.
    """
    keys = [f"oft_blocks.{n}" for n in range(len(heights))] or ["oft_blocks"]
    heights = heights or (out,)
    seed(f"kohya {heights} {alpha} {kind}")
    layer = storable(LAYERS[kind](features, sum(heights), dtype=torch.float64))
    count = 3 if heights[0] % 3 == 0 else 4
    blocks = [0.1 * torch.randn(count, height // count, height // count) for height in heights]
    stored = through_a_file(dict(zip(keys, blocks, strict=True)) | {"alpha": torch.tensor(alpha)}, source)
    weight = layer.weight.detach()
    alpha = stored["alpha"].item()
    bands: dict[float, list[Tensor]] = {1.0: [], 0.5: []}
    for key, band in zip(keys, weight.split(heights), strict=True):
        skew = torch.block_diag(*(stored[key].double() - stored[key].double().mT))
        skew = skew * min(1.0, alpha * len(band) / skew.norm().item())
        unit = torch.eye(len(band)).double()
        turn = (unit + skew) @ torch.linalg.inv(unit - skew)
        for strength, found in bands.items():
            found.append(torch.einsum("oi...,op->pi...", band, strength * (turn - unit) + unit))
    parts = {part: tensor for part, tensor in named(stored).items() if part != "alpha"}
    references: dict[str, tuple[Tensor, Tensor | None]] = {"restated": (torch.cat(bands[1.0]), layer.bias.detach())}
    return Made(
        parts, alpha, weight, layer.bias.detach(), references, torch.float64, stored=stored, half=torch.cat(bands[0.5])
    )


def cases() -> Iterator[Case]:
    def each(
        family: str, name: str, make: Callable[..., Made], kinds: tuple[str, ...] = ANY, **rest: Any
    ) -> Iterator[Case]:
        for kind in kinds:
            yield Case(family, f"{name}, {kind}", functools.partial(make, kind=kind, **rest))

    def lyc(family: str, name: str, module: type, kinds: tuple[str, ...] = ANY, **settings: Any) -> Iterator[Case]:
        return each(family, name, functools.partial(lycoris, module), kinds, **settings)

    def hugging(family: str, name: str, config: Any, kinds: tuple[str, ...] = ANY, **rest: Any) -> Iterator[Case]:
        return each(family, f"PEFT {name}", functools.partial(peft, config), kinds, **rest)

    two = ("linear", "conv2d")
    # LyCORIS: https://github.com/KohakuBlueleaf/LyCORIS
    low = {"lora_dim": 3, "alpha": 2.0}
    outputs = {"weight_decompose": True}
    inputs = {"weight_decompose": True, "wd_on_out": False}
    yield from lyc("lora", "LoCon", LoConModule, **low)
    yield from lyc("lora", "LoCon, alpha = rank", LoConModule, ("linear",), lora_dim=3, alpha=None)
    yield from lyc("lora", "LoCon, core", LoConModule, KERNELS, **low, use_tucker=True)
    yield from lyc("lora", "LoCon, rsLoRA", LoConModule, two, lora_dim=4, alpha=2.0, rs_lora=True)
    yield from lyc("lora", "DoRA of outputs", LoConModule, **low, **outputs)
    yield from lyc("lora", "DoRA of inputs", LoConModule, **low, **inputs)
    yield from lyc("lora", "DoRA of inputs, square", LoConModule, two, **low, **inputs, features=OUT)
    yield from lyc("lora", "DoRA, core", LoConModule, ("conv2d",), **low, **outputs, use_tucker=True)
    yield from lyc("loha", "LoHa", LohaModule, **low)
    yield from lyc("loha", "LoHa, cores", LohaModule, KERNELS, **low, use_tucker=True)
    yield from lyc("loha", "DoHa of outputs", LohaModule, two, **low, **outputs)
    yield from lyc("loha", "DoHa of inputs", LohaModule, two, **low, **inputs)
    yield from lyc("loha", "DoHa, cores", LohaModule, ("conv2d",), **low, **outputs, use_tucker=True)
    yield from lyc("loha", "rsLoRA", LohaModule, two, lora_dim=4, alpha=2.0, rs_lora=True)
    half = {"lora_dim": 2, "alpha": 1.0}
    tall = {"features": 4, "factor": 2, "decompose_both": True, "unbalanced_factorization": True}
    yield from lyc("lokr", "w1, w2", LokrModule, **half, full_matrix=True)
    yield from lyc("lokr", "w1, w2_a w2_b", LokrModule, **half)
    yield from lyc("lokr", "w1, w2_a w2_b, factor 2", LokrModule, two, **half, factor=2)
    yield from lyc("lokr", "w1, core", LokrModule, KERNELS, **half, use_tucker=True)
    yield from lyc("lokr", "w1_a w1_b, w2", LokrModule, **half, **tall)
    yield from lyc("lokr", "w1_a w1_b, w2_a w2_b", LokrModule, **half, decompose_both=True)
    yield from lyc("lokr", "w1_a w1_b, core", LokrModule, KERNELS, **half, decompose_both=True, use_tucker=True)
    yield from lyc("lokr", "rsLoRA", LokrModule, ("linear",), lora_dim=2, alpha=math.sqrt(2), rs_lora=True)
    yield from lyc("lokr", "w1, w2, by its size", LokrModule, two, lora_dim=64, alpha=1.0)
    yield from lyc("lokr", "DoKr of outputs", LokrModule, two, **half, **outputs)
    yield from lyc("lokr", "DoKr of inputs", LokrModule, two, **half, **inputs)
    yield from lyc("lokr", "DoKr, core", LokrModule, ("conv2d",), **half, **outputs, use_tucker=True)
    yield from lyc("glora", "GLoRA", GLoRAModule, **low)
    yield from lyc("glora", "GLoRA, square", GLoRAModule, two, **low, features=OUT)
    yield from each("glora", "older GLoRA", older, two, features=IN)
    yield from each("glora", "older GLoRA, square", older, two, features=OUT)
    yield from lyc("ia3", "IA3 of outputs", IA3Module)
    yield from lyc("ia3", "IA3 of inputs", IA3Module, train_on_input=True)
    yield from lyc("ia3", "IA3 of inputs, square", IA3Module, two, train_on_input=True, features=OUT)
    yield from lyc("oft", "Diag-OFT", DiagOFTModule, lora_dim=4)
    yield from lyc("oft", "Diag-OFT, constraint", DiagOFTModule, two, lora_dim=4, constraint=2**-7)
    yield from lyc("oft", "Diag-OFT, loose constraint", DiagOFTModule, two, lora_dim=4, constraint=4.0)
    yield from lyc("oft", "Diag-OFT, rescale", DiagOFTModule, lora_dim=4, constraint=2**-7, rescaled=True)
    yield from lyc("oft", "Diag-OFT, rescale alone", DiagOFTModule, two, lora_dim=4, rescaled=True)
    yield from lyc("oft", "BOFT", ButterflyOFTModule, out=32, lora_dim=4)
    yield from lyc("oft", "BOFT, constraint", ButterflyOFTModule, two, out=32, lora_dim=4, constraint=2**-6)
    yield from lyc("oft", "BOFT, rescale", ButterflyOFTModule, out=32, lora_dim=8, constraint=2**-8, rescaled=True)
    # kohya: https://github.com/kohya-ss/sd-scripts
    yield from each("oft", "kohya's OFT", kohya_oft, two, alpha=1.0)
    yield from each("oft", "kohya's OFT, constraint", kohya_oft, two, alpha=2**-6)
    yield from each("oft_bands", "kohya's OFT for Flux", kohya_oft, ("linear",), alpha=2**-6, heights=(OUT,))
    yield from each("oft_bands", "kohya's OFT of 3", kohya_oft, ("linear",), alpha=2**-6, heights=(6, 6, 6))
    yield from each("oft_bands", "kohya's OFT of 4", kohya_oft, ("linear",), alpha=2**-6, heights=(6, 6, 6, 24))
    yield from lyc("full", "diff, diff_b", FullModule)
    layer_norm = functools.partial(norms, nn.LayerNorm)
    yield Case("norm", "LayerNorm", layer_norm)
    yield Case("norm", "GroupNorm", functools.partial(norms, functools.partial(nn.GroupNorm, 4)))
    full = functools.partial(lycoris, FullModule, "conv2d")
    yield Case("full", "diff alone", functools.partial(alone, full, "diff"))
    yield Case("full", "diff_b alone", functools.partial(alone, full, "diff_b"))
    yield Case("norm", "w_norm alone", functools.partial(alone, layer_norm, "w_norm"))
    yield Case("norm", "b_norm alone", functools.partial(alone, layer_norm, "b_norm"))

    # PEFT: https://github.com/huggingface/peft
    lora = functools.partial(LoraConfig, r=4, lora_alpha=2)
    yield from hugging("lora", "LoRA", lora, alpha=2.0, rank=4)
    yield from hugging("lora", "DoRA", functools.partial(lora, use_dora=True), alpha=2.0, rank=4)
    yield from hugging(
        "lora", "DoRA, square", functools.partial(lora, use_dora=True), two, alpha=2.0, rank=4, features=OUT
    )
    yield from hugging("lora", "LoRA with bias", functools.partial(lora, lora_bias=True), two, alpha=2.0, rank=4)
    # alpha/√r is (alpha·√r)/r: our reader of adapter_config.json hands in alpha·√r.
    yield from hugging("lora", "rsLoRA", functools.partial(lora, use_rslora=True), two, alpha=4.0, rank=4)
    flat = ("linear", "conv1d", "conv2d", "conv2d 1x1")
    loha, lokr = (functools.partial(c, r=2, alpha=3, init_weights=False) for c in (LoHaConfig, LoKrConfig))
    both, whole = functools.partial(lokr, decompose_both=True), functools.partial(lokr, r=8)
    yield from hugging("loha", "LoHa", loha, flat, alpha=3.0, rank=2)
    yield from hugging("lokr", "LoKr", lokr, flat, alpha=3.0, rank=2)
    yield from hugging("lokr", "LoKr of both", both, flat, alpha=3.0, rank=2)
    # Not its whole factors for conv1d, whose ⊗ takes the kernel's axis for the inputs' (PEFT 0.21.2, lokr/layer.py).
    yield from hugging(
        "lokr", "LoKr, whole", whole, ("linear", "conv2d", "conv2d 1x1"), alpha=3.0, ours={"full_rank": 8}
    )
    core = {"kinds": ("conv1d", "conv2d"), "alpha": 3.0, "rank": 2}
    yield from hugging("loha", "LoHa, cores", functools.partial(loha, use_effective_conv2d=True), **core)
    yield from hugging("lokr", "LoKr, core", functools.partial(lokr, use_effective_conv2d=True), **core)
    oft = functools.partial(OFTConfig, oft_block_size=5, init_weights=False)
    flat = ("linear", "conv2d", "conv2d 1x1")
    exact = functools.partial(oft, use_cayley_neumann=False)
    yield from hugging("oftv2", "OFT", oft, flat)
    yield from hugging("oftv2", "OFT, exact", exact, flat, ours={"neumann": None})
    yield from hugging("oftv2", "OFT, shared block", functools.partial(oft, block_share=True), flat)
    # Its constraint divides by a root in float32.
    for kind, eps in (("linear", 0.5), ("conv2d", 2.0)):
        coft = functools.partial(oft, coft=True, eps=eps)
        yield from hugging("oftv2", "OFT, coft", coft, (kind,), ours={"coft": eps}, precision=torch.float32)
    for terms in (1, 2, 3, 4, 6):
        series = functools.partial(oft, num_cayley_neumann_terms=terms)
        yield from hugging("oftv2", f"OFT, {terms} terms", series, ("linear",), ours={"neumann": terms})

    for parts in (("set_weight",), ("set_bias",), ("set_weight", "set_bias")):
        yield Case("set", ", ".join(parts), functools.partial(set_by_comfy, parts))


CASES = list(cases())

# What was promised, form by form, and the cases that keep the promise: made by LyCORIS and PEFT, for matrices and for
# kernels. (fuse_lora of diffusers, kohya's merge and what is for no library to make stand in tests of their own.)
PROMISED: dict[str, tuple[str, ...]] = {
    "LoRA, linear": ("lora: LoCon, linear", "lora: PEFT LoRA, linear"),
    "LoRA, conv": (
        "lora: LoCon, conv1d", "lora: LoCon, conv2d", "lora: LoCon, conv2d 1x1", "lora: LoCon, conv3d",
        "lora: PEFT LoRA, conv1d", "lora: PEFT LoRA, conv2d", "lora: PEFT LoRA, conv2d 1x1", "lora: PEFT LoRA, conv3d",
    ),
    "LoRA, Tucker/CP mid": ("lora: LoCon, core, conv1d", "lora: LoCon, core, conv2d", "lora: LoCon, core, conv3d"),
    "LoRA, lora bias": ("lora: PEFT LoRA with bias, linear", "lora: PEFT LoRA with bias, conv2d"),
    "LoRA, rsLoRA": (
        "lora: LoCon, rsLoRA, linear", "lora: LoCon, rsLoRA, conv2d",
        "lora: PEFT rsLoRA, linear", "lora: PEFT rsLoRA, conv2d",
    ),
    "LoHa": (
        "loha: LoHa, linear", "loha: LoHa, conv1d", "loha: LoHa, conv2d", "loha: LoHa, conv3d",
        "loha: PEFT LoHa, linear", "loha: PEFT LoHa, conv2d",
    ),
    "LoHa, with Tucker": ("loha: LoHa, cores, conv2d", "loha: PEFT LoHa, cores, conv2d"),
    "LoKr, w1 and w2": (
        "lokr: w1, w2, linear", "lokr: w1, w2, conv2d", "lokr: w1, w2, by its size, linear",
        "lokr: w1, w2, by its size, conv2d",
    ),
    "LoKr, w1 and w2_a w2_b": (
        "lokr: w1, w2_a w2_b, linear", "lokr: w1, w2_a w2_b, conv2d",
        "lokr: PEFT LoKr, linear", "lokr: PEFT LoKr, conv2d",
    ),
    "LoKr, w1_a w1_b and w2": ("lokr: w1_a w1_b, w2, linear", "lokr: w1_a w1_b, w2, conv2d"),
    "LoKr, w1_a w1_b and w2_a w2_b": (
        "lokr: w1_a w1_b, w2_a w2_b, linear", "lokr: w1_a w1_b, w2_a w2_b, conv2d",
        "lokr: PEFT LoKr of both, linear", "lokr: PEFT LoKr of both, conv2d",
    ),
    "LoKr, with Tucker": (
        "lokr: w1, core, conv2d", "lokr: w1_a w1_b, core, conv2d", "lokr: PEFT LoKr, core, conv2d",
    ),
    "LoKr, the trainers that mean otherwise": ("lokr: PEFT LoKr, whole, linear", "lokr: PEFT LoKr, whole, conv2d"),
    "DoRA, per output": (
        "lora: DoRA of outputs, linear", "lora: DoRA of outputs, conv2d", "lora: PEFT DoRA, linear",
        "lora: PEFT DoRA, conv2d", "lora: PEFT DoRA, square, linear", "lora: PEFT DoRA, square, conv2d",
        "lora: DoRA, core, conv2d", "loha: DoHa of outputs, linear", "loha: DoHa of outputs, conv2d",
        "lokr: DoKr of outputs, linear", "lokr: DoKr of outputs, conv2d",
    ),
    "DoRA, per input": (
        "lora: DoRA of inputs, linear", "lora: DoRA of inputs, conv2d", "lora: DoRA of inputs, square, linear",
        "lora: DoRA of inputs, square, conv2d", "loha: DoHa of inputs, linear", "loha: DoHa of inputs, conv2d",
        "lokr: DoKr of inputs, linear", "lokr: DoKr of inputs, conv2d",
    ),
    "IA3": (
        "ia3: IA3 of outputs, linear", "ia3: IA3 of outputs, conv2d", "ia3: IA3 of inputs, linear",
        "ia3: IA3 of inputs, conv2d", "ia3: IA3 of inputs, square, linear", "ia3: IA3 of inputs, square, conv2d",
    ),
    "GLoRA, both dialects": (
        "glora: GLoRA, linear", "glora: GLoRA, conv2d", "glora: GLoRA, square, linear", "glora: GLoRA, square, conv2d",
        "glora: older GLoRA, linear", "glora: older GLoRA, conv2d",
        "glora: older GLoRA, square, linear", "glora: older GLoRA, square, conv2d",
    ),
    "Diag-OFT": ("oft: Diag-OFT, linear", "oft: Diag-OFT, conv2d"),
    "Diag-OFT, constraint": (
        "oft: Diag-OFT, constraint, linear", "oft: Diag-OFT, constraint, conv2d",
        "oft: Diag-OFT, loose constraint, linear", "oft: Diag-OFT, loose constraint, conv2d",
    ),
    "Diag-OFT, rescale": (
        "oft: Diag-OFT, rescale, linear", "oft: Diag-OFT, rescale, conv2d",
        "oft: Diag-OFT, rescale alone, linear", "oft: Diag-OFT, rescale alone, conv2d",
    ),
    "BOFT": ("oft: BOFT, linear", "oft: BOFT, conv2d"),
    "BOFT, constraint": ("oft: BOFT, constraint, linear", "oft: BOFT, constraint, conv2d"),
    "BOFT, rescale": ("oft: BOFT, rescale, linear", "oft: BOFT, rescale, conv2d"),
    "kohya's OFT": (
        "oft: kohya's OFT, linear", "oft: kohya's OFT, conv2d", "oft_bands: kohya's OFT for Flux, linear",
        "oft_bands: kohya's OFT of 3, linear", "oft_bands: kohya's OFT of 4, linear",
    ),
    "kohya's OFT, constraint": ("oft: kohya's OFT, constraint, linear", "oft: kohya's OFT, constraint, conv2d"),
    "PEFT's OFTv2": (
        "oftv2: PEFT OFT, linear", "oftv2: PEFT OFT, conv2d", "oftv2: PEFT OFT, exact, linear",
        "oftv2: PEFT OFT, exact, conv2d", "oftv2: PEFT OFT, shared block, linear", "oftv2: PEFT OFT, coft, linear",
        "oftv2: PEFT OFT, coft, conv2d", "oftv2: PEFT OFT, 6 terms, linear",
    ),
    "full diff/diff_b": (
        "full: diff, diff_b, linear", "full: diff, diff_b, conv2d", "full: diff alone", "full: diff_b alone",
    ),
    "norms w_norm/b_norm": ("norm: LayerNorm", "norm: GroupNorm", "norm: w_norm alone", "norm: b_norm alone"),
    "set_weight": ("set: set_weight", "set: set_bias", "set: set_weight, set_bias"),
}  # fmt: skip
# Of these there is no weight to compare: what is promised stands in tests/ops/test_fuse_families.py.
PROMISED_OF_FILES = {
    "LoKr, a named option for the trainers that mean otherwise":
        "test_alpha_is_divided_by_the_rank_that_is_named_where_both_factors_of_a_lokr_are_whole",
    "reshape_weight (BFL control)": "test_a_control_lora_widens_the_input_sets_the_norms_and_moves_the_biases",
    "bundled textual-inversion embeddings": "test_bundled_embeddings_are_named_and_no_weight_is_changed_by_them",
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_weight = pytest.mark.parametrize("case", [c for c in CASES if not c.of_bias_alone], ids=lambda case: case.id)


def close(found: Tensor, wanted: Tensor, tolerance: float, size: Tensor | None = None) -> None:
    assert found.shape == wanted.shape
    size = wanted if size is None else size
    worst = (found.double() - wanted.double()).abs().max().item() / size.abs().max().item()
    assert worst <= tolerance, worst


# ------------------------------------------------------------------------------------------------ references


def test_every_family_and_form_is_compared_with_a_reference() -> None:
    """A new family, or a new form of an old one, needs a case above."""
    assert {(name, form) for name, family in FAMILIES for form in family.forms} == {
        (case.family, family_of(case).form(case.made().parts)) for case in CASES
    }


def test_every_form_that_was_promised_has_its_cases() -> None:
    """Those of the table, word for word: a case that goes, or is given another name, is missed."""
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
    lost = {form: missing for form, promised in PROMISED.items() if (missing := sorted(set(promised) - set(ids)))}
    assert lost == {}
    files = (Path(__file__).parents[1] / "ops" / "test_fuse_families.py").read_text(encoding="utf-8")
    assert [name for name in PROMISED_OF_FILES.values() if f"def {name}(" not in files] == []


@every_source
@every_case
def test_a_family_does_to_a_weight_what_its_library_does(case: Case, source: torch.dtype) -> None:
    made, family = case.made(source), family_of(case)
    for dtype, tolerance in TOLERANCE.items():
        parts = made.given(dtype)
        weight = change(family, parts, made.weight.to(dtype), 1.0)
        bias = change_bias(family, parts, None if made.bias is None else made.bias.to(dtype), 1.0)
        assert weight.dtype == dtype
        for name, (wanted, wanted_bias) in made.references.items():
            allowed = max(tolerance, TOLERANCE[made.precision])
            close(weight, wanted, allowed)
            if wanted_bias is not None:
                assert bias is not None, name
                close(bias, wanted_bias, allowed)


@every_weight
def test_half_a_strength_is_the_librarys_where_it_means_the_same(case: Case) -> None:
    """Not of BOFT, DoRA and rescale: see `change`, and the tests of magnitudes below."""
    made, family = case.made(), family_of(case)
    if made.half is not None:
        found = change(family, made.given(torch.float64), made.weight.double(), 0.5)
        close(found, made.half, TOLERANCE[made.precision])


@every_case
def test_the_references_change_something(case: Case) -> None:
    """Or their agreement would say nothing."""
    made = case.made()
    for weight, bias in made.references.values():
        moved = (weight - made.weight).abs().max() > 0.01 or (
            bias is not None and (bias - made.bias).abs().max() > 0.01
        )
        assert moved or "1 terms" in case.name


# ------------------------------------------------------------------------------------------------ contracts


@every_case
def test_rank_and_shape_follow_from_the_shapes_alone(case: Case) -> None:
    made, family = case.made(), family_of(case)
    shapes = {part: tuple(tensor.shape) for part, tensor in made.parts.items()}
    shape = tuple(made.weight.shape)
    assert family.rank(shapes) == made.rank
    found = family.shape(shapes)
    if found is not None:  # PEFT's cores for conv1d have a second, idle axis
        assert found == shape or (family.flat and (found[0], math.prod(found)) == (shape[0], math.prod(shape)))
    assert can_change(family, shapes, shape)
    assert not can_change(family, shapes, tuple(n + 1 for n in shape))


@every_weight
def test_bands_of_rows_are_the_rows_of_the_whole(case: Case) -> None:
    made, family = case.made(), family_of(case)
    shape = tuple(made.weight.shape)
    for dtype, tolerance in SAME.items():
        parts, weight = made.given(dtype), made.weight.to(dtype)
        whole = change(family, parts, weight, 0.7)
        if grain_of(family, parts.shapes, shape) == "tensor":
            assert case.family in ("oft", "oft_bands") or parts["dora_scale"].shape[:2] == (1, shape[1])
            continue
        for height in (1, 5, 7, shape[0]):
            bands = [slice(start, start + height) for start in range(0, shape[0], height)]
            found = torch.cat([change(family, parts, weight[rows], 0.7, rows) for rows in bands])
            close(found, whole, tolerance)
        assert change(family, parts, weight[3:3], 0.7, slice(3, 3)).shape == (0, *shape[1:])


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.id == "lokr: w1, w2, conv2d" or c.family in ("full", "ia3", "norm", "set")],
    ids=lambda case: case.id,
)
def test_what_is_made_value_by_value_does_not_depend_on_the_bands_to_the_bit(case: Case) -> None:
    made, family = case.made(), family_of(case)
    parts, weight = made.given(torch.float32), made.weight.float()
    for strength in (1.0, 0.3):
        whole = change(family, parts, weight, strength)
        for height in (1, 5, 7):
            bands = [slice(start, start + height) for start in range(0, len(weight), height)]
            assert torch.equal(torch.cat([change(family, parts, weight[b], strength, b) for b in bands]), whole)


@every_weight
def test_a_delta_of_rows_has_only_these_rows(case: Case) -> None:
    made, family = case.made(), family_of(case)
    if family.delta is None:
        return
    parts = made.given(torch.float64)
    whole = family.delta(parts, slice(None))
    assert whole.shape == made.weight.shape
    for rows in (slice(4, 11), slice(0, 1), slice(20, None), slice(2, 2)):
        assert family.delta(parts, rows).shape == whole[rows].shape
        assert torch.allclose(family.delta(parts, rows), whole[rows], rtol=0, atol=1e-13)


@every_weight
def test_the_factors_multiply_to_the_delta(case: Case) -> None:
    """Up and down are exact, whatever the family, and have no more columns than the change has rank."""
    made, family = case.made(), family_of(case)
    if family.lowrank is None:
        assert family.delta is None or case.family in ("full", "norm")
        return
    assert family.delta is not None
    parts = made.given(torch.float64)
    up, down = family.lowrank(parts)
    delta = family.delta(parts, slice(None)).flatten(1)
    assert up.shape[1] == down.shape[0]
    close(up @ down, delta, 1e-13)
    assert torch.linalg.matrix_rank(delta) == min(up.shape[1], *delta.shape)
    if case.family in ("lora", "loha"):
        assert up.shape[1] == (made.rank or 0) ** {"lora": 1, "loha": 2}[case.family]


@every_weight
def test_strength_is_the_way_from_w_to_w_changed(case: Case) -> None:
    made, family = case.made(), family_of(case)
    parts, weight = made.given(torch.float64), made.weight.double()
    assert torch.equal(change(family, parts, weight, 0.0), weight)
    whole = change(family, parts, weight, 1.0)
    for strength in (0.25, 0.5, 0.8, -1.0, 2.5):
        close(change(family, parts, weight, strength), weight + strength * (whole - weight), 1e-13)


@every_weight
def test_what_is_added_can_be_taken_away(case: Case) -> None:
    made, family = case.made(), family_of(case)
    if family.delta is None or "dora_scale" in made.parts:
        return
    parts, weight = made.given(torch.float32), made.weight.float()
    for strength in (1.0, 0.7):
        there = change(family, parts, weight, strength)
        close(change(family, parts, there, -strength), weight, 1e-6, there)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")
@every_weight
def test_a_gpu_comes_to_the_same(case: Case) -> None:
    made, family = case.made(), family_of(case)
    for dtype, tolerance in TOLERANCE.items():
        parts, weight = made.given(dtype), made.weight.to(dtype)
        there = replace(parts, tensors={part: tensor.cuda() for part, tensor in parts.tensors.items()})
        found = change(family, there, weight.cuda(), 0.7)
        assert found.is_cuda
        close(found.cpu(), change(family, parts, weight, 0.7), tolerance)


@every_case
def test_no_tensor_that_is_handed_in_is_changed(case: Case) -> None:
    made, family = case.made(), family_of(case)
    parts, weight = made.given(torch.float32), made.weight.float()
    bias = None if made.bias is None else made.bias.float()
    before = [t.clone() for t in (weight, *parts.tensors.values())]
    change(family, parts, weight, 0.5)
    change_bias(family, parts, bias, 0.5)
    if family.lowrank is not None and family.changes_weight(parts.tensors):
        family.lowrank(parts)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, *parts.tensors.values()), strict=True))


@pytest.mark.parametrize("name", [name for name, _ in FAMILIES])
def test_a_family_says_what_it_does(name: str) -> None:
    family = FAMILIES.get(name)
    assert (family.delta is None) != (family.apply is None)
    assert (family.bias is None) == (not family.of_bias)
    assert set(family.of_bias) <= family.parts
    assert family.lowrank is None or family.delta is not None
    assert family.grain == "rows" or family.delta is None


# ------------------------------------------------------------------------------------------------ biases


@every_case
def test_a_bias_moves_by_the_strength(case: Case) -> None:
    made, family = case.made(), family_of(case)
    assert made.bias is not None
    parts, bias = made.given(torch.float64), made.bias.double()
    whole = change_bias(family, parts, bias, 1.0)
    found = change_bias(family, parts, bias, 0.25)
    assert whole is not None
    assert found is not None
    close(found, bias + 0.25 * (whole - bias), 1e-13)
    assert torch.equal(whole, bias) != family.changes_bias(parts.tensors)


def test_a_module_without_a_bias_gets_the_change_for_one() -> None:
    family = FAMILIES.get("full")
    parts = Parts({"diff_b": torch.tensor([2.0, 4.0])}, None, (2, 3))
    found = change_bias(family, parts, None, 0.5)
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    assert change_bias(FAMILIES.get("ia3"), parts, None, 0.5) is None
    with pytest.raises(MismatchError, match=r"^the adapter changes a bias of \[2\], and this one is \[3\]$"):
        change_bias(family, parts, torch.zeros(3), 1.0)


# ------------------------------------------------------------------------------------------------ magnitudes


def dora(shape: tuple[int, ...], magnitude: tuple[int, ...]) -> tuple[Parts, Tensor]:
    seed(f"{shape} {magnitude}")
    up, down = torch.randn(shape[0], 2), torch.randn(2, *shape[1:])
    tensors = {"up": up, "down": down, "dora_scale": torch.rand(magnitude) + 0.5}
    return Parts({part: t.double() for part, t in tensors.items()}, 1.0, shape), torch.randn(shape).double()


@pytest.mark.parametrize("magnitude", [(8,), (8, 1, 1, 1), (1, 8, 1, 1)], ids=str)
def test_a_magnitude_of_outputs_may_be_shaped_as_lycoris_or_as_peft_has_it(magnitude: tuple[int, ...]) -> None:
    family = FAMILIES.get("lora")
    parts, weight = dora((8, 6, 3, 3), magnitude)
    found = change(family, parts, weight, 1.0).flatten(1).norm(dim=1)
    close(found, parts["dora_scale"].flatten(), 1e-14)
    assert can_change(family, parts.shapes, parts.shape)
    assert grain_of(family, parts.shapes, parts.shape) == "rows"


@pytest.mark.parametrize(("shape", "magnitude"), [((8, 6), (1, 6)), ((8, 6, 3, 3), (1, 6, 1, 1)), ((8, 8), (1, 8))])
def test_a_magnitude_of_inputs_is_the_length_of_columns(shape: tuple[int, ...], magnitude: tuple[int, ...]) -> None:
    family = FAMILIES.get("lora")
    parts, weight = dora(shape, magnitude)
    found = change(family, parts, weight, 1.0).transpose(0, 1).flatten(1).norm(dim=1)
    close(found, parts["dora_scale"].flatten(), 1e-14)
    assert grain_of(family, parts.shapes, parts.shape) == "tensor"
    with pytest.raises(MismatchError, match="a magnitude for each input needs all 8 rows, found 3"):
        change(family, parts, weight[:3], 1.0, slice(0, 3))


def test_a_magnitude_that_fits_no_axis_is_refused() -> None:
    family = FAMILIES.get("lora")
    for magnitude in ((6,), (7, 1), (1, 7), (2, 4), ()):
        parts, weight = dora((8, 6), magnitude)
        assert not can_change(family, parts.shapes, parts.shape)
        with pytest.raises(MismatchError, match="fits no axis of"):
            change(family, parts, weight, 1.0)


def test_a_direction_of_zeros_stays_zero() -> None:
    """PEFT's division makes NaN of it, LyCORIS adds an epsilon to every norm."""
    found = decompose(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([2.0, 10.0]), (2, 2), slice(None))
    assert found.tolist() == [[0.0, 0.0], [6.0, 8.0]]


def test_the_norm_is_of_the_changed_weight_unlike_comfyuis() -> None:
    """ComfyUI divides a magnitude of outputs by ‖W‖ of the base; we follow the paper, LyCORIS and PEFT: ‖W + ΔW‖."""
    parts, weight = dora((8, 6), (8, 1))
    family = FAMILIES.get("lora")
    assert family.delta is not None
    changed = weight + family.delta(parts, slice(None))
    comfy = changed * parts["dora_scale"] / weight.norm(dim=1, keepdim=True)
    found = change(family, parts, weight, 1.0)
    assert (found - comfy).abs().max() > 0.1
    close(found, changed * parts["dora_scale"] / changed.norm(dim=1, keepdim=True), 1e-14)


def test_a_weaker_dora_lies_between_unlike_lycoris() -> None:
    """LyCORIS' multiplier scales V = W + ΔW by λ(m/‖V‖ − 1) + 1, so that a strength of 0 leaves ΔW in."""
    seed("multiplier")
    layer = nn.Linear(6, 8, dtype=torch.float64)
    module = LoConModule("module", layer, lora_dim=2, alpha=1.0, weight_decompose=True).double()
    randomised(module.named_parameters())
    state = {key: t.detach() for key, t in module.state_dict().items()}
    parts = Parts({part: t for part, t in named(state).items() if part != "alpha"}, 1.0, (8, 6))
    family, weight = FAMILIES.get("lora"), layer.weight.detach()
    close(change(family, parts, weight, 1.0), module.get_merged_weight(1.0)[0], 1e-12)
    weak = module.get_merged_weight(0.0)[0].detach()
    assert (weak - weight).abs().max() > 0.1
    assert torch.equal(change(family, parts, weight, 0.0), weight)


def test_a_magnitude_beside_a_rotation_is_refused() -> None:
    made = next(c for c in CASES if c.family == "oft").made()
    parts = made.given(torch.float32)
    parts = replace(parts, tensors={**parts.tensors, "dora_scale": torch.ones(OUT, 1)})
    with pytest.raises(MismatchError, match=r"^a magnitude \(dora_scale\) beside oft has no meaning"):
        change(FAMILIES.get("oft"), parts, made.weight.float(), 1.0)


# ------------------------------------------------------------------------------------------------ strengths of modules


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4.0, 1.0), (1.0, 0.25), (-2.0, -0.5), (0.0, 0.0)])
def test_scale_is_alpha_over_the_rank_of_the_shapes(alpha: float | None, scale: float) -> None:
    parts = Parts({"up": torch.ones(3, 4), "down": torch.ones(4, 2)}, alpha, (3, 2))
    family = FAMILIES.get("lora")
    assert family.scale(parts) == scale
    assert change(family, parts, torch.zeros(3, 2), 1.0).tolist() == [[4 * scale] * 2] * 3


def test_a_lokr_of_two_whole_factors_has_scale_1_unless_the_trainers_rank_is_named() -> None:
    """LyCORIS, ComfyUI and diffusers: 1, whatever alpha says. PEFT: alpha / r, and r stands in no tensor."""
    parts = Parts({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, 3.0, (4, 4))
    family = FAMILIES.get("lokr")
    assert family.scale(parts) == 1.0
    assert family.scale(replace(parts, told=Told(full_rank=8))) == 3 / 8
    one = Parts(
        {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 1), "lokr_w2_b": torch.ones(1, 2)}, 3.0, (4, 4)
    )
    assert family.scale(replace(one, told=Told(full_rank=8))) == 3.0


def test_lycoris_merges_loha_and_lokr_at_the_square_of_their_scale() -> None:
    """So their merge is no reference (4.1.3): its get_diff_weight multiplies a weight that its get_weight has scaled.

    We follow its forward, which scales once, and with it ComfyUI, diffusers and PEFT.
    """
    for module, family in ((LohaModule, "loha"), (LokrModule, "lokr")):
        seed("square")
        layer = nn.Linear(IN, OUT, dtype=torch.float64)
        written = module("module", layer, lora_dim=2, alpha=1.0).double()
        randomised(written.named_parameters())
        state = {key: t.detach() for key, t in written.state_dict().items()}
        parts = Parts({part: t for part, t in named(state).items() if part != "alpha"}, 1.0, (OUT, IN))
        delta = FAMILIES.get(family).delta
        assert delta is not None
        close(delta(parts, slice(None)), written.get_weight((OUT, IN)).detach(), 1e-13)
        close(written.get_diff_weight(1)[0].detach(), written.get_weight((OUT, IN)).detach() * 0.5, 1e-13)


# ------------------------------------------------------------------------------------------------ kohya, diffusers


@pytest.mark.parametrize("kind", ["linear", "conv2d 1x1", "conv2d"])
def test_lora_is_kohyas_merge(kind: str) -> None:
    """sd-scripts, networks/lora.py merge_to: a 3×3 kernel's product is a convolution of `down` by `up`."""
    seed(kind)
    made = lycoris(LoConModule, kind, torch.float16, lora_dim=4, alpha=1.0)
    up, down = (made.parts[part].double() for part in ("up", "down"))
    product = up @ down if kind == "linear" else nn.functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    found = change(FAMILIES.get("lora"), made.given(torch.float64), made.weight, 0.7)
    close(found, made.weight + 0.7 * product * (1.0 / 4), 1e-13)


@pytest.mark.parametrize(
    "case", [c for c in CASES if family_of(c).grain == "tensor" or "exact" in c.name], ids=lambda case: case.id
)
def test_rotations_keep_lengths(case: Case) -> None:
    if "rescale" in case.name:
        return
    made = case.made()
    found = change(family_of(case), made.given(torch.float64), made.weight.double(), 1.0)
    close(found.norm(), made.weight.double().norm(), 1e-12)


def test_lora_is_what_diffusers_fuses() -> None:
    """load_lora_adapter and fuse_lora, for an attention's matrix and a resnet's kernel of a tiny UNet."""
    from diffusers import UNet2DConditionModel

    seed("diffusers")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    names = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1")
    weights = {name: unet.get_submodule(name).weight.detach().clone() for name in names}
    parts, state = {}, {}
    for name, weight in weights.items():
        up = torch.randn(weight.shape[0], 3, *[1] * (weight.ndim - 2))
        parts[name] = Parts({"up": up, "down": torch.randn(3, *weight.shape[1:])}, 2.0, tuple(weight.shape))
        state |= {f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_A.weight": parts[name]["down"]}
    alphas = {f"unet.{name}.alpha": 2.0 for name in names}
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    unet.fuse_lora(lora_scale=0.7)
    for name, weight in weights.items():
        fused = unet.get_submodule(name).base_layer.weight.detach()
        close(change(FAMILIES.get("lora"), parts[name], weight, 0.7), fused, 1e-6)


# ------------------------------------------------------------------------------------------------ other shapes


def test_an_adapter_may_be_wider_than_the_weight_if_it_says_so() -> None:
    """BFL's control LoRAs: `img_in` reads twice as many channels, and what was not there is zero."""
    family = FAMILIES.get("lora")
    tensors = {"up": torch.ones(4, 1), "down": torch.ones(1, 6), "reshape_weight": torch.tensor([4.0, 6.0])}
    parts = Parts(tensors, None, (4, 6))
    weight = torch.full((4, 3), 2.0)
    assert can_change(family, parts.shapes, (4, 3))
    assert not can_change(family, parts.shapes, (4, 7))
    assert change(family, parts, weight, 0.5).tolist() == [[2.5] * 3 + [0.5] * 3] * 4
    assert change(family, parts, weight[1:3], 0.5, slice(1, 3)).tolist() == [[2.5] * 3 + [0.5] * 3] * 2
    bare = replace(parts, tensors={"up": tensors["up"], "down": tensors["down"]})
    assert not can_change(family, bare.shapes, (4, 3))
    with pytest.raises(MismatchError, match=r"^the adapter changes a weight of \[4, 6\], and this one is \[4, 3\]$"):
        change(family, bare, weight, 0.5)
    with pytest.raises(MismatchError):
        change(family, parts, torch.ones(4, 7), 0.5)


def test_a_weight_may_be_set_to_a_wider_one() -> None:
    family = FAMILIES.get("set")
    parts = Parts({"set_weight": torch.ones(4, 6)}, None, (4, 6))
    assert torch.equal(change(family, parts, torch.zeros(4, 3), 1.0), torch.ones(4, 6))
    assert torch.equal(change(family, parts, torch.zeros(4, 3), 0.5), torch.full((4, 6), 0.5))


@pytest.mark.parametrize("kind", ["linear", "conv2d 1x1"])
def test_matrices_and_kernels_of_one_are_the_same(kind: str) -> None:
    """SD1's proj_in is a 1×1 convolution, SDXL's a matrix, and adapters are found in either shape."""
    made = lycoris(LoConModule, kind, torch.float32, lora_dim=3, alpha=2.0)
    other = (OUT, IN, 1, 1) if kind == "linear" else (OUT, IN)
    parts = replace(made.given(torch.float64), shape=other)
    assert can_change(FAMILIES.get("lora"), parts.shapes, other)
    found = change(FAMILIES.get("lora"), parts, made.weight.reshape(other), 1.0)
    close(found.reshape(made.weight.shape), made.references["merge"][0], 1e-12)


def test_the_two_dialects_of_glora_are_told_apart() -> None:
    """By what can be multiplied; where both can, the rank is the shorter side; where there is none, it is the newer."""
    rank = FAMILIES.get("glora").rank
    newer = {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}
    older = {"a1": (2, 6), "a2": (6, 2), "b1": (2, 6), "b2": (8, 2)}
    square = {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8)}
    assert rank(newer) == rank(older) == rank(square) == 2
    assert FAMILIES.get("glora").shape(older) == FAMILIES.get("glora").shape(newer) == (8, 6)
    assert rank(dict.fromkeys(newer, (4, 4))) == 4
    assert rank(dict.fromkeys(newer, ())) is None


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_weights_are_not_broadcast(kind: str) -> None:
    made = lycoris(FullModule, kind, torch.float32)
    with pytest.raises(MismatchError, match="the adapter changes a weight of"):
        change(FAMILIES.get("full"), made.given(torch.float64), made.weight[:1], 1.0)
