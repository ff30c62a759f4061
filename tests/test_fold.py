"""Model folding: what is equal folds without loss, the rest is means and sums; cuts that change what makes the units."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
import tiny
from secateur.context import Context
from secateur.cuts import Cuts
from secateur.errors import RunError
from secateur.methods.structure.fold import fold
from secateur.network.anatomy import Axis, Group
from secateur.network.examine import anatomy
from secateur.network.source import open_model
from secateur.network.surgery import cut_tensors, silence_tensors
from secateur.network.verify import CleanProcess
from secateur.network.views import Cut, units_of
from secateur.tensor.clustering import k_means, norms_lost, scatter

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 150, 2]])
# fused and interleaved, stored the other way, with biases, with shared keys and values
ARCHITECTURES = ("llama", "llama_mqa", "gpt2", "opt", "phi3", "gpt_neox", "falcon_new")


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(IDS, use_cache=False).logits


def recipe(axis: str, ratio: float = 0.5, **given: Any) -> secateur.Recipe:
    step = {"fold": {"ratio": ratio, "axis": axis, "multiple_of": 1, **given}}
    return secateur.Recipe.parse({"steps": [step]})


def double(module: nn.Module, axis: str) -> None:
    """Makes every second unit the same as the one before it."""
    for block in anatomy(module).blocks:
        group = block.group(axis)  # type: ignore[arg-type]
        assert group is not None
        first = torch.arange(0, group.count, 2)
        for part in group.slices:
            tensor = module.get_parameter(part.parameter).data
            tensor.index_copy_(part.dim, part.indices(first + 1), tensor.index_select(part.dim, part.indices(first)))


FOLDED: tuple[Axis, ...] = ("heads", "neurons")


@pytest.mark.parametrize("cluster", ["kmeans", "ward"])
@pytest.mark.parametrize(
    ("name", "axis"),
    [*((name, "neurons") for name in ARCHITECTURES), ("llama", "heads"), ("llama_mha", "heads"), ("phi3", "heads")],
)
def test_equal_units_fold_without_loss(name: str, axis: str, cluster: str) -> None:
    module = tiny.make(name)
    double(module, axis)
    result = secateur.compress(module, recipe=recipe(axis, cluster=cluster))
    assert set(result.receipt["decisions"][0]["kept"][axis].values()) == {
        anatomy(module).blocks[0].group(axis).count // 2
    }
    # in float64, where the order of sums does not show
    torch.testing.assert_close(logits(result.model.double()), logits(module.double()), atol=1e-9, rtol=1e-9)


def test_nothing_to_fold_changes_nothing() -> None:
    module = tiny.make("llama")
    result = secateur.compress(module, recipe=recipe("neurons", 0.0))
    for one, other in zip(module.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("axis", FOLDED)
def test_rows_are_means_and_columns_sums(axis: Axis, repair: bool, model: Callable[..., Path]) -> None:
    """(UᵀU)⁻¹Uᵀ W of every tensor that makes units, W U of the one that reads them, by the clusters of whole features."""
    name = "llama_mqa" if axis == "neurons" else "gpt_neox"
    source = open_model(model(name))
    units = units_of(source, 1, axis, keep := units_of(source, 1, axis).count * 3 // 5)
    context = Context(seed=3)
    cut = fold(units, context, starts=2, repair=repair)
    columns = units.output.reshape(units.hidden, units.count, -1).movedim(1, 0).flatten(1)
    features = torch.cat([*(rows.flatten(1) for rows in units.coupled), columns], dim=1)
    labels = k_means(features @ features.T, keep, Context(seed=3).generator("fold", axis, 1), 2)
    places = torch.empty(keep, dtype=torch.int64)
    for cluster in range(keep):  # the kept unit of each cluster is one of its own
        [places[cluster]] = [place for place, unit in enumerate(cut.kept) if labels[unit] == cluster]
    u = functional.one_hot(places[labels], keep).float()
    assert u.sum(0).max() > 1
    means = (u.T @ u).inverse() @ u.T
    assert cut.makers is not None and cut.output is not None
    for rows, made in zip(units.coupled, cut.makers, strict=True):
        wanted = means @ rows.flatten(1)
        if repair and rows.dim() == 3:
            wanted *= norms_lost(rows.flatten(1), places[labels], keep)[:, None]
        assert torch.allclose(made.flatten(1), wanted, atol=1e-6)
    assert torch.allclose(cut.output.reshape(units.hidden, keep, -1).movedim(1, 0).flatten(1), u.T @ columns, atol=1e-6)
    assert context.notes["scatter"] == pytest.approx(scatter(features @ features.T, labels) / features.square().sum())


def test_folding_loses_less_than_removing_what_is_folded() -> None:
    """Where units are nearly equal: what the others said is in the sums."""
    module = tiny.make("llama")
    double(module, "neurons")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wanted = logits(module)
    lost = {}
    for method in ("fold", "magnitude_units"):
        step = {method: {"ratio": 0.5, "multiple_of": 1}}
        result = secateur.compress(module, recipe=secateur.Recipe.parse({"steps": [step]}))
        lost[method] = float((logits(result.model) - wanted).norm())
    assert lost["fold"] < 0.2 * lost["magnitude_units"]


# Cuts that change what makes the units, whichever method says so.


def anew(units: Any, group: Group, seed: int = 0) -> Cut:
    """A cut with numbers drawn for everything that it may change."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.arange(0, units.count, 2)
    makers = tuple(torch.randn(len(kept), *rows.shape[1:], generator=generator) for rows in units.coupled)
    output = torch.randn(units.hidden, len(kept) * units.width, generator=generator)
    return Cut(kept, output, None, makers)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "falcon", "qwen2"])
def test_new_rows_lie_where_the_units_are_read(name: str, model: Callable[..., Path]) -> None:
    """What is written into a cut block is read from it again; the uncut block holds the same at the kept units."""
    source = open_model(model(name))
    block = source.anatomy.blocks[1]
    for axis in FOLDED:
        group = block.group(axis)
        if group is None or group.count < 2:
            continue
        units = units_of(source, 1, axis)
        assert [rows.flatten(1).shape for rows in units.coupled if rows.dim() == 3] == [m.shape for m in units.makers]
        cut = anew(units, group)
        assert cut.makers is not None
        tensors = {name: source.parameter(name) for name in block.parameters}
        small, silent = cut_tensors(tensors, group, cut), silence_tensors(tensors, group, cut)
        assert set(small) == set(silent) == {part.parameter for part in group.slices}
        for part, rows in zip(group.inputs, cut.makers, strict=True):
            for where, units_there in ((small, None), (silent, cut.kept)):
                found = where[part.parameter]
                # of a cut tensor, the parts that lie before this one have lost units too
                before = {p.offset: p.width for p in group.inputs if p.parameter == part.parameter}
                gone = group.count - len(cut.kept) if units_there is None else 0
                start = part.offset - sum(gone * width for offset, width in before.items() if offset < part.offset)
                count = group.count - gone
                lying = found.narrow(part.dim, start, count * part.width)
                lying = lying.T if part.dim == 1 else lying
                lying = lying.reshape(count, *rows.shape[1:])
                assert torch.equal(lying if units_there is None else lying[units_there], rows)
        whole = {name: tensors[name].clone() for name in silent}
        for part in group.slices:  # nothing but units is touched
            for tensor in (whole[part.parameter], silent[part.parameter]):
                tensor.index_fill_(part.dim, part.indices(torch.arange(group.count)), 0)
        assert all(torch.equal(whole[name], silent[name]) for name in silent)


def test_the_reload_check_sees_a_wrong_row(
    model: Callable[..., Path], clean: CleanProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "secateur.cuts.cut_tensors", lambda t, g, cut, d: cut_tensors(t, g, replace(cut, makers=None), d)
    )
    with pytest.raises(RunError, match="logits differ"):
        secateur.compress(
            model("llama"), recipe=recipe("neurons", 0.4), output=tmp_path / "out", evaluate=False, clean=clean
        )


def test_new_rows_are_rounded_once(model: Callable[..., Path], clean: CleanProcess, tmp_path: Path) -> None:
    source = model("gpt2", dtype=torch.bfloat16)
    secateur.compress(source, recipe=recipe("neurons", 0.4), output=tmp_path / "same", evaluate=False, clean=clean)
    wider = secateur.Recipe.parse(recipe("neurons", 0.4).plain() | {"dtype": "float32"})
    secateur.compress(source, recipe=wider, output=tmp_path / "wider", evaluate=False, clean=clean)
    one, two = (
        secateur.network.source.load(tmp_path / each)[0].get_parameter("transformer.h.0.mlp.c_fc.weight")
        for each in ("same", "wider")
    )
    assert torch.equal(one.float(), two.bfloat16().float()) and not torch.equal(one.float(), two)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda makers: makers[:1], "1 tensors make the neurons"),
        (lambda makers: (makers[0][:-1], *makers[1:]), r"shape \[79, 1, 64\], not \[80, 1, 64\]"),
        (lambda makers: (makers[0] * torch.nan, *makers[1:]), "hold non-finite values"),
    ],
)
def test_impossible_rows_are_refused(change: Callable, what: str, model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_model(model("llama"))
    group = source.anatomy.blocks[0].group("neurons")
    assert group is not None
    cut = anew(units_of(source, 0, "neurons"), group)
    cuts = Cuts(source, tmp_path, "a_method")
    cuts.save(0, "neurons", cut)
    again = cuts.read(0, "neurons")
    assert all(torch.equal(one, other) for one, other in zip(cut.makers or (), again.makers or (), strict=True))
    with pytest.raises(RunError, match=what):
        cuts.check(0, "neurons", replace(cut, makers=change(cut.makers)))
