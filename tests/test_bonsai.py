"""Bonsai: units silenced in passing, rounds of sub-models, what is planted is found, nothing is tried twice."""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
import tiny
from secateur.calibration.evaluator import Evaluator, Key
from secateur.calibration.samples import Samples
from secateur.context import Context
from secateur.errors import RequestError, RunError
from secateur.forecast import dry_run
from secateur.methods.structure.bonsai import bonsai
from secateur.network.anatomy import COLUMN_AXES
from secateur.network.source import load, open_model
from secateur.network.views import Cut, Network, Units

LENGTH = 16


def drawn(count: int = 4) -> list[Tensor]:
    return list(torch.randint(3, tiny.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0)))


def mean_loss(model: nn.Module, sequences: list[Tensor]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.stack(sequences), use_cache=False).logits
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.stack(sequences)[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "falcon_new", "llama_mqa", "opt", "mixtral"])
def test_silent_units_are_those_of_zero_output_columns(name: str) -> None:
    live, changed = tiny.make(name), tiny.make(name)
    source = open_model(live)
    evaluator = Evaluator(source, Samples(drawn(), drawn(2), "drawn"))
    dense = evaluator.loss({})
    assert dense == pytest.approx(mean_loss(live, drawn()), abs=1e-5) and evaluator.count == 4
    silent: dict[Key, Tensor] = {}
    for block in source.anatomy.blocks[:2]:
        for group in filter(None, map(block.group, COLUMN_AXES)):
            if group.count > 1:
                silent[block.index, group.axis] = gone = torch.tensor([0, group.count - 1][: group.count - 1])
                with torch.no_grad():
                    changed.get_parameter(group.output.parameter).index_fill_(
                        group.output.dim, group.output.indices(gone), 0
                    )
    told = evaluator.loss(silent, [0, 2])
    assert told == pytest.approx(mean_loss(changed, [drawn()[0], drawn()[2]]), abs=1e-5)
    assert evaluator.loss({}) == dense != told, "nothing is left behind"
    sizes = evaluator.sizes(silent)
    for block in source.anatomy.blocks[:2]:
        for group in filter(None, map(block.group, COLUMN_AXES)):
            gone = silent.get((block.index, group.axis), torch.empty(0, dtype=torch.long))
            assert sizes[block.index, group.axis].nonzero().numel() <= group.count * group.output.width - len(gone)
            assert not sizes[block.index, group.axis][group.output.indices(gone) - group.output.offset].any()


def test_what_goes_anywhere_need_not_fit_every_block() -> None:
    """Of two heads in each block 0.6 cannot go, but of all heads and neurons together it can."""
    source = open_model(tiny.make("llama"))
    network: Network[Units] = Network(source, axes=("heads", "neurons"))
    evaluator = Evaluator(source, Samples(drawn(), [], "drawn"), ("heads", "neurons"))
    given: dict[str, Any] = {"uniform": False, "per_round": 0.3, "submodels": 4, "sequences": 1, "prior_sequences": 1}
    plan = bonsai(network, evaluator, Context(), ratio=0.6, **given)
    sizes = {(units.block, units.axis): units.size for units in network}
    gone = sum(
        (units.count - len(plan.cuts[key].kept)) * sizes[key]
        for units in network
        if (key := (units.block, units.axis)) in plan.cuts
    )
    whole = sum(units.count * units.size for units in network)
    assert abs(gone - 0.6 * whole) <= max(sizes.values())
    with pytest.raises(RequestError, match="one unit stays in every block"):
        bonsai(network, evaluator, Context(), ratio=0.99, **given)


def test_sizes_are_those_of_what_the_output_matrix_reads() -> None:
    live, caught = tiny.make("llama"), list[Tensor]()
    evaluator = Evaluator(open_model(live), Samples(drawn(), [], "drawn"), ("neurons",))
    sizes = evaluator.sizes({}, [1, 3])
    hook = live.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    mean_loss(live, [drawn()[1], drawn()[3]])
    hook.remove()
    torch.testing.assert_close(sizes[1, "neurons"], caught[0].detach().square().mean((0, 1)).sqrt())
    assert set(sizes) == {(block, "neurons") for block in range(tiny.BLOCKS)}


def test_the_model_is_as_it_is_stored_and_a_live_one_stays_as_it_was(model: Callable[..., Path]) -> None:
    evaluator = Evaluator(open_model(model("llama", dtype=torch.bfloat16)), Samples(drawn(), [], "drawn"))
    evaluator.loss({})
    assert {p.dtype for p in evaluator._model.parameters()} == {torch.bfloat16}
    live = tiny.make("llama").train()
    live.model.layers[0].eval()
    before = {name: p.data_ptr() for name, p in live.named_parameters()}
    modes = [module.training for module in live.modules()]
    evaluator = Evaluator(open_model(live), Samples(drawn(), [], "drawn"))
    evaluator.loss({(0, "neurons"): torch.arange(5)})
    assert modes == [module.training for module in live.modules()]
    assert before == {name: p.data_ptr() for name, p in evaluator._model.named_parameters()}
    assert not any(module._forward_pre_hooks for module in live.modules())


def test_what_cannot_be_silenced_and_what_is_not_finite_is_told() -> None:
    live = tiny.make("llama")
    source = open_model(live)
    assert source.anatomy.blocks, "seen before what its forward does is changed"
    down = live.model.layers[0].mlp.down_proj
    live.model.layers[0].mlp.forward = lambda x: functional.linear(x[..., :1].expand(*x.shape[:-1], 160), down.weight)
    evaluator = Evaluator(source, Samples(drawn(), [], "drawn"))
    evaluator.loss({})
    with pytest.raises(RunError, match="block 0: its neurons could not be silenced"):
        evaluator.loss({(0, "neurons"): torch.tensor([3])})
    with torch.no_grad():
        live.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        evaluator.loss({})


class Planted(Evaluator):
    """The loss is what silent units are worth, and every unit is as large as any other."""

    def __init__(self, source: Any, worth: Mapping[Key, Tensor], last: int | None = None) -> None:
        super().__init__(source, Samples(drawn(), [], "drawn"))
        self.worth, self.last, self.asked = worth, last, 0

    def loss(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> float:
        if self.asked == self.last:
            raise InterruptedError
        self.asked += 1
        return 1 + float(sum(self.worth[key][units].sum() for key, units in silent.items()))

    def sizes(self, silent: Mapping[Key, Tensor], sequences: Sequence[int] | None = None) -> dict[Key, Tensor]:
        return {key: torch.ones(group.count * group.output.width) for key, group in self._groups.items()}


def planted(last: int | None = None) -> tuple[Network[Units], Planted]:
    source = open_model(tiny.make("llama"))
    generator = torch.Generator().manual_seed(1)
    worth = {
        (block, axis): torch.rand(count, generator=generator) * (1 + 9 * (block == 0))
        for block in range(tiny.BLOCKS)
        for axis, count in (("neurons", tiny.UNITS), ("heads", tiny.KV_HEADS))
    }
    return Network(source, axes=["neurons"]), Planted(source, worth, last)  # type: ignore[arg-type]


def test_what_is_planted_is_found_among_the_candidates() -> None:
    """In one round that removes half, every unit is a candidate."""
    _, evaluator = planted()
    network: Network[Units] = Network(open_model(tiny.make("llama")), blocks=[1])
    plan = bonsai(network, evaluator, Context(), ratio=0.5, per_round=0.5, submodels=500, metric="loss", multiple_of=1)
    assert evaluator.asked == 500
    worth, kept = evaluator.worth[1, "neurons"], plan.cuts[1, "neurons"].kept
    best = set(worth.argsort(descending=True)[:80].tolist())
    assert len(kept) == 80 and len(best & set(kept.tolist())) >= 76


def test_rounds_leave_exactly_what_is_asked_for_and_only_candidates_go() -> None:
    network, evaluator = planted()
    context = Context()
    plan = bonsai(network, evaluator, context, ratio=0.3, per_round=0.07, submodels=5, multiple_of=1)
    rounds = context.notes["rounds"]
    assert [each["units left"] for each in rounds] == [480 - 3 * gone for gone in (9, 19, 28, 38, 48)]
    assert evaluator.asked == 5 * 6, "five rounds of three pairs"
    assert all(len(plan.cuts[block, "neurons"].kept) == 112 for block in range(tiny.BLOCKS))
    for units in network:  # the prior is that of the weights alone here, and each round takes at most twice its share
        prior = units.output.abs().mean(0)
        gone = set(range(units.count)) - set(plan.cuts[units.block, "neurons"].kept.tolist())
        assert gone <= set(prior.argsort()[: 48 + 10].tolist())
    assert bonsai(network, evaluator, Context(), ratio=0.0) == secateur.registry.Plan({})


def test_where_blocks_may_differ_the_parameters_asked_for_go_and_each_keeps_one() -> None:
    network, evaluator = planted()
    network = Network(open_model(tiny.make("llama")), axes=["neurons", "heads"])
    plan = bonsai(
        network, evaluator, Context(), ratio=0.4, per_round=0.2, submodels=600, metric="loss", uniform=False
    )  # fmt: skip
    whole = sum(units.count * units.size for units in network)
    gone = {
        (u.block, u.axis): u.count - len(plan.cuts.get((u.block, u.axis), Cut(torch.arange(u.count))).kept)
        for u in network
    }
    removed = sum(gone[u.block, u.axis] * u.size for u in network)
    assert abs(removed - 0.4 * whole) <= max(u.size for u in network)
    assert gone[0, "neurons"] < min(gone[1, "neurons"], gone[2, "neurons"]), "where units are worth more, fewer go"
    assert all(gone[u.block, u.axis] < u.count for u in network)
    for units in network:
        tensors = {part.parameter for part in units._group.slices}
        assert units.size * units.count == sum(tiny.make("llama").get_parameter(name).numel() for name in tensors)


@pytest.mark.parametrize(("ratio", "per_round"), [(0.8, 0.2), (0.97, 1.0)])
def test_most_of_the_units_can_go_where_blocks_may_differ(ratio: float, per_round: float) -> None:
    """Each round removes a part of what there was, and few units are left for the last ones to choose among."""
    network, evaluator = planted()
    context = Context()
    given: dict[str, Any] = {"per_round": per_round, "submodels": 4, "metric": "loss", "uniform": False}
    plan = bonsai(network, evaluator, context, ratio=ratio, **given)
    left = sum(len(plan.cuts[block, "neurons"].kept) for block in range(tiny.BLOCKS))
    rounds = context.notes["rounds"]
    assert left == rounds[-1]["units left"] == round((1 - ratio) * 480) and len(rounds) == math.ceil(ratio / per_round)
    assert evaluator.asked == 4 * len(rounds), "what the bar was told"
    assert all(len(cut.kept) > 0 for cut in plan.cuts.values())


def test_nothing_is_tried_twice_after_an_interruption(tmp_path: Path) -> None:
    given: dict[str, Any] = {"ratio": 0.3, "per_round": 0.1, "submodels": 6, "multiple_of": 1}
    network, evaluator = planted()
    context = Context(state=tmp_path / "whole")
    whole = bonsai(network, evaluator, context, **given)
    asked = 0
    for last in (4, 5, 99):
        network, evaluator = planted(last)
        again = Context(state=tmp_path / "parts")
        try:
            parts = bonsai(network, evaluator, again, **given)
        except InterruptedError:
            assert last != 99
        asked += evaluator.asked
    assert asked == 18 and again.notes == context.notes
    assert {key: cut.kept.tolist() for key, cut in whole.cuts.items()} == {
        key: cut.kept.tolist() for key, cut in parts.cuts.items()
    }


class Shared(Context):
    """One of two processes, in a thread."""

    def __init__(self, rank: int, told: dict[int, dict[int, Any]], met: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.world, self._told, self._met = rank, 2, told, met

    def gather(self, results: Mapping[int, Any]) -> dict[int, Any]:
        self._told[self.rank] = dict(results)
        self._met.wait(60)
        together = dict(sorted((self._told[0] | self._told[1]).items()))
        self._met.wait(60)  # both have read
        return together


def test_two_processes_try_each_sub_model_once_and_agree_with_one() -> None:
    given: dict[str, Any] = {"ratio": 0.2, "per_round": 0.1, "submodels": 6, "multiple_of": 1, "uniform": False}
    told: dict[int, dict[int, Any]] = {}
    met, members = threading.Barrier(2), [planted() for _ in range(2)]
    contexts = [Shared(rank, told, met) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda each: bonsai(*each[0], each[1], **given), zip(members, contexts, strict=True)))
    assert [evaluator.asked for _, evaluator in members] == [6, 6], "half of two rounds of six each"
    alone = bonsai(*planted(), Context(), **given)
    for plan in plans:
        assert {k: cut.kept.tolist() for k, cut in plan.cuts.items()} == {
            k: cut.kept.tolist() for k, cut in alone.cuts.items()
        }


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps([each.tolist() for each in drawn()]))
    return tmp_path / "ids.json"


def recipe(ids: Path, **given: Any) -> secateur.Recipe:
    quick = {"submodels": 6, "sequences": 1, "prior_sequences": 2, "per_round": 0.2}
    calibration = {"data": str(ids), "samples": 4, "length": LENGTH}
    return secateur.Recipe.parse({"steps": [{"bonsai": quick | given}], "calibration": calibration})


@pytest.mark.every
def test_a_result_whose_blocks_differ_loads(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    said = recipe(ids, uniform=False, axis=["heads", "neurons"], ratio=0.3)
    result = secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False)
    kept = result.receipt["decisions"][0]["units"]["neurons"]
    found, _ = load(tmp_path / "out")
    widths = [layer.mlp.up_proj.out_features for layer in found.model.layers]
    assert widths == [kept[str(block)]["kept"] if str(block) in kept else 160 for block in range(tiny.BLOCKS)]
    before, after = (sum(p.numel() for p in each.model.layers.parameters()) for each in (tiny.make("llama"), found))
    norms = sum(p.numel() for layer in found.model.layers for p in layer.parameters() if p.ndim == 1)
    assert after - norms == pytest.approx(0.7 * (before - norms), rel=0.05)
    assert result.receipt["decisions"][0]["notes"]["calibration"]["held_out_tokens"] == 0


def test_a_live_module_and_a_dry_run(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    live = tiny.make("gpt2")
    result = secateur.compress(live, recipe=recipe(ids))
    assert result.model is not None and live.transformer.h[0].mlp.c_fc.nf == 160
    assert result.model.transformer.h[0].mlp.c_fc.nf == 128
    told = dry_run(model("llama"), recipe=recipe(ids), output=tmp_path / "out")
    assert told["units"]["neurons"]["0"] == {"kept": 128, "of": 160} and told["seconds"] > 0
    assert told["memory_needed"] > open_model(model("llama")).bytes
    told = dry_run(model("llama"), recipe=recipe(ids, uniform=False), output=tmp_path / "out")
    assert not told["units"], "no width is foretold"


@pytest.mark.parametrize(
    ("given", "what"), [({"axis": "layers"}, "axis"), ({"submodels": 2}, "submodels"), ({"per_round": 0}, "per_round")]
)
def test_wrong_wishes(given: dict[str, Any], what: str) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        secateur.Recipe.parse({"steps": [{"bonsai": given}]})


def test_blocks_that_cannot_differ_are_refused_before_anything_is_read(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError):
        secateur.compress(model("bloom"), recipe=recipe(ids, uniform=False), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
