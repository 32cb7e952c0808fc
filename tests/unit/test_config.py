"""Recipes: reading YAML, typed conversion, overrides, origins, errors that name the place and the mend."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import (
    STAGE_KINDS,
    LoadedRecipe,
    Recipe,
    RecipeError,
    load_recipe,
    resolved_yaml,
    shipped_recipes,
    stage_class,
)
from pipelines.recipe_source import Node, apply_override, dump_scalar, dump_yaml, nearest, parse_override, parse_recipe
from pipelines.schema import Builder, describe, field_docs, flatten, plain
from pipelines.show import recipe_json, render_recipe
from policy.config import AdvantageConfig, LoraConfig, LossConfig, OptimizerConfig, RouterConfig

MINIMAL = """\
name: small
model: {preset: tiny}
stages:
  - kind: sft
    data: {source: "jsonl:train.jsonl"}
    steps: 3
  - kind: grpo
    data:
      source: jsonl:train.jsonl
    rewards: {functions: [{path: accuracy}]}
    steps: 4
    optimizer:
      lr: 1e-6
"""


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf.

    Attributes:
        x: how far, metres;
            counted from zero.
        y, z: the other two.
    """

    x: int = 1
    y: float = 0.5
    z: str = "z"

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x must be >= 0, got {self.x}")


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A tree."""

    must: int
    leaf: Leaf = field(default_factory=Leaf)
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    flag: bool = False
    maybe: int | None = None
    either: int | str = 0
    mode: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    params: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    where: Path = Path(".")


def build(text: str, *overrides: str) -> Tree:
    root = parse_recipe(text, "t.yaml")
    for override in overrides:
        apply_override(root, *parse_override(override))
    return Builder().build(Tree, root)


def recipe(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


# -- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("010", 10), ("0x1F", 31), ("0o17", 15),
        ("-3", -3), ("off", "off"), ("yes", "yes"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("12:30", "12:30"), ("1_000", "1_000"), ("2026-01-01", "2026-01-01"), ("'3'", "3"), ("1.5.2", "1.5.2"),
        ("e5", "e5"), ("!!str 3", "3"), ("!!float 3", 3.0),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    node = parse_recipe(f"a: {text}\n", "t.yaml").value["a"]
    assert node.value == value and type(node.value) is type(value)


def test_lines_are_remembered() -> None:
    root = parse_recipe("a: 1\n\nb:\n  c: [2,\n   3]\n", "t.yaml")
    assert str(root.value["a"].origin) == "t.yaml:1"
    assert str(root.value["b"].value["c"].value[1].origin) == "t.yaml:5"
    assert str(root.value["b"].keys["c"]) == "t.yaml:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "t.yaml:3: a is written twice, first at t.yaml:1; remove one"),
        ("a:\n  b: 1\n  b: 1\n", "t.yaml:3: a.b is written twice, first at t.yaml:2; remove one"),
        ("", "t.yaml: the recipe is empty"),
        ("- 1\n", "t.yaml:1: a recipe is a mapping"),
        ("a: [1\n", "t.yaml:2: this is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "t.yaml:2: this is not valid YAML: but found another document"),
        ("1: a\n", "t.yaml:1: recipe: a key must be text, got '1'; quote it"),
        ("a: &x [*x]\n", "t.yaml:1: a.0: an anchor refers to itself"),
        ("a: !!int x\n", "t.yaml:1: a: the tag"),
        ("a: !python/object x\n", "t.yaml:1: a: the tag"),
        ("a: {<<: 3}\n", "t.yaml:1: a: << takes a mapping"),
    ],
)
def test_unusable_yaml_names_the_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        parse_recipe(text, "t.yaml")
    assert "\n" not in str(error.value)


def test_merge_keys_and_aliases() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: &m {y: 3, z: 4}\na: {<<: *b, y: 5}\nc: {<<: [*m, *b]}\n"
    root = parse_recipe(text, "t.yaml")
    assert {k: n.value for k, n in root.value["a"].value.items()} == {"x": 1, "y": 5}
    assert {k: n.value for k, n in root.value["c"].value.items()} == {"y": 3, "z": 4, "x": 1}
    apply_override(root, *parse_override("c.x=9"))
    assert root.value["base"].value["x"].value == 1, "an alias is a copy"


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")) | st.sampled_from("\n:#-'\"{}[]")),
    lambda children: st.lists(children, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1), children, max_size=3),
    max_leaves=8,
)  # fmt: skip


def _values(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _values(item) for key, item in node.value.items()}
    return [_values(item) for item in node.value] if isinstance(node.value, list) else node.value


@given(plain_values)
def test_what_is_written_is_read_back_by_us_and_by_yaml_1_1(value: Any) -> None:
    text = dump_yaml({"a": value})
    assert _values(parse_recipe(text, "t.yaml").value["a"]) == value
    assert yaml.safe_load(text)["a"] == value
    flow = dump_scalar(value)
    assert "\n" not in flow
    assert _values(parse_recipe(f"a: {flow}\n", "t.yaml").value["a"]) == value


@pytest.mark.parametrize("text", ["off", "yes", "1e-6", "12:30", "null", "true", "010", "~", "", "2026-01-01", "0x1"])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert yaml.safe_load(dump_yaml({"a": text}))["a"] == text
    assert _values(parse_recipe(dump_yaml({"a": text}), "t.yaml"))["a"] == text


# -- conversion ----------------------------------------------------------------------------------------------------


def test_every_kind_of_annotation_is_converted() -> None:
    tree = build(
        "must: 3\nleaf: {x: 2}\nleaves: [{x: 4}, {}]\npair: [1, 2]\nflag: true\nmaybe: null\neither: word\nmode: slow\n"
        "colour: blue\nparams: {a: [1, {b: null}]}\nrates: {r: 1}\nnames: [n]\nwhere: some/where\n"
    )
    assert tree == Tree(
        must=3, leaf=Leaf(x=2), leaves=(Leaf(x=4), Leaf()), pair=(1.0, 2.0), flag=True, either="word", mode="slow",
        colour=Colour.BLUE, params={"a": [1, {"b": None}]}, rates={"r": 1.0}, names=["n"], where=Path("some/where"),
    )  # fmt: skip
    assert type(tree.pair[0]) is float and type(tree.rates["r"]) is float and tree.colour is Colour.BLUE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("must: true", "must must be a whole number, got true"),
        ("must: 3.0", "must must be a whole number, got 3.0; write 3"),
        ("must: 1e3", "got 1e3; write 1000"),
        ("must: '3'", "must must be a whole number, got the text '3'; leave the quotes out"),
        ("must:", "must must be a whole number, got nothing"),
        ("must: 1\nflag: 1", "flag must be true or false, got 1"),
        ("must: 1\nflag: yes", "flag must be true or false, got the text 'yes'; write true or false"),
        ("must: 1\nleaf: {y: true}", "leaf.y must be a number, got true"),
        ("must: 1\nleaf: {y: .nan}", "leaf.y must be a finite number, got .nan"),
        ("must: 1\nleaf: {y: .inf}", "leaf.y must be a finite number"),
        ("must: 1\nleaf: {z: 5}", "leaf.z must be text, got 5; write '5' in quotes"),
        ("must: 1\nleaf: 5", "leaf must be a mapping with keys x, y, z"),
        ("must: 1\nleaves: {x: 1}", "leaves must be a list of mappings, got a mapping"),
        ("must: 1\nnames: word", "names must be a list of text, got the text 'word'; write [word]"),
        ("must: 1\npair: [1]", "pair takes 2 values, got 1"),
        ("must: 1\nmaybe: x", "maybe must be a whole number, got the text 'x'"),
        ("must: 1\neither: [1]", "either must be a whole number or text, got a list"),
        ("must: 1\nmode: slwo", "mode must be one of fast, slow, got slwo; did you mean 'slow'?"),
        ("must: 1\ncolour: green", "colour must be one of red, blue, got green"),
        ("must: 1\nrates: {r: x}", "rates.r must be a number, got the text 'x'"),
        ("must: 1\nrates: [1]", "rates must be a mapping, got a list"),
        ("must: 1\nmust_: 2", "unknown key must_; did you mean 'must'?"),
        ("must: 1\nleaf: {xx: 2}", "unknown key leaf.xx; did you mean 'x'?"),
        ("must: 1\nleaf: {qqq: 2}", "unknown key leaf.qqq; valid here: x, y, z"),
        ("flag: true", "must is missing"),
    ],
)
def test_wrong_values_name_line_path_and_mend(line: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        build(f"{line}\n")
    assert str(error.value).startswith(f"t.yaml:{2 if chr(10) in line else 1}: ")
    assert "\n" not in str(error.value)


def test_a_value_error_of_a_dataclass_gets_the_line_of_the_key_it_names() -> None:
    with pytest.raises(RecipeError, match=r"^t\.yaml:4: leaves\.1: x must be >= 0, got -1$"):
        build("must: 1\nleaves:\n  - x: 1\n  - x: -1\n    y: 2\n")
    with pytest.raises(RecipeError, match=r"^command line: leaf: x must be >= 0, got -7$"):
        build("must: 1\n", "leaf.x=-7")


def test_a_programming_error_is_not_taken_for_a_user_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        z: complex = 0j

    with pytest.raises(AssertionError, match="no rule for the annotation"):
        Builder().build(Odd, parse_recipe("z: 1\n", "t.yaml"))


def test_descriptions_of_annotations() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(tuple[float, float]) == "a list of 2 values"
    assert describe(Literal["a", "b"]) == "a | b"
    assert describe(Colour) == "red | blue"
    assert describe(dict[str, int]) == "a mapping"


def test_docs_come_from_the_attributes_section() -> None:
    assert field_docs(Leaf) == {
        "x": "how far, metres; counted from zero.", "y": "the other two.", "z": "the other two."
    }  # fmt: skip
    assert field_docs(Tree) == {}


# -- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_win_and_are_typed() -> None:
    tree = build(
        "must: 1\nleaves: [{x: 1}, {x: 2}]\nleaf: {z: off}\n", "must=5", "leaves.1.x=7", "pair=[3, 4e0]", "leaf.z=12",
        "maybe=null", "params.deep.er=[1, a]", "where=3", "flag=true", "leaf.y=1e-6",
    )  # fmt: skip
    assert tree.must == 5 and tree.leaves == (Leaf(x=1), Leaf(x=7)) and tree.pair == (3.0, 4.0)
    assert tree.leaf == Leaf(z="12", y=1e-6), "a text field takes what was typed"
    assert tree.params == {"deep": {"er": [1, "a"]}} and tree.where == Path("3") and tree.flag


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("must", "an override is written a.b=value, got 'must'"),
        ("=3", "an override is written a.b=value"),
        ("a..b=3", "an override is written a.b=value"),
        ("must='3'", "command line: must must be a whole number, got the text '3'; leave the quotes out"),
        ("must=[1", "command line: must: '[1' is not valid YAML"),
        ("mst=3", "command line: unknown key mst; did you mean 'must'?"),
        ("must.x=3", "command line: must.x: must is a single value (1), so it has no 'x'"),
        ("leaves.5.x=3", "command line: leaves.5: there is no element 5, the last one is 1"),
        ("leaves.first.x=3", "command line: leaves.first: no element is named 'first'"),
        ("leaf.x=true", "command line: leaf.x must be a whole number, got true"),
        ("must=", "command line: must must be a whole number, got nothing"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        build("must: 1\nleaves: [{x: 1}, {x: 2}]\n", override)


def test_list_elements_by_name_and_kind() -> None:
    text = "s:\n  - {kind: eval, name: before}\n  - {kind: eval, name: grpo}\n  - {kind: grpo, name: rl}\n"

    def values(override: str) -> list[Any]:
        root = parse_recipe(text, "t.yaml")
        apply_override(root, *parse_override(override))
        return [item.value.get("x", Node(None, item.origin)).value for item in root.value["s"].value]

    assert values("s.before.x=1") == [1, None, None]
    assert values("s.rl.x=1") == [None, None, 1]
    assert values("s.grpo.x=1") == [None, 1, None], "a name goes before a kind"
    assert values("s.2.x=1") == [None, None, 1]
    with pytest.raises(RecipeError, match="'eval' fits 2 elements; name one by its index \\(0, 1\\)"):
        values("s.eval.x=1")
    with pytest.raises(RecipeError, match="did you mean 'before'"):
        values("s.befor.x=1")


# -- recipes -------------------------------------------------------------------------------------------------------


def test_a_minimal_recipe_and_where_its_values_come_from(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, MINIMAL, "stages.grpo.group_size=4", "seed=7")
    assert [stage.kind for stage in loaded.recipe.stages] == ["sft", "grpo"]
    grpo: Any = loaded.recipe.stages[1]
    assert grpo.optimizer.lr == 1e-6 and grpo.group_size == 4 and loaded.recipe.seed == 7
    origin = {path: str(o).rpartition("/")[2] for path, o in loaded.origins.items()}
    assert origin["name"] == "small.yaml:1"
    assert origin["stages.1.optimizer.lr"] == "small.yaml:13"
    assert origin["stages.1.group_size"] == origin["seed"] == "command line"
    assert origin["stages.1.loss.clip_low"] == origin["engine.max_model_len"] == "default"
    assert set(loaded.origins) == set(flatten(plain(loaded.recipe))), "every leaf has an origin"


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    again = recipe(tmp_path, resolved_yaml(loaded.recipe))
    assert again.recipe == loaded.recipe
    assert yaml.safe_load(resolved_yaml(loaded.recipe)) == plain(loaded.recipe)


@pytest.mark.parametrize("docs", [False, True])
def test_what_show_prints_reads_back_equal(tmp_path: Path, docs: bool) -> None:
    loaded = recipe(tmp_path, MINIMAL, "stages.grpo.steps=9")
    shown = render_recipe(loaded, docs=docs)
    assert recipe(tmp_path, shown).recipe == loaded.recipe
    assert re.search(r"^    steps: 9 +# command line$", shown, re.M)
    assert re.search(r"^name: small +# .*small\.yaml:1$", shown, re.M)
    assert re.search(r"^seed: 0 +# default$", shown, re.M)
    assert ("# samples per problem, >= 2" in shown) == docs


def test_show_as_json(tmp_path: Path) -> None:
    row = recipe_json(recipe(tmp_path))
    assert row["recipe"]["stages"][1]["steps"] == 4
    assert row["origins"]["stages.1.steps"].endswith("small.yaml:11")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 4", "stps: 4", r"small.yaml:11: unknown key stages.1.stps; did you mean 'steps'?"),
        ("steps: 4", "steps: 4\n    group_size: 1", r"small.yaml:12: stages.1: group_size must be >= 2, got 1"),
        ("kind: grpo", "kind: gpro", "small.yaml:7: stages.1.kind: there is no stage kind 'gpro'; did you mean"),
        ("- kind: grpo", "- name: grpo", "small.yaml:7: stages.1 must be a mapping with kind: sft | grpo | eval"),
        ("- kind: grpo", "- kind: grpo\n    name: sft", "stages 0 and 1 are both named 'sft'"),
        ("- kind: grpo", "- kind: grpo\n    name: a/b", "a stage's name is letters, digits"),
        ("name: small", "name: ../up", "small.yaml:1: recipe: name must be a folder name"),
        ("name: small", "name: small\nseed: -1", "small.yaml:2: recipe: seed must be >= 0, got -1"),
        ("{preset: tiny}", "{}", "small.yaml:2: model: set exactly one of model.preset and model.path"),
        ("lr: 1e-6", "lr: -1", "small.yaml:13: stages.1.optimizer: lr must be > 0 and finite, got -1.0"),
        (
            "steps: 4", "steps: 4\n    sampling: {max_tokens: 5000}",
            "small.yaml:12: stages.1.sampling.max_tokens is 5000, but engine.max_model_len is 1024",
        ),
        (
            "steps: 4", "steps: 4\n    gate: {set: hard, min_pass_at_1: 0.2}",
            "small.yaml:12: stages.1.gate.set names 'hard', which no earlier eval stage evaluates",
        ),
        (
            "lr: 1e-6", "lr: 1e-6\n      kind: adamw8bit\nparallel: {ranks: 2}",
            "stages.1.optimizer.kind is 'adamw8bit', which works with one learner rank, and parallel.ranks is 2",
        ),
    ],
)  # fmt: skip
def test_broken_recipes_end_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, MINIMAL.replace(old, new))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_stages_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stages is empty"):
        recipe(tmp_path, "name: a\nmodel: {preset: tiny}\nstages: []\n")
    with pytest.raises(RecipeError, match=r"small.yaml:1: model is missing: the policy that is trained"):
        recipe(tmp_path, "name: a\nstages: []\n")
    with pytest.raises(RecipeError, match=r"stages\.0\.steps is missing: optimizer steps"):
        recipe(tmp_path, MINIMAL.replace("    steps: 3\n", ""))


def test_a_rule_about_a_default_points_to_the_stage(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"small.yaml:7: stages\.1\.sampling\.max_tokens is 256, but"):
        recipe(tmp_path, MINIMAL, "engine.max_model_len=100")


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no shipped recipe 'r1-tin'; did you mean 'r1-tiny'\?"):
        load_recipe("r1-tin")
    (tmp_path / "mine.yaml").write_text("a: 1")
    with pytest.raises(RecipeError, match=r"there is no recipe file .*mein\.yaml; did you mean 'mine.yaml'"):
        load_recipe(tmp_path / "mein.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="this is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(f"{tmp_path}/")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_read_and_states_only_what_differs(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    stated = [path for path, origin in loaded.origins.items() if str(origin) != "default"]
    assert stated and len(stated) < len(loaded.origins)


def _dataclasses(cls: type, seen: set[type]) -> set[type]:
    if cls in seen:
        return seen
    seen.add(cls)
    pending = list(get_type_hints(cls).values())
    while pending:
        hint = pending.pop()
        if is_dataclass(hint) and isinstance(hint, type):
            _dataclasses(hint, seen)
        pending += get_args(hint)
    return seen


ROOTS = (Recipe, *map(stage_class, STAGE_KINDS))
RECIPE_CLASSES = sorted({c for root in ROOTS for c in _dataclasses(root, set())}, key=lambda c: c.__name__)


@pytest.mark.parametrize("cls", RECIPE_CLASSES)
def test_every_key_has_a_sentence_and_every_dataclass_is_frozen(cls: type) -> None:
    missing = [item.name for item in fields(cls) if item.name not in field_docs(cls)]
    assert not missing, f"{cls.__name__}: no sentence for {missing}"
    unknown = set(field_docs(cls)) - {item.name for item in fields(cls)}
    assert not unknown, f"{cls.__name__} documents keys that it does not have: {unknown}"
    params: Any = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert params.frozen and all(item.kw_only for item in dataclasses.fields(cls))


def test_stage_kinds_name_themselves() -> None:
    for kind in STAGE_KINDS:
        default = next(item.default for item in fields(stage_class(kind)) if item.name == "kind")
        assert default == kind


def test_the_nearest_choice() -> None:
    assert nearest("Lr", ["lr", "eps"]) == "; did you mean 'lr'?"
    assert nearest("zzz", ["lr", "eps"]) == "; valid here: lr, eps"
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (LoraConfig, ["alpha"]),
        (AdvantageConfig, ["epsilon"]),
        (LossConfig, ["clip_low", "clip_high", "kl_coef", "importance_cap"]),
        (OptimizerConfig, ["lr", "eps", "weight_decay", "max_grad_norm", "min_lr_ratio"]),
        (RouterConfig, ["bias_rate", "balance_coef"]),
    ],
)
def test_numbers_of_the_policy_are_finite(made: Any, names: list[str]) -> None:
    for name in names:
        for value in (math.inf, math.nan, -math.inf):
            with pytest.raises(ValueError, match=f"^{name} must be "):
                made(**{name: value})
