"""Refitting to the dense network's outputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
import tiny
from secateur import forecast
from secateur.calibration.passes import Passes
from secateur.calibration.samples import Calibration, Samples
from secateur.calibration.statistics import CrossGram, Gram, Sums
from secateur.methods.weights.dense_refit import dense_refit
from secateur.network.matrices import matrices, put, view
from secateur.network.source import open_model
from secateur.network.stream import put_parameter
from secateur.network.views import Weight
from secateur.tensor.patterns import Budget, Pattern

ROWS, COLUMNS, TOKENS = 6, 16, 60


def statistics(dense: torch.Tensor, inputs: torch.Tensor) -> tuple[Gram, CrossGram]:
    sums = Sums({"gram", "cross"}, inputs.shape[1])
    for start in range(0, len(inputs), 17):
        sums.add(inputs[start : start + 17], dense=dense[start : start + 17])
    sums.finish()
    return Gram.of(sums), CrossGram.of(sums)


def problem(seed: int = 0) -> tuple[Weight, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(ROWS, COLUMNS, generator=generator)
    dense = torch.randn(TOKENS, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = dense + 0.5 * torch.randn(TOKENS, COLUMNS, generator=generator)
    kept = torch.rand(ROWS, COLUMNS, generator=generator) < 0.6
    return Weight("w", 0, None, (ROWS, COLUMNS), lambda: matrix), dense, inputs, kept


def budget() -> Budget:
    return Budget.uniform(Pattern.parse("0.4"), (ROWS, COLUMNS))


def test_it_is_least_squares_against_the_dense_outputs() -> None:
    weight, dense, inputs, kept = problem()
    gram, cross = statistics(dense, inputs)
    torch.testing.assert_close(cross.matrix, dense.T @ inputs, rtol=1e-5, atol=1e-3)
    found = dense_refit(weight, gram, cross, budget(), damping=1e-7, tolerance=1e-7, mask=kept)
    for row in range(ROWS):
        columns = kept[row].nonzero()[:, 0]
        wanted = torch.linalg.lstsq(inputs[:, columns].double(), (dense @ weight.matrix[row]).double()).solution
        torch.testing.assert_close(found.matrix[row, columns].double(), wanted, rtol=2e-3, atol=2e-3)
    assert torch.equal(found.kept, kept) and not found.matrix[~kept].any()

    def error(matrix: torch.Tensor) -> float:
        return float((dense @ weight.matrix.T - inputs @ matrix.T).square().sum())

    assert error(found.matrix) < 0.9 * error(weight.matrix * kept)


def test_without_pruning_before_and_without_a_mask_nothing_changes() -> None:
    weight, dense, _, kept = problem(1)
    gram, cross = statistics(dense, dense)
    found = dense_refit(weight, gram, cross, budget(), mask=torch.ones_like(kept))
    torch.testing.assert_close(found.matrix, weight.matrix, rtol=1e-3, atol=1e-3)


def test_dead_inputs_lose_their_weights() -> None:
    weight, dense, inputs, kept = problem(2)
    dense[:, 3] = inputs[:, 3] = 0
    found = dense_refit(weight, *statistics(dense, inputs), budget(), mask=kept)
    assert not found.matrix[:, 3].any() and found.matrix.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_engine_pairs_the_inputs_of_both_networks(name: str, model: Callable[..., Path], tmp_path: Path) -> None:
    """Block 0 is halved on the way; of block 1 the cross-Gram must be that of the dense network and the changed one."""
    source = open_model(model(name))
    refs = dict(enumerate(matrices(source.skeleton, source.anatomy)))
    ids = torch.randint(3, tiny.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(5))
    samples = Samples(list(ids[:3]), [ids[3]], "ids")
    passes = Passes(source, samples, Calibration(), {Gram, CrossGram}, refs, tmp_path)
    passes.capture()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for block in source.anatomy.blocks[:2]:
        working = {n: source.parameter(n).clone() for n in block.parameters}
        empty = {n: source.skeleton.get_parameter(n) for n in working}
        for n, tensor in working.items():
            put_parameter(source.skeleton, n, nn.Parameter(tensor, requires_grad=False))

        def settle(ref, found, _rows, working=working) -> None:  # type: ignore[no-untyped-def]
            seen[ref.name] = (found.view(CrossGram).matrix, found.view(Gram).matrix)
            put(ref, working[ref.parameter], view(ref, working[ref.parameter]) / 2)

        passes.through(block, refs[block.index], working, settle)
        for n, parameter in empty.items():
            put_parameter(source.skeleton, n, parameter)

    dense, changed = tiny.make(name), tiny.make(name)
    with torch.no_grad():
        for ref in refs[0]:
            changed.get_parameter(ref.parameter).div_(2)
    inputs: list[dict[str, torch.Tensor]] = [{}, {}]
    for network, found in zip((dense, changed), inputs, strict=True):
        for ref in refs[1]:
            module = network.get_submodule(ref.parameter.rpartition(".")[0])
            module.register_forward_pre_hook(
                lambda _m, given, n=ref.name, found=found: found.update({n: given[0].reshape(-1, given[0].shape[-1])})
            )
        with torch.no_grad():
            network(ids[:3])
    for ref in refs[1]:
        cross, gram = seen[ref.name]
        x, y = inputs[0][ref.name], inputs[1][ref.name]
        torch.testing.assert_close(cross, x.T @ y, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gram, y.T @ y, rtol=1e-4, atol=1e-3)
        assert (cross - gram).abs().max() > 1e-2, "the two networks differ there"


def test_experts_are_refused(model: Callable[..., Path], tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(str(torch.randint(3, 300, (4, 16)).tolist()))
    recipe = {"steps": ["dense_refit"], "calibration": {"data": str(ids), "samples": 3, "length": 16}}
    with pytest.raises(secateur.RequestError, match="experts may get other tokens"):
        secateur.compress(model("mixtral"), recipe=secateur.Recipe.parse(recipe), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_times_it_with_one_batch_and_with_two(model: Callable[..., Path], tmp_path: Path) -> None:
    """The dense network's hidden states of the first try are gone when the second begins, like the others."""
    (tmp_path / "text.txt").write_text("the garden in spring " * 2000)
    recipe = secateur.Recipe.parse(
        {
            "steps": ["dense_refit"],
            "calibration": {"data": str(tmp_path / "text.txt"), "samples": 40, "length": 256},
        }
    )
    said = forecast.dry_run(model("llama"), recipe=recipe, output=tmp_path / "out")
    assert said["seconds"] > 0
