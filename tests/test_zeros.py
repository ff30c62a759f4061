"""What zeros are good for."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur.network import zeros
from secateur.tensor.patterns import keep_n_of_m


def test_zeros_compress_and_noise_does_not(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(200_000))
    (tmp_path / "half").write_bytes(os.urandom(100_000) + bytes(100_000))
    assert 200_000 <= zeros.size_under_zstd([tmp_path / "noise"]) < 201_000
    assert 100_000 <= zeros.size_under_zstd([tmp_path / "half"]) < 101_000
    both = zeros.size_under_zstd([tmp_path / "noise", tmp_path / "half"])
    assert 300_000 <= both < 302_000


def test_too_much_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    monkeypatch.setattr(zeros, "MOST", 999)
    assert zeros.size_under_zstd([tmp_path / "large"]) is None


def test_what_two_of_four_looks_like() -> None:
    matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert not zeros.is_semi_structured(matrix)
    assert zeros.is_semi_structured(matrix * keep_n_of_m(matrix.abs(), 2, 4))
    assert zeros.is_semi_structured(matrix * keep_n_of_m(matrix.abs(), 1, 4))
    assert not zeros.is_semi_structured(matrix * keep_n_of_m(matrix.abs(), 4, 8))
    assert not zeros.is_semi_structured(torch.zeros(8, 6)), "four do not divide its rows"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_a_refusal_says_why() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    with pytest.raises(secateur.RequestError, match="2:4"):
        secateur.to_semi_structured(model)
    with torch.no_grad():
        model[0].weight.mul_(keep_n_of_m(model[0].weight.abs(), 2, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(secateur.RequestError, match="cpu has no kernels"):
        secateur.to_semi_structured(model)
    assert torch.equal(model[0].weight, before)
