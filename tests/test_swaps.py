"""Swaps: counts stay, errors fall, what has stopped is not touched; a plain loop over rows says the same."""

import pytest
import torch

from secateur.tensor.patterns import keep_n_of_m, keep_per_row
from secateur.tensor.swaps import refine

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _case(rows: int = 12, columns: int = 48, seed: int = 0, group: int | None = None, coarse: bool = False) -> Case:
    """Weight, Wanda's mask, mean, variance, norms; coarse values have ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mean = torch.randn(columns, generator=generator)
    variance = torch.rand(columns, generator=generator) + 0.2
    if coarse:
        weight, mean, variance = (weight * 2).round() / 2, mean.round(), (variance * 2).round() / 2
    norms = (variance + mean.square()).sqrt()
    scores = weight.abs() * norms
    kept = keep_n_of_m(scores, group // 2, group) if group else keep_per_row(scores, [columns // 2] * rows)
    return weight, kept, mean, variance, norms


def _plain(
    case: Case, cycles: int, threshold: float, same_sign: bool, group: int | None
) -> tuple[torch.Tensor, list[int]]:
    """The same by lists, row after row."""
    weight, kept, mean, variance, norms = case
    result, swaps = kept.clone(), []
    for i in range(len(weight)):
        c = [float(weight[i, j] * mean[j]) for j in range(weight.shape[1])]
        scores = (weight[i].abs() * norms).tolist()
        gain = ((weight[i] * mean).abs() / variance.clamp_min(1e-30)).tolist()
        removed = [j for j in range(len(c)) if not kept[i, j]]
        stayed = [j for j in range(len(c)) if kept[i, j]]
        error, count = sum(c[j] for j in removed), 0
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            takers = [j for j in removed if c[j] * sign > 0]
            if not takers:
                break
            taker = max(takers, key=lambda j: (gain[j], -j))
            givers = [j for j in stayed if c[j] * sign < 0 and (group is None or j // group == taker // group)]
            if not givers and group is None:
                break
            removed.remove(taker)
            if not givers:
                continue
            giver = min(givers, key=lambda j: (scores[j], j))
            following = error + c[giver] - c[taker]
            if (same_sign or group is not None) and following * error < 0:
                continue
            stayed.remove(giver)
            error, count = following, count + 1
            result[i, taker], result[i, giver] = True, False
        swaps.append(count)
    return result, swaps


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("same_sign", "group"), [(False, None), (True, None), (True, 4), (True, 8)])
def test_a_plain_loop_over_rows_gives_the_same_masks(same_sign: bool, group: int | None, coarse: bool) -> None:
    swapped = 0
    for seed in range(6):
        case = _case(seed=seed, group=group, coarse=coarse)
        for cycles, threshold in ((3, 0.1), (50, 0.1), (50, 2.0)):
            refined = refine(*case, cycles=cycles, threshold=threshold, same_sign=same_sign, group=group)
            expected, swaps = _plain(case, cycles, threshold, same_sign, group)
            assert torch.equal(refined.kept, expected)
            assert refined.swaps.tolist() == swaps
            swapped += sum(swaps)
    assert swapped > 50


@pytest.mark.parametrize("group", [None, 4])
def test_counts_stay(group: int | None) -> None:
    case = _case(40, 64, 7, group)
    refined = refine(*case, group=group)
    assert not torch.equal(refined.kept, case[1])
    assert torch.equal(refined.kept.sum(1), case[1].sum(1))
    if group:
        assert (refined.kept.view(40, -1, group).sum(2) == group // 2).all()


@pytest.mark.parametrize("group", [None, 4])
def test_the_error_is_that_of_the_mask_and_falls_at_every_swap(group: int | None) -> None:
    case = _case(30, 64, 8, group)
    weight, kept, mean = case[:3]

    def error(mask: torch.Tensor) -> torch.Tensor:
        return (weight.double() * mean.double() * ~mask).sum(1)

    last = refine(*case, cycles=0)
    assert torch.equal(last.kept, kept)
    torch.testing.assert_close(last.before, error(kept))
    for cycles in range(1, 30):
        refined = refine(*case, cycles=cycles, same_sign=True, group=group)
        torch.testing.assert_close(refined.after, error(refined.kept), atol=1e-5, rtol=1e-5)
        moved = refined.swaps > last.swaps
        assert ((refined.swaps - last.swaps)[moved] == 1).all()
        assert (refined.after.abs() < last.after.abs())[moved].all()
        assert (refined.after * last.after >= 0).all()
        # and a row that was not moved is as it was
        assert torch.equal(refined.kept[~moved], last.kept[~moved])
        last = refined
    assert int(last.swaps.sum()) > 30
    assert float(last.after.abs().mean()) < 0.5 * float(last.before.abs().mean())


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_inputs_without_mean_leave_the_mask_bit_for_bit(group: int | None, threshold: float) -> None:
    weight, kept, _, variance, norms = _case(group=group)
    refined = refine(weight, kept, torch.zeros(48), variance, norms, threshold=threshold, group=group)
    assert torch.equal(refined.kept, kept)
    assert not refined.swaps.any()


def test_a_row_that_has_stopped_is_not_touched() -> None:
    case = _case(30, 64, 9)
    before = refine(*case, cycles=0).before.abs()
    threshold = float(before.median())
    refined = refine(*case, threshold=threshold)
    stopped = before <= threshold
    assert stopped.any() and not stopped.all()
    assert torch.equal(refined.kept[stopped], case[1][stopped])
    assert (refined.swaps[~stopped] > 0).all()


def test_one_swap_by_hand() -> None:
    # removed: 0 (c = 3, v = 1) and 1 (c = 4, v = 4); kept: 2 (c = -1) and 3 (c = -2, lower Wanda score), 4 (c > 0)
    weight = torch.tensor([[3.0, 4.0, -1.0, -2.0, 0.1]])
    kept = torch.tensor([[False, False, True, True, True]])
    variance = torch.tensor([1.0, 4.0, 1.0, 1.0, 1.0])
    norms = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0])
    refined = refine(weight, kept, torch.ones(5), variance, norms, cycles=1)
    assert refined.kept.tolist() == [[True, False, True, False, True]]
    assert refined.before.tolist() == [7.0]
    assert refined.after.tolist() == [2.0]


def test_a_relative_threshold_does_not_depend_on_the_scale() -> None:
    weight, kept, mean, variance, norms = _case(30, 64, 10)
    first = refine(weight, kept, mean, variance, norms, threshold=0.1, relative=True)
    for scale in (2.0**-20, 2.0**20):
        other = refine(weight * scale, kept, mean, variance, norms, threshold=0.1, relative=True)
        assert torch.equal(other.kept, first.kept)
    absolute = refine(weight * 2.0**-20, kept, mean, variance, norms, threshold=0.1)
    assert torch.equal(absolute.kept, kept)
    assert int(first.swaps.sum()) > 0


def test_constant_and_dead_inputs() -> None:
    weight, kept, mean, variance, norms = _case(seed=11)
    variance[:4] = 0  # constant
    mean[2:4], norms[2:4] = 0, 0  # dead
    refined = refine(weight, kept, mean, variance, norms)
    assert not torch.equal(refined.kept, kept)
    assert torch.equal(refined.kept.sum(1), kept.sum(1))
    assert torch.equal(refined.kept[:, 2:4], kept[:, 2:4])
    assert bool(refined.after.isfinite().all())
    # among constant inputs the larger contribution comes back first
    row, kept = torch.tensor([[1.0, 2.0, 9.0, -1.0]]), torch.tensor([[False, False, False, True]])
    refined = refine(row, kept, torch.ones(4), torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4), cycles=1)
    assert refined.kept.tolist() == [[False, True, False, False]]


def test_rows_in_parts_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(30, 64, 12)
    whole = refine(*case)
    monkeypatch.setattr("secateur.tensor.swaps.CHUNK", 64 * 7)
    for part, expected in zip(refine(*case), whole, strict=True):
        assert torch.equal(part, expected)
