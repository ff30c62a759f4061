"""Every registered method over every tiny architecture that it can treat. A method joins by being registered."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import outcomes
import secateur
import tiny
from secateur.network.anatomy import Block
from secateur.network.verify import CleanProcess, prompt
from secateur.registry import methods

# `make test` runs two architectures, .ci/run all of them.
FIRST = ("llama", "gpt2")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed", "olmoe")
# No feed-forward, or a width that its configuration cannot say: every method that cuts neurons must refuse these, and of
# mixtures every method that cuts none inside experts.
REFUSED = ("bloom", "mamba")
# Heads cannot go: all of them share keys and values or a norm, or the configuration ties their number to the hidden size
# (that of a llama asks that they divide it, which three heads of 64 channels do not).
NO_HEADS = (
    "llama_mqa", "llama_mha", "opt", "gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "falcon", "falcon_new", "bloom",
    "olmoe", "mamba",
)  # fmt: skip
# Channels cannot go: the configuration ties the size of heads to their number, or a block is not understood.
NO_CHANNELS = (
    "opt", "gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "falcon", "falcon_new", "bloom", "olmoe", "mamba",
)  # fmt: skip
# A stream that can be turned has norms in front of readers and nowhere else, in blocks of matrices alone; whether a
# configuration can say fewer channels does not matter, because a file of code does.
NO_ROTATION = ("gemma2", "gemma3", "bloom", "mamba", *MIXTURES)
# Small enough for seconds, large enough that a kill finds a method half way;
# the metric whose engine has most to go on with.
QUICK = {
    "prunenet": {"episodes": 3},
    "layer_drop": {"metric": "perplexity"},
    "bonsai": {"submodels": 4, "sequences": 1, "prior_sequences": 1, "per_round": 0.1},
    "minitron": {"multiple_of": 16},
    "random_units": {"multiple_of": 16},
    "magnitude_units": {"multiple_of": 16},
    "slicegpt": {"multiple_of": 16},
    "divergent_tokens": {"prompts": 3, "prompt": 4, "continuation": 6, "levels": [0.3, 0.6, 0.9]},
}
WIDTH = 128  # of 160, at ratio 0.2, a multiple of 32
CHANNELS = 48  # of 64, a multiple of 16
# How much goes in all, where blocks come out with different widths.
UNEVEN = {"adapt_pruner": {"overall": 0.2, "steps": 2, "strength": 0.2, "multiple_of": 1}}
SPARSITY = 0.37  # no whole number of weights in any row


def _cases() -> list:
    return [
        pytest.param(method.name, name, id=f"{method.name}-{name}", marks=() if name in FIRST else pytest.mark.every)
        for method in methods().values()
        for name in tiny.ARCHITECTURES
        if not _cuts(method.name) or _axes(method.name, name)
    ]


def _drops(method: str) -> bool:
    """Whether it removes whole blocks."""
    return methods()[method].scope == "blocks"


def _renumbers(method: str) -> bool:
    """Whether it removes tokens."""
    return methods()[method].scope == "vocabulary"


def _cuts(method: str) -> bool:
    """Whether it removes neurons; the others zero or change single weights."""
    return methods()[method].scope in ("units", "network", "widths")


def _divides(method: str) -> bool:
    """Whether its blocks may differ in width."""
    return methods()[method].scope == "widths"


def _axes(method: str, name: str) -> list[str]:
    """The units that it can cut there; query heads and dimensions inside heads, which are not cut beside heads, have test
    files of their own.
    """
    axes = methods()[method].axes
    others = set(tiny.ARCHITECTURES) - set(MIXTURES)
    neurons = REFUSED if "expert_neurons" in axes else (*REFUSED, *MIXTURES)
    # experts go with their neurons, so those of mixtures are cut where experts are not
    experts = {*others, *(MIXTURES if "expert_neurons" in axes else ())}
    refused = {"neurons": neurons, "heads": NO_HEADS, "channels": NO_CHANNELS, "experts": experts}
    if method == "slicegpt":
        return [] if name in NO_ROTATION else ["channels"]
    apart = ("queries", "head_dims", "expert_neurons")
    return [axis for axis in axes if axis not in apart and name not in refused[axis]]


# What a method leaves alone: experts of the dense network and of the pruned one get other tokens.
SPARED = {"dense_refit": {"targets": ["attention"]}}


def _recipe(method: str, name: str, ids: Path) -> secateur.Recipe:
    parameters: dict = {"ratio": 0.2} if _cuts(method) or _drops(method) else {"pattern": SPARSITY}
    parameters = {} if _renumbers(method) else dict(UNEVEN.get(method, parameters))
    if "axis" in methods()[method].schema.model_fields:
        parameters["axis"] = _axes(method, name)
    spared = SPARED.get(method, {}) if name in MIXTURES else {}
    step = {method: {**parameters, **QUICK.get(method, {}), **spared}}
    learns = secateur.Recipe.parse({"steps": [step]}).calibrated
    calibration = {"calibration": {"data": str(ids), "samples": 6, "length": 16}} if learns else {}
    return secateur.Recipe.parse({"steps": [step], **calibration})


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids to calibrate on."""
    path = tmp_path_factory.mktemp("calibration") / "ids.json"
    drawn = torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    path.write_text(json.dumps(drawn.tolist()))
    return path


def _check_cut(source: Path, axes: list[str], dense: torch.nn.Module, result: torch.nn.Module) -> None:
    blocks = secateur.network.source.open_model(source).anatomy.blocks
    inside = {name for block in blocks if block.attention for name in _attention(block)}
    removed = {name: p.numel() - result.get_parameter(name).numel() for name, p in dense.named_parameters()}
    attention = sum(count for name, count in removed.items() if name in inside)
    assert sum(removed.values()) == outcomes.parameters(dense) - outcomes.parameters(result)
    if "heads" in axes:
        kv = blocks[0].attention.kv_heads
        whole = sum(dense.get_parameter(name).numel() for name in inside)
        assert attention * kv == whole * (kv - int(0.8 * kv)) > 0, "whole heads are gone from all four matrices"
        assert result.config.num_attention_heads * kv == dense.config.num_attention_heads * int(0.8 * kv)
    else:
        assert not attention
    banks = {part.parameter for block in blocks if block.experts for part in block.experts.group.slices}
    experts = sum(removed[name] for name in banks)
    if "experts" in axes:  # one of four goes
        assert experts * 4 == sum(dense.get_parameter(name).numel() for name in banks)
    elif "neurons" in axes:
        assert experts == sum(_inside_experts(block, result) for block in blocks if block.experts)
    else:
        assert not experts
    own = [block for block in blocks if block.feed_forward and block.feed_forward.units == tiny.UNITS]
    shared = [block for block in blocks if block.feed_forward and block.experts]
    fewer = sum(removed[part.parameter] for block in shared for part in block.feed_forward.group.slices[-1:])
    assert fewer == ("neurons" in axes) * len(shared) * tiny.HIDDEN * 32, "of 128 neurons 96 stay"
    left = sum(removed.values()) - attention - experts - 3 * fewer
    per_neuron = left / (tiny.UNITS - WIDTH) / max(len(own), 1)
    if "neurons" in axes and own:
        assert per_neuron == int(per_neuron) >= 2 * tiny.HIDDEN, "whole neurons are gone, and nothing else"
    else:
        assert not per_neuron


def _inside_experts(block: Block, result: torch.nn.Module) -> int:
    """How many numbers its experts lose where each keeps the multiple of 32 neurons that is nearest to four of five."""
    width = {96: 64, tiny.UNITS: WIDTH}[block.experts.width]
    assert result.get_parameter(f"{block.experts.module}.down_proj").shape == (4, tiny.HIDDEN, width)
    return 4 * (block.experts.width - width) * 3 * tiny.HIDDEN


def _check_uneven(source: Path, axes: list[str], dense: torch.nn.Module, result: torch.nn.Module) -> None:
    """Whole units are gone, the fraction that was asked for of each kind, each from all tensors that it lies in."""
    removed = {name: p.numel() - result.get_parameter(name).numel() for name, p in dense.named_parameters()}
    expected = dict.fromkeys(removed, 0)
    for axis in axes:
        groups = [block.group(axis) for block in secateur.network.source.open_model(source).anatomy.blocks]
        lost = [removed[group.output.parameter] // (group.output.width * tiny.HIDDEN) for group in groups]
        for group, units in zip(groups, lost, strict=True):
            for part in group.slices:
                whole = dense.get_parameter(part.parameter)
                expected[part.parameter] += units * part.width * whole.numel() // whole.shape[part.dim]
        assert sum(lost) == round(0.2 * sum(group.count for group in groups)) > 0
    assert removed == expected, "and nothing else"


def _check_divided(output: Path, dense: torch.nn.Module, result: torch.nn.Module) -> None:
    """What all blocks together lose is what they would lose if they were alike, but for the rounding of widths."""
    decided = json.loads((output / "secateur.json").read_text())["decisions"][0]
    reached = decided["budget"]["reached"]["parameters"]
    assert reached == {"before": outcomes.parameters(dense), "after": outcomes.parameters(result)}
    neurons = decided["units"].get("neurons", {}).values()
    assert all(unit["kept"] % 32 == 0 for unit in neurons)
    if set(decided["units"]) == {"neurons"}:
        assert sum(unit["kept"] for unit in neurons) == WIDTH * len(neurons)


def _check_narrowed(output: Path, source: Path, dense: torch.nn.Module, result: torch.nn.Module) -> None:
    """Channels are gone from everything outside and from every norm, the same ones everywhere."""
    kept = load_file(output / "secateur/kept.safetensors")["channels"]
    assert len(kept) == result.config.get_text_config().hidden_size == CHANNELS
    network = secateur.network.source.open_model(source).anatomy
    norms = [name for block in network.blocks for name in block.norms]
    before, after = dict(dense.named_parameters()), dict(result.named_parameters())
    outside = [name for name in after if name in network.outside and before[name].shape[-1] == tiny.HIDDEN]
    assert outside and set(network.embeddings) <= set(outside)
    for name in [*outside, *(name for name in norms if before[name].shape == (tiny.HIDDEN,))]:
        assert torch.equal(after[name], before[name][..., kept]), f"{name} has lost the same channels as all others"


def _attention(block: Block) -> set[str]:
    """Matrices and biases of its attention, but for the output bias, which no head has a share of."""
    names = {name for part in "qkvo" for name in getattr(block.attention, part)}
    biases = {name.removesuffix("weight") + "bias" for part in "qkv" for name in getattr(block.attention, part)}
    return names | (biases & set(block.parameters))


def _check_dropped(output: Path, source: Path, dense: torch.nn.Module, result: torch.nn.Module) -> None:
    decided = json.loads((output / "secateur.json").read_text())["decisions"][0]["blocks"]
    kept, removed = decided["kept"], decided["removed"]
    assert len(removed) == 1 and sorted(kept + removed) == list(range(tiny.BLOCKS))
    paths = [block.path for block in secateur.network.source.open_model(source).anatomy.blocks]
    before, after = dict(dense.named_parameters()), dict(result.named_parameters())
    inside = tuple(path + "." for path in paths)
    assert {n for n in before if not n.startswith(inside)} == {n for n in after if not n.startswith(inside)}
    for name, parameter in after.items():
        old = next(
            (name.replace(f"{paths[i]}.", f"{paths[k]}.") for i, k in enumerate(kept) if f"{paths[i]}." in name), name
        )
        assert torch.equal(parameter, before[old]), f"{name} is {old} of the source"
    words = torch.tensor([prompt(tiny.VOCABULARY)])
    with torch.no_grad(), outcomes.skipped(dense, [paths[index] for index in removed]):
        torch.testing.assert_close(result(words).logits, dense(words).logits, atol=1e-4, rtol=1e-4)


def _check_renumbered(output: Path, dense: torch.nn.Module, result: torch.nn.Module) -> None:
    old = load_file(output / "secateur/vocabulary.safetensors")["old_ids"]
    assert result.config.get_text_config().vocab_size == len(old) < tiny.VOCABULARY
    before, after = dict(dense.named_parameters()), dict(result.named_parameters())
    rows = {name for name, p in after.items() if p.shape != before[name].shape}
    assert {tuple(p.shape) for name, p in after.items() if name in rows} <= {(len(old), tiny.HIDDEN), (len(old),)}
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name][old] if name in rows else before[name])
    fewer = (tiny.VOCABULARY - len(old)) * sum(p[0].numel() for name, p in before.items() if name in rows)
    assert outcomes.parameters(dense) - outcomes.parameters(result) == fewer
    words = torch.tensor([prompt(len(old))])
    with torch.no_grad():
        assert torch.allclose(result(words).logits, dense(old[words]).logits[..., old], atol=1e-6)


def _check_zeros(output: Path, dense: torch.nn.Module, result: torch.nn.Module) -> None:
    masks = secateur.read_masks(output)
    removed, of = sum(int((~mask).sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    assert removed == pytest.approx(SPARSITY * of, abs=len(masks)), "what was asked for is gone"
    before, after = dict(dense.named_parameters()), dict(result.named_parameters())
    zeros = sum(int((after[name] == 0).sum()) for name in after)
    assert zeros == removed + sum(int((p == 0).sum()) for p in before.values()), (
        "zeros are where masks say, and nowhere else"
    )
    pruned = {name.partition("[")[0] for name, mask in masks.items() if not mask.all()}
    for name, parameter in before.items():
        assert torch.equal(parameter, after[name]) != (name in pruned), f"{name} changes only if it is pruned"


@pytest.mark.parametrize(("method", "name"), _cases())
def test_every_method_on_every_architecture(
    method: str,
    name: str,
    model: Callable[..., Path],
    clean: CleanProcess,
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = _recipe(method, name, ids)

    def run(output: Path) -> None:
        secateur.compress(source, recipe=recipe, output=output, evaluate=False, shard_bytes=1, clean=clean)

    source, first, second, killed = model(name), tmp_path / "first", tmp_path / "second", tmp_path / "killed"
    before = outcomes.promised(source)

    run(first)
    dense = AutoModelForCausalLM.from_pretrained(source)
    # where blocks differ, a file of ours says how; what the card says needs none must load without
    trust = {"trust_remote_code": True} if methods()[method].taxonomy["runtime"] == ("code",) else {}
    result = AutoModelForCausalLM.from_pretrained(first, **trust)
    outcomes.check_claim(methods()[method], dense, result)
    if _divides(method):
        _check_divided(first, dense, result)
    elif _drops(method):
        _check_dropped(first, source, dense, result)
    elif _renumbers(method):
        _check_renumbered(first, dense, result)
    elif method in UNEVEN:
        _check_uneven(source, recipe.steps[0].parameters["axis"], dense, result)
    elif method == "slicegpt":  # changes every number; what they compute is told by the reload check
        assert result.get_input_embeddings().weight.shape[1] == CHANNELS
        assert {p.shape[-1] for n, p in result.named_parameters() if "norm" in n or ".ln_" in n} >= {CHANNELS}
        if name not in NO_CHANNELS:
            assert result.config.get_text_config().hidden_size == CHANNELS
        reached = json.loads((first / "secateur.json").read_text())["decisions"][0]["budget"]["reached"]["parameters"]
        assert reached == {"before": outcomes.parameters(dense), "after": outcomes.parameters(result)}
    elif "channels" in recipe.steps[0].parameters.get("axis", []):
        _check_narrowed(first, source, dense, result)
    elif _cuts(method):
        _check_cut(source, _axes(method, name), dense, result)
    else:
        _check_zeros(first, dense, result)

    words = [prompt(result.config.get_text_config().vocab_size)]
    with torch.no_grad():
        here = result.eval()(torch.tensor(words)).logits
    torch.testing.assert_close(clean.logits(first, words, **trust), here, atol=1e-5, rtol=1e-5)
    tokens = result.generate(torch.tensor(words), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > len(words[0]), "the result generates"
    if (
        _drops(method) or trust or "heads" in methods()[method].axes
    ):  # the cache is addressed by blocks, and holds heads
        without = result.generate(
            torch.tensor(words), max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
        )
        assert torch.equal(tokens, without), "and with a cache as without"

    run(second)
    assert outcomes.promised(first) == outcomes.promised(second), "one seed, one result"

    with monkeypatch.context() as patch:
        counter = outcomes.kill_at_rename(patch, 4)
        with pytest.raises(outcomes.Killed):
            run(killed)
    assert counter["renames"] == 5
    run(killed)
    assert outcomes.promised(first) == outcomes.promised(killed), "a kill leaves no trace"
    assert outcomes.promised(source) == before, "the source is never written"
    assert not (killed / ".secateur").exists()
    said = json.loads((first / "secateur.json").read_text())["recipe"]
    assert secateur.Recipe.parse(said).identity() == recipe.identity(), "the receipt holds the recipe"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mamba" else pytest.mark.every) for n in REFUSED])
@pytest.mark.parametrize("method", ["random_units", "prunenet"])
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    method: str, name: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError) as refusal:
        secateur.compress(model(name), method, output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1
    assert not (tmp_path / "out").exists()
