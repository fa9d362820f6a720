"""A model is the same pipeline however it is named: a folder, a file, a recipe; and wears LoRAs at their strength."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loras import Maker, named, save

import weightops
from weightops.diffusion.adapters import wear
from weightops.diffusion.models import load, networks
from weightops.diffusion.tiny import tiny_model, tiny_vae
from weightops.errors import FormatError, MemoryRefused, MismatchError, NetworkError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from weightops.diffusion.models import Loaded

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ARCHITECTURES = ("sd15", "sdxl", "flux")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of each architecture, and a single file of it."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name in ARCHITECTURES:
        found[name] = tiny_model(name, root / name, seed=1)
        weightops.convert(found[name], to="original", output=root / f"{name}.safetensors")
        found[f"{name} file"] = root / f"{name}.safetensors"
    found["other"] = tiny_model("sd15", root / "other", seed=2)
    return found


def image(loaded: Loaded) -> Any:
    made = loaded.pipe(
        prompt="a red cat", num_inference_steps=2, output_type="np", height=64, width=64, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return torch.from_numpy(made.images)


def weights(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, network in networks(loaded.pipe).items()
        for name, tensor in network.state_dict().items()
    }


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(a, second[key]) for key, a in first.items())


def layers(loaded: Loaded) -> Iterator[tuple[str, Any]]:
    """Name in files, and module, of attentions and of some convolutions, of every network that LoRAs are for."""
    for part, network in networks(loaded.pipe).items():
        for name, module in network.named_modules():
            # Whole packs, whose parts some dialects keep together; the sizes of tiny ones are nowhere else.
            wanted = name.endswith(("to_q", "to_k", "to_v", "proj_mlp", "to_out.0", "q_proj", "fc1", "conv_shortcut"))
            if part != "vae" and wanted and "encoder_2.encoder" not in name and isinstance(
                module, torch.nn.Linear | torch.nn.Conv2d
            ):  # fmt: skip
                text = part.startswith("text_encoder") and not name.startswith("text_model.")
                yield f"{part}.{'text_model.' if text else ''}{name}", module


def lora(path: Path, loaded: Loaded, family: str = "lora") -> Path:
    """A LoRA of rank 8 and alpha 4, or another family, of these layers, in kohya's names."""
    maker, found = Maker(3), {}
    for name, module in layers(loaded):
        out, features, *kernel = module.weight.shape
        if loaded.architecture == "flux" and name.startswith("text_encoder_2"):
            continue
        if family == "loha":
            if not kernel:
                found[name] = {
                    ".hada_w1_a": maker(out, 4), ".hada_w1_b": maker(4, features), ".hada_w2_a": 0.003 * maker(out, 4),
                    ".hada_w2_b": maker(4, features), ".alpha": torch.tensor(2.0),
                }  # fmt: skip
            continue
        parts = maker.lora(out, features, 8, 4.0, kernel)
        parts = {key: value * 0.1 if key != ".alpha" else value for key, value in parts.items()}
        if family == "dora":
            norms = module.weight.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (module.weight.dim() - 1))
            parts[".dora_scale"] = norms * 1.1
        found[name] = parts
    return save(path, named(found))


# ------------------------------------------------------------------------------------------------ one model, many names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_and_its_single_file_make_the_same_image(name: str, places: dict[str, Path]) -> None:
    folder = load(places[name], where="generate")
    single = load(places[f"{name} file"], where="generate", like=places[name])
    assert folder.architecture == single.architecture == name
    assert equal(weights(folder), weights(single))
    assert torch.equal(image(folder), image(single))
    assert not any(p.requires_grad for network in networks(folder.pipe).values() for p in network.parameters())
    assert not any(network.training for network in networks(folder.pipe).values())
    assert folder.hashes.keys() == {name}
    assert all(value.startswith("xxh3_128:") and value.strip("0") != "xxh3_128:" for value in folder.hashes.values())


def test_a_recipe_is_merged_in_memory_as_on_the_disk(places: dict[str, Path], tmp_path: Path) -> None:
    a, b = str(places["sd15"]), str(places["other"])
    weightops.merge(a, b, alpha=0.3, output=tmp_path / "merged")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"models: {{a: {json.dumps(a)}, b: {json.dumps(b)}}}\nmerge: {{weighted_sum: [a, b], weights: [0.7, 0.3]}}\n"
    )
    ours, theirs = load(recipe, where="generate"), load(tmp_path / "merged", where="generate")
    assert equal(weights(ours), weights(theirs))
    assert set(ours.hashes) == {"sd15", "other"}


@pytest.mark.parametrize("name", ["sd15", "sd15 file"])
def test_another_vae_takes_the_place_of_the_models_own(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae", seed=7)
    plain = weights(load(places[name], where="train", like=places["sd15"]))
    swapped = weights(load(places[name], where="train", vae=vae, like=places["sd15"]))
    changed = {key.split(".")[0] for key, tensor in plain.items() if not torch.equal(tensor, swapped[key])}
    assert changed == {"vae"}
    alone = tmp_path / "alone.safetensors"
    weightops.convert(vae, output=alone)
    from safetensors.torch import load_file

    assert all(torch.equal(tensor, swapped[f"vae.{key}"]) for key, tensor in load_file(alone).items())


def test_half_precision_and_prediction_are_as_asked(places: dict[str, Path]) -> None:
    loaded = load(places["sd15 file"], where="train", like=places["sd15"], dtype="bf16", prediction="v_prediction")
    assert {tensor.dtype for tensor in weights(loaded).values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert loaded.pipe.scheduler.config.prediction_type == "v_prediction"
    folder = load(places["sd15"], where="train", prediction="v_prediction")
    assert folder.pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_network_alone_takes_its_place_in_another_folder(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    part = "unet" if name == "sd15" else "transformer"
    alone = tmp_path / "alone.safetensors"
    weightops.convert(places[name] / part, output=alone)
    whole, loaded = load(places[name], where="generate"), load(alone, where="generate", like=places[name])
    assert (loaded.architecture, loaded.own) == (name, (part,))
    assert set(loaded.hashes) == {"alone.safetensors", name}
    assert torch.equal(image(loaded), image(whole))
    # What changes the text encoder too is fused into all that it is for, and taken off again.
    before, file = weights(loaded), lora(tmp_path / "lora.safetensors", whole, "loha")
    for one in (whole, loaded):
        wear(one, [(file, 0.7)])
        assert [worn.way for worn in one.loras] == ["fused"]
    changed = {key.split(".")[0] for key, tensor in weights(loaded).items() if not torch.equal(tensor, before[key])}
    assert changed == {part, "text_encoder"}
    assert equal(weights(whole), weights(loaded))
    assert loaded.warnings == []
    wear(loaded, ())
    assert equal(weights(loaded), before)


def test_a_network_alone_says_what_it_predicts(places: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(places["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    file = save(tmp_path / "v.safetensors", {**found, "v_pred": torch.zeros(0)})
    said = load(file, where="generate", like=places["sd15"])
    assert said.pipe.scheduler.config.prediction_type == "v_prediction"
    asked = load(file, where="generate", like=places["sd15"], prediction="epsilon")
    assert asked.pipe.scheduler.config.prediction_type == "epsilon"


def test_what_is_assumed_of_a_model_is_said(tmp_path: Path) -> None:
    folder = tiny_model("sd2", tmp_path / "sd2")
    weightops.convert(folder, to="original", output=tmp_path / "marked.safetensors")
    from safetensors.torch import load_file

    file = save(tmp_path / "sd2.safetensors", load_file(tmp_path / "marked.safetensors"))
    shutil.rmtree(folder / "scheduler")
    loaded = load(file, where="generate", like=folder)
    assert [text for text in loaded.warnings if "v_prediction is assumed" in text]


def test_what_t5_keeps_in_float32_stays_there(places: dict[str, Path]) -> None:
    folder = load(places["flux"], where="generate", dtype="fp16")
    single = load(places["flux file"], where="generate", like=places["flux"], dtype="fp16")
    wide = {key for key, tensor in weights(folder).items() if tensor.dtype == torch.float32}
    assert wide
    assert all(key.startswith("text_encoder_2.") and key.endswith(".wo.weight") for key in wide)
    exact = weights(load(places["flux"], where="generate"))
    dtypes = {key: tensor.dtype for key, tensor in weights(folder).items()}
    assert equal(weights(single), {key: tensor.to(dtypes[key]) for key, tensor in exact.items()})
    assert dtypes == {key: tensor.dtype for key, tensor in weights(single).items()}


def test_files_of_one_name_are_both_named(places: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(places["sd15 file"])
    for name, factor in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        more = {key: tensor * factor if tensor.is_floating_point() else tensor for key, tensor in found.items()}
        save(tmp_path / name / "model.safetensors", more)
    recipe = tmp_path / "recipe.yaml"
    files = ", ".join(f"{n}: {json.dumps(str(tmp_path / n / 'model.safetensors'))}" for n in "ab")
    recipe.write_text(f"models: {{{files}}}\nmerge: {{weighted_sum: [a, b], weights: [0.5, 0.5]}}\n")
    hashes = load(recipe, where="generate", like=places["sd15"]).hashes
    assert set(hashes) == {"model.safetensors", "b/model.safetensors"}
    assert len(set(hashes.values())) == 2


# ------------------------------------------------------------------------------------------------ odd folders


def odd(places: dict[str, Path], to: Path) -> Path:
    shutil.copytree(places["sd15"], to)
    return to


def test_a_folder_of_half_precision_alone_is_read(places: dict[str, Path], tmp_path: Path) -> None:
    folder = odd(places, tmp_path / "half")
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert torch.equal(image(load(folder, where="generate")), image(load(places["sd15"], where="generate")))


def test_a_folder_may_lack_the_safety_checker_that_it_names(places: dict[str, Path], tmp_path: Path) -> None:
    folder = odd(places, tmp_path / "folder")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder, where="generate").pipe.safety_checker is None


def test_sd3_may_be_without_its_t5(tmp_path: Path) -> None:
    folder = tiny_model("sd3", tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
        with pytest.raises(FormatError, match=f"sd3: its model_index.json names '{name}', of which there is no folder"):
            load(folder, where="generate")
        index[name] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder, where="generate").pipe.text_encoder_3 is None


def test_a_folder_that_lacks_something_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("unet", "vae", "tokenizer", "scheduler"):
        folder = odd(places, tmp_path / name)
        shutil.rmtree(folder / name)
        with pytest.raises(FormatError, match=f"{name}: its model_index.json names '{name}', of which there is no"):
            load(folder, where="generate")
    folder = odd(places, tmp_path / "words")
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(FormatError, match=r"words: its tokenizer has \d tokens, its text encoder 514: files of it are"):
        load(folder, where="generate")
    for name, file, key in (
        ("unet", "diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("text_encoder", "model.safetensors", "text_model.encoder.layers.0.layer_norm1.weight"),
    ):
        folder = odd(places, tmp_path / f"cut {name}")
        found = load_file(folder / name / file)
        del found[key]
        save_file(found, folder / name / file)
        with pytest.raises(FormatError, match=rf"its {name} lacks 1 tensor: '[\w.]*{key.removeprefix('text_model.')}'"):
            load(folder, where="generate")


# ------------------------------------------------------------------------------------------------ LoRAs


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        *(("sd15", dialect) for dialect in ("kohya", "diffusers", "peft", "comfy", "onetrainer")),
        *(("sdxl", dialect) for dialect in ("kohya", "diffusers", "peft")),
        *(("flux", dialect) for dialect in ("kohya", "diffusers", "comfy")),
    ],
)
def test_a_lora_of_rank_8_and_alpha_4_is_worn_as_it_is_fused(
    name: str, dialect: str, places: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(places[name], where="generate")
    plain = image(loaded)
    file = lora(tmp_path / "kohya.safetensors", loaded)
    if dialect != "kohya":
        written = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
        weightops.convert(file, to=dialect, output=written, architecture=name)
        file = written
    wear(loaded, [(file, 0.5)])
    assert [(worn.way, worn.strength) for worn in loaded.loras] == [("adapter", 0.5)], loaded.loras
    weightops.fuse(places[name], (file, 0.5), output=tmp_path / "fused")
    fused = image(load(tmp_path / "fused", where="generate"))
    assert (image(loaded) - fused).abs().max() < 1e-5
    assert (fused - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "family"), [("sd15", "loha"), ("flux", "dora")])
def test_other_families_are_fused_and_said_to_be(
    name: str, family: str, places: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(places[f"{name} file"], where="generate", like=places[name])
    before, plain = weights(loaded), image(loaded)
    file = lora(tmp_path / "lora.safetensors", loaded, family)
    other = lora(tmp_path / "plain.safetensors", loaded)
    wear(loaded, [(file, 0.7), (other, -0.25)])
    assert [(worn.way, worn.strength) for worn in loaded.loras] == [("fused", 0.7), ("adapter", -0.25)]
    assert family in loaded.loras[0].reason
    weightops.fuse(places[name], (file, 0.7), (other, -0.25), output=tmp_path / "fused")
    wanted = image(load(tmp_path / "fused", where="generate"))
    assert (image(loaded) - wanted).abs().max() < 1e-5
    assert (wanted - plain).abs().max() > 1e-3
    wear(loaded, [])
    assert loaded.loras == ()
    assert equal(weights(loaded), before)
    assert torch.equal(image(loaded), plain)


def test_what_is_worn_is_what_was_asked_for_last(places: dict[str, Path], tmp_path: Path) -> None:
    loaded = load(places["sd15"], where="generate")
    plain, file = image(loaded), lora(tmp_path / "lora.safetensors", loaded)
    wear(loaded, [f"{file}:0.5"])
    half = image(loaded)
    wear(loaded, [f"{file}:1.0"])
    whole = image(loaded)
    wear(loaded, [(file, 0.25), (file, 0.25)])
    assert (image(loaded) - half).abs().max() < 1e-5
    assert not torch.allclose(half, whole)
    wear(loaded, [])
    assert torch.equal(image(loaded), plain)


def test_what_is_made_with_a_lora_at_one_strength_is_kept_apart_from_another(
    places: dict[str, Path], tmp_path: Path
) -> None:
    from weightops.diffusion.cache import hash_of_network

    loaded = load(places["sd15"], where="generate")
    file, found = lora(tmp_path / "lora.safetensors", loaded), []
    for strength in (0.5, 1.0, 0.5):
        wear(loaded, [(file, strength)])
        found.append(hash_of_network(loaded.pipe.text_encoder))
    assert found[0] == found[2] != found[1]


def test_keys_without_a_use_are_said_once(places: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    loaded = load(places["sd15"], where="generate")
    found = load_file(lora(tmp_path / "lora.safetensors", loaded))
    file = save(tmp_path / "more.safetensors", {**found, "bundle_emb.word.string_to_param.*": torch.ones(1, 64)})
    for strength in (0.5, 1.0):
        wear(loaded, [(file, strength)])
    assert len(loaded.warnings) == 1
    assert "1 key is not used: 'bundle_emb.word.string_to_param.*'" in loaded.warnings[0]


# ------------------------------------------------------------------------------------------------ refusals


def test_what_is_no_model_is_refused_by_name(places: dict[str, Path], tmp_path: Path) -> None:
    loaded = load(places["sd15"], where="generate")
    file = lora(tmp_path / "lora.safetensors", loaded)
    with pytest.raises(MismatchError, match=r"lora.safetensors: expected a model, found: lora"):
        load(file, where="generate")
    vae = tiny_vae(tmp_path / "vae")
    with pytest.raises(MismatchError, match="vae: expected a model, found: vae"):
        load(vae, where="generate")
    with pytest.raises(UsageError, match=r"nothing.safetensors: no such file"):
        load("nothing.safetensors", where="generate")
    with pytest.raises(UsageError, match="owner/name: no such file or folder") as raised:
        load("owner/name", where="generate")
    assert raised.value.hint == "a repository is named hf://owner/name"
    strange = save(tmp_path / "strange.safetensors", {"x.weight": torch.ones(2, 2)})
    with pytest.raises(MismatchError, match=r"strange.safetensors: "):
        load(strange, where="generate")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    with pytest.raises(FormatError, match=r"text.safetensors: "):
        load(tmp_path / "text.safetensors", where="generate")


def test_a_lora_for_another_model_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    file = lora(tmp_path / "lora.safetensors", load(places["sdxl"], where="generate"))
    loaded = load(places["sd15"], where="generate")
    with pytest.raises(MismatchError, match=r"lora.safetensors: "):
        wear(loaded, [file])
    assert loaded.loras == ()


def test_words_that_mean_nothing_are_refused(places: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--dtype: found 'fp8', expected auto, fp32, fp16, bf16"):
        load(places["sd15"], where="generate", dtype="fp8")
    with pytest.raises(UsageError, match="--prediction: found 'noise', expected epsilon or v_prediction"):
        load(places["sd15"], where="generate", prediction="noise")
    with pytest.raises(UsageError, match=r"--prediction: found epsilon, but .*flux is trained by flow matching"):
        load(places["flux"], where="generate", prediction="epsilon")
    with pytest.raises(UsageError, match=r"x: cannot be read: File name too long|x: no such file|x: .*too long"):
        load("x" * 300, where="generate")
    with pytest.raises(MismatchError, match="flux: is not for this model: of its components none are of the class"):
        load(places["sd15"] / "unet", where="generate", like=places["flux"])
    with pytest.raises(UsageError, match="--like: no such folder: nowhere"):
        load(places["sd15 file"], where="generate", like="nowhere")


def test_a_model_larger_than_the_memory_is_refused(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightops.diffusion.models._free_memory", lambda: 1 << 20)
    with pytest.raises(MemoryRefused, match=r"sd15: takes 0.0 GiB in float32, and 0.0 GiB are free") as raised:
        load(places["sd15"], where="train")
    assert raised.value.hint == "--dtype bf16 takes half"


def test_a_repository_is_not_fetched_where_none_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"hf://owner/name: cannot be fetched: "):
        load("hf://owner/name", where="generate")


def test_a_file_without_tokenizers_says_where_they_come_from(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="the pipeline needs a tokenizer, and none is at hand") as raised:
        load(places["sd15 file"], where="generate")
    assert raised.value.hint == "--like FOLDER takes it from a diffusers folder or hf://owner/name"


def test_tokenizers_are_looked_for_wherever_the_table_says(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that is a tokenizer, without a folder for it, is asked for no file of an empty folder's."""
    asked: list[tuple[str, list[str]]] = []

    def fetch(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repository, allow_patterns))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UsageError, match="the pipeline needs a tokenizer, and none is at hand"):
        load(places["sd15 file"], where="generate")
    assert [repository for repository, _ in asked][-1] == "openai/clip-vit-large-patch14"
    assert "vocab.json" in asked[-1][1]
    assert "tokenizer/vocab.json" in asked[0][1]
    assert not any("*" in name for _, names in asked for name in names)
