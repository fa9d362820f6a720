"""convert --to lora: every family as plain LoRA, exactly where that can be, else with the error that is said.

The adapters and what their libraries make of W are those of tests/lora/test_arithmetic, in files of their own names.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import weightops as command
from locon import BLOCK, KERNEL, KEY, POINT, QUERY, locon, off
from loras import ENDINGS, LORAS, Maker, delta, metadata_of, modules_of, named, needs_loras, raw, save, tensors_of

import weightops
from weightops.errors import UsageError, WeightopsError
from weightops.lora.family import FAMILIES
from weightops.ops.fuse import fuse
from weightops.ops.resize import resize

sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))
sys.path.insert(0, str(Path(__file__).parents[1] / "naming"))

from tagged import from_canonical, needs_lists, shapes_of, to_canonical
from test_arithmetic import CASES, SOURCES, Case, every_source
from test_fuse import weights
from test_fuse_families import WHOLE, packed, respelled

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of a product of two factors, each rounded once.
ROUNDING = {torch.float32: 1e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def to_lora(source: str | Path, output: str = "out.safetensors", **words: Any) -> Any:
    return weightops.convert(source, to="lora", output=output, device="cpu", **{"force": True} | words)


def rows(report: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.details["modules"]}


def change_of(case: Case, source: torch.dtype) -> Tensor:
    """ΔW as the case's library makes it, as a matrix in float64."""
    made = case.made(source)
    return (next(iter(made.references.values()))[0].double() - made.weight.double()).flatten(1)


def family(case: Case) -> Any:
    return FAMILIES.get(case.family)


def is_plain(case: Case) -> bool:
    """Is it a LoRA already?"""
    return case.family == "lora" and not {"mid", "dora_scale"} & set(case.made().parts)


def is_exact(case: Case) -> bool:
    """Is it exactly a product of factors, and no LoRA?"""
    return family(case).lowrank is not None and "dora_scale" not in case.made().parts and not is_plain(case)


EXACT = [case for case in CASES if is_exact(case)]


# ------------------------------------------------------------------------------------------------ files of all cases


@dataclass
class Names:
    """What the modules of cases are called: in a checkpoint, and flattened in files."""

    of: dict[Case, str]

    def stored(self, case: Case) -> str:
        if case.made().config is not None:
            return f"base_model.model.{self.of[case]}"
        return f"{'oft' if 'kohya' in case.name else 'lora'}_unet_{self.of[case].replace('.', '_')}"

    def written(self, case: Case) -> str:
        """A LoRA's name: nothing that is one is called oft_unet_."""
        return self.stored(case).replace("oft_unet_", "lora_unet_")


def write(folder: Path, names: Names, source: torch.dtype) -> dict[Path, list[Case]]:
    """The adapter files, PEFT's folders among them, and the cases that each holds; and base.safetensors."""
    files: dict[Path, list[Case]] = {}
    base: dict[str, Tensor] = {"conv_in.weight": torch.ones(32, 4, 3, 3), "conv_norm_out.weight": torch.ones(32)}
    for number, case in enumerate(names.of):
        made = case.made(source)
        base[f"{names.of[case]}.weight"] = made.weight.to(source)
        if made.bias is not None:
            base[f"{names.of[case]}.bias"] = made.bias.to(source)
        path = folder / f"{names.stored(case).partition('_')[0]}.safetensors"
        if made.config is not None:
            path = folder / f"peft{number}"
            made.config.save_pretrained(path)
        files.setdefault(path, []).append(case)
    for path, cases in files.items():
        tensors = {f"{names.stored(c)}.{k}": t for c in cases for k, t in c.made(source).stored.items()}
        save(path if path.suffix else path / "adapter_model.safetensors", tensors)
    save(folder / "base.safetensors", base)
    return files


def converted(path: Path, words: Mapping[str, Any]) -> tuple[Any, Path]:
    name = f"{path.stem}-{words.get('rank', 'exact')}-{words.get('dtype')}"
    target = path.with_name(name.replace(":", "") + path.suffix)
    return to_lora(path, str(target), **words), target


def loras_of(path: Path) -> dict[str, Tensor]:
    """ΔW of each plain LoRA, and nothing but these and changes of biases and norms."""
    found = {}
    for name, (parts, alpha) in modules_of(path).items():
        if "up" in parts:
            found[name] = delta(parts, alpha)
        assert parts.keys() <= {"up", "down", "bias", "diff_b", "w_norm", "b_norm", "set_bias"}
    return found


class Result:
    """Conversions of files: of each case the row of its report, and ΔW as written."""

    def __init__(self, names: Names, files: Mapping[Path, Sequence[Case]], **words: Any) -> None:
        self.rows: dict[Case, dict[str, Any]] = {}
        self.deltas: dict[Case, Tensor] = {}
        self.reports: dict[Path, Any] = {}
        self.targets: dict[Path, Path] = {}
        self.files, self.names = files, names
        for path, cases in files.items():
            self.reports[path], self.targets[path] = converted(path, words)
            found, told = loras_of(self.targets[path]), rows(self.reports[path])
            for case in cases:
                if case.of_bias_alone:
                    continue
                self.rows[case] = told[names.written(case)]
                self.deltas[case] = found[names.written(case)].flatten(1)


# ------------------------------------------------------------------------------------------------ exact products

UNKNOWN = Names({case: f"blocks.{number}.layer" for number, case in enumerate(EXACT)})


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[torch.dtype, str], Result]:
    """Every product of every library, in files of three dtypes, converted as they are and to float32."""
    found = {}
    for source in SOURCES.values():
        files = write(tmp_path_factory.mktemp("exact"), UNKNOWN, source)
        for dtype in ("keep", "fp32"):
            found[source, dtype] = Result(UNKNOWN, files, dtype=dtype, verify=True)
    return found


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_a_product_is_exactly_a_lora(case: Case, exact: dict[tuple[torch.dtype, str], Result]) -> None:
    """To the rounding of the dtype that is written, which is the error that is said. No model is needed."""
    for (source, dtype), result in exact.items():
        wanted, row = change_of(case, source), result.rows[case]
        error = off(wanted, result.deltas[case])
        assert error <= ROUNDING[source if dtype == "keep" else torch.float32]
        # Of half precision the products are made in float32.
        assert math.isclose(row["error"], error, rel_tol=1e-3, abs_tol=1e-12 if source is torch.float32 else 1e-7)
        assert math.isclose(row["delta_norm"], float(wanted.norm()), rel_tol=1e-6)
        assert (row["energy"], row["method"]) == (1.0, "joined")
        assert row["rank"] == int(torch.linalg.matrix_rank(wanted, rtol=1e-9))


# ------------------------------------------------------------------------------------------------ with a base


def places() -> dict[str, list[str]]:
    """Modules of Stable Diffusion's UNet as diffusers calls them, by the kind of their weights."""
    down, up = ([f"{way}_blocks.{n}" for n in range(4)] for way in ("down", "up"))
    attentions = [f"{b}.attentions.{n}" for b in down[:3] for n in range(2)]
    attentions += [f"{b}.attentions.{n}" for b in up[1:] for n in range(3)]
    resnets = [f"{b}.resnets.{n}" for b in down for n in range(2)] + [f"{b}.resnets.{n}" for b in up for n in range(3)]
    resnets += ["mid_block.resnets.0", "mid_block.resnets.1"]
    heads = [f"attn{n}.to_{to}" for n in (1, 2) for to in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
    return {
        "linear": [f"{a}.transformer_blocks.0.{head}" for head in heads for a in attentions],
        "conv2d": [f"{r}.conv{n}" for n in (1, 2) for r in resnets],
        "conv2d 1x1": [f"{a}.proj_{side}" for side in ("in", "out") for a in attentions],
    }


def kind_of(case: Case) -> str | None:
    """The kind of module in a UNet whose weight is such as the case's; None: there is none."""
    shape = tuple(case.made().weight.shape)
    return {(): "linear", (3, 3): "conv2d", (1, 1): "conv2d 1x1"}.get(shape[2:]) if len(shape) > 1 else None


def in_unet(cases: Iterable[Case]) -> Names:
    free = {kind: iter(names) for kind, names in places().items()}
    return Names({case: next(free[kind]) for case in cases if (kind := kind_of(case)) is not None})


# Two models, for one has not as many convolutions as there are cases. One term of a series turns nothing at all.
TURNING = [case for case in CASES if "OFT, 1 terms" not in case.name]
UNETS = [in_unet(c for c in TURNING if (c.made().config is None) == ours) for ours in (True, False)]
CHANGED = [case for names in UNETS for case in names.of if not case.of_bias_alone and not is_plain(case)]


# By the dtype of files and model, and by that which is written.
Based = dict[tuple[torch.dtype, str], list[Result]]


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> Based:
    """Every family that has a place in a UNet, in files of three dtypes, each with a model of the same dtype."""
    found: Based = {}
    for source in SOURCES.values():
        for names in UNETS:
            folder = tmp_path_factory.mktemp("based")
            files = write(folder, names, source)
            files = {path: cases for path, cases in files.items() if not all(map(is_plain, cases))}
            rules: list[tuple[Any, str]] = [(5, "keep"), ("energy:0.7", "fp32")]
            for rank, dtype in rules if source is torch.float32 else rules[:1]:
                words = {"base": folder / "base.safetensors", "rank": rank, "dtype": dtype, "verify": True}
                found.setdefault((source, dtype), []).append(Result(names, files, **words))
    return found


@pytest.mark.parametrize("case", CHANGED, ids=lambda case: case.id)
def test_the_error_that_is_said_is_the_true_one(case: Case, based: Based) -> None:
    """Against what the library makes of the weight, in float64; and it is the least that the rank allows."""
    for (source, dtype), results in based.items():
        result = next(result for result in results if case in result.rows)
        wanted, row, written = change_of(case, source), result.rows[case], result.deltas[case]
        # LyCORIS' OFT is in float32; of weights in half precision so are we.
        arithmetic = 1e-6 * float(case.made(source).weight.norm() / wanted.norm()) if wanted.any() else 0.0
        assert math.isclose(row["delta_norm"], float(wanted.norm()), rel_tol=1e-6 + arithmetic)
        assert math.isclose(row["error"], off(wanted, written), rel_tol=1e-3, abs_tol=1e-7 + arithmetic)
        values = torch.linalg.svdvals(wanted)
        squares = values.square().cumsum(0)
        if dtype == "fp32" and wanted.any():
            assert row["rank"] == 1 + int((squares < 0.7 * squares[-1]).sum())
        else:
            assert row["rank"] == min(5, len(values), row["rank_before"])
        least = float(values[row["rank"] :].norm() / values.norm()) if wanted.any() else 0.0
        rounding = ROUNDING[source if dtype == "keep" else torch.float32]
        assert least * (1 - 1e-6) - arithmetic <= row["error"] <= 1.005 * least + rounding + arithmetic
        assert math.isclose(row["energy"], 1 - least**2, abs_tol=1e-4)


@every_source
def test_the_whole_error_is_that_of_all_modules(source: torch.dtype, based: Based) -> None:
    """LoRAs, which lose nothing, among them."""
    for dtype in ("keep", "fp32"):
        for result in based.get((source, dtype), []):
            for path, report in result.reports.items():
                changes = {c: change_of(c, source) for c in result.files[path] if c in result.rows}
                lost = math.fsum(float((t - result.deltas[c]).norm()) ** 2 for c, t in changes.items())
                norm = math.fsum(float(t.norm()) ** 2 for t in changes.values())
                wanted = math.sqrt(lost / norm) if norm else 0.0
                assert math.isclose(report.details["error"], wanted, rel_tol=1e-3, abs_tol=1e-6)
                assert report.verified["modules"] == min(16, len(changes))
                kept = {c for c in changes if result.rows[c]["method"] == "kept"}
                assert kept == {c for c in changes if is_plain(c)}


# ------------------------------------------------------------------------------------------------ what stays, what goes


@every_source
def test_loras_keep_their_bytes_and_all_other_keys_go_along(
    source: torch.dtype, exact: Mapping[tuple[torch.dtype, str], Result], based: Based
) -> None:
    """LoRAs beside other families; changes of biases and norms; embeddings have a test of their own."""
    for result in [exact[source, "keep"], *based[source, "keep"]]:
        for path, target in result.targets.items():
            account, before, after = result.reports[path].account, raw(path), raw(target)
            assert sorted([*account.used, *account.copied]) == sorted(before)
            assert (account.unused, account.surprises()) == ([], [])
            for key in account.copied:
                assert after[key] == before[key]
            made = {case for case in result.files[path] if not is_plain(case) and not case.of_bias_alone}
            gone = {f"{result.names.stored(c)}.{k}" for c in made for k in c.made(source).stored}
            gone -= {key for key in gone if key.endswith((".diff_b", ".set_bias", ".lora_B.bias"))}
            assert set(account.used) == gone
            assert after.keys() - before.keys() <= {
                f"{result.names.written(c)}.{part}" for c in made
                for part in ("lora_up.weight", "lora_down.weight", "lora_B.weight", "lora_A.weight", "alpha")
            }  # fmt: skip


@pytest.mark.parametrize(("out", "features"), [(12, 40), (40, 12), (6, 288)])
@every_source
def test_a_product_of_more_ranks_than_the_matrix_has_is_the_matrix_and_an_identity(
    source: torch.dtype, out: int, features: int
) -> None:
    maker = Maker(3, source)
    name = "lora_unet_blocks_0_layer"
    parts = {
        ".hada_w1_a": maker(out, 5), ".hada_w1_b": maker(5, features), ".hada_w2_a": maker(out, 5),
        ".hada_w2_b": maker(5, features), ".alpha": torch.tensor(2.5, dtype=source),
    }  # fmt: skip
    report = to_lora(save(Path("lora.safetensors"), named({name: parts})), verify=True)
    found = tensors_of(Path("out.safetensors"))
    up, down = found[f"{name}.lora_up.weight"], found[f"{name}.lora_down.weight"]
    assert float(found[f"{name}.alpha"]) == 0.5 * len(down) == 0.5 * min(out, features)
    one, matrix = (up, down) if out < features else (down, up)
    assert torch.equal(one, torch.eye(min(out, features)).to(source))
    p = {key: tensor.double() for key, tensor in parts.items()}
    wanted = (p[".hada_w1_a"] @ p[".hada_w1_b"]) * (p[".hada_w2_a"] @ p[".hada_w2_b"])
    assert off(wanted, matrix.double()) <= torch.finfo(source).eps / 2
    assert math.isclose(rows(report)[name]["error"], off(wanted, matrix.double()), rel_tol=1e-3, abs_tol=1e-7)


def test_a_rank_that_holds_all_of_a_change_writes_no_whole_difference() -> None:
    """`resize` writes what is smaller; of a file that is to be plain LoRA no other tool would read it."""
    diff = Maker(4)(32, 24)
    save(Path("lora.safetensors"), {f"{KEY}.diff": diff, f"{KEY}.diff_b": Maker(5)(32)})
    report = to_lora("lora.safetensors", rank=64)
    found = tensors_of(Path("out.safetensors"))
    assert found.keys() == {f"{KEY}.{part}" for part in ("lora_up.weight", "lora_down.weight", "diff_b")}
    assert torch.equal(found[f"{KEY}.lora_up.weight"] @ found[f"{KEY}.lora_down.weight"], diff)
    assert (rows(report)[KEY]["rank"], report.details["error"]) == (24, 0.0)
    with pytest.raises(UsageError, match="plain LoRA already"):
        to_lora("out.safetensors", output="again.safetensors")


def test_a_file_becomes_another_dtype_as_a_whole() -> None:
    """LoRAs beside it are rounded once, and say so."""
    tensors = {k: t.float() for k, t in locon().items() if not k.startswith(KEY)} | lokr(KEY, (4, 4), (8, 6))
    save(Path("lora.safetensors"), tensors)
    for dtype, name in DTYPES.items():
        report = to_lora("lora.safetensors", dtype=name, verify=True)
        after = tensors_of(Path("out.safetensors"))
        assert {t.dtype for t in after.values() if t.ndim} == {dtype}
        for key, tensor in tensors.items():
            if tensor.ndim and not key.startswith(KEY):
                assert torch.equal(after[key], tensor.to(dtype))
        plain = loras_of(Path("out.safetensors"))
        for module, (parts, alpha) in modules_of(Path("lora.safetensors")).items():
            error = off(delta(parts, alpha), plain[module].reshape(delta(parts, alpha).shape))
            assert math.isclose(rows(report)[module]["error"], error, rel_tol=1e-3, abs_tol=1e-7), module
            assert (error > 0) == (dtype is not torch.float32 or module == KEY)


def lokr(name: str, first: tuple[int, int], second: tuple[int, ...], alpha: float | None = None) -> dict[str, Tensor]:
    maker = Maker(len(name))
    parts = {".lokr_w1": maker(*first), ".lokr_w2": maker(*second)}
    return named({name: parts if alpha is None else parts | {".alpha": torch.tensor(alpha)}})


def test_alphas_stand_where_the_file_has_them() -> None:
    """Beside the factors where any stands there; a LoRA without one is as strong as it stands."""
    with_alpha = lokr(KEY, (4, 4), (8, 6), 3.0) | {
        f"{QUERY}.lora_up.weight": torch.ones(32, 2),
        f"{QUERY}.lora_down.weight": torch.ones(2, 32),
    }
    save(Path("with.safetensors"), with_alpha)
    save(Path("without.safetensors"), {k: t for k, t in with_alpha.items() if not k.endswith("alpha")})
    for name, keys in (("with", {f"{KEY}.alpha"}), ("without", set())):
        report = to_lora(f"{name}.safetensors")
        found = tensors_of(Path("out.safetensors"))
        assert {key for key in found if key.endswith("alpha")} == keys
        assert rows(report)[KEY]["rank"] == 24
        for key in keys:
            assert float(found[key]) == 24


METADATA = {
    "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}', "ss_network_dim": "10000",
    "ss_network_alpha": "1.0", "ss_base_model_version": "sd_v1", "modelspec.title": "falcon",
    "sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "0x" + "0" * 64,
}  # fmt: skip


def test_metadata_tell_of_the_lora() -> None:
    save(Path("lora.safetensors"), lokr(KEY, (4, 4), (8, 6), 1.0), METADATA)
    to_lora("lora.safetensors")
    found = metadata_of(Path("out.safetensors"))
    assert not found.keys() & {"ss_network_module", "ss_network_args"}
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("24", "24")
    assert (found["ss_base_model_version"], found["modelspec.title"]) == ("sd_v1", "falcon")
    assert found["sshs_model_hash"] not in ("0" * 64, "")
    recipe = json.loads(found["weightops"])
    assert {key: recipe[key] for key in ("command", "to", "dtype", "seed")} == {
        "command": "convert", "to": "lora", "dtype": "keep", "seed": 0,
    }  # fmt: skip


def test_a_token_that_a_trainer_put_beside_the_factors_goes_along() -> None:
    token = {"<token>": torch.randn(768), "bundle_emb.cat.clip_l": torch.randn(2, 768)}
    save(Path("lora.safetensors"), lokr(KEY, (4, 4), (8, 6)) | token)
    report = to_lora("lora.safetensors", strict=True)
    assert sorted(report.account.copied) == sorted(token)
    before, after = raw(Path("lora.safetensors")), raw(Path("out.safetensors"))
    assert [after[key] for key in token] == [before[key] for key in token]


# ------------------------------------------------------------------------------------------------ other hands


def fused(base: Path, lora: Path, output: str, strength: float = 1.0) -> dict[str, Tensor]:
    fuse(base, (lora, strength), output=output, threads=1, device="cpu", force=True)
    return tensors_of(Path(output))


def same(was: Mapping[str, Tensor], now: Mapping[str, Tensor], tolerance: float) -> None:
    assert was.keys() == now.keys()
    for key, tensor in was.items():
        assert off(tensor.double(), now[key].double()) <= tolerance, key


def test_a_product_fuses_as_its_lora_does(exact: dict[tuple[torch.dtype, str], Result]) -> None:
    """At any strength, for an exact product and its factors are one."""
    result = exact[torch.float32, "keep"]
    for path, target in result.targets.items():
        base = path.with_name("base.safetensors")
        was, now = (fused(base, p, f"{name}.safetensors", -0.3) for name, p in (("was", path), ("now", target)))
        same(was, now, 2e-7)


def test_a_model_with_the_file_is_the_model_with_its_lora(tmp_path: Path) -> None:
    """Of all families, weights and biases, with all ranks that their changes have."""
    for names in UNETS:
        files = write(tmp_path, names, torch.float32)
        for path, cases in files.items():
            if not all(map(is_plain, cases)):
                words = {"base": tmp_path / "base.safetensors", "rank": "energy:1"}
                report, target = converted(path, words)
                assert report.details["error"] < 1e-6
                base = tmp_path / "base.safetensors"
                was, now = (fused(base, p, f"{p.stem}-fused.safetensors") for p in (path, target))
                same(was, now, 1e-5)  # LyCORIS' magnitudes of inputs, in float32
        for path in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@needs_lists
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize("name", [*WHOLE, "kohya's OFT"])
def test_a_packed_weight_is_found_whether_or_not_the_checkpoint_packs_it(spelling: str, name: str) -> None:
    """Of Flux; and its last layer, whose halves trade places in diffusers' spelling."""
    base, lora, wanted, precision = packed(name)
    save(Path("base.safetensors"), respelled(spelling, base))
    save(Path("lora.safetensors"), lora)
    if name == "LoCon":
        with pytest.raises(UsageError, match="nothing to convert"):
            to_lora("lora.safetensors", base="base.safetensors", rank=8)
        return
    report = to_lora("lora.safetensors", base="base.safetensors", rank=8, verify=True)
    written = loras_of(Path("out.safetensors"))
    changes = {f"lora_unet_{k[:-7].replace('.', '_')}": t - base[k] for k, t in wanted.items() if k.endswith(".weight")}
    assert written.keys() == changes.keys() == rows(report).keys()
    for module, change in changes.items():
        error = off(change.double(), written[module])
        close_enough = 1e-5 if precision is torch.float32 else 1e-6
        assert math.isclose(rows(report)[module]["error"], error, rel_tol=1e-3, abs_tol=close_enough), module
        values = torch.linalg.svdvals(change.double())
        assert error <= 1.005 * float(values[8:].norm() / values.norm()) + 2 * close_enough


@needs_lists
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_halves_that_trade_places_in_the_last_block_of_sd3_are_turned_as_they_were_meant(spelling: str) -> None:
    shapes = {k: tuple(n // 32 if n > 16 else n for n in s) for k, s in shapes_of("orig_sd3_medium").items()}
    base, lora, wanted = weights(shapes, torch.float32), {}, {}
    for block in (0, 23):
        module = f"joint_blocks.{block}.context_block.adaLN_modulation.1"
        out, features = shapes[f"{module}.weight"]
        made = WHOLE["Diag-OFT"]("linear", torch.float32, out=out, features=features)
        base[f"{module}.weight"] = made.weight.float()
        flat = f"lora_unet_{module.replace('.', '_')}"
        lora |= {f"{flat}.{key}": tensor for key, tensor in made.stored.items()}
        wanted[flat] = next(iter(made.references.values()))[0].double() - made.weight.double()
    save(Path("lora.safetensors"), lora)
    own = from_canonical("sd3_transformer", spelling, to_canonical("sd3_transformer", "original", base))
    save(Path("base.safetensors"), {key: tensor.contiguous() for key, tensor in own.items()})
    report = to_lora("lora.safetensors", base="base.safetensors", rank="energy:1")
    assert report.details["error"] < 1e-6
    for module, found in loras_of(Path("out.safetensors")).items():
        assert off(wanted[module], found) < 1e-5, module


# ------------------------------------------------------------------------------------------------ rules


IN_MODEL = {
    KEY: "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    QUERY: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    POINT: "down_blocks.0.attentions.0.proj_in",
    KERNEL: "down_blocks.0.resnets.0.conv1",
}


def several(source: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """lora.safetensors, of a LoRA, an OFT, a difference and a LoHa, and base.safetensors; ΔW of each, restated."""
    maker = Maker(17, source)
    base = {KEY: maker(32, 24), QUERY: maker(32, 32), POINT: maker(32, 32, 1, 1), KERNEL: maker(32, 16, 3, 3)}
    others = {"conv_in.weight": maker(32, 4, 3, 3), "conv_norm_out.weight": maker(32)}
    save(Path("base.safetensors"), others | {f"{IN_MODEL[m]}.weight": t for m, t in base.items()})
    modules = {
        KEY: {".lora_up.weight": maker(32, 3), ".lora_down.weight": maker(3, 24), ".alpha": torch.tensor(1.5)},
        QUERY: {".oft_blocks": 0.1 * maker(4, 8, 8), ".alpha": torch.tensor(0.0)},
        POINT: {".diff": 0.1 * maker(32, 32, 1, 1), ".diff_b": maker(32)},
        KERNEL: {
            ".hada_w1_a": maker(32, 3), ".hada_w1_b": maker(3, 144), ".hada_w2_a": maker(32, 3),
            ".hada_w2_b": maker(3, 144), ".alpha": torch.tensor(1.0),
        },
    }  # fmt: skip
    save(Path("lora.safetensors"), {k: t.to(source) for k, t in named(modules).items()})
    blocks = modules[QUERY][".oft_blocks"].double()
    skew, one = torch.block_diag(*(blocks - blocks.mT)), torch.eye(32, dtype=torch.float64)
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    found = {}
    for name in (KEY, POINT, KERNEL):
        parts = {ENDINGS[key]: tensor for key, tensor in modules[name].items()}
        alpha = parts.pop("alpha", None)
        found[name] = delta(parts, None if alpha is None else float(alpha))
    found[QUERY] = turn.mT @ base[QUERY].double() - base[QUERY].double()
    return {name: found[name].flatten(1) for name in base}


def lost(wanted: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """The relative error of these modules together, as written."""
    found = loras_of(Path("out.safetensors"))
    names = list(names)
    squares = [float((wanted[n] - found[n].flatten(1) if n in found else wanted[n]).norm()) ** 2 for n in names]
    return math.sqrt(math.fsum(squares) / math.fsum(float(wanted[n].norm()) ** 2 for n in names))


MADE = (QUERY, POINT, KERNEL)


@every_source
@pytest.mark.parametrize("limit", [0.5, 0.2, 0.02])
def test_an_error_is_reached_over_what_becomes_a_lora(limit: float, source: torch.dtype) -> None:
    """With the fewest bytes: a rank less anywhere, and it is not. LoRAs, which have none, do not count."""
    wanted = several(source)
    report = to_lora("lora.safetensors", base="base.safetensors", rank=f"error:{limit}", dtype="fp32", verify=True)
    assert lost(wanted, MADE) <= limit * (1 + 1e-5)
    assert math.isclose(report.details["error"], lost(wanted, wanted), rel_tol=1e-4)
    ranks = {name: row["rank"] for name, row in rows(report).items()}
    squares = {m: torch.linalg.svdvals(wanted[m]).square() for m in MADE}
    whole = sum(float(s.sum()) for s in squares.values())
    rest = sum(float(squares[m][ranks[m] :].sum()) for m in MADE)
    # Ranks are taken by their energy per byte: the last one of some module was needed.
    last = {m: float(squares[m][ranks[m] - 1]) for m in MADE if ranks[m]}
    assert rest / whole <= limit**2 * (1 + 1e-6)
    assert (rest + max(last.values())) / whole > limit**2
    assert ranks[KEY] == 3


@pytest.mark.parametrize(
    ("rule", "words"),
    [("6", {}), ("6", {"conv_rank": 2}), ("energy:0.8", {}), ("energy:0.8", {"conv_rank": 4}), ("ratio:1.5", {}),
     ("fro:0.7", {"conv_rank": "energy:0.5"}), ("cumulative:0.6", {}), ("knee", {})],
    ids=str,
)  # fmt: skip
def test_rules_are_those_of_resize(rule: str, words: dict[str, Any]) -> None:
    """Of the same modules, but for LoRAs, which stay as they are."""
    several()
    report = to_lora("lora.safetensors", base="base.safetensors", rank=rule, **words)
    after = raw(Path("out.safetensors"))
    other = resize("lora.safetensors", rank=rule, base="base.safetensors", output="resized.safetensors", **words)
    resized = {name: row["rank"] for name, row in rows(other).items() if name != KEY and row["method"] != "whole"}
    found = {name: row["rank"] for name, row in rows(report).items()}
    assert len(resized) > 1
    assert found | resized == found
    for part in ("lora_up.weight", "lora_down.weight", "alpha"):
        assert after[f"{KEY}.{part}"] == raw(Path("lora.safetensors"))[f"{KEY}.{part}"]
    for name in resized:
        for part in ("lora_up.weight", "lora_down.weight"):
            assert after[f"{name}.{part}"] == raw(Path("resized.safetensors"))[f"{name}.{part}"]


def test_a_size_is_kept() -> None:
    wanted = several()
    least = None
    for size in (14_000, 20_000, 30_000):
        report = to_lora("lora.safetensors", base="base.safetensors", rank=f"size:{size}B")
        assert Path("out.safetensors").stat().st_size == report.bytes_written <= size
        assert least is None or lost(wanted, MADE) < least
        least = lost(wanted, MADE)
        assert rows(report)[KEY]["rank"] == 3


@pytest.mark.parametrize("words", [{}, {"rank": 4}, {"rank": 400}, {"rank": 4, "conv_rank": 0}], ids=str)
def test_a_dry_run_tells_the_size(words: dict[str, Any]) -> None:
    several()
    if not words:  # what is exact needs no model
        tensors = {k: t for k, t in tensors_of(Path("lora.safetensors")).items() if k.startswith((KERNEL, KEY))}
        save(Path("lora.safetensors"), tensors)
    else:
        words = words | {"base": "base.safetensors"}
    told = to_lora("lora.safetensors", dry_run=True, **words)
    assert not Path("out.safetensors").exists()
    done = to_lora("lora.safetensors", **words)
    assert told.bytes_written == done.bytes_written == Path("out.safetensors").stat().st_size
    assert (told.account.used, told.account.copied) == (done.account.used, done.account.copied)


def test_bytes_do_not_depend_on_memory_or_threads() -> None:
    several()
    found = set()
    for memory, threads in ((24 << 20, 1), (64 << 20, 3), (None, None)):
        for rank in (6, "error:0.1"):
            to_lora("lora.safetensors", base="base.safetensors", rank=rank, memory=memory, threads=threads)
            found.add((rank, Path("out.safetensors").read_bytes()))
    assert len(found) == 2


# ------------------------------------------------------------------------------------------------ refusals


REFUSED: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "no rank": (
        "lora", {"base": "base.safetensors"},
        f"--rank: found none, and 2 modules have no exact factors: {POINT!r}",
        "--rank 64 or error:0.01 says how near they are to be",
    ),
    "no rank, one module": (
        "full", {}, f"--rank: found none, and 1 module has no exact factors: {POINT!r}",
        "--rank 64 or error:0.01 says how near they are to be",
    ),
    "no base": (
        "lora", {"rank": 8},
        f"lora.safetensors: 2 tensors cannot become a LoRA: '{QUERY}.oft_blocks', its family is oft, whose change "
        "depends on the model's weights",
        "--base CHECKPOINT, the model that the file is for, makes it one",
    ),
    "no base for a magnitude": (
        "dora", {"rank": 8},
        f"dora.safetensors: 3 tensors cannot become a LoRA: '{KEY}.lora_down.weight', it has a magnitude (DoRA), whose "
        "change depends on the model's weights",
        "--base CHECKPOINT, the model that the file is for, makes it one",
    ),
    "no base for one tensor": (
        "set", {"rank": 8},
        f"set.safetensors: 1 tensor cannot become a LoRA: '{KEY}.set_weight', its family is set, whose change depends "
        "on the model's weights",
        "--base CHECKPOINT, the model that the file is for, makes it one",
    ),
    "plain": (
        "plain", {}, "--to: plain.safetensors is plain LoRA already: nothing to convert", "resize cuts its ranks",
    ),
    "norms": ("norms", {}, "norms.safetensors: has no module that can be cut to a rank", None),
    "wrong base": (
        "lora", {"rank": 8, "base": "lora.safetensors"}, "--base: lora.safetensors is no checkpoint",
        "it is the model that the LoRA changes",
    ),
    "base that lacks it": (
        "lora", {"rank": 8, "base": "other.safetensors"},
        f"other.safetensors: has no {IN_MODEL[QUERY]}.weight, which {QUERY!r} changes", None,
    ),
    "drop": ("lora", {"drop": ["text_encoder"]}, "--drop: says nothing with --to lora", None),
    "check": (
        "lora", {"check": True}, "--check: says nothing with --to lora", "--verify does what can be done",
    ),
    "alpha": (
        "lora", {"alpha": "fold"}, "--alpha: says nothing with --to lora: the strength stays where it is", None,
    ),
    "fp8": (
        "lora", {"dtype": "fp8_e4m3"}, "--dtype: fp8_e4m3 would leave little of the factors",
        "fp16 and bf16 are the usual ones",
    ),
    "conv rank alone": ("loha", {"conv_rank": 8}, "--conv-rank: stands with --rank", None),
    "unknown rule": (
        "loha", {"rank": "erorr:0.1"}, "--rank: found 'erorr:0.1', expected a rank such as 32, *",
        "did you mean 'error'?",
    ),
    "rank 0": (
        "loha", {"rank": 0}, "--rank: found 0, expected a rank of 1 or more, or a rule such as energy:0.9", None,
    ),
    "shards": (
        "lora", {"shard_size": 1 << 20},
        "--shard-size: says something only of a checkpoint, and lora.safetensors is a LoRA", None,
    ),
    "a checkpoint": (
        "base", {}, "--to: base.safetensors is no adapter file", "extract makes a LoRA of a finetune and its base",
    ),
    "an unknown architecture": ("loha", {"architecture": "sd51"}, "--architecture: unknown architecture 'sd51'", "*"),
    "a change of nothing": (
        "nothing", {"rank": "energy:0.9"},
        "--rank: energy:0.9 leaves no module a rank: there is nothing to write", None,
    ),
    "NaN": ("nan", {}, f"{{where}}: {KERNEL!r} holds NaN or Inf*", None),
    "NaN, of a rank": ("nan", {"rank": 4}, f"{{where}}: {KERNEL!r} holds NaN or Inf*", None),
    "a name that is no file of tensors": (
        "loha", {"output": "out"}, "out: the output's name must end in .safetensors", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(name: str) -> None:
    several()
    tensors = tensors_of(Path("lora.safetensors"))
    save(Path("loha.safetensors"), {k: t for k, t in tensors.items() if k.startswith(KERNEL)})
    save(Path("plain.safetensors"), {k: t for k, t in tensors.items() if k.startswith(KEY)})
    save(Path("full.safetensors"), {k: t for k, t in tensors.items() if k.startswith(POINT)})
    save(Path("dora.safetensors"), {k: t for k, t in tensors.items() if k.startswith(KEY) and "alpha" not in k}
         | {f"{KEY}.dora_scale": torch.ones(32, 1)})  # fmt: skip
    save(Path("set.safetensors"), {f"{KEY}.set_weight": torch.ones(32, 24)})
    save(Path("norms.safetensors"), {f"{BLOCK}_norm.w_norm": torch.ones(32), f"{BLOCK}_norm.b_norm": torch.ones(32)})
    save(Path("nothing.safetensors"), {f"{KEY}.diff": torch.zeros(32, 24)})
    loha = tensors_of(Path("loha.safetensors"))
    loha[f"{KERNEL}.hada_w1_b"][1, 5] = math.nan
    save(Path("nan.safetensors"), loha)
    base = tensors_of(Path("base.safetensors"))
    save(Path("other.safetensors"), {k: t for k, t in base.items() if not k.startswith(IN_MODEL[QUERY])})
    source, words, message, hint = REFUSED[name]
    with pytest.raises(WeightopsError) as refused:
        to_lora(f"{source}.safetensors", **words)
    wanted = message.replace("{where}", f"{source}.safetensors")
    assert str(refused.value) == wanted or (wanted.endswith("*") and str(refused.value).startswith(wanted[:-1]))
    assert refused.value.hint == hint or (hint == "*" and refused.value.hint)
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(("option", "value"), [("--rank", 4), ("--conv-rank", 2), ("--base", "x"), ("--seed", 1)])
@pytest.mark.parametrize("to", [None, "kohya"])
def test_what_is_for_plain_loras_is_refused_elsewhere(option: str, value: Any, to: str | None) -> None:
    several()
    words: dict[str, Any] = {option[2:].replace("-", "_"): value}
    with pytest.raises(UsageError) as refused:
        weightops.convert("lora.safetensors", to=to, output="out.safetensors", **words)
    assert str(refused.value) == f"{option}: says something only with --to lora"


def test_an_input_is_never_written() -> None:
    several()
    before = Path("lora.safetensors").read_bytes()
    for output in ("lora.safetensors", "base.safetensors"):
        with pytest.raises(WeightopsError, match=output):
            to_lora("lora.safetensors", output=output, base="base.safetensors", rank=4, force=False)
    assert Path("lora.safetensors").read_bytes() == before


def test_the_command_line_says_what_was_done() -> None:
    several()
    words = ("convert", "lora.safetensors", "--to", "lora", "--base", "base.safetensors", "--rank", "error:0.1")
    done = command(*words, "--verify", "--json", cwd=Path.cwd())
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["output"] == "lora-lora.safetensors"
    assert {row["name"] for row in told["modules"]} == {KEY, *MADE}
    assert told["verified"]["modules"] == 4
    assert 0 < told["error"] <= 0.1
    found = loras_of(Path("lora-lora.safetensors"))
    assert found.keys() == {KEY, *MADE}
    done = command(*words[:-2], cwd=Path.cwd())
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: --rank: found none, and 2 modules have no exact factors: {POINT!r}",
        "hint: --rank 64 or error:0.01 says how near they are to be",
    ]


# ------------------------------------------------------------------------------------------------ what others load


CONFIGS: dict[str, Any] = {
    "LoHa": lambda peft: peft.LoHaConfig(r=2, alpha=3, target_modules=["to_q", "norm.linear"], rank_pattern={"to_q": 3},
                                         alpha_pattern={"norm.linear": 1}, init_weights=False),
    "LoKr": lambda peft: peft.LoKrConfig(r=2, alpha=3, target_modules=["to_q", "norm.linear"], decompose_factor=4,
                                         init_weights=False),
    "LoKr of both": lambda peft: peft.LoKrConfig(r=1, alpha=3, target_modules=["to_q", "proj_mlp"], decompose_both=True,
                                                 init_weights=False),
    "LoKr, whole": lambda peft: peft.LoKrConfig(r=16, alpha=8, target_modules=["to_q", "proj_mlp"], init_weights=False),
    "DoRA": lambda peft: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "proj_out"], use_dora=True,
                                         init_lora_weights=False),
    "rank-stabilised DoRA": lambda peft: peft.LoraConfig(r=5, lora_alpha=3, target_modules=["to_q"], use_dora=True,
                                                         use_rslora=True, init_lora_weights=False),
    "OFT": lambda peft: peft.OFTConfig(oft_block_size=8, target_modules=["to_q", "to_k"], init_weights=False),
}  # fmt: skip
DEPENDS = ("DoRA", "rank-stabilised DoRA", "OFT")


def merged(peft: Any, model: Any, folder: Path) -> dict[str, Tensor]:
    """The weights that PEFT makes of the model with the folder's adapter."""
    adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    return {k: t.detach().double() for k, t in adapted.merge_and_unload().state_dict().items()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_becomes_one_that_it_and_diffusers_load(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        import test_lora_into_diffusers as tiny
    torch.manual_seed(3)
    model = tiny.flux().transformer
    save(Path("base.safetensors"), model.state_dict())
    adapted = peft.get_peft_model(model, CONFIGS[name](peft))
    for key, parameter in adapted.named_parameters():
        if any(mark in key for mark in ("lora_", "hada_", "lokr_", "oft_")):
            torch.nn.init.normal_(parameter, std=0.1)
            if "magnitude" in key:
                parameter.data.abs_().add_(0.5)
    adapted.save_pretrained("saved")
    words = {"base": "base.safetensors", "rank": "energy:1"} if name in DEPENDS else {"architecture": "flux"}
    report = to_lora("saved", "made", verify=True, **words)
    assert report.details["error"] < 1e-6
    assert {path.name for path in Path("made").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    def fresh() -> Any:
        found = tiny.flux().transformer
        found.load_state_dict(tensors_of(Path("base.safetensors")))
        return found

    # A word of another family's settings would be a warning, and so an error.
    was, now = merged(peft, fresh(), Path("saved")), merged(peft, fresh(), Path("made"))
    same(was, now, 1e-5)
    assert any(off(tensor, now[key]) > 1e-4 for key, tensor in fresh().state_dict().items())
    told = json.loads(Path("made/adapter_config.json").read_text())
    assert (told["peft_type"], told["use_dora"]) == ("LORA", False)
    weightops.convert("made", to="diffusers", output="diffusers.safetensors", architecture="flux")
    pipeline = tiny.flux()
    pipeline.transformer.load_state_dict(tensors_of(Path("base.safetensors")))
    changes = tiny.fused(pipeline, Path("diffusers.safetensors").resolve())
    for (_, module), change in changes.items():
        key = f"{module}.weight"
        wanted = was[key] - fresh().state_dict()[key].double()
        assert float((change - wanted).abs().max()) < 1e-5, module


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("says", [True, False], ids=["with settings", "without"])
def test_a_file_in_diffusers_names_becomes_one_that_diffusers_loads(says: bool) -> None:
    """Settings in its header, where it had them, are those of the LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("diffusers")
        import test_lora_into_diffusers as tiny
    pipeline, maker = tiny.flux(), Maker(6)
    modules = [f"transformer.transformer_blocks.{n}.attn.to_{to}" for n in range(2) for to in "qk"]
    tensors = {}
    for number, name in enumerate(modules):
        if number % 2:
            parts = {"lokr_w1": maker(4, 4), "lokr_w2_a": maker(8, 1), "lokr_w2_b": maker(1, 8)}
        else:
            parts = {"lora_A.weight": maker(2, 32), "lora_B.weight": maker(32, 2)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    settings = {"r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["to_q", "to_k"]}
    flat = {f"transformer.{key}": value for key, value in settings.items()}
    save(Path("lora.safetensors"), tensors, {"lora_adapter_metadata": json.dumps(flat)} if says else None)
    to_lora("lora.safetensors", architecture="flux", verify=True)
    found = {("transformer", k.removeprefix("transformer.")): t for k, t in loras_of(Path("out.safetensors")).items()}
    wanted = {}
    for name in modules:
        p = {k.removeprefix(f"{name}."): t.double() for k, t in tensors.items() if k.startswith(name)}
        if "lora_B.weight" in p:
            product, scale = p["lora_B.weight"] @ p["lora_A.weight"], 4 / 2
        else:
            product, scale = torch.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]), 4 / 1
        wanted["transformer", name.removeprefix("transformer.")] = product * (scale if says else 1.0)
    assert ("lora_adapter_metadata" in metadata_of(Path("out.safetensors"))) == says
    tiny.assert_changed(found, wanted)
    tiny.assert_changed(tiny.fused(pipeline, Path("out.safetensors").resolve()), wanted)


# ------------------------------------------------------------------------------------------------ real files


@needs_loras
@pytest.mark.parametrize(
    ("name", "rank"), [("lycoris_smart_falcon_4_lokr", "error:0.2"), ("lycoris_smart_falcon_16_lokr", 8)]
)
def test_a_real_lokr_becomes_a_lora_with_the_error_that_is_said(name: str, rank: int | str) -> None:
    """Of each shape of weights a module, against LyCORIS' own product; kernels, flat in the file, have their axes."""
    functional = pytest.importorskip("lycoris.functional")
    source = LORAS / f"{name}.safetensors"
    report = to_lora(source, rank=rank, verify=True)
    told, given, after = rows(report), tensors_of(source), modules_of(Path("out.safetensors"))
    account = report.account
    assert sorted([*account.used, *(unused.key for unused in account.unused)]) == sorted(given)
    assert told.keys() == {key.partition(".")[0] for key in given}
    assert after.keys() == {module for module, row in told.items() if row["rank"]}
    if rank == "error:0.2":
        assert abs(report.details["error"] - 0.2) < 1e-3
    assert {tuple(parts["down"].shape[2:]) for parts, _ in after.values()} == {(), (1, 1), (3, 3)}
    by_shape = {(len(parts["up"]), parts["down"].shape[1:]): module for module, (parts, _) in after.items()}
    for (out, features), module in by_shape.items():
        if out * features.numel() > 1 << 21:
            continue
        p = {k.removeprefix(f"{module}.lokr_"): t.double() for k, t in given.items() if k.startswith(f"{module}.lokr_")}
        factors = [p.get(part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
        # Of a product it divides its gamma by the rank.
        alpha = float(given[f"{module}.alpha"])
        wanted = functional.lokr.diff_weight(*factors, gamma=alpha).flatten(1)
        error = off(wanted, delta(*after[module]).flatten(1))
        assert math.isclose(told[module]["error"], error, rel_tol=1e-3, abs_tol=1e-6), module
        assert math.isclose(told[module]["delta_norm"], float(wanted.norm()), rel_tol=1e-5), module
