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
from loras import LORAS, Maker, delta, metadata_of, modules_of, named, needs_loras, raw, save, tensors_of

import weightops
from weightops.errors import MismatchError, UsageError, ValueRefused, WeightopsError
from weightops.lora.family import FAMILIES
from weightops.ops.fuse import fuse
from weightops.ops.resize import resize

sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))

from test_arithmetic import CASES, SOURCES, Case, every_source, lycoris

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
    target = path.with_name(f"{path.stem}-{words.get('rank', 'exact')}-{words.get('dtype')}".replace(":", "") + path.suffix)
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


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[torch.dtype, str], list[Result]]:
    """Every family that has a place in a UNet, in files of three dtypes, each with a model of the same dtype."""
    found: dict[tuple[torch.dtype, str], list[Result]] = {}
    for source in SOURCES.values():
        for names in UNETS:
            folder = tmp_path_factory.mktemp("based")
            files = write(folder, names, source)
            files = {path: cases for path, cases in files.items() if not all(map(is_plain, cases))}
            for rank, dtype in ((5, "keep"), ("energy:0.7", "fp32")):
                words = {"base": folder / "base.safetensors", "rank": rank, "dtype": dtype, "verify": True}
                found.setdefault((source, dtype), []).append(Result(names, files, **words))
    return found


@pytest.mark.parametrize("case", CHANGED, ids=lambda case: case.id)
def test_the_error_that_is_said_is_the_true_one(
    case: Case, based: dict[tuple[torch.dtype, str], list[Result]]
) -> None:
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
def test_the_whole_error_is_that_of_all_modules(
    source: torch.dtype, based: dict[tuple[torch.dtype, str], list[Result]]
) -> None:
    """LoRAs, which lose nothing, among them."""
    for dtype in ("keep", "fp32"):
        for result in based[source, dtype]:
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
    source: torch.dtype, exact: dict[tuple[torch.dtype, str], Result], based: dict[tuple[torch.dtype, str], list[Result]]
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
        f"{QUERY}.lora_up.weight": torch.ones(32, 2), f"{QUERY}.lora_down.weight": torch.ones(2, 32)
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
