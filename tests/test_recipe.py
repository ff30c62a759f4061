"""Recipes: read, checked, overridden, repeated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import command
import outcomes
from secateur import Recipe, RequestError

TWO = {"steps": [{"random_units": {"ratio": 0.2}}, {"magnitude_units": {"ratio": 0.25}}]}


def test_defaults_are_filled_in_and_plain_data_comes_back() -> None:
    recipe = Recipe.parse({"seed": 4, "steps": ["random_units", {"prunenet": None}]})
    defaults = {"ratio": 0.2, "of": "units", "target": None, "axis": ["neurons"], "ratios": None, "multiple_of": 32}
    assert recipe.steps[0].parameters == {**defaults, "allocation": None}
    assert recipe.steps[1].parameters["mode"] == "stable"
    assert Recipe.parse(recipe.plain()) == recipe
    assert Recipe.parse(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe


def test_a_recipe_is_read_from_yaml_and_from_a_receipt(tmp_path: Path) -> None:
    recipe = Recipe.parse(TWO)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TWO))
    (tmp_path / "secateur.json").write_text(json.dumps({"recipe": recipe.plain(), "seconds": 3}))
    assert Recipe.read(tmp_path / "recipe.yaml") == Recipe.read(tmp_path / "secateur.json") == recipe


@pytest.mark.parametrize(
    ("settings", "ratios"),
    [
        ([], [0.2, 0.25]),
        (["random_units.ratio=0.5"], [0.5, 0.25]),
        (["1.ratio=0.5"], [0.2, 0.5]),
        (["0.ratio=0.1", "magnitude_units.ratio=3e-1"], [0.1, 0.3]),
    ],
)
def test_settings_find_their_step(settings: list[str], ratios: list[float]) -> None:
    changed = Recipe.parse(TWO).override(settings)
    assert [step.parameters["ratio"] for step in changed.steps] == ratios


def test_settings_are_yaml_and_change_nothing_else() -> None:
    recipe = Recipe.parse({"seed": 9, "steps": [{"prunenet": {"episodes": 7}}]})
    changed = recipe.override(["ratios=[0.1, 0.2]", "mode=reference", "learning_rate=1e-3"])
    assert changed.steps[0].parameters == recipe.steps[0].parameters | {
        "ratios": [0.1, 0.2], "mode": "reference", "learning_rate": 0.001,
    }  # fmt: skip
    assert changed.seed == 9 and recipe.steps[0].parameters["mode"] == "stable"


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("ratio=0.5", "several steps could be meant"),
        ("2.ratio=0.5", "no step '2'"),
        ("prunenet.ratio=0.5", "no step 'prunenet'"),
        ("0.ration=0.5", "Did you mean 'ratio'"),
        ("0.ratio", "key=value"),
        ("0.ratio=[", "not valid YAML"),
        ("0.ratio=1.0", "less than 1"),
    ],
)
def test_settings_that_are_refused(setting: str, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Recipe.parse(TWO).override([setting])


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (
            {"calibration": {"sample": 3}},
            r"^calibration has no entry 'sample'\. Did you mean 'samples'\? It has: data, samp",
        ),
        (
            {"evaluate": {"windws": 3}},
            r"^evaluate has no entry 'windws'\. Did you mean 'window(s)?'\? It has: text, wind",
        ),
        ({"evaluate": {"qqq": 3}}, r"^evaluate has no entry 'qqq'\. It has: text"),
        (
            {"evaluate": {"windows": "many"}},
            r"^recipe: evaluate\.windows='many' was refused: input should be a valid int",
        ),
        ({"calibration": {"samples": 0}}, r"^recipe: calibration\.samples=0 was refused"),
        ({"calibrtion": {}}, r"Did you mean 'calibration'"),
    ],
)
def test_entries_that_are_refused(raw: dict, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Recipe.parse({"steps": ["wanda"], **raw})
    if "calibration" in raw:
        [(name, value)] = raw["calibration"].items()
        with pytest.raises(RequestError, match=what):
            Recipe.parse({"steps": ["wanda"]}).override([f"calibration.{name}={value}"])


def test_identity_holds_what_decides_the_bytes(tmp_path: Path) -> None:
    policy = tmp_path / "policy.safetensors"
    policy.write_bytes(b"one")
    recipe = Recipe.parse({"steps": [{"prunenet": {"policy": str(policy)}}]})
    first = recipe.identity()
    assert Recipe.parse(recipe.plain() | {"model": "elsewhere", "evaluate": False}).identity() == first
    for change in ({"seed": 1}, {"dtype": "float16"}, {"steps": ["prunenet"]}):
        assert Recipe.parse(recipe.plain() | change).identity() != first
    policy.write_bytes(b"two")
    assert recipe.identity() != first, "the content of a file counts, not its name"


def test_missing_files_are_named(tmp_path: Path) -> None:
    for raw in (
        {"steps": [{"prunenet": {"policy": str(tmp_path / "none.st")}}]},
        {"steps": ["prunenet"], "evaluate": {"text": str(tmp_path / "none.txt")}},
    ):
        with pytest.raises(RequestError, match=r"none\."):
            Recipe.parse(raw).check_files()


@pytest.mark.usefixtures("shared_clean")
def test_a_receipt_repeats_its_run(model: Callable[..., Path], tmp_path: Path) -> None:
    """Two steps, a seed and a dtype that are not the defaults: all from the receipt, the model too."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TWO))
    one, two = tmp_path / "one", tmp_path / "two"
    source = model("llama")
    options = ("--recipe", tmp_path / "recipe.yaml", "--seed", 5, "--dtype", "bfloat16", "--set", "0.ratio=0.4")
    assert command.compress(source, one, *options, method=None).code == 0
    told = command.secateur("compress", "--recipe", one / "secateur.json", "--output", two, "--no-evaluate", "--quiet")
    assert told.code == 0, told.err
    assert outcomes.promised(one) == outcomes.promised(two)
    assert json.loads((two / "secateur.json").read_text())["recipe"]["model"] == str(source)
    assert command.compress(source, tmp_path / "three", *options[:2], method=None).code == 0
    assert outcomes.promised(tmp_path / "three") != outcomes.promised(one)


@pytest.mark.usefixtures("shared_clean")
def test_the_policy_of_one_run_serves_another(model: Callable[..., Path], tmp_path: Path) -> None:
    """Trained once, used at another ratio; with two steps each keeps its own."""
    source = model("llama")
    assert command.compress(source, tmp_path / "one", "--set", "episodes=2", method="prunenet").code == 0
    policy = tmp_path / "one" / "secateur" / "policy.safetensors"
    again = ("--set", f"policy={policy}", "--set", "ratio=0.4")
    assert command.compress(source, tmp_path / "two", *again, method="prunenet").code == 0
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["intermediate_size"] == 96

    steps = [{"prunenet": {"episodes": 2}}, {"prunenet": {"episodes": 1, "ratio": 0.25}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"steps": steps}))
    told = command.compress(source, tmp_path / "both", "--recipe", tmp_path / "recipe.yaml", method=None)
    assert told.code == 0, told.err
    kept = [tmp_path / "both" / "secateur" / f"step-{step}" / "policy.safetensors" for step in (0, 1)]
    assert kept[0].read_bytes() == policy.read_bytes() != kept[1].read_bytes()
