"""The attention or the feed-forward of single blocks goes alone, and what it is chosen by."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.calibration.flow import FlowPass
from secateur.calibration.samples import Samples
from secateur.forecast import dry_run
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess, prompt

Make = Callable[..., Path]
WORDS = torch.tensor([prompt(tiny.VOCABULARY)])
SEQUENCES = torch.randint(3, tiny.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5)).tolist()
PARTS = ("attention", "feed_forward")
# where the parts stand, written down here, which the engine finds by structure
PATHS = {"llama": ("self_attn", "mlp"), "phi": ("self_attn", "mlp"), "mixtral": ("self_attn", "mlp"),
         "gpt2": ("attn", "mlp")}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def go(model: Any, method: str, output: str | None = "out", **parameters: Any) -> Any:
        (tmp_path / "ids.json").write_text(json.dumps(SEQUENCES))
        recipe = {"steps": [{method: parameters}]}
        if secateur.Recipe.parse(recipe).calibrated:
            recipe["calibration"] = {"data": str(tmp_path / "ids.json"), "samples": 4, "length": 12}  # type: ignore
        return secateur.compress(
            model, recipe=secateur.Recipe.parse(recipe), output=tmp_path / output if output else None, evaluate=False
        )

    return go


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()


def layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def silence(module: nn.Module) -> Any:
    def zeros(_: nn.Module, __: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    return module.register_forward_hook(zeros)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(WORDS).logits


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "mixtral", pytest.param("phi", marks=pytest.mark.every)])
def test_it_computes_what_it_did_with_the_part_silent(
    name: str, part: str, model: Make, run: Callable, clean: CleanProcess, tmp_path: Path
) -> None:
    said = run(model(name), "layer_drop", part=part, metric="random", remove=2).receipt
    blocks = said["decisions"][0]["blocks"]
    assert (blocks["part"], len(blocks["removed"]), blocks["of"]) == (part, 2, 3) and said["code"]
    result, dense = loaded(tmp_path / "out"), loaded(model(name))
    path = PATHS[name][PARTS.index(part)]
    inside = [p.numel() for i in blocks["removed"] for p in layers(dense)[i].get_submodule(path).parameters()]
    assert sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in result.parameters()) == sum(inside) > 0
    for index in blocks["removed"]:
        silence(layers(dense)[index].get_submodule(path))
    torch.testing.assert_close(logits(result), logits(dense), atol=1e-5, rtol=1e-5)
    there = clean.logits(tmp_path / "out", WORDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(result), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = result.generate(WORDS, **options)
    assert torch.equal(cached, result.generate(WORDS, use_cache=False, **options))
    assert torch.equal(cached, dense.generate(WORDS, use_cache=False, **options)), "and as the silenced one does"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_flow_is_what_a_part_adds(name: str, part: str, model: Make, tmp_path: Path) -> None:
    """x + f(norm(x)) against x, by the block's own modules: both parts of phi read the block's input."""
    source, ids = open_model(model(name)), torch.tensor(SEQUENCES)
    tokens = FlowPass(source, Samples(list(ids), [], "drawn"), tmp_path, torch.float32, part=part)
    tokens.run()
    found, dense = tokens.flow(), loaded(model(name))
    for index, layer in enumerate(layers(dense)):
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for key, module in zip(("block", *PARTS), (layer, layer.self_attn, layer.mlp), strict=True):

                def note(_: Any, args: Any, kwargs: Any, out: Any, key: str = key, seen: dict = seen) -> None:
                    seen[f"{key} in"] = args[0] if args else kwargs["hidden_states"]
                    seen[f"{key} out"] = out[0] if isinstance(out, tuple) else out

                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            dense(ids)
        x = seen["block in"]
        if part == "feed_forward" and name == "llama":
            x = x + seen["attention out"]
        cosine = torch.cosine_similarity(x.double(), (x + seen[f"{part} out"]).double(), dim=-1).mean()
        assert float(found.cosine[index]) == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_the_loss_is_that_without_the_part(part: str, model: Make, run: Callable, tmp_path: Path) -> None:
    said = run(model("llama"), "layer_drop", part=part, metric="perplexity", remove=1).receipt["decisions"][0]["blocks"]
    ids = torch.tensor(SEQUENCES)
    for index in range(tiny.BLOCKS):
        dense = loaded(model("llama"))
        silence(layers(dense)[index].get_submodule(PATHS["llama"][PARTS.index(part)]))
        with torch.no_grad():
            loss = float(dense(ids, labels=ids).loss)
        assert said["scores"][str(index)] == pytest.approx(loss, abs=1e-4)
    assert said["removed"] == [min(range(3), key=lambda index: said["scores"][str(index)])]


@pytest.mark.parametrize("metric", ["magnitude", "taylor"])
def test_metrics_see_the_part_alone(metric: str, run: Callable) -> None:
    """Neither the other part nor a norm decides: only the feed-forward of the second block is small."""
    dense = tiny.make("llama")
    with torch.no_grad():
        for p in dense.model.layers[1].mlp.parameters():
            p *= 1e-3
        for p in dense.model.layers[2].self_attn.parameters():
            p *= 1e-6
    said = run(dense, "layer_drop", None, part="feed_forward", metric=metric, remove=1).receipt
    assert said["decisions"][0]["blocks"]["removed"] == [1]


@pytest.mark.parametrize("part", PARTS)
def test_a_live_module(part: str, run: Callable, tmp_path: Path) -> None:
    dense = tiny.make("llama")
    live = run(dense, "layer_drop", None, part=part, remove=1).model
    run(dense, "layer_drop", "saved", part=part, remove=1)
    torch.testing.assert_close(logits(live), logits(loaded(tmp_path / "saved")), atol=1e-5, rtol=1e-5)
    assert "Nothing" not in {type(module).__name__ for module in dense.modules()}, "what was given stays whole"


@pytest.mark.every
def test_the_other_part_goes_next_and_gone_ones_do_not_count(model: Make, run: Callable, tmp_path: Path) -> None:
    run(model("llama"), "layer_drop", "one", part="attention", remove=1)
    again = run(tmp_path / "one", "block_influence", "two", part="attention", remove=1).receipt["decisions"][0][
        "blocks"
    ]
    assert again["of"] == 2 and again["removed"] == [1] and again["kept"] == [0]
    both = run(tmp_path / "two", "layer_drop", "three", part="feed_forward", remove=1).receipt
    assert both["decisions"][0]["blocks"]["removed"] == [2] and both["reload_check"]["largest_difference"] < 1e-5
    raw = json.loads((tmp_path / "three/config.json").read_text())
    assert [entry.get("skip") for entry in raw["per_layer_config"].values()] == [
        None, ["attention"], ["attention", "feed_forward"]
    ]  # fmt: skip
    with pytest.raises(secateur.RequestError, match="leaves none of 1"):
        run(tmp_path / "three", "layer_drop", "four", part="attention", remove=1)


@pytest.mark.every
def test_neurons_of_what_is_left_go_too(model: Make, run: Callable, tmp_path: Path) -> None:
    run(model("llama"), "layer_drop", "one", part="attention", remove=1)
    said = run(tmp_path / "one", "random_units", "two", ratio=0.2).receipt
    assert said["reload_check"]["largest_difference"] < 1e-5


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("mamba", {"part": "attention"}, "none of .* has one"),
        ("bloom", {"part": "attention"}, "cannot go without"),  # its modules add to the hidden states by themselves
        ("llama", {"part": "attention", "remove": 3}, "leaves none of 3"),
        ("llama", {"part": "attention", "protect": [5]}, "there are blocks 0 to 2"),
        ("llama", {"part": "norm"}, "part='norm' was refused"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, parameters: dict, said: str, model: Make, run: Any, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=said):
        run(model(name), "layer_drop", **parameters)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_part(model: Make, run: Callable, tmp_path: Path) -> None:
    recipe = secateur.Recipe.parse({"steps": [{"layer_drop": {"part": "attention", "remove": 1}}]})
    told = dry_run(model("llama"), recipe=recipe, output=tmp_path / "dry")
    run(model("llama"), "layer_drop", part="attention", remove=1)
    assert told["parts"] == [{"part": "attention", "kept": 2, "of": 3}] and told["blocks"] is None
    assert told["parameters_after"] == sum(p.numel() for p in loaded(tmp_path / "out").parameters())


def test_two_steps_take_the_part_from_different_blocks(model: Make, tmp_path: Path) -> None:
    steps = [
        {"layer_drop": {"part": "attention", "remove": 1}},
        {"block_influence": {"part": "attention", "remove": 1}},
    ]
    given = {"steps": steps, "calibration": {"data": "self", "samples": 2, "length": 16}}
    told = dry_run(model("llama"), recipe=secateur.Recipe.parse(given), output=tmp_path / "dry")
    assert told["parts"] == [{"part": "attention", "kept": 2, "of": 3}, {"part": "attention", "kept": 1, "of": 2}]
    attention = sum(p.numel() for p in layers(loaded(model("llama")))[0].self_attn.parameters())
    assert told["parameters"] - told["parameters_after"] == 2 * attention
    with pytest.raises(secateur.RequestError, match="leaves none of 1"):  # of those that the first two leave
        given["steps"] = [*steps, steps[0]]
        dry_run(model("llama"), recipe=secateur.Recipe.parse(given), output=tmp_path / "dry")
