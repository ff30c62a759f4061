"""Adapt-Pruner: ratios by the formula, counts that add up, and a network that is measured as it has been cut so far."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import outcomes
import secateur
import tiny
from secateur.calibration.samples import Samples
from secateur.calibration.silenced_flow import SilencedFlow, Where
from secateur.methods.structure import adapt_pruner
from secateur.network.anatomy import Axis
from secateur.network.examine import anatomy
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess
from secateur.tensor.layer_ratios import largest_removals, next_ratios, relative_importance, removals

LENGTH, SKIP = 12, 4
IDS = torch.randint(3, tiny.VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path, **given: Any) -> secateur.Recipe:
    said = {"data": str(ids), "samples": len(IDS), "length": LENGTH, "order": "first"}
    return secateur.Recipe.parse({"steps": [{"adapt_pruner": given}], "calibration": said})


def cosines(seed: int, layers: int = 8) -> Tensor:
    return torch.rand(layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Ratios.


def test_the_mean_of_the_ratios_is_what_was_asked_for_so_far() -> None:
    """Unclipped, t S / T after step t, whatever the cosines; layers with a higher cosine lose more."""
    ratios, share = torch.full((8,), 0.3, dtype=torch.float64), 0.02
    for step in range(1, 6):
        importance = relative_importance(cosines(step))
        assert float(importance.abs().max()) == pytest.approx(1) and abs(float(importance.mean())) < 1e-15
        before, ratios = ratios, next_ratios(ratios, importance, share, 0.05)
        assert float(ratios.mean()) == pytest.approx(0.3 + step * share, abs=1e-14)
        assert torch.equal((ratios - before).argsort(), cosines(step).argsort())


def test_the_formula_by_hand() -> None:
    # I = (−.9, −.7, −.5), less its mean (−.2, 0, .2), over .2: (−1, 0, 1)
    importance = relative_importance(torch.tensor([0.9, 0.7, 0.5]))
    assert importance.tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    found = next_ratios(torch.tensor([0.98, 0.5, 0.0]), importance, 0.02, 0.03)
    assert found.tolist() == pytest.approx([0.99, 0.52, 0.0]), "clipped above and below"


def test_no_strength_and_equal_layers_are_uniform() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert next_ratios(zero, relative_importance(cosines(0, 4)), 0.02, 0.0).tolist() == [0.02] * 4
    assert next_ratios(zero, relative_importance(torch.full((4,), 0.7)), 0.02, 0.5).tolist() == [0.02] * 4


def test_counts_add_up_and_nothing_comes_back() -> None:
    sizes, gone, ratios = [48, 48, 40, 3], [0, 0, 0, 0], torch.zeros(4, dtype=torch.float64)
    for step in range(20):
        ratios = next_ratios(ratios, relative_importance(cosines(step, 4)), 0.05, 0.2)
        total = int(0.05 * (step + 1) * sum(sizes) * 0.9)
        before, gone = gone, removals(ratios.tolist(), sizes, gone, total)
        assert sum(gone) == total and all(now >= then for now, then in zip(gone, before, strict=True))
        assert all(lost <= most for lost, most in zip(gone, largest_removals(sizes), strict=True))


def test_counts_are_the_ratios_where_these_are_whole() -> None:
    assert removals([0.25, 0.5, 0.0], [8, 8, 8], [0, 0, 0], 6) == [2, 4, 0]
    assert removals([0.25, 0.5, 0.0], [8, 8, 8], [0, 0, 2], 6) == [1, 3, 2], "who has lost more than its ratio stays"
    assert removals([0.99, 0.99, 0.0], [4, 4, 4], [0, 0, 0], 8) == [3, 3, 2], "when the others can give no more"
    assert largest_removals([1, 2, 100, 1000]) == [0, 1, 99, 990]
    with pytest.raises(ValueError, match="can lose at most"):
        removals([0.9, 0.9], [2, 2], [0, 0], 3)


# What is measured.


def by_hand(model: nn.Module) -> tuple[Tensor, dict[Where, Tensor]]:
    """Mean cosine of each block, and mean square of the inputs of output matrices, of a model as it is."""
    seen: dict[int, Tensor] = {}
    inputs: dict[Where, Tensor] = {}
    handles = []
    for block in anatomy(model).blocks:

        def flow(_: nn.Module, args: Any, kwargs: Any, output: Any, index: int = block.index) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            seen[index] = functional.cosine_similarity(before.double(), after.double(), dim=-1).mean()

        handles.append(model.get_submodule(block.path).register_forward_hook(flow, with_kwargs=True))
        for group in block.groups:

            def read(_: nn.Module, args: Any, where: Where = (block.index, group.axis)) -> None:
                inputs[where] = args[0].reshape(*IDS.shape, -1)[:, SKIP:].flatten(0, 1).square().mean(0)

            path = group.output.parameter.rpartition(".")[0]
            handles.append(model.get_submodule(path).register_forward_pre_hook(read))
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack([seen[index] for index in sorted(seen)]), inputs


def flow_of(name: str) -> tuple[nn.Module, SilencedFlow]:
    module = tiny.make(name)
    return module, SilencedFlow(open_model(module), Samples(list(IDS), [], "drawn"), skip=SKIP)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "falcon_new", "gemma2"])
def test_the_network_is_measured_as_if_the_units_were_gone(name: str) -> None:
    """Against the same network with the columns that read them at zero."""
    module, flow = flow_of(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    dense, inputs = by_hand(module)
    seen = flow.measure({})
    torch.testing.assert_close(seen.cosine, dense, atol=1e-6, rtol=1e-6)
    for where, norms in seen.norms.items():
        torch.testing.assert_close(norms.norms.square(), inputs[where], atol=1e-5, rtol=1e-5)
        assert norms.tokens == IDS.numel() - SKIP * len(IDS)
    kept: dict[Where, Tensor] = {}
    with torch.no_grad():
        for block in anatomy(module).blocks[:2]:
            for group in block.groups:
                stays = torch.arange(0, group.count, 2) if group.count > 1 else torch.arange(1)
                gone = torch.tensor([unit for unit in range(group.count) if unit not in stays], dtype=torch.int64)
                kept[block.index, group.axis] = stays
                module.get_parameter(group.output.parameter).index_fill_(
                    group.output.dim, group.output.indices(gone), 0
                )
    silent, inputs = by_hand(module)
    seen = flow.measure(kept)
    torch.testing.assert_close(seen.cosine, silent, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(silent, dense, atol=1e-3)
    last: Where = (2, "neurons")
    torch.testing.assert_close(seen.norms[last].norms.square(), inputs[last], atol=1e-5, rtol=1e-5)
    for where, stays in kept.items():
        silenced = torch.ones(anatomy(module).blocks[where[0]].group(where[1]).count, dtype=torch.bool)
        silenced[stays] = False
        assert not seen.norms[where].squares.view(len(silenced), -1)[silenced].any()
    torch.testing.assert_close(flow.measure({}).cosine, dense, atol=1e-6, rtol=1e-6)
    outputs = {group.output.parameter for block in anatomy(module).blocks[:2] for group in block.groups}
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items() if key not in outputs)


def test_sequences_of_several_lengths_count_token_by_token() -> None:
    module = tiny.make("llama")
    sequences = [IDS[0, :6], IDS[1, :6], IDS[2]]
    every = SilencedFlow(open_model(module), Samples(sequences, [], "drawn")).measure({})
    apart = [SilencedFlow(open_model(module), Samples([ids], [], "drawn")).measure({}) for ids in sequences]
    wanted = sum(len(ids) * each.cosine for ids, each in zip(sequences, apart, strict=True)) / sum(map(len, sequences))
    torch.testing.assert_close(every.cosine, wanted, atol=1e-6, rtol=1e-6)


def test_a_skip_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(secateur.RequestError, match="leaves nothing of a sequence of 12 tokens"):
        SilencedFlow(open_model(tiny.make("llama")), Samples(list(IDS), [], "drawn"), skip=12)


# The method.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_asked_for_is_gone_and_blocks_differ(
    name: str, model: Callable[..., Path], ids: Path, clean: CleanProcess, tmp_path: Path
) -> None:
    said = recipe(ids, overall=0.3, steps=4, strength=0.05, multiple_of=1)
    result = secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    decisions = result.receipt["decisions"][0]
    widths = [entry["kept"] for entry in decisions["units"]["neurons"].values()]
    assert sum(tiny.UNITS - width for width in widths) == round(0.3 * 3 * tiny.UNITS) and len(set(widths)) > 1
    told = decisions["notes"]
    history = torch.tensor(told["ratios after each step"], dtype=torch.float64)
    assert history.mean(1).tolist() == pytest.approx([0.075, 0.15, 0.225, 0.3], abs=1e-5)
    for width, ratio in zip(widths, history[-1].tolist(), strict=True):
        assert abs(width - (1 - ratio) * tiny.UNITS) <= 1
    assert told["training between steps"] == "none"


@pytest.mark.parametrize("axes", [["neurons"], ["heads"], ["heads", "neurons"]])
def test_no_strength_is_one_width(axes: list[Axis], ids: Path) -> None:
    given = {"overall": 0.5, "strength": 0, "steps": 2, "axis": axes, "multiple_of": 1}
    result = secateur.compress(tiny.make("llama"), recipe=recipe(ids, **given))
    kept = result.receipt["decisions"][0]["kept"]
    wanted = {"neurons": [80] * 3, "heads": [1] * 3}
    assert {axis: list(widths.values()) for axis, widths in kept.items()} == {axis: wanted[axis] for axis in axes}


def test_widths_stay_multiples(ids: Path) -> None:
    result = secateur.compress(tiny.make("llama"), recipe=recipe(ids, overall=0.4, steps=3, strength=0.2))
    widths = [layer.mlp.up_proj.out_features for layer in result.model.model.layers]
    assert sum(widths) == 3 * 96 and all(width % 32 == 0 for width in widths)


def test_later_steps_see_what_earlier_ones_cut(ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes is the lowest score among what is left, by norms of the network as cut; nothing else goes."""
    asked: list[Mapping[Where, Tensor]] = []
    measure = SilencedFlow.measure
    monkeypatch.setattr(SilencedFlow, "measure", lambda self, kept: (asked.append(dict(kept)), measure(self, kept))[1])
    module = tiny.make("llama")
    given = {"overall": 0.5, "steps": 3, "strength": 0.05, "multiple_of": 1}
    result = secateur.compress(module, recipe=recipe(ids, **given))
    flow = SilencedFlow(open_model(module), Samples(list(IDS), [], "drawn"), skip=SKIP)
    assert len(asked) == 3 and all(len(units) == tiny.UNITS for units in asked[0].values())
    for before, after in zip(asked, asked[1:], strict=False):
        norms = measure(flow, before).norms
        for (block, axis), units in before.items():
            output = module.get_parameter(f"model.layers.{block}.mlp.down_proj.weight").detach()
            scores = output.square().sum(0) * norms[block, axis].norms.square()
            left = after[block, axis]
            gone = torch.tensor(sorted({*units.tolist()} - {*left.tolist()}))
            assert {*left.tolist()} <= {*units.tolist()} and len(gone) == len(units) - len(left) > 0
            assert scores[gone].max() <= scores[left].min()
    assert sum(result.receipt["decisions"][0]["kept"]["neurons"].values()) == 240


def test_magnitude_looks_at_weights_alone(ids: Path) -> None:
    module = tiny.make("llama_mqa")
    given = {"overall": 0.5, "steps": 1, "strength": 0, "multiple_of": 1, "score": "magnitude"}
    result = secateur.compress(module, recipe=recipe(ids, **given))
    old, new = module.model.layers[1].mlp, result.model.model.layers[1].mlp
    sizes = old.down_proj.weight.square().sum(0)
    for matrix in (old.gate_proj, old.up_proj):
        sizes = sizes + matrix.weight.square().sum(1) + matrix.bias.square()
    kept = sizes.argsort(descending=True)[:80].sort().values
    assert torch.equal(new.up_proj.weight, old.up_proj.weight[kept])


def test_a_killed_run_goes_on_from_its_last_step(
    model: Callable[..., Path], ids: Path, clean: CleanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recipe(ids, overall=0.3, steps=4, strength=0.1)

    def run(output: Path) -> None:
        secateur.compress(model("llama"), recipe=said, output=output, evaluate=False, clean=clean)

    run(tmp_path / "whole")
    measured = {"calls": 0, "most": 2}
    measure = SilencedFlow.measure

    def count(self: SilencedFlow, kept: Mapping[Where, Tensor]) -> Any:
        if measured["calls"] == measured["most"]:
            raise outcomes.Killed
        measured["calls"] += 1
        return measure(self, kept)

    monkeypatch.setattr(SilencedFlow, "measure", count)
    with pytest.raises(outcomes.Killed):
        run(tmp_path / "killed")
    measured["most"] = 4
    run(tmp_path / "killed")
    assert measured["calls"] == 4, "no step is done twice"
    assert outcomes.promised(tmp_path / "whole") == outcomes.promised(tmp_path / "killed")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"overall": 0.9, "axis": ["heads"]}, "at most 0.5 can"),
        ({"overall": 0.993}, r"at most 0\.9875 can"),
        ({"steps": 0}, "steps"),
        ({"axis": "layers"}, "axis"),
        ({"ratio": 0.5}, "has no parameter 'ratio'"),
    ],
)
def test_wrong_wishes(given: dict[str, Any], what: str, model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        secateur.compress(model("llama"), recipe=recipe(ids, **given), output=tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()


def test_widths_that_cannot_differ_are_refused_before_anything_is_measured(
    model: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_pruner, "next_ratios", None)
    said = recipe(ids, axis="heads")
    with pytest.raises(secateur.RequestError, match="no entries that set the heads of a block"):
        secateur.compress(model("falcon_new"), recipe=said, output=tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_its_time(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    from secateur.forecast import dry_run

    said = dry_run(model("llama"), recipe=recipe(ids, steps=2), output=tmp_path / "out")
    assert 0 < said["seconds"] < 100 and said["memory_needed"] > 4 * said["parameters"]
