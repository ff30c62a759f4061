"""Trials of single matrices by divergent tokens, and the allocation made of them."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import secateur
import tiny
from secateur.calibration.divergence_trials import DivergenceTrials, Trial
from secateur.calibration.samples import Samples
from secateur.context import Context
from secateur.errors import RequestError
from secateur.evaluation.divergent import Continuations, divergent_tokens
from secateur.forecast import dry_run
from secateur.methods.allocation.divergent_tokens import LEVELS, _Search
from secateur.methods.allocation.divergent_tokens import divergent_tokens as allocation
from secateur.network.matrices import matrices, put, view
from secateur.network.source import open_model
from secateur.registry import InputNorms, Matrices, Weight
from secateur.tensor.budgets import scaled_counts
from secateur.tensor.patterns import keep_overall

WRITTEN = Continuations(prompts=6, prompt=4, continuation=12)


def _endless(name: str) -> Any:
    """A tiny architecture whose texts nothing ends."""
    model = tiny.make(name)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def _samples(count: int = 6) -> Samples:
    drawn = torch.randint(3, tiny.VOCABULARY, (count, 4), generator=torch.Generator().manual_seed(0))
    return Samples(list(drawn), [], "drawn")


def _smallest(ref: Any, matrix: torch.Tensor, remove: int, seen: Any) -> torch.Tensor:
    return keep_overall(matrix.abs(), remove)


def _trials(model: torch.nn.Module, **options: Any) -> tuple[DivergenceTrials, list]:
    source = open_model(model)
    refs = [ref for block in matrices(source.skeleton, source.anatomy) for ref in block]
    return DivergenceTrials(source, _samples(), refs, options.pop("prune", _smallest), **options), refs


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.every) for name in ("mixtral", "gemma3"))]
)
def test_a_trial_is_what_the_pruned_model_writes(name: str) -> None:
    model = _endless(name)
    before = deepcopy(model.state_dict())
    trials, refs = _trials(model)
    assert trials.write(WRITTEN) == 72 and trials._from_the_middle, "blocks before a matrix need not run again"
    found = []
    for ref in (refs[0], refs[len(refs) // 2], refs[-1]):
        pruned, count = deepcopy(model), int(0.8 * ref.rows * ref.columns)
        parameter = pruned.get_parameter(ref.parameter).data
        matrix = view(ref, parameter).clone()
        put(ref, parameter, matrix * keep_overall(matrix.abs(), count))
        ids = torch.cat(_samples().sequences)
        expected = divergent_tokens(pruned, model, ids, written=WRITTEN)
        trial = trials.removing({ref.name: count})
        assert trial == pytest.approx((1 - expected.mean / 12, expected.corrected))
        found.append(trial)
    assert any(each.first > 0 for each in found), "the case says something"
    assert trials.removing({}) == trials.removing({refs[0].name: 0}) == Trial(0, 0)
    both = {refs[0].name: 2000, refs[-1].name: 2000}
    trials_whole, _ = _trials(model)
    trials_whole.write(WRITTEN)
    trials_whole._from_the_middle = False
    for remove in (both, {refs[-1].name: 3000}):
        assert trials.removing(remove) == trials_whole.removing(remove)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "and all is put back"


def test_what_passes_between_blocks_beside_their_outputs_is_noticed() -> None:
    model = tiny.make("llama")
    blocks, left = model.model.layers, {}
    blocks[0].register_forward_hook(lambda _module, given, output: left.update(word=2.0))
    blocks[2].register_forward_hook(lambda _module, given, output: output + left.pop("word", 1.0))
    trials, refs = _trials(model)
    trials.write(WRITTEN)
    assert not trials._from_the_middle
    assert trials.removing({}) == Trial(0, 0), "then every trial runs all of them"


def test_statistics_of_the_dense_network_reach_who_prunes() -> None:
    seen = {}

    def prune(ref: Any, matrix: torch.Tensor, remove: int, statistics: Any) -> torch.Tensor:
        seen[ref.name] = statistics.view(InputNorms)
        return _smallest(ref, matrix, remove, statistics)

    model = tiny.make("llama")
    trials, refs = _trials(model, prune=prune, kinds={InputNorms})
    trials.write(WRITTEN)
    trials.removing({ref.name: 1 for ref in refs})
    first = next(ref for ref in refs if ref.columns == tiny.HIDDEN)
    norms = seen[first.name]
    assert norms.tokens == 6 * 15 and len(seen) == len(refs), (
        "all that is read, prompts and text but for its last token"
    )
    squares = model.model.layers[0].input_layernorm
    given = []
    handle = squares.register_forward_hook(lambda _module, _given, output: given.append(output))
    with torch.no_grad():
        for part in trials._parts:
            model(torch.cat([part.prompts, part.text[:, :-1]], dim=1))
    handle.remove()
    torch.testing.assert_close(norms.squares, torch.cat(given).flatten(0, 1).square().sum(0), rtol=1e-4, atol=1e-4)


def test_too_few_prompts_are_refused() -> None:
    trials, _ = _trials(tiny.make("llama"))
    with pytest.raises(RequestError, match="hold 6"):
        trials.write(WRITTEN._replace(prompts=7))
    with pytest.raises(RequestError, match="256 positions"):
        trials.write(WRITTEN._replace(continuation=256))


class Priced:
    """Stands for trials: what a matrix loses costs what `prices` says of its sparsity."""

    def __init__(self, sizes: Mapping[str, int], prices: Mapping[str, Callable[[float], float]]) -> None:
        self.sizes, self.prices, self.asked, self.stop = sizes, prices, [], None

    def write(self, written: Continuations) -> int:
        return 100

    def removing(self, remove: Mapping[str, int]) -> Trial:
        if len(remove) != 1:
            return Trial(0.5, 0.25)
        [(name, count)] = remove.items()
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append((name, count))
        price = self.prices[name](count / self.sizes[name])
        return Trial(price, price / 2)


SIZES = {"easy": 1000, "plain": 2000, "hard": 500}
PRICES = {
    "easy": lambda share: max(0.0, share - 0.5),
    "plain": lambda share: share**2,
    "hard": lambda share: min(1.0, 3 * share),
}


def _network(fraction: float) -> Matrices:
    makers = [
        lambda name=name, size=size: Weight(name, 0, None, (size // 10, 10), lambda: torch.zeros(1))
        for name, size in SIZES.items()
    ]
    return Matrices(makers, round(fraction * sum(SIZES.values())), list(SIZES.values()))


def _context() -> Any:
    notes: dict[str, Any] = {}
    return SimpleNamespace(
        notes=notes, note=notes.__setitem__, load=lambda _: None, save=lambda *_: None, world=1,
        gather=lambda found: found, mine=lambda total: range(total), progress=Context().progress,
    )  # fmt: skip


@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.5, 0.8])
def test_all_pay_one_price_and_the_budget_is_met_exactly(fraction: float) -> None:
    trials, context = Priced(SIZES, PRICES), _context()
    found = allocation(_network(fraction), trials, context)
    assert sum(found.remove.values()) == round(fraction * 3500) and not found.short
    shares = {name: count / SIZES[name] for name, count in found.remove.items()}
    price = context.notes["divergent tokens"]["price"]
    for name, share in shares.items():
        # prices are linear between levels, which are a tenth apart
        paid = PRICES[name](share)
        assert paid == pytest.approx(price, abs=0.04) or (share >= 0.95 - 1e-3 and paid < price), name
    if fraction == 0.1:
        assert shares == {"easy": 0.35, "plain": 0, "hard": 0} and price == 0, "what costs nothing is enough"
    else:
        assert shares["easy"] > shares["plain"] > shares["hard"] > 0
    assert len(trials.asked) == len(set(trials.asked)) < 3 * 10, "not every level of every matrix is tried"
    json.dumps(context.notes)


def test_only_neighbouring_levels_are_tried_and_the_rest_would_change_nothing() -> None:
    prices = {name: (lambda share, power=power: share**power) for name, power in zip(SIZES, (1, 2, 4), strict=True)}
    trials, context = Priced(SIZES, prices), _context()
    found = allocation(_network(0.45), trials, context)
    told = context.notes["divergent tokens"]["alone"]
    for name, count in found.remove.items():
        tried = [float(level) for level in told[name]]
        share = count / SIZES[name]
        assert any(level <= share + 1e-3 for level in tried) and any(level >= share - 1e-3 for level in tried)

    levels = [0.0, *LEVELS]
    every = _Search(list(SIZES), list(SIZES.values()), levels, "first", trials, context)
    for index, (name, size) in enumerate(SIZES.items()):
        for place, level in enumerate(levels):
            every.prices[index, place] = prices[name](int(level * size + 1e-6) / size)
    shares, _ = every.at_one_price(1575, [10, 10, 10])
    assert scaled_counts(shares, list(SIZES.values()), 1575, 0.95) == list(found.remove.values())


def test_a_threshold_keeps_every_matrix_below_it() -> None:
    trials, context = Priced(SIZES, PRICES), _context()
    found = allocation(_network(0.8), trials, context, threshold=0.31)
    # the last levels that cost no more: 0.8 (0.3), 0.5 (0.25), 0.1 (0.3)
    assert found.remove == {"easy": 800, "plain": 1000, "hard": 50}
    assert "only 52.86%" in found.short and "80.00%" in found.short
    enough = allocation(_network(0.4), Priced(SIZES, PRICES), _context(), threshold=0.31)
    assert sum(enough.remove.values()) == 1400 and not enough.short
    assert all(PRICES[name](count / SIZES[name]) <= 0.31 + 1e-6 for name, count in enough.remove.items())
    none = allocation(_network(0.4), Priced(SIZES, {name: lambda _: 1.0 for name in SIZES}), _context(), threshold=0.3)
    assert set(none.remove.values()) == {0} and none.short


def test_measures_and_what_levels_allow() -> None:
    context = _context()
    allocation(_network(0.37), Priced(SIZES, PRICES), context, measure="corrected")
    assert context.notes["divergent tokens"]["alone"]["hard"]["0.1"] == pytest.approx(0.15)
    with pytest.raises(RequestError, match=r"levels up to 0\.5: 2100 are to go, but no more than 1750 may"):
        allocation(_network(0.6), Priced(SIZES, PRICES), _context(), levels=[0.25, 0.5])
    with pytest.raises(RequestError, match="do not rise"):
        secateur.compress(tiny.make("llama"), "divergent_tokens", {"levels": [0.5, 0.2]})


def test_a_stopped_search_goes_on_with_what_is_known(tmp_path: Path) -> None:
    whole = Priced(SIZES, PRICES)
    expected = allocation(_network(0.37), whole, Context(state=tmp_path / "whole"))
    stopped = Priced(SIZES, PRICES)
    stopped.stop = len(whole.asked) // 2
    with pytest.raises(KeyboardInterrupt):
        allocation(_network(0.37), stopped, Context(state=tmp_path / "stopped"))
    rest = Priced(SIZES, PRICES)
    assert allocation(_network(0.37), rest, Context(state=tmp_path / "stopped")) == expected
    assert stopped.asked + rest.asked == whole.asked


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    drawn = torch.randint(3, tiny.VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    path.write_text(json.dumps(drawn.tolist()))
    return path


def _recipe(method: str, ids: Path, pattern: Any = 0.5, **parameters: Any) -> secateur.Recipe:
    own = {"prompts": 6, "prompt": 4, "continuation": 8, **parameters}
    step = {"divergent_tokens": {"pattern": pattern, "apply": method, **own}}
    calibration = {"data": str(ids), "samples": 6, "length": 16}
    return secateur.Recipe.parse({"steps": [step], "calibration": calibration})


@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.every)])
def test_with_methods_that_read_inputs(method: str, ids: Path) -> None:
    model = tiny.make("llama")
    result = secateur.compress(model, recipe=_recipe(method, ids))
    entries = result.receipt["decisions"][0]["matrices"].values()
    removed, of = (sum(entry[key] for entry in entries) for key in ("removed", "of"))
    assert removed == of // 2 and len({entry["removed"] / entry["of"] for entry in entries}) > 1
    assert "divergent tokens" in result.receipt["decisions"][0]


@pytest.mark.every
def test_tiles_and_less_than_was_asked_for(ids: Path) -> None:
    result = secateur.compress(tiny.make("llama"), recipe=_recipe("magnitude", ids, "0.5/8x8", prompts=2))
    entries = result.receipt["decisions"][0]["matrices"].values()
    assert all(entry["removed"] % 64 == 0 for entry in entries)
    assert sum(entry["removed"] for entry in entries) * 2 == sum(entry["of"] for entry in entries)
    less = secateur.compress(
        tiny.make("llama"), recipe=_recipe("magnitude", ids, threshold=0.0, levels=[0.5], prompts=2)
    )
    entries = less.receipt["decisions"][0]["matrices"].values()
    assert sum(entry["removed"] for entry in entries) * 2 < sum(entry["of"] for entry in entries)


def test_a_dry_run_counts_the_trials(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    said = dry_run(model("llama"), recipe=_recipe("magnitude", ids), output=tmp_path / "out")
    plain = dry_run(
        model("llama"), recipe=secateur.Recipe.parse({"steps": [{"magnitude": {}}]}), output=tmp_path / "out"
    )
    assert said["memory_needed"] > plain["memory_needed"] and "one block" in said["time"]
    assert not (tmp_path / "out").exists()


def test_units_are_refused(ids: Path) -> None:
    with pytest.raises(RequestError, match="single weights"):
        secateur.Recipe.parse({"steps": [{"wanda_units": {"allocation": "divergent_tokens"}}]})
