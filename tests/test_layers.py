"""Whole blocks removed: what methods are told, what they choose, and what is left of a model."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, OPTConfig

import command
import outcomes
import secateur
import tiny
from secateur import forecast
from secateur.calibration.flow import FlowPass
from secateur.calibration.samples import Samples
from secateur.network import depth
from secateur.network.depth import shortened_config
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess, prompt
from test_distributed import CALIBRATED, torchrun

Make = Callable[..., Path]
WORDS = torch.tensor([prompt(tiny.VOCABULARY)])
IDS = [torch.randint(3, tiny.VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (16, 16, 9, 5)]


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([each.tolist() for each in IDS]))
    return path


@pytest.fixture
def run(ids: Path, clean: CleanProcess) -> Callable[..., secateur.Result]:
    """Compresses by one method, on the tokens of `IDS`."""

    def compress(source: Path, output: Path, method: str, parameters: dict | None = None, **options: Any) -> Any:
        recipe: dict[str, Any] = {"steps": [{method: parameters or {}}]}
        if secateur.Recipe.parse(recipe).calibrated:
            recipe["calibration"] = {"data": str(ids), "samples": len(IDS), "held_out": 0, "length": 16}
        given = {"evaluate": False, "shard_bytes": 1, "clean": clean, **options}
        return secateur.compress(source, recipe=secateur.Recipe.parse(recipe), output=output, **given)

    return compress


def removed(result: secateur.Result) -> list[int]:
    return result.receipt["decisions"][0]["blocks"]["removed"]


def scores(result: secateur.Result) -> list[float]:
    found = result.receipt["decisions"][0]["blocks"]["scores"]
    assert list(found) == [str(index) for index in range(len(found))]
    return list(found.values())


def logits(model: nn.Module, words: Tensor = WORDS) -> Tensor:
    with torch.no_grad():
        return model(words, use_cache=False).logits


def loss(model: nn.Module, sequences: Sequence[Tensor] = IDS) -> float:
    """Mean next-token loss over all predicted tokens."""
    total = sum(
        functional.cross_entropy(logits(model, ids[None])[0, :-1], ids[1:], reduction="sum") for ids in sequences
    )
    return float(total) / sum(len(ids) - 1 for ids in sequences)


def skipped(model: nn.Module, index: int) -> AbstractContextManager[nn.Module]:
    return outcomes.skipped(model, [open_model(model).anatomy.blocks[index].path])


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_flow_is_what_hooks_see(name: str, model: Make, tmp_path: Path) -> None:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    dense = AutoModelForCausalLM.from_pretrained(model(name)).eval()

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            seen.setdefault(index, []).append((x[0].clone(), y[0].clone()))

        return hook

    source = open_model(model(name))
    for block in source.anatomy.blocks:
        dense.get_submodule(block.path).register_forward_hook(note(block.index), with_kwargs=True)
    for ids in IDS:
        logits(dense, ids[None])
    tokens = FlowPass(source, Samples(IDS, [], ""), tmp_path, torch.float32)
    tokens.run()
    flow = tokens.flow()
    assert flow.tokens == sum(map(len, IDS))
    for index, pairs in seen.items():
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        wanted = (
            (flow.cosine, functional.cosine_similarity(x, y).mean()),
            (flow.flat, functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)),
            (flow.norm, x.norm(dim=-1).mean()),
            (flow.change, ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()),
        )
        for found, expected in wanted:
            torch.testing.assert_close(found[index], expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["block_influence", "layer_drop"])
def test_a_block_that_does_nothing_goes_first(method: str, run: Callable, tmp_path: Path) -> None:
    dense = tiny.make("llama")
    with torch.no_grad():
        for parameter in (dense.model.layers[1].self_attn.o_proj.weight, dense.model.layers[1].mlp.down_proj.weight):
            parameter.zero_()
    dense.save_pretrained(tmp_path / "source")
    options = {"metric": "influence"} if method == "layer_drop" else {}
    result = run(tmp_path / "source", tmp_path / "out", method, options)
    assert removed(result) == [1] and abs(scores(result)[1]) < 1e-12 < 1e-3 < scores(result)[0]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(dense))


@pytest.mark.parametrize("given", [{"ratio": 0}, {"remove": 0}, {"ratio": 0.1}])
def test_nothing_removed_changes_nothing(given: dict, run: Callable, model: Make, tmp_path: Path) -> None:
    result = run(model("gemma3"), tmp_path / "out", "layer_drop", given)
    assert removed(result) == []
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model("gemma3"), tmp_path / "out"))
    assert all(torch.equal(p, dict(before.named_parameters())[n]) for n, p in after.named_parameters())
    assert (model("gemma3") / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    assert bool(result.receipt["decisions"][0]["warnings"]) == (given == {"ratio": 0.1}), "less than half a block"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [2]),
        ({"remove": 2}, [1, 2]),
        ({"remove": 1, "ratio": 0.9}, [2]),
        ({"ratio": 0.5}, [1, 2]),  # 1.5 of 3
        ({"ratio": 0.99}, [1, 2]),  # one is left
        ({"protect": [2]}, [1]),
        ({"remove": 2, "protect": [1]}, [0, 2]),
    ],
)
def test_the_last_blocks_go(given: dict, wanted: list, run: Callable, model: Make, tmp_path: Path) -> None:
    assert removed(run(model("llama"), tmp_path / "out", "layer_drop", given)) == wanted


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("vectors", [False, True])
def test_magnitude_sums_weights(p: int, vectors: bool, run: Callable, model: Make, tmp_path: Path) -> None:
    result = run(model("gpt2"), tmp_path / "out", "layer_drop", {"metric": "magnitude", "p": p, "vectors": vectors})
    blocks = AutoModelForCausalLM.from_pretrained(model("gpt2")).transformer.h
    wanted = [
        float(sum(w.detach().double().abs().pow(p).sum() for w in block.parameters() if vectors or w.ndim > 1))
        for block in blocks
    ]
    assert scores(result) == pytest.approx(wanted, rel=1e-6)
    assert removed(result) == [wanted.index(min(wanted))]


def test_one_cosine_of_all_tokens_never_scores_the_last_block(run: Callable, model: Make, tmp_path: Path) -> None:
    given = {"metric": "influence", "influence": "flat", "remove": 2}
    result = run(model("llama"), tmp_path / "out", "layer_drop", given)
    assert removed(result) == [0, 1] and len(scores(result)) == 2
    result = run(model("llama"), tmp_path / "protected", "layer_drop", given | {"protect": [0]})
    assert removed(result) == [1, 2], "unless nothing else is left"


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_taylor_adds_what_the_loss_reacts_to(name: str, run: Callable, model: Make, tmp_path: Path) -> None:
    result = run(model(name), tmp_path / "out", "layer_drop", {"metric": "taylor"})
    dense = AutoModelForCausalLM.from_pretrained(model(name))
    for ids in IDS:
        functional.cross_entropy(dense(ids[None]).logits[0, :-1], ids[1:]).backward()
    wanted = [
        sum(float((w.detach() * w.grad).abs().sum()) for w in block.parameters() if w.ndim > 1 and w.grad is not None)
        for block in dense.model.layers
    ]
    assert scores(result) == pytest.approx(wanted, rel=1e-4)
    assert removed(result) == [wanted.index(min(wanted))]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gptj", "mamba", "opt"])
def test_perplexity_is_that_without_a_block(name: str, run: Callable, model: Make, tmp_path: Path) -> None:
    result = run(model(name), tmp_path / "out", "layer_drop", {"metric": "perplexity"})
    dense = AutoModelForCausalLM.from_pretrained(model(name)).eval()
    wanted = []
    for index in range(tiny.BLOCKS):
        with skipped(dense, index) as shorter:
            wanted.append(loss(shorter))
    assert scores(result) == pytest.approx(wanted, rel=1e-5)
    assert result.receipt["decisions"][0]["notes"]["loss of the dense network"] == pytest.approx(loss(dense), rel=1e-5)
    assert removed(result) == [wanted.index(min(wanted))]
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == pytest.approx(min(wanted), rel=1e-5)


def test_random_blocks_follow_the_seed(run: Callable, model: Make, tmp_path: Path) -> None:
    given = {"metric": "random"}
    found = [removed(run(model("llama"), tmp_path / str(n), "layer_drop", given, seed=n)) for n in range(8)]
    assert removed(run(model("llama"), tmp_path / "again", "layer_drop", given, seed=3)) == found[3]
    assert len({tuple(each) for each in found}) > 1


def test_lists_of_layers_follow(run: Callable, model: Make, tmp_path: Path) -> None:
    """Of sliding, sliding, full the first goes; of experts, plain, experts the first, so the plain block moves."""
    run(model("gemma3"), tmp_path / "gemma", "layer_drop", {"protect": [1, 2]})
    config = json.loads((tmp_path / "gemma" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] and config["num_hidden_layers"] == 2
    run(model("qwen3_moe_mixed"), tmp_path / "mixed", "layer_drop", {"protect": [1, 2]})
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["mlp_only_layers"] == [0] and config["num_hidden_layers"] == 2


def test_names_of_older_files_and_buffers_follow(run: Callable, model: Make, tmp_path: Path) -> None:
    """Files of GPT-2 may lack the model's prefix and hold masks, which are no parameters."""
    source = tmp_path / "source"
    shutil.copytree(model("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in tensors.items()}
    old |= {f"h.{index}.attn.bias": torch.full((2,), index) for index in range(tiny.BLOCKS)}
    save_file(old, source / "model.safetensors", {"format": "pt"})
    assert removed(run(source, tmp_path / "out", "layer_drop", {"protect": [2]}, shard_bytes=10**9)) == [1]
    written = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    moved = {name.replace("h.2.", "h.1."): tensor for name, tensor in old.items() if not name.startswith("h.1.")}
    assert set(written) == set(moved) and all(torch.equal(written[name], moved[name]) for name in moved)


def test_blocks_that_differ_by_their_number_are_not_moved() -> None:
    """GPT-2 may scale attention by 1 / (number + 1): the second block would be another as the first."""
    with torch.random.fork_rng(devices=[]):
        config = tiny.ARCHITECTURES["gpt2"]()
        config.scale_attn_by_inverse_layer_idx = True
        source = open_model(AutoModelForCausalLM.from_config(config))
    assert shortened_config(source, [0, 1])["n_layer"] == 2
    with pytest.raises(secateur.RequestError, match=r"cannot say that of the 3 blocks of .* only 0, 2 are left"):
        shortened_config(source, [0, 2])


@pytest.mark.parametrize(("window", "alike"), [(8, True), (4, False)])
def test_a_number_that_is_not_the_index_is_a_setting(window: int, alike: bool) -> None:
    def block(index: int, window: int) -> nn.Module:
        made = nn.Linear(2, 2)
        made.number, made.window = index, window
        return made

    assert depth._alike(block(2, 8), 2, block(1, window), 1) == alike


def test_a_list_that_only_happens_to_be_as_long_stays() -> None:
    module = tiny.make("gemma3")
    module.config.eos_token_id = [2, 5, 0]  # three, as there are blocks, and each could be the index of one
    short = shortened_config(open_model(module), [0, 2])
    assert short["eos_token_id"] == [2, 5, 0]
    assert short["layer_types"] == ["sliding_attention", "full_attention"]


def test_a_live_module(model: Make, run: Callable, tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "gemma3", "mamba"):
        module = tiny.make(name)
        if module.supports_gradient_checkpointing:  # a setting of the module that no configuration makes
            module.activation_checkpointing_enable()
        before = deepcopy(module.state_dict())
        cut = secateur.compress(module, "layer_drop", {"protect": [2]}).model
        assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
        assert len(open_model(cut).anatomy.blocks) == 2 < len(open_model(module).anatomy.blocks)
        with skipped(module, 1) as shorter:
            torch.testing.assert_close(logits(cut), logits(shorter))
        tokens = [
            cut.generate(WORDS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*tokens)
        cut.save_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(cut))


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ({"remove": 3}, "remove=3 leaves none of 3 blocks; ask for at most 2"),
        ({"remove": 2, "protect": [0, 1]}, "2 of 3 blocks are to go, but protect keeps 2"),
        ({"protect": [3]}, "protect names block 3, but there are blocks 0 to 2"),
        ({"protect": [-1]}, "protect names block -1"),
        ({"remove": -1}, "greater than or equal to 0"),
        ({"ratio": 1}, "less than 1"),
        ({"metric": "perplexety"}, "metric='perplexety' was refused"),
    ],
)
def test_what_cannot_be_done_is_refused(parameters: dict, what: str, model: Make, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        secateur.compress(model("llama"), "layer_drop", parameters, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_block_that_cannot_be_left_out(tmp_path: Path) -> None:
    """With its norm behind the sum, a block without weights still changes what it is given."""
    sizes = {"hidden_size": 64, "ffn_dim": 160, "num_attention_heads": 4, "vocab_size": tiny.VOCABULARY}
    config = OPTConfig(**sizes, num_hidden_layers=3, do_layer_norm_before=False, word_embed_proj_dim=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(
        secateur.RequestError, match=r"layers\.0 .* cannot be left out: its output is not its input and"
    ):
        secateur.compress(tmp_path / "source", "layer_drop", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given",
    [pytest.param({"metric": m}, marks=pytest.mark.every) for m in ("influence", "perplexity", "taylor")],
)
def test_a_kill_at_each_rename(
    given: dict, run: Callable, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(model("llama"), tmp_path / "undisturbed", "layer_drop", given)
    for number in range(100):
        output = tmp_path / str(number)
        with monkeypatch.context() as patch:
            outcomes.kill_at_rename(patch, number)
            try:
                run(model("llama"), output, "layer_drop", given)
                break
            except outcomes.Killed:
                pass
        receipt = run(model("llama"), output, "layer_drop", given).receipt
        assert outcomes.promised(output) == outcomes.promised(tmp_path / "undisturbed"), f"rename {number}"
        assert receipt["decisions"] == undisturbed.receipt["decisions"]
        assert not (output / ".secateur").exists()
    assert 10 < number < 99


def test_finished_blocks_are_not_passed_again(
    run: Callable, model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    once = FlowPass._block

    def count(self: FlowPass, index: int) -> None:
        if index == 2 and 2 not in passed:
            passed.append(index)
            raise outcomes.Killed
        passed.append(index)
        once(self, index)

    monkeypatch.setattr(FlowPass, "_block", count)
    with pytest.raises(outcomes.Killed):
        run(model("llama"), tmp_path / "out", "block_influence")
    run(model("llama"), tmp_path / "out", "block_influence")
    assert passed == [0, 1, 2, 2]


@pytest.mark.every
def test_two_processes_write_the_bytes_of_one(run: Callable, model: Make, ids: Path, tmp_path: Path) -> None:
    """Three batches of tokens for two processes; what they see of each is added up in the same order by both."""
    parameters = {"block_influence": {}, "layer_drop": {"metric": "perplexity"}}
    calibration = {"data": str(ids), "samples": len(IDS), "held_out": 0, "length": 16}
    runs = [
        (str(model("llama")), {"steps": [{name: given}], "calibration": calibration}, str(tmp_path / name))
        for name, given in parameters.items()
    ]
    (tmp_path / "program.py").write_text(CALIBRATED.format(runs=runs))
    ended = torchrun(tmp_path / "program.py")
    assert ended.returncode == 0, ended.stderr
    for name, given in parameters.items():
        alone = run(model("llama"), tmp_path / "alone" / name, name, given).receipt
        assert outcomes.promised(tmp_path / name) == outcomes.promised(tmp_path / "alone" / name)
        told = json.loads((tmp_path / name / "secateur.json").read_text())
        assert told["decisions"] == alone["decisions"], "to the last bit of every score"


@pytest.mark.parametrize("steps", [["layer_drop", "random_units"], ["random_units", "layer_drop"]])
def test_other_steps_before_and_after(steps: list[str], model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    parameters = {"layer_drop": {"protect": [2]}, "random_units": {"ratio": 0.2}}
    recipe = secateur.Recipe.parse({"steps": [{name: parameters[name]} for name in steps]})
    said = forecast.dry_run(model("llama"), recipe=recipe, output=tmp_path / "out")
    secateur.compress(model("llama"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.mlp.up_proj.out_features for layer in result.model.layers] == [128, 128]
    assert said["parameters_after"] == outcomes.parameters(result)
    assert said["bytes_written"] == sum(p.numel() * p.itemsize for p in result.parameters())
    assert said["blocks"] == {"kept": 2, "of": 3} and set(said["units"]["neurons"]) == {"0", "1"}


def test_what_a_person_reads(model: Make, ids: Path, tmp_path: Path) -> None:
    settings = ("--calibration", ids, "--samples", 3, "--set", "calibration.held_out=1", "--length", 16)
    told = command.compress(model("llama"), tmp_path / "out", "--dry-run", *settings, method="block_influence")
    assert told.code == 0 and "would remove: 1 of 3 blocks" in told.out and "s by one block" in told.out
    assert not (tmp_path / "out").exists()
    told = command.compress(model("llama"), tmp_path / "out", *settings, method="block_influence")
    assert told.code == 0
    card, kept = ((tmp_path / "out" / name).read_text() for name in ("README.md", "secateur/blocks.json"))
    gone = json.loads(kept)["removed"]
    for text in (told.out, card):
        assert f"block_influence: 1 of 3 blocks removed (33.3%): {gone[0]}; scores of those removed" in text
    assert "1 of 3 blocks" in command.compress(
        model("llama"), tmp_path / "plain", "--dry-run", method="layer_drop"
    ).out  # fmt: skip


def test_only_what_a_metric_needs_is_asked_for() -> None:
    recipe = secateur.Recipe.parse({"steps": ["layer_drop"]})
    assert not recipe.calibrated
    assert recipe.override(["metric=taylor"]).calibrated
    card = secateur.list_methods()["layer_drop"].card()
    text, gradients = (
        "calibration text (metric=influence or metric=perplexity)",
        "calibration text, gradients (metric=taylor)",
    )
    assert set(card["data"].split("; ")) == {"none: weights only", text, gradients}
    assert card["needs"]["gradients"].endswith("(metric=taylor)")
