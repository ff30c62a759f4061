"""Masks: exact counts, ties by index, what people may write."""

import pytest
import torch

from secateur.tensor import patterns
from secateur.tensor.patterns import Budget, Pattern, keep_blocks, keep_n_of_m, keep_overall, keep_per_row, shares


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.5", Pattern(0.5)),
        (0, Pattern(0.0)),
        ("2:4", Pattern(kept=2, of=4)),
        ("4:4", Pattern(kept=4, of=4)),
        (" 0.25/4x8", Pattern(0.25, block=(4, 8))),
    ],
)
def test_patterns_as_people_write_them(text: str | float, pattern: Pattern) -> None:
    assert Pattern.parse(text) == pattern
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["1", "-0.1", "0:4", "5:4", "half", "0.5/", "0.5/4", "0.5/0x4", "nan", ""])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=text or "neither"):
        Pattern.parse(text)


def test_shares_are_whole_and_sum_to_the_total() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 50, (7,), generator=generator).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, (1,), generator=generator))
        parts = shares(total, sizes)
        assert sum(parts) == total
        assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
        assert all(abs(part - total * size / sum(sizes)) <= 1 for part, size in zip(parts, sizes, strict=True))


def test_exactly_so_many_go_and_the_first_of_equals() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert keep_per_row(scores, [2, 3]).tolist() == [[False, False, True, True], [False, False, False, True]]
    assert keep_overall(scores, 2).tolist() == [[False, False, True, True], [True] * 4]
    assert keep_overall(scores, 5).tolist() == [[False, False, False, False], [False, True, True, True]]
    assert keep_n_of_m(scores, 1, 2).tolist() == [[True, False, False, True], [False, True, False, True]]
    assert keep_overall(scores, 0).all()
    assert not keep_overall(scores, 8).any()


def test_the_lowest_go() -> None:
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    counts = list(range(20))
    kept = keep_per_row(scores, counts)
    assert (~kept).sum(dim=1).tolist() == counts
    for row, mask in zip(scores, kept, strict=True):
        assert mask.all() or row[~mask].numel() == 0 or row[~mask].max() < row[mask].min()
    kept = keep_overall(scores, 123)
    assert int((~kept).sum()) == 123 and scores[~kept].max() < scores[kept].min()


@pytest.mark.parametrize(("kept", "of"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8), (4, 16), (12, 16)])
def test_n_of_m_is_the_same_choice_in_every_group(kept: int, of: int) -> None:
    scores = torch.randint(0, 6, (12, 48), generator=torch.Generator().manual_seed(kept)).float()
    expected = keep_per_row(scores.view(-1, of), [of - kept] * (12 * 48 // of)).view(12, 48)
    assert torch.equal(keep_n_of_m(scores, kept, of), expected)
    assert not expected.all() and (expected.view(-1, of).sum(dim=1) == kept).all()


def test_tiles_go_whole() -> None:
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(2))
    kept = keep_blocks(scores, (4, 3), 5)
    tiles = kept.view(2, 4, 4, 3).float().mean(dim=(1, 3))
    assert set(tiles.flatten().tolist()) == {0.0, 1.0} and int((tiles == 0).sum()) == 5
    sums = scores.view(2, 4, 4, 3).sum(dim=(1, 3))
    assert sums[tiles == 0].max() < sums[tiles == 1].min()


@pytest.mark.parametrize("text", ["0.5", "0.37", "2:4", "1:4", "0.25/4x8", "0"])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_a_budget_is_met_to_one_weight(text: str, per: str) -> None:
    budget = Budget.uniform(Pattern.parse(text), (12, 40))
    kept = budget.mask(torch.rand(12, 40, generator=torch.Generator().manual_seed(3)), per)
    assert int((~kept).sum()) == budget.weights
    tile = 32 if "x" in text else 1
    assert abs(budget.weights - Pattern.parse(text).sparsity * 480) <= tile / 2
    assert sum(budget.rows()) == sum(budget.columns([16, 16, 8])) == budget.remove


@pytest.mark.parametrize("text", ["0.37", "2:4", "0.25/4x8"])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_scores_made_some_rows_at_a_time_give_the_same_mask(
    text: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_rows_at_once", lambda columns: 5)
    budget, asked = Budget.uniform(Pattern.parse(text), (12, 40)), []
    scores = torch.rand(12, 40, generator=torch.Generator().manual_seed(3))

    def some(rows: slice) -> torch.Tensor:
        asked.append(rows.stop - rows.start)
        return scores[rows]

    assert torch.equal(budget.mask(some, per), budget.mask(scores, per))
    alone = text == "2:4" or (text == "0.37" and per == "row")
    assert asked == ([5, 5, 2] if alone else [12])


@pytest.mark.parametrize("text", ["2:4", "0.5/4x4", "0.5/3x2"])
def test_a_matrix_that_the_pattern_does_not_fit(text: str) -> None:
    with pytest.raises(ValueError, match="needs|divide"):
        Budget.uniform(Pattern.parse(text), (10, 6))
