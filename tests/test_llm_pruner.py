"""Taylor terms of units: against finite differences and autograd; how LLM-Pruner makes scores of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
import tiny
from secateur.calibration.samples import Samples
from secateur.calibration.unit_gradients import TensorTerms, UnitGradients, learn_unit_gradients, read_unit_gradients
from secateur.errors import RunError
from secateur.files import read_tensors
from secateur.forecast import dry_run
from secateur.methods.structure.llm_pruner import llm_pruner
from secateur.network.anatomy import AXES, Group, Slice
from secateur.network.source import open_model

LENGTH = 16


def drawn(count: int = 3) -> list[Tensor]:
    return list(torch.randint(3, tiny.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0)))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits[:-1], ids[1:])


def learned(model: nn.Module, folder: Path, block: int = 1) -> dict[str, tuple[Group, UnitGradients]]:
    source = open_model(model)
    learn_unit_gradients(source, Samples(drawn(), [], "drawn"), AXES, folder)
    groups = {axis: group for axis in AXES if (group := source.anatomy.blocks[block].group(axis))}
    return {axis: (group, read_unit_gradients(folder, block, group)) for axis, group in groups.items()}


def rows(tensor: Tensor, part: Slice, units: Tensor) -> Tensor:
    return tensor.index_select(part.dim, part.indices(units))


# root mean square norms compute in float32 whatever the weights are, so a smaller step shows rounding; ReLUs have edges
@pytest.mark.parametrize(
    ("name", "step"),
    [("llama", 1e-3), ("phi3", 1e-3), ("gpt2", 1e-3), ("gpt_neox", 1e-3), ("llama_mqa", 1e-3), ("opt", 1e-5)],
)
def test_the_signed_sum_is_minus_the_first_order_change_of_the_loss(name: str, step: float, tmp_path: Path) -> None:
    """All that is coupled to a unit times 1 − ε: the loss changes by −ε Σ w g."""
    found = learned(tiny.make(name), tmp_path)
    for axis, (group, gradients) in found.items():
        assert len(gradients.tensors) == len(group.slices) and gradients.samples == 3
        for unit in {0, group.count - 1}:
            losses = []
            for factor in (1 - step, 1 + step):
                changed = tiny.make(name).double()
                with torch.no_grad():
                    for part in group.slices:
                        place = part.indices(torch.tensor([unit]))
                        whole = changed.get_parameter(part.parameter)
                        whole.index_copy_(part.dim, place, whole.index_select(part.dim, place) * factor)
                    losses.append(sum(float(loss(changed, ids)) for ids in drawn()) / 3)
            slope = (losses[1] - losses[0]) / (2 * step)
            told = sum(float(terms.sums("first")[unit].sum()) for terms in gradients.tensors)
            assert told == pytest.approx(slope, rel=2e-3, abs=2e-5), (axis, unit)


def test_terms_are_those_of_the_gradients_of_each_sequence(tmp_path: Path) -> None:
    for group, gradients in learned(tiny.make("phi3"), tmp_path).values():
        model = tiny.make("phi3")
        each: dict[str, list[Tensor]] = {part.parameter: [] for part in group.slices}
        for ids in drawn():
            model.zero_grad()
            loss(model, ids).backward()
            for name, grads in each.items():
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                grads.append(gradient.clone())
        for part, terms in zip(group.slices, gradients.tensors, strict=True):
            stacked = torch.stack(each[part.parameter])
            w = model.get_parameter(part.parameter).detach()
            first, second = w * stacked.mean(0), w.square() * stacked.square().mean(0)
            for unit in (0, group.count - 1):
                mine = torch.tensor([unit])
                f, s = (rows(t, part, mine).movedim(part.dim, 0).flatten(1) for t in (first, second))
                close = {"rtol": 1e-4, "atol": 1e-9}
                torch.testing.assert_close(terms.first[unit], f.sum(1), **close)
                torch.testing.assert_close(terms.first_size[unit], f.abs().sum(1), **close)
                torch.testing.assert_close(terms.second[unit], s.sum(1), **close)
                torch.testing.assert_close(terms.mixed_size[unit], (f - s / 2).abs().sum(1), **close)
                torch.testing.assert_close(terms.sums("mixed")[unit], (f - s / 2).sum(1), **close)


def test_what_passes_through_a_neuron_is_seen_alike_by_both_its_sides(tmp_path: Path) -> None:
    """In a gated layer without biases Σ w g of a row of `up` and of the column of `down` are one number."""
    _, gradients = learned(tiny.make("llama"), tmp_path)["neurons"]
    _, up, down = gradients.tensors
    torch.testing.assert_close(up.first, down.first, rtol=1e-4, atol=1e-8)


def test_a_unit_of_heads_has_the_queries_that_read_its_keys(tmp_path: Path) -> None:
    """The score of the queries is folded as (key-value heads, queries of each), never the other way round."""
    group, gradients = learned(tiny.make("llama"), tmp_path)["heads"]
    model = tiny.make("llama")
    sum(loss(model, ids) / 3 for ids in drawn()).backward()  # type: ignore[union-attr]
    weight = model.get_parameter(group.inputs[0].parameter)
    assert weight.grad is not None
    per_head = (weight.detach() * weight.grad).abs().sum(1).view(tiny.HEADS, -1).sum(1)
    right = per_head.view(tiny.KV_HEADS, -1).sum(1)
    published = per_head.view(-1, tiny.KV_HEADS).sum(0)
    torch.testing.assert_close(gradients.tensors[0].first_size.sum(1), right, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(right, published, rtol=1e-2)


class _Units:
    """As many units as asked for are kept, the best first."""

    def best(self, scores: Tensor) -> Tensor:
        return scores


def _planted() -> UnitGradients:
    generator = torch.Generator().manual_seed(0)

    def terms(scale: float) -> TensorTerms:
        w, g = (torch.randn(5, 2, 7, generator=generator) for _ in range(2))
        return TensorTerms.of(w * scale, g, g.square() + 0.1)

    zero = TensorTerms.of(torch.zeros(5, 1, 1), torch.ones(5, 1, 1), torch.ones(5, 1, 1))
    return UnitGradients((terms(1.0), terms(3.0), zero, terms(0.1)), 4)


@pytest.mark.parametrize("element", ["first", "second", "mixed"])
@pytest.mark.parametrize("score", ["param", "vectorize"])
def test_how_scores_are_combined(element: str, score: str) -> None:
    gradients = _planted()
    rows = [
        (terms.sizes(element) if score == "param" else terms.sums(element).abs()).sum(1) for terms in gradients.tensors
    ]
    wanted = {
        "sum": sum(rows), "mean": sum(rows) / 4, "max": torch.stack(rows).amax(0), "first": rows[0],
        "prod": (rows[0].double() * rows[1] * rows[3]).log(),
    }  # fmt: skip
    for group, scores in wanted.items():
        found = llm_pruner(_Units(), gradients, element=element, score=score, group=group)  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), scores.double(), rtol=1e-5, atol=1e-6)  # type: ignore


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps([each.tolist() for each in drawn()]))
    return tmp_path / "ids.json"


def recipe(ids: Path, method: str = "llm_pruner", **given: object) -> secateur.Recipe:
    said = {"data": str(ids), "samples": 3, "length": LENGTH, "order": "first", "held_out": 0}
    return secateur.Recipe.parse({"steps": [{method: {"ratio": 0.5, "multiple_of": 1, **given}}], "calibration": said})


def test_the_best_by_hand_are_kept_in_every_block(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    said = recipe(ids, axis=["heads", "neurons"], element="mixed")
    secateur.compress(model("qwen3"), recipe=said, output=tmp_path / "out", evaluate=False)
    kept, _ = read_tensors(tmp_path / "out/secateur/kept.safetensors")
    for block in range(tiny.BLOCKS):
        for axis, (group, gradients) in learned(tiny.make("qwen3"), tmp_path / "own", block).items():
            if axis not in said.steps[0].parameters["axis"]:
                continue
            scores = sum(terms.mixed_size.sum(1) for terms in gradients.tensors)
            wanted = scores.argsort(descending=True)[: group.count // 2].sort().values  # type: ignore[union-attr]
            assert kept[f"block {block}, {axis}"].tolist() == wanted.tolist()


def test_edges_are_spared_by_ratios_and_liar_takes_the_choice(
    model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    said = recipe(ids, ratios=[0, 0.5, 0])
    result = secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False)
    kept = result.receipt["decisions"][0]["units"]["neurons"]
    assert [kept[str(block)]["kept"] for block in range(tiny.BLOCKS)] == [160, 80, 160]
    found = secateur.compress(tiny.make("llama"), recipe=recipe(ids, "liar", by="llm_pruner"))
    assert found.model is not None and found.model.get_submodule("model.layers.1.mlp.up_proj").out_features == 80


def test_gradients_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(1e38)
    with pytest.raises(RunError, match=r"the gradients of model\.layers\.\d\..* are not finite"):
        learned(model, tmp_path)


def test_what_is_kept_is_not_collected_again(tmp_path: Path) -> None:
    before = learned(tiny.make("llama"), tmp_path)["neurons"][1]
    after = learned(tiny.make("llama", seed=1), tmp_path)["neurons"][1]
    assert torch.equal(before.tensors[0].first, after.tensors[0].first)


def test_a_dry_run_counts_the_memory_of_gradients(model: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    source = model("llama")
    plain = dry_run(source, recipe=recipe(ids, "magnitude_units"), output=tmp_path / "out")
    told = dry_run(source, recipe=recipe(ids), output=tmp_path / "out")
    parameters = 4 * open_model(source).anatomy.parameters
    assert told["memory_needed"] - plain["memory_needed"] > 2 * parameters and "gradients" in told["time"]
