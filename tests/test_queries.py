"""Query heads cut one by one: as many of each that share keys and values, and keys and values stay whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.checks import check_steps
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess, prompt
from secateur.registry import methods
from secateur.unit_budgets import counted

# Several query heads share keys and values, and lie apart from them.
SHARED = (
    "llama", "llama_mqa", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3",
    "mixtral", "qwen2_moe", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "llama" else pytest.mark.every) for n in SHARED])
def test_query_heads_go_and_keys_and_values_stay(
    name: str, model: Callable[..., Path], clean: CleanProcess, tmp_path: Path
) -> None:
    source, output = model(name), tmp_path / "out"
    recipe = {"steps": [{"random_units": {"axis": "queries", "ratio": 0.5}}]}
    secateur.compress(
        source, recipe=secateur.Recipe.parse(recipe), output=output, evaluate=False, shard_bytes=1, clean=clean
    )
    before, result = open_model(source).anatomy, AutoModelForCausalLM.from_pretrained(output)
    after = open_model(output).anatomy
    for old, new in zip(before.blocks, after.blocks, strict=True):
        assert old.attention and new.attention and old.attention.queries
        together = old.attention.heads // old.attention.kv_heads
        assert new.attention.kv_heads == old.attention.kv_heads
        assert new.attention.heads == old.attention.kv_heads * round(together / 2)
        assert new.attention.head_dim == old.attention.head_dim
        assert result.get_parameter(new.attention.o[0]).numel() * together == round(together / 2) * (
            AutoModelForCausalLM.from_pretrained(source).get_parameter(old.attention.o[0]).numel()
        )
    words = torch.tensor([prompt(tiny.VOCABULARY)])
    cached, plain = (
        result.generate(words, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_as_many_of_each_that_share_keys_and_values(model: Callable[..., Path], tmp_path: Path) -> None:
    """The best of each set stay, not the best of all."""
    source = open_model(model("llama"))
    group = source.anatomy.blocks[0].attention.queries
    size = group.count // group.sets
    assert group.sets > 1 and size > 1
    from secateur.network.views import units_of

    units = units_of(source, 0, "queries", group.sets)
    scores = torch.arange(group.count, dtype=torch.float32)
    assert units.best(scores).kept.tolist() == [size * (n + 1) - 1 for n in range(group.sets)]


@pytest.mark.parametrize(
    "method", [name for name, each in methods().items() if each.scope == "units" and "queries" in each.axes]
)
def test_every_method_that_claims_queries(
    method: str, model: Callable[..., Path], clean: CleanProcess, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.json"
    drawn = torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    ids.write_text(json.dumps(drawn.tolist()))
    steps = [{method: {"axis": "queries", "ratio": 0.5}}]
    learns = secateur.Recipe.parse({"steps": steps}).calibrated
    calibration = {"calibration": {"data": str(ids), "samples": 6, "length": 16}} if learns else {}
    output = tmp_path / "out"
    secateur.compress(
        model("llama"),
        recipe=secateur.Recipe.parse({"steps": steps, **calibration}),
        output=output,
        evaluate=False,
        clean=clean,
    )
    found = open_model(output).anatomy.blocks[0].attention
    assert found.heads == found.kv_heads == open_model(model("llama")).anatomy.blocks[0].attention.kv_heads


def test_differing_numbers_make_a_heterogeneous_model(
    model: Callable[..., Path], clean: CleanProcess, tmp_path: Path
) -> None:
    ratios = [0.5, *[0.0] * (tiny.BLOCKS - 1)]
    recipe = {"steps": [{"magnitude_units": {"axis": "queries", "ratios": ratios}}]}
    output = tmp_path / "out"
    secateur.compress(model("llama"), recipe=secateur.Recipe.parse(recipe), output=output, evaluate=False, clean=clean)
    heads = [block.attention.heads for block in open_model(output).anatomy.blocks]
    assert heads[0] < heads[1] and "per_layer_config" in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "axis", "said"),
    [
        ("llama_mha", ["queries"], "choose axis=heads"),
        ("llama", ["heads", "queries"], "make two of it"),
    ],
)
def test_what_cannot_be_cut(name: str, axis: list[str], said: str, model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match=said):
        secateur.compress(
            model(name),
            recipe=secateur.Recipe.parse({"steps": [{"random_units": {"axis": axis}}]}),
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axes", [("heads", "queries"), ("queries", "heads")])
def test_heads_and_queries_go_in_two_steps(
    axes: tuple[str, str], model: Callable[..., Path], clean: CleanProcess, tmp_path: Path
) -> None:
    """Heads take their queries along, and what is foretold is what the run does."""
    recipe = secateur.Recipe.parse({"steps": [{"random_units": {"axis": axis, "ratio": 0.5}} for axis in axes]})
    source = model("llama")
    left = check_steps(open_model(source), recipe.steps)
    assert left.sizes["heads"] == left.sizes["queries"] == dict.fromkeys(range(tiny.BLOCKS), 1)
    secateur.compress(source, recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean)
    found = open_model(tmp_path / "out")
    assert all(block.attention.heads == block.attention.kv_heads == 1 for block in found.anatomy.blocks)
    assert counted(open_model(source), "parameters", left.sizes) == found.anatomy.parameters


def test_an_allocation_divides_query_heads(model: Callable[..., Path], clean: CleanProcess, tmp_path: Path) -> None:
    # between one and two blocks without half of their queries
    step = {"magnitude_units": {"axis": "queries", "target": 164_000, "allocation": "flap_search"}}
    output = tmp_path / "out"
    secateur.compress(
        model("llama"), recipe=secateur.Recipe.parse({"steps": [step]}), output=output, evaluate=False, clean=clean
    )
    heads = [block.attention.heads for block in open_model(output).anatomy.blocks]
    assert sorted(heads) in ([2, 4, 4], [2, 2, 4])


def test_equal_errors_of_query_heads(model: Callable[..., Path], clean: CleanProcess, tmp_path: Path) -> None:
    """Query heads add to the stream that attention adds to."""
    ids = tmp_path / "ids.json"
    drawn = torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    ids.write_text(json.dumps(drawn.tolist()))
    step = {"wanda_units": {"axis": "queries", "target": 164_000, "allocation": "equal_error"}}
    calibration = {"data": str(ids), "samples": 6, "length": 16}
    recipe = secateur.Recipe.parse({"steps": [step], "calibration": calibration})
    secateur.compress(model("llama"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean)
    heads = [block.attention.heads for block in open_model(tmp_path / "out").anatomy.blocks]
    assert sorted(heads) in ([2, 4, 4], [2, 2, 4])
