"""What zeros are good for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
import tiny
from secateur.network import zeros
from secateur.network.recognise import matrices
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


class Converted:
    """Stands for torch's conversion, which needs a GPU: remembers what it was given, and marks it by a factor."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.given: list[torch.Tensor] = []
        self.fails_at = fails_at

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        assert weight.is_contiguous() and not weight.requires_grad and zeros.is_semi_structured(weight)
        if len(self.given) == self.fails_at:
            raise RuntimeError("an error of the kernels\nand more of it")
        self.given.append(weight)
        return weight * 2


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Converted]:
    """A device with kernels, and a conversion that may fail."""

    def patched(fails_at: int | None = None) -> Converted:
        conversion = Converted(fails_at)
        monkeypatch.setattr(zeros, "to_sparse_semi_structured", conversion)
        monkeypatch.setattr(zeros, "_without_kernels", lambda device: None)
        return conversion

    return patched


def pruned(model: nn.Module) -> nn.Module:
    """The model with all its matrices 2:4 along their inputs, in bfloat16."""
    with torch.no_grad():
        for matrix in matrices(model):
            weight = model.get_parameter(matrix.weight)
            view = weight.T if matrix.output_dim == 1 else weight
            view.mul_(keep_n_of_m(view.abs(), 2, 4))
    return model.to(torch.bfloat16)


def test_what_can_be_converted_is_and_the_rest_is_named(convert: Callable[..., Converted]) -> None:
    conversion = convert()
    model = pruned(tiny.make("llama"))
    with torch.no_grad():
        model.lm_head.weight.fill_(1)
    # torch asks for whole tiles
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(150, 64, dtype=torch.bfloat16))
    model.model.layers[2].mlp.up_proj.float()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    done = secateur.to_semi_structured(model)
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert set(done.skipped) == {f"model.layers.{number}.mlp.up_proj.weight" for number in (1, 2)}
    assert "shape (150, 64) is no multiple of" in done.skipped["model.layers.1.mlp.up_proj.weight"]
    assert "not torch.float32" in done.skipped["model.layers.2.mlp.up_proj.weight"]
    assert set(done.converted) == linear - set(done.skipped) - {"lm_head.weight"} and len(conversion.given) == 19
    for name, now in model.state_dict().items():
        assert torch.equal(now, before[name] * 2 if name in done.converted else before[name]), name
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_a_failure_half_way_changes_nothing(convert: Callable[..., Converted]) -> None:
    convert(fails_at=5)
    model = pruned(tiny.make("llama"))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(secateur.RunError, match=r"could not convert model\.layers\.0.*\(an error of the kernels\)"):
        secateur.to_semi_structured(model)
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_weights_that_are_stored_transposed(convert: Callable[..., Converted]) -> None:
    """They are 2:4, so it must not be said that the model holds no such weights."""
    conversion = convert()
    model = pruned(tiny.make("gpt2"))
    done = secateur.to_semi_structured(model)
    assert done.converted == ("lm_head.weight",) and len(conversion.given) == 1
    assert len(done.skipped) == 12 and all("a Conv1D holds it" in why for why in done.skipped.values())
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.ones_like(model.lm_head.weight))
    with pytest.raises(secateur.RequestError, match=r"none of the 12 2:4 weights .*transformer\.h\.0\..*Conv1D"):
        secateur.to_semi_structured(model)


def test_stacked_experts_are_named_too(convert: Callable[..., Converted]) -> None:
    convert()
    model = tiny.make("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                flat = stack.flatten(0, 1)
                flat.mul_(keep_n_of_m(flat.abs(), 2, 4))
    with pytest.raises(secateur.RequestError, match=r"none of the 6 2:4 weights .*experts\.(gate_up|down)_proj"):
        secateur.to_semi_structured(model)
