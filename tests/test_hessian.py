"""The damped Hessian and its factors: what defines them, what happens to dead inputs, what happens when it fails."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from secateur.tensor.hessian import damp


def _gram(inputs: int = 24, tokens: int = 200, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return (mixed.T.double() @ mixed.double()).to(dtype)


def test_every_factor_is_what_it_says() -> None:
    hessian = damp(_gram())
    wanted, inverse = hessian.matrix, torch.linalg.inv(hessian.matrix)
    assert_close(hessian.backward @ hessian.backward.T, wanted)
    assert torch.equal(hessian.backward, hessian.backward.triu())
    assert_close(hessian.factor @ hessian.factor.T, wanted)
    assert torch.equal(hessian.factor, hessian.factor.tril())
    assert_close(hessian.upper, torch.linalg.cholesky(inverse, upper=True))
    assert_close(hessian.inverse, inverse)
    assert hessian.upper is hessian.upper, "computed once"


def test_damping_of_the_mean_and_of_each() -> None:
    gram = _gram()
    mean, each = damp(gram, 0.1), damp(gram, 0.1, "each")
    assert_close(mean.matrix, gram + 0.1 * gram.diagonal().mean() * torch.eye(24, dtype=gram.dtype))
    assert_close(each.matrix, gram + 0.1 * torch.diag(gram.diagonal()))
    norms = gram.diagonal().sqrt()
    correlation = gram / norms / norms[:, None] + 0.1 * torch.eye(24, dtype=gram.dtype)
    assert_close(each.matrix, correlation * norms * norms[:, None])
    assert (mean.retries, mean.fraction, mean.dtype) == (0, 0.1, torch.float64)
    assert damp(gram.float()).dtype == torch.float32


def test_the_scale_of_the_gram_matrix_is_the_scale_of_the_hessian() -> None:
    # a power of two, so that this is exact: sum or mean over tokens makes no difference to any solver
    gram = _gram()
    gram[3], gram[:, 3] = 0, 0
    living = torch.arange(24) != 3
    once, scaled = damp(gram), damp(gram / 1024)
    assert torch.equal(once.matrix[living][:, living] / 1024, scaled.matrix[living][:, living])


def test_dead_inputs_stand_alone_and_do_not_count_in_the_mean() -> None:
    gram = _gram()
    gram[[3, 7]], gram[:, [3, 7]] = 0, 0
    gram[3, 5] = gram[5, 3] = 1e-30  # products that did not underflow where the square did
    hessian = damp(gram)
    living = [index for index in range(24) if index not in (3, 7)]
    assert hessian.dead.nonzero()[:, 0].tolist() == [3, 7]
    assert torch.equal(hessian.matrix[3], torch.eye(24, dtype=gram.dtype)[3])
    assert_close(hessian.inverse[7], torch.eye(24, dtype=gram.dtype)[7])
    assert torch.equal(hessian.matrix[living][:, living], damp(gram[living][:, living]).matrix)
    nothing = damp(torch.zeros(4, 4))
    assert bool(nothing.dead.all())
    assert torch.equal(nothing.matrix, torch.eye(4))


def test_asymmetry_of_rounding_goes_and_the_gram_matrix_stays() -> None:
    gram = _gram(dtype=torch.float32)
    gram[0, 1] += 1
    before = gram.clone()
    matrix = damp(gram).matrix
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(gram, before)


def test_float64_helps_before_more_damping_does() -> None:
    # pairs of inputs (a, 1) and (a + 1, 1): whole numbers that float32 holds, with a determinant of 1 that its rounding of
    # the factor loses, in some pairs for certain
    pairs = [
        torch.tensor([[a * a + 1, a * (a + 1) + 1], [a * (a + 1) + 1, (a + 1) ** 2 + 1]]) for a in range(3000, 3032)
    ]
    gram = torch.block_diag(*pairs).float()
    hessian = damp(gram, 0.0)
    assert (hessian.retries, hessian.dtype, hessian.fraction) == (1, torch.float64, 0.0)
    assert torch.equal(hessian.matrix, gram.double())
    assert_close(hessian.backward @ hessian.backward.T, gram.double())


@pytest.mark.parametrize(("needed", "retries", "used"), [(0.05, 2, 0.1), (0.5, 3, 1.0), (5.0, 4, 10.0)])
def test_more_damping_is_tried_where_that_does_not_do(needed: float, retries: int, used: float) -> None:
    # correlation 1 + needed: positive definite when the diagonal grows by more
    gram = torch.tensor([[1.0, 1 + needed], [1 + needed, 1.0]])
    hessian = damp(gram, 0.01, "each")
    assert (hessian.retries, hessian.dtype) == (retries, torch.float64)
    assert hessian.fraction == pytest.approx(used)
    assert_close(hessian.backward @ hessian.backward.T, hessian.matrix)


def test_hopeless_matrices_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="even in float64 with a damping of 10; use a larger damping"):
        damp(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
    broken = _gram()
    broken[2, 2] = torch.inf
    with pytest.raises(torch.linalg.LinAlgError, match="infinities"):
        damp(broken)
