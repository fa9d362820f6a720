"""Recipes as YAML: what they mean, every mistake with its line, and text that reads back as the same tree."""

# ruff: noqa: E501 - a table is read by its lines: one case, one line

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightops.errors import UsageError
from weightops.merging.method import METHODS
from weightops.merging.recipe import Lora, Merge, Model, Node, Recipe, Varied, kind_of, merged, models_of, over
from weightops.ops import recipe_file, yaml_lines
from weightops.ops.recipe_file import drawn, in_words, parse_recipe, recipe_text

A, B, C, D = (Model(name) for name in "abcd")
STYLE = Lora("style")


def parse(text: str, folder: str = "") -> Recipe:
    return parse_recipe(textwrap.dedent(text), label="r.yaml", folder=Path(folder))


def delta(*models: Model) -> Merge:
    return merged("difference", models)


def wrong(text: str) -> tuple[str, str | None]:
    with pytest.raises(UsageError) as caught:
        parse(text)
    return str(caught.value), caught.value.hint


# ------------------------------------------------------------------------------------------------ the whole

FILES_OF_THE_EXAMPLE = {name: Model(f"{name}.safetensors") for name in ("a", "b", "c", "d", "e", "sd15")}

# "a, TIES-merged with b and c over base, plus 0.6 of a LoRA, less 0.3 of d − e, with the VAE of f, as bf16"
EXAMPLE = """
    models:
      base: sd15.safetensors
      sharp: {ties: [a.safetensors, b.safetensors, c.safetensors], base: base, density: 0.3}
    merge:
      add:
        - sharp
        - {lora: style.safetensors, strength: 0.6}
        - {difference: [d.safetensors, e.safetensors], strength: -0.3}
    vae: f.safetensors
    dtype: bf16
"""


def test_the_example() -> None:
    recipe = parse(EXAMPLE)
    a, b, c, d, e, base = FILES_OF_THE_EXAMPLE.values()
    sharp = over(base, "ties", [a, b, c], {"density": 0.3})
    assert recipe.root == merged("add", (sharp, Lora("style.safetensors"), delta(d, e)), {"weights": (0.6, -0.3)})
    assert recipe.like == a
    assert recipe.numbered == (a, b, c, d, base, e)
    assert (recipe.vae, recipe.text_encoder, recipe.dtype) == ("f.safetensors", "merge", "bf16")
    assert (recipe.drop, recipe.on_mismatch, recipe.seed) == ((), "error", 0)


def test_the_example_in_words() -> None:
    names = {model.file: name for name, model in FILES_OF_THE_EXAMPLE.items()} | {"style.safetensors": "style"}
    said = in_words(parse(EXAMPLE), names)
    assert said == "sd15 + ties(a − sd15, b − sd15, c − sd15; density 0.3) + 0.6·style − 0.3·(d − e)"


def test_the_example_drawn() -> None:
    inner = tuple((f"{n}.safetensors − sd15.safetensors", ()) for n in "abc")
    ties = ("ties, density 0.3, count_votes false, normalize true", inner)
    assert drawn(parse(EXAMPLE)) == (
        "add",
        (
            ("add", (("sd15.safetensors", ()), ties)),
            ("0.6 × LoRA style.safetensors", ()),
            ("-0.3 × (d.safetensors − e.safetensors)", ()),
        ),
    )


def test_the_example_as_text() -> None:
    assert recipe_text(parse(EXAMPLE)) == textwrap.dedent("""\
        merge:
          add:
          - ties: [a.safetensors, b.safetensors, c.safetensors]
            density: 0.3
            base: sd15.safetensors
          - {lora: style.safetensors, strength: 0.6}
          - difference: [d.safetensors, e.safetensors]
            strength: -0.3
        vae: f.safetensors
        dtype: bf16
        """)


def test_the_language_that_is_documented_can_be_read() -> None:
    doc = recipe_file.__doc__ or ""
    recipe = parse(textwrap.dedent(doc[doc.index("    models:") : doc.index("\n\nOnly")]))
    a, b, c, d, e, _ = FILES_OF_THE_EXAMPLE.values()
    sharp = over(Model("hf://owner/name/model.safetensors"), "ties", [a, b, c], {"density": 0.3})
    assert recipe.root == merged("add", (sharp, Lora("style.safetensors"), delta(d, e)), {"weights": (0.6, -0.3)})
    assert recipe == replace(recipe, vae="f.safetensors", dtype="bf16", drop=("ema",), like=a)


def test_everything_has_its_default() -> None:
    recipe = parse("merge: {weighted_sum: [a, b]}")
    assert recipe == Recipe(merged("weighted_sum", (A, B)), A, (A, B))


def test_one_model_may_be_all() -> None:
    assert parse("merge: {model: a, ema: true}").root == Model("a", ema=True)


# ------------------------------------------------------------------------------------------------ nodes


GRADED = Varied(0.5, "GRAD_V")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        # alpha
        ("{weighted_sum: [a, b], alpha: 0.25}", merged("weighted_sum", (A, B), {"weights": (0.75, 0.25)})),
        ("{slerp: [a, b], alpha: 0.25}", merged("slerp", (A, B), {"weights": (0.75, 0.25)})),
        ("{add_difference: [a], base: c, alpha: 0.25}", merged("add_difference", (C, A), {"weights": (0.25,)})),
        ("{add_difference: [a, b], base: c, alpha: 0.25}", merged("add_difference", (C, A, B), {"weights": (1.0, 0.25)})),
        ("{geometric_sum: [a, b], alpha: 0.25}", merged("geometric_sum", (A, B), {"alpha": 0.25})),
        ("{ties: [a, b], base: c, alpha: 0.25}", over(C, "ties", [A, B], {}, 0.25)),
        ("{weighted_sum: [a, b], base: c, alpha: 0.25}", over(C, "weighted_sum", [A, B], {}, 0.25)),
        ("{extract_features: [a, b], base: c, alpha: 0.25, strength: 0.5}", over(C, "extract_features", [A, B], {"alpha": 0.25}, 0.5)),
        # base
        ("{difference: [a, b]}", None),
        ("{add: [a, {difference: [b, c]}]}", merged("add", (A, delta(B, C)))),
        ("{train_difference: [a, b, c]}", merged("train_difference", (A, B, C))),
        ("{train_difference: [a, b], base: c}", merged("train_difference", (A, B, C))),
        ("{ties: [a, {lora: style}], base: c, strength: 0.5}", over(C, "ties", [A, STYLE], {}, 0.5)),
        ("{n_average: [a, b], base: {n_average: [c, d]}}", over(merged("n_average", (C, D)), "n_average", [A, B], {})),
        # strength
        ("{add: [a, {difference: [b, c], strength: 0.5}], weights: [0.5]}", merged("add", (A, delta(B, C)), {"weights": (0.25,)})),
        ("{add: [a, {sum: [{lora: style, strength: 2}]}]}", merged("add", (A, merged("sum", (STYLE,), {"weights": (2.0,)})))),
        (
            "{add: [a, {n_average: [{lora: style, strength: 2}, {difference: [b, c]}], strength: 0.5}]}",
            merged("add", (A, merged("n_average", (merged("sum", (STYLE,), {"weights": (2.0,)}), delta(B, C)))), {"weights": (0.5,)}),
        ),
        (
            "{ties: [{lora: style, strength: 2}, b], base: c}",
            over(C, "ties", [merged("sum", (STYLE,), {"weights": (2.0,)}), B], {}),
        ),
        (
            "{add: [a, {lora: style, strength: {blocks: GRAD_V, default: 0.5}}]}",
            merged("add", (A, STYLE), {"weights": (GRADED,)}),
        ),
        (
            "{add: [a, {lora: style, strength: {blocks: GRAD_V, default: 0.5}}], weights: [2]}",
            merged("add", (A, merged("sum", (STYLE,), {"weights": (GRADED,)})), {"weights": (2.0,)}),
        ),
        (
            "{add: [a, {lora: style, strength: 2}], weights: [{blocks: GRAD_V, default: 0.5}]}",
            merged("add", (A, merged("sum", (STYLE,), {"weights": (2.0,)})), {"weights": (GRADED,)}),
        ),
        # one alone needs no brackets
        ("{add: [a, {truncate_rank: {difference: [b, c]}, rank: 4}]}", merged("add", (A, merged("truncate_rank", (delta(B, C),), {"rank": 4.0})))),
        # statistics, flags, other kinds of models
        (
            "{fisher: [a, b], statistics: [c, x/s]}",
            merged("fisher", (A, B), statistics=("c", "x/s")),
        ),
        ("{weighted_sum: [a, b], weights: [1, 2e-1], normalize: no}", merged("weighted_sum", (A, B), {"weights": (1.0, 0.2), "normalize": False})),
        ("{karcher: [a, b], max_iter: 20, tol: 1e-3}", merged("karcher", (A, B), {"max_iter": 20, "tol": 0.001})),
        ("{model: a, ema: true, rebasin: b}", Model("a", True, Model("b"))),
        ("{model: a, rebasin: {model: b, ema: true}}", Model("a", to=Model("b", True))),
    ],
)  # fmt: skip
def test_a_node(text: str, meant: Node | None) -> None:
    if meant is None:
        assert wrong(f"merge: {text}") == (
            "r.yaml, line 1: the result is a difference, expected a model", "add: [model, difference] makes a model of it",
        )  # fmt: skip
        return
    assert parse(f"merge: {text}").root == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("0.5", 0.5),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("'0.5=0.5'", Varied(1.0, "0.5=0.5")),
        ("IN00-IN05=0.3", Varied(1.0, "IN00-IN05=0.3")),
        ("GRAD_V", Varied(1.0, "GRAD_V")),
        ("[0, 0.1, 1]", Varied(1.0, "0.0,0.1,1.0")),
        ("{IN00-IN05: 0.3, attn.q: GRAD_A, '*': 1}", Varied(1.0, "IN00-IN05=0.3, attn.q=GRAD_A, *=1.0")),
        ("{IN00: 0.3, default: 0.7}", Varied(0.7, "IN00=0.3")),
        ("{blocks: IN00=0.3, default: 0.7}", Varied(0.7, "IN00=0.3")),
        ("{blocks: [0, 0.1, 1], default: 0.7}", Varied(0.7, "0.0,0.1,1.0")),
        ("|\n    IN00=0.3\n    OUT=0.4", Varied(1.0, "IN00=0.3\nOUT=0.4\n")),
    ],
)
def test_a_number(text: str, meant: float | Varied) -> None:
    recipe = parse(f"merge:\n  train_difference: [a, b, c]\n  alpha: {text}\n")
    assert isinstance(recipe.root, Merge)
    assert recipe.root.parameters["alpha"] == meant


def test_numbers_for_blocks_know_where_they_were_said() -> None:
    recipe = parse("merge:\n  train_difference: [a, b, c]\n  alpha: IN00=0.3\n")
    assert isinstance(recipe.root, Merge)
    assert recipe.root.parameters["alpha"].where == "r.yaml, line 3, train_difference, alpha"


def test_a_number_without_a_default_may_be_said_for_everything() -> None:
    recipe = parse("merge: {nearswap: [a, b], threshold: 'IN00=0.3, *=0.5'}")
    assert isinstance(recipe.root, Merge)
    assert recipe.root.parameters["threshold"] == Varied(0.5, "IN00=0.3, *=0.5")


def test_alpha_of_two_models_for_blocks() -> None:
    recipe = parse("merge: {weighted_sum: [a, b], alpha: IN00=0.3}")
    assert isinstance(recipe.root, Merge)
    share = Varied(0.5, "IN00=0.3")
    assert recipe.root.parameters["weights"] == (replace(share, complement=True), share)


# ------------------------------------------------------------------------------------------------ files and names


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("a.safetensors", "x/y/a.safetensors"),
        ("./a.safetensors", "x/y/a.safetensors"),
        ("../a.safetensors", "x/y/../a.safetensors"),
        ("sd-1.5", "x/y/sd-1.5"),
        ("/a.safetensors", "/a.safetensors"),
        ("hf://owner/name@main/a.safetensors", "hf://owner/name@main/a.safetensors"),
        ("2024-01-01", "x/y/2024-01-01"),
        ("'1'", "x/y/1"),
    ],
)
def test_relative_files_lie_beside_the_recipe(said: str, meant: str) -> None:
    recipe = parse(f"merge: {{add: [{{model: {said}, rebasin: {said}}}, {{lora: {said}}}]}}\nlike: {said}", "x/y")
    assert recipe.root == merged("add", (Model(meant, to=Model(meant)), Lora(meant)))
    assert recipe.like == Model(meant)


def test_a_file_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("merge: ~/a.safetensors", "x").root == Model("/home/me/a.safetensors")


def test_a_name_goes_before_a_file_of_that_name() -> None:
    recipe = parse("models: {a: b}\nmerge: {n_average: [a, ./a]}")
    assert recipe.root == merged("n_average", (B, A))


def test_a_name_may_stand_for_any_node_and_in_any_order() -> None:
    text = """
        models:
          sum: {add: [m, s]}
          s: {lora: f, strength: 0.5}
          f: style
          m: {model: a, ema: true}
        merge: sum
        like: m
        vae: m
        text_encoder: m
    """
    model = Model("a", ema=True)
    assert parse(text) == Recipe(merged("add", (model, STYLE), {"weights": (0.5,)}), model, (model,), "1", "1")


def test_an_alias_of_yaml_is_what_it_repeats() -> None:
    text = "merge:\n  n_average:\n    - &a {model: a, ema: true}\n    - *a\n"
    model = Model("a", ema=True)
    assert parse(text).root == merged("n_average", (model, model))


@pytest.mark.parametrize(
    ("said", "vae", "text_encoder"),
    [
        ("", "1", "merge"),
        ("vae: 2\ntext_encoder: 3", "2", "3"),
        ("vae: '2'\ntext_encoder: 1", "2", "1"),
        ("vae: merge\ntext_encoder: merge", "merge", "merge"),
        ("vae: two\ntext_encoder: two", "2", "2"),
        ("vae: b\ntext_encoder: b", "b", "2"),
        ("vae: base\ntext_encoder: base", "3", "3"),
        ("vae: ./merge", "merge", "merge"),
        ("like: two", "2", "merge"),
        ("like: base", "3", "merge"),
        ("like: other.safetensors", "1", "merge"),
        ("like: two\nvae: 1", "1", "merge"),
    ],
)
def test_whose_vae_and_text_encoder(said: str, vae: str, text_encoder: str) -> None:
    models = "models: {base: c, two: b}"
    recipe = parse(f"{models}\nmerge: {{add_difference: [a, two], base: base}}\n{said}")
    assert recipe.numbered == (A, B, C)
    assert (recipe.vae, recipe.text_encoder) == (vae, text_encoder)


# ------------------------------------------------------------------------------------------------ mistakes

NODES = "a name, a file, {model: FILE}, {lora: FILE} or {METHOD: [inputs]}"
A_NAME = "a name is letters, digits, and _ . + - after the first; no number, and not merge"
MODEL_OF_IT = "add: [model, difference] makes a model of it"
DELTA_OF_IT = "difference: [model, base] makes one of two models; or say which base"

MISTAKES = [
    # the file
    ("", "1: found nothing, expected merge: and a tree of models", None),
    ("# nothing", "1: found nothing, expected merge: and a tree of models", None),
    ("- a", "1: found a list, expected keys with values: merge, models, …", None),
    ("a.safetensors", "1: found 'a.safetensors', expected keys with values: merge, models, …", None),
    ("seed: 0\nmrege: a", "2: unknown key 'mrege' of a recipe", "did you mean 'merge'?"),
    ("seed: 0", "1: has no merge", "merge: begins the tree of models"),
    ("merge: a\nseed: 1\nmerge: b", "3: the key 'merge' stands twice, first in line 1", None),
    # YAML
    ("merge:\n  n_average: [a, b\nvae: 1", "3: cannot be read as YAML: while parsing a flow sequence, expected ',' or ']', but got ':'", None),
    ("merge:\n\t- a", "2: cannot be read as YAML: while scanning for the next token, found character '\\t' that cannot start any token", "indent with spaces"),
    ("merge:\n  train_difference: [a, b, c]\n  alpha: {*: 3}", "3: cannot be read as YAML: while scanning an alias, expected alphabetic or numeric character, but found ':'", 'a text that begins with * stands in quotes: "*": 0.5'),
    ("merge: a\n---\nmerge: b", "2: cannot be read as YAML: expected a single document in the stream, but found another document", None),
    ("merge: *b", "1: cannot be read as YAML: found undefined alias 'b'", None),
    ("seed: 0\nmerge: a\x00", "2: found '\\x00', which no YAML may hold", None),
    ("merge: &a\n  n_average: [*a]", "1: an alias stands in what it repeats", None),
    ("merge: !!python/name:os.system x", "1: found the tag '!!python/name:os.system', expected none", None),
    ("merge: !x {n_average: [a]}", "1: found the tag '!x', expected none", None),
    ("merge: !!set {a, b}", "1: found the tag '!!set', expected none", None),
    ("merge: {[a]: b}", "1: found a list or keys as a key, expected a word", None),
    ("merge: {<<: {model: a}}", "1: unknown merge method '<<'", "weightops merge --list-methods shows them"),
    # nodes
    ("merge: 3", f"1: found 3, expected {NODES}", "in quotes it is a name, or a file"),
    ("merge:", f"1: found nothing, expected {NODES}", None),
    ("merge: [a, b]", f"1: found a list, expected {NODES}", None),
    ("merge: {alpha: 0.3}", f"1: found no method, expected {NODES}", None),
    ("merge:\n  weigthed_sum: [a, b]", "2: unknown merge method 'weigthed_sum'", "did you mean 'weighted_sum'?"),
    ("merge:\n  modle: a", "2: unknown merge method 'modle'", "did you mean 'model'?"),
    ("merge:\n  xyz: a", "2: unknown merge method 'xyz'", "weightops merge --list-methods shows them"),
    ("merge:\n  ties: [a, b]\n  base: c\n  denisty: 0.3", "4: ties has no setting 'denisty'", "did you mean 'density'?"),
    ("merge:\n  n_average: [a, b]\n  zzz: 3", "3: n_average has no setting 'zzz'", "known are base, strength, alpha, statistics"),
    ("merge:\n  n_average: [a, b]\n  ties: [c]", "3: n_average has no setting 'ties'", "a node has one method"),
    ("merge: {model: a, em: true}", "1: unknown key 'em' of a model", "did you mean 'ema'?"),
    ("merge: {model: a, ema: 1}", "1: ema: found 1, expected true or false", None),
    ("merge: {model: [a]}", "1: found a list, expected a file", None),
    ("merge: {lora: 2}", "1: found 2, expected a file", "in quotes it is a file"),
    ("merge: {lora: x, alpha: 3}", "1: unknown key 'alpha' of a LoRA", "known are lora, strength"),
    ('merge: ""', "1: found an empty text, expected a file", None),
    # kinds
    ("merge: {lora: a}", "1: the result is a difference, expected a model", MODEL_OF_IT),
    ("merge:\n  ties:\n    - {difference: [a, b]}\n    - b", "4: ties: takes a difference there, found a model: 'b'", DELTA_OF_IT),
    ("merge:\n  n_average:\n    - a\n    - {lora: x}", "4: n_average: takes models or differences, all alike, found both: 'x' is a difference", MODEL_OF_IT),
    ("merge:\n  add:\n    - {difference: [a, b]}\n    - {lora: x}", "3: add: takes a model there, found a difference: difference", MODEL_OF_IT),
    ("merge:\n  ties: [a]\n  base: {lora: x}", "3: base: found a difference, expected a model", None),
    ("merge:\n  model: a\n  strength: 0.3", "3: a model has no strength, a difference or a LoRA has", "weights: of a method has one for each model"),
    ("merge:\n  n_average: [a, b]\n  strength: 0.3", "3: a model has no strength, and n_average makes one here; a difference or a LoRA has", None),
    # how many, and which base
    ("merge: {n_average: []}", "1: n_average: takes the models *models, found 0", None),
    ("merge:\n  train_difference: [a, b]", "2: train_difference: takes the models a, b, base, found 2", None),
    ("merge:\n  add_difference: [a, b]", "2: add_difference needs a base", "base: FILE, beside the list"),
    ("merge:\n  arcee_fusion: [a, b]\n  base: c", "3: arcee_fusion takes no base", None),
    # settings
    ("merge:\n  nearswap: [a, b]", "2: nearswap needs the parameter 'threshold'", None),
    ("merge:\n  nearswap: [a, b]\n  threshold: IN00=0.3", "3: nearswap, threshold: says no number for the tensors of other blocks", "*=0.5 among the blocks, or {default: 0.5, blocks: …}"),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: 0", "4: ties, density: found 0.0, expected a number above 0 and at most 1", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: true", "4: ties, density: found true, expected a number", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density:", "4: ties, density: found nothing, expected a number", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: .inf", "4, ties, density: '.inf' (character 1): found '.inf', expected SELECTOR=VALUE, a curve or a preset", "curves are linear(a..b), cosine(a..b), smoothstep(a..b); presets GRAD_V, GRAD_A, FLAT_25, FLAT_75, …"),
    ("merge:\n  ties: [a, b]\n  base: c\n  count_votes: 3", "4: ties, count_votes: found 3, expected true or false", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: {}", "4: ties, density: found no blocks, expected {IN00-IN05: 0.3} or the like", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: {IN00: [1]}", "4: ties, density: found a list, expected a number", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: {IN00: 0.1, default: x}", "4: ties, density, default: found 'x', expected a number", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: {blocks: 3}", "4: ties, density, blocks: found 3, expected a text as for --blocks", None),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: {blocks: GRAD_V, IN00: 3}", "4: unknown key 'IN00' of ties, density", "known are blocks, default"),
    ("merge:\n  ties: [a, b]\n  base: c\n  density: IN00-=", "4, ties, density: 'IN00-=' (character 1): found nothing, expected a number, a curve or a preset", "curves are linear(a..b), cosine(a..b), smoothstep(a..b); presets GRAD_V, GRAD_A, FLAT_25, FLAT_75, …"),
    ("merge:\n  karcher: [a, b]\n  max_iter: 2.5", "3: karcher, max_iter: found 2.5, expected a whole number", None),
    ("merge:\n  weighted_sum: [a, b]\n  weights: 3", "3: weighted_sum, weights: found 3, expected a list, a number for each model", None),
    ("merge:\n  weighted_sum: [a, b]\n  weights: [1]", "3: weighted_sum, weights: found 1 weights for 2 models, expected one for each", None),
    ("merge:\n  weighted_sum: [a, b]\n  weights: [1, -1]", "3: weighted_sum, weights: they sum to 0 and cannot be normalised", "normalize: false takes them as they are"),
    ("merge:\n  weighted_sum: [a, b]\n  weights: [1, 1]\n  alpha: 0.5", "4: alpha: stands beside weights, expected one of the two", None),
    ("merge:\n  weighted_sum: [a, b, c]\n  alpha: 0.3", "3: alpha: is for two models, found 3", "weights: has one for each"),
    ("merge:\n  nearswap: [a, b]\n  alpha: 0.3", "3: nearswap takes no alpha", "known are threshold, base"),
    ("merge:\n  ties: [a, b]\n  base: c\n  strength: 1\n  alpha: 1", "5: alpha: stands beside strength, which means the same here", None),
    ("merge:\n  fisher: [a, b]\n  statistics: [c]", "2: fisher: found 1 files of statistics for 2 models, expected one for each", None),
    ("merge:\n  fisher: [a, b]\n  statistics: c", "3: statistics: found 'c', expected a list of files", None),
    ("merge:\n  n_average: [a, b]\n  statistics: [a, b]", "2: n_average: takes no statistics", None),
    ("merge:\n  {model: a, rebasin:\n    {lora: b}}", "3: rebasin: found no model, expected a model whose channels stay", None),
    ("merge:\n  {model: a, rebasin:\n    {model: b, rebasin: c}}", "3: rebasin: found a model that is itself matched to another, expected a model whose channels stay", None),
    # names
    ("merge: a\nmodels: b", "2: found 'b' under models, expected names, each with what it is", None),
    ("merge: a\nmodels:\n  1: b", "3: '1' cannot be a name", A_NAME),
    ("merge: a\nmodels:\n  merge: b", "3: 'merge' cannot be a name", A_NAME),
    ("merge: a\nmodels:\n  a b: b", "3: 'a b' cannot be a name", A_NAME),
    ("models:\n  a: b\n  b: {n_average: [c, a]}\nmerge: a", "3: 'a' is made of itself: a → b → a", None),
    ("models:\n  a: x.safetensors\n  b: y.safetensors\nmerge: a", "3: 'b' stands nowhere in the recipe", "take it out, or put # before it"),
    ("models:\n  sharp: x.safetensors\nmerge: {n_average: [sharp, shrap]}", "3: found 'shrap', no name under models and no file", "did you mean 'sharp'?"),
    ("models:\n  sharp: {n_average: [x, y]}\nmerge: {model: sharp}", "3: found 'sharp', which names more than a file, expected a file or the name of one", None),
    # of the output
    ("merge: a\nvae: 2", "2: vae: there is no model 2, expected 1 to 1", "1 is a"),
    ("merge: a\nvae: -1", "2: vae: there is no model -1, expected 1 to 1", "1 is a"),
    ("merge: a\nvae: 1.5", "2: vae: found 1.5, expected merge, the name or number of a model, or a file", None),
    ("merge: a\nvae: true", "2: vae: found true, expected merge, the name or number of a model, or a file", None),
    ("merge: a\ntext_encoder: 0", "2: text_encoder: there is no model 0, expected 1 to 1", "1 is a"),
    ("merge: a\ntext_encoder: x.safetensors", "2: text_encoder: found 'x.safetensors', expected merge, or a model of the tree", None),
    ("merge: a\ndtype: fp12", "2: dtype: found 'fp12', expected keep, fp32, fp16, bf16, fp8_e4m3, fp8_e5m2", None),
    ("merge: a\ndrop:\n  - ema\n  - clip", "4: drop: found 'clip', expected ema, optimizer, schedule, vae, text_encoder, safety_checker", None),
    ("merge: a\nvae: x.safetensors\ndrop: vae", "3: drops the VAE that vae takes from 'x.safetensors'", None),
    ("merge: a\non_mismatch: keep", "2: on_mismatch: found 'keep', expected error, keep-first", None),
    ("merge: a\nseed: -1", "2: seed: found -1, expected a whole number from 0 on", None),
    ("merge: a\nseed: true", "2: seed: found true, expected a whole number from 0 on", None),
    ("merge: a\nseed: 0.5", "2: seed: found 0.5, expected a whole number from 0 on", None),
    ("merge: a\nlike: {n_average: [a, b]}", "2: like: found a tree, expected a model", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_refused_with_its_line(text: str, message: str, hint: str | None) -> None:
    assert wrong(text) == (f"r.yaml, line {message}", hint)


def test_a_text_without_end_is_not_read() -> None:
    text = "merge: a\n#" + "x" * yaml_lines.MAX_CHARACTERS
    assert wrong(text) == ("r.yaml: holds 262,154 characters, expected at most 262,144", None)


def test_depth_is_bounded() -> None:
    text = "merge: " + "[" * 200
    assert wrong(text) == ("r.yaml, line 1: lists and keys lie more than 64 deep", None)
    aliases = "".join(f"  - &a{n} [*a{n - 1}]\n" for n in range(1, 80))
    text = f"merge: a\nseed:\n  - &a0 x\n{aliases}"
    assert wrong(text) == ("r.yaml, line 3: lists and keys lie more than 64 deep, aliases expanded", None)
    names = "".join(f"  n{n}: {{n_average: [n{n + 1}]}}\n" for n in range(100))
    text = f"models:\n{names}  n100: x\nmerge: n0"
    assert wrong(text) == ("r.yaml, line 65: the tree is more than 64 deep", None)


def test_aliases_and_names_do_not_grow_without_bounds() -> None:
    aliases = "".join(f"  - &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    text = f"merge: a\ndrop:\n  - &a0 x\n{aliases}"
    message = "r.yaml, line 3: holds more than 20,000 values, its aliases expanded"
    assert wrong(text) == (message, "name what is needed often under models")
    names = "".join(f"  n{n}: {{n_average: [n{n - 1}, n{n - 1}]}}\n" for n in range(1, 40))
    text = f"models:\n  n0: x\n{names}merge: n39"
    message = (
        "r.yaml, line 11: the tree has more than 2,000 models, LoRAs and methods, what has a name counted each time"
    )
    assert wrong(text) == (message, None)


def test_a_deep_tree_of_names_that_are_read_early_is_refused() -> None:
    """Each name is read where it stands first, and none is read deep."""
    names = "".join(f"  n{n}: {{n_average: [n{n - 1}]}}\n" for n in range(1, 200))
    text = f"models:\n  n0: x\n{names}merge: {{n_average: [{', '.join(f'n{n}' for n in range(200))}]}}"
    message, hint = wrong(text)
    assert message.endswith("the tree is more than 128 deep, what has a name counted each time")
    assert hint is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(
            [*"{}[]:,-*&!#|>'\"% \n\t", "merge: ", "ties", "a", "1", "models:", "base: ", "- ", "  ", "x: "]
        ),
        max_size=25,
    ).map("".join)
)
def test_every_text_is_a_recipe_or_refused(text: str) -> None:
    found: Recipe | UsageError
    try:
        found = parse(text)
    except UsageError as e:
        found = e
    assert kind_of(found.root) == "model" if isinstance(found, Recipe) else found.where.startswith("r.yaml, line ")


# ------------------------------------------------------------------------------------------------ there and back

FILES = [
    "a.safetensors", "a", "b", "./a", "././a", "x/a.safetensors", "y/a.safetensors", "../é b.safetensors", "~/a", "/abs/a.ckpt", "hf://o/n@v1/a.safetensors",
    "1", "1.5", "1e-3", "1.e5", "1:30", "merge", "on", "null", "-", "?", "a: b", "#x", " a ", "a\nb", "\ud800", "'", "{}", "*a", "&a", "<<", "=", "2024-01-01",
    "a" * 200, "merge.safetensors", "x/merge.safetensors",
]  # fmt: skip
files = st.sampled_from(FILES)
references = st.none() | st.builds(Model, files, st.booleans())
models = st.builds(Model, files, st.booleans(), references) | files.map(Model)
numbers = st.floats(-2, 2, allow_nan=False) | st.sampled_from([0.0, 1.0, 1e-7])
varied = st.builds(
    Varied, numbers, st.sampled_from(["GRAD_V", "IN00=0.3, *=1", "IN00-IN05=0.3;\nNOT attn.q=cosine(0..1)", "0,1,0.5"])
)
weights = numbers | varied | st.just(1.0)


@st.composite
def deltas(draw: Any, depth: int = 2) -> Node:
    kind = draw(st.integers(0, 4 if depth else 1))
    if kind == 0:
        return Lora(draw(files))
    if kind == 1:
        return merged("difference", (draw(trees(depth - 1)), draw(trees(depth - 1))))
    inner = draw(st.lists(deltas(depth - 1), min_size=1, max_size=3))
    if kind == 2:
        return merged("sum", inner, {"weights": tuple(draw(weights) for _ in inner)})
    if kind == 3:
        return merged("truncate_rank", inner[:1], {"rank": float(draw(st.integers(1, 64)))})
    density = draw(st.floats(0.01, 1) | st.builds(Varied, st.floats(0.01, 1), st.just("GRAD_V")))
    return merged("ties", inner, {"density": density, "normalize": draw(st.booleans())})


@st.composite
def trees(draw: Any, depth: int = 3) -> Node:
    kind = draw(st.integers(0, 6)) if depth > 0 else 0
    if kind <= 1:
        return draw(models)
    if kind == 2:
        inputs = draw(st.lists(deltas(depth - 1), min_size=1, max_size=3))
        return merged("add", (draw(trees(depth - 1)), *inputs), {"weights": tuple(draw(weights) for _ in inputs)})
    if kind == 3:
        inputs = draw(st.lists(trees(depth - 1) | deltas(depth - 1), min_size=1, max_size=3))
        name = draw(st.sampled_from(["ties", "sum", "weighted_sum", "n_average"]))
        own = (
            {"weights": tuple(float(n + 1) for n, _ in enumerate(inputs))}
            if name != "n_average" and draw(st.booleans())
            else {}
        )
        return over(draw(trees(depth - 1)), name, inputs, own, draw(weights))
    if kind == 4:
        alpha = draw(st.floats(0, 1) | varied)
        rest = replace(alpha, complement=True) if isinstance(alpha, Varied) else 1.0 - alpha
        return merged("weighted_sum", (draw(trees(depth - 1)), draw(trees(depth - 1))), {"weights": (rest, alpha)})
    if kind == 5:
        inputs = draw(st.lists(trees(depth - 1), min_size=1, max_size=3))
        own = {"weights": tuple(draw(weights) for _ in inputs)}
        return merged("add_difference", (draw(trees(depth - 1)), *inputs), own)
    return merged("train_difference", [draw(trees(depth - 1)) for _ in range(3)], {"alpha": draw(weights)})


@st.composite
def recipes(draw: Any) -> Recipe:
    tree = draw(trees())
    numbered = models_of(tree)
    numbers_of = st.sampled_from([str(n + 1) for n, _ in enumerate(numbered)])
    like = draw(st.sampled_from(numbered) | models)
    # A file that is called like the word, or a number, is another one: ./merge.
    of_files = files.filter(lambda f: f != "merge" and not f.isdecimal())
    return Recipe(
        tree, like, numbered, draw(st.just("merge") | numbers_of | of_files), draw(st.just("merge") | numbers_of),
        draw(st.sampled_from(["keep", "bf16"])), draw(st.sampled_from([(), ("ema", "vae"), ("optimizer",)])),
        draw(st.sampled_from(["error", "keep-first"])), draw(st.sampled_from([0, 7])),
    )  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(recipes())
def test_text_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    if "vae" in recipe.drop and recipe.vae != "merge" and not recipe.vae.isdecimal():
        recipe = replace(recipe, drop=())
    text = recipe_text(recipe)
    assert parse_recipe(text, label="r.yaml", folder=Path()) == recipe
    assert in_words(recipe, {})
    assert drawn(recipe)[0]


@pytest.mark.parametrize("name", [name for name, _ in METHODS])
def test_every_method_can_be_said(name: str) -> None:
    method = METHODS.get(name)
    roles = [method.role(n) for n in range(max(2, len(method.models)) if method.is_open else len(method.models))]
    inputs: list[Node] = [delta(A, B) if role == "Delta" else Model(f"{n}.ckpt") for n, role in enumerate(roles)]
    own = {p.name: 0.25 for p in method.parameters if p.default is None and p.kind != "Weights"}
    given = [f"{n}.safetensors" for n in range(len(inputs) - method.fixed)] if method.needs_statistics else []
    tree: Node = merged(name, inputs, own, statistics=given)
    if kind_of(tree) == "delta":
        tree = merged("add", (C, tree), {"weights": (0.5,)})
    recipe = Recipe(tree, models_of(tree)[0], models_of(tree))
    assert parse(recipe_text(recipe)) == recipe
    if method.roles[0] == "Delta":
        tree = over(C, name, [D, *inputs[1:]], own, 0.5, statistics=given)
        recipe = Recipe(tree, models_of(tree)[0], models_of(tree))
        assert parse(recipe_text(recipe)) == recipe


def test_no_method_is_called_like_a_word_of_the_language() -> None:
    assert not {name for name, _ in METHODS} & {"model", "lora", "base", "strength", "alpha", "weights", "statistics"}
    for name, method in METHODS:
        assert not {p.name for p in method.parameters} & {"base", "strength", "statistics", name}, name


def test_files_that_stand_often_have_names() -> None:
    a, b = Model("x/my model.safetensors"), Model("y/my model.safetensors")
    tree = merged("n_average", (a, b, a, b, replace(a, ema=True), Model("7.ckpt"), Model("7.ckpt")))
    assert recipe_text(Recipe(tree, b, models_of(tree), "2")) == textwrap.dedent("""\
        models:
          my-model: x/my model.safetensors
          my-model-2: y/my model.safetensors
          model-7: 7.ckpt
        merge:
          n_average:
          - my-model
          - my-model-2
          - my-model
          - my-model-2
          - {model: my-model, ema: true}
          - model-7
          - model-7
        like: my-model-2
        """)


@pytest.mark.parametrize(
    "tree",
    [
        "weighted_sum: [./a, ./b]\nalpha: 0.25",
        "weighted_sum: [./a, ./b]\nalpha: {blocks: GRAD_V, default: 0.5}",
        "weighted_sum: [./a, ./b, ./c]\nweights: [1.0, 0.5, 2.0]\nnormalize: false",
        "slerp: [./a, ./b]\nalpha: 0.25",
        "add_difference: [./a, ./b]\nbase: ./c\nalpha: 0.5",
        "add_difference: [./a]\nbase: ./c\nalpha: 0.5",
        "add_difference: [./a, ./b]\nbase: ./c\nweights: [0.5, 0.5]",
        "ties: [./a, ./b]\ndensity: 0.3\nbase: ./c\nstrength: 0.5",
        "weighted_sum: [./a, ./b]\nweights: [0.75, 0.25]\nbase: ./c",
        "add:\n- ./a\n- difference: [./b, ./c]\n  strength: 0.5\n- {lora: ./d}",
        "train_difference: [./a, ./b]\nbase: ./c",
        "fisher: [./a, ./b]\nstatistics: [./c, ./d]",
    ],
)
def test_a_tree_as_text(tree: str) -> None:
    text = f"merge:\n{textwrap.indent(tree, '  ')}\n"
    assert recipe_text(parse(text)) == text


def test_a_text_of_one_model_has_a_line_for_each_key() -> None:
    text = "merge: ./a\nvae: merge\ntext_encoder: merge\ndtype: bf16\ndrop: [ema]\nseed: 7\n"
    assert recipe_text(parse(text)) == text.replace("text_encoder: merge\n", "")


def test_models_that_are_numbered_otherwise_are_renumbered() -> None:
    """The command line numbers what it was given: one model twice, and no base."""
    tree = merged("add_difference", (C, A, B, A))
    assert recipe_text(Recipe(tree, A, (A, B, A), vae="3", text_encoder="2")).endswith("\ntext_encoder: 2\n")
    assert parse(recipe_text(Recipe(tree, A, (A, B, A), vae="2"))).vae == "2"
    assert parse(recipe_text(Recipe(tree, A, (A, B, A), vae="3"))).vae == "1"


def test_a_complement_by_itself_cannot_be_said() -> None:
    tree = merged("train_difference", (A, B, C), {"alpha": Varied(0.5, "GRAD_V", complement=True)})
    with pytest.raises(ValueError, match="what is 1 less numbers for blocks stands by itself"):
        recipe_text(Recipe(tree, A, models_of(tree)))


# ------------------------------------------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "a"),
        ("{weighted_sum: [a, b], alpha: 0.7}", "0.3·a + 0.7·b"),
        ("{weighted_sum: [a, b, c]}", "0.333333·a + 0.333333·b + 0.333333·c"),
        ("{weighted_sum: [a, b], weights: [1, -2], normalize: false}", "a − 2·b"),
        ("{weighted_sum: [a, b], weights: [-1, 3]}", "−0.5·a + 1.5·b"),
        ("{weighted_sum: [a, b], alpha: IN00=0.3}", "(1 − [IN00=0.3; else 0.5])·a + [IN00=0.3; else 0.5]·b"),
        ("{add_difference: [a, b], base: c, alpha: 0.5}", "c + (a − c) + 0.5·(b − c)"),
        ("{ties: [a, b], base: c, density: 0.3, strength: 0.5}", "c + 0.5·ties(a − c, b − c; density 0.3)"),
        ("{ties: [a, b], base: c, weights: [1, 2], normalize: false}", "c + ties(a − c, b − c; weights 1, 2; normalize false)"),
        ("{train_difference: [a, b, {weighted_sum: [c, d]}], alpha: 0.5}", "train_difference(a, b, 0.5·c + 0.5·d; alpha 0.5)"),
        ("{add: [a, {difference: [b, {n_average: [c, d]}]}]}", "a + (b − n_average(c, d))"),
        ("{add: [a, {difference: [b, {weighted_sum: [c, d]}]}]}", "a + (b − (0.5·c + 0.5·d))"),
        ("{add: [a, {sum: [{lora: style, strength: -2}], strength: 2}]}", "a + 2·(−2·style)"),
        ("{n_average: [{model: a, ema: true}, {model: b, rebasin: a}]}", "n_average(ema(a), rebasin(b; to a))"),
        ("{n_average: [a, {model: b, ema: true, rebasin: {model: c, ema: true}}]}", "n_average(a, ema(rebasin(b; to ema(c))))"),
        ("{fisher: [a, b], statistics: [c, d]}", "fisher(a, b; statistics c, d)"),
        (f"{{add: [a, {{lora: style, strength: '{', '.join(f'IN0{n}=0.{n}' for n in range(8))}'}}]}}", "a + [IN00=0.0, IN01=0.1, IN02=0.2, IN03=0.3,…; else 1]·style"),
    ],
)  # fmt: skip
def test_a_tree_in_words(text: str, words: str) -> None:
    assert in_words(parse(f"merge: {text}"), {}) == words


def test_settings_and_bases_are_drawn() -> None:
    text = "merge: {train_difference: [a, {karcher: [b, c], weights: [1, GRAD_V]}, d], alpha: OUT=0.3}"
    assert drawn(parse(text)) == (
        "train_difference, alpha [OUT=0.3; else 1]",
        (
            ("a", ()),
            (
                "karcher, max_iter 10, tol 1e-05",
                (("b", ()), ("[GRAD_V; else 1] × c", ())),
            ),
            ("base: d", ()),
        ),
    )
