"""Products by another library are the same products."""

import pytest
import torch
from torch import nn

import tiny
from secateur.tensor import products

SHAPES = [(512, 96, 130), (70, 1000, 33)]


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 0)


@pytest.mark.skipif(products._ONEDNN is None, reason="torch was built without oneDNN")
def test_it_is_there_and_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(products, "_ONEDNN", lambda *given: used.append(len(given)) or torch.zeros(1))
    inputs, weight = torch.randn(8, 4), torch.randn(3, 4)
    products.linear(inputs, weight)
    products.product(inputs, weight.T)
    assert len(used) == 2
    for other in (inputs.double(), inputs.bfloat16()):
        products.linear(other, weight.to(other.dtype))
    products.linear(inputs, nn.Parameter(weight))  # a gradient is wanted
    assert len(used) == 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_numbers(shape: tuple[int, int, int], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, inner, outputs = shape
    inputs, weight = torch.randn(tokens, inner, generator=generator), torch.randn(outputs, inner, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    exact = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = inner**0.5
    for given in (inputs, inputs.T.contiguous().T, inputs.view(2, -1, inner)):
        found = products.linear(given, weight.T.contiguous().T, bias)
        torch.testing.assert_close(found.reshape(exact.shape).double(), exact, rtol=0, atol=2e-6 * size * 10)
    torch.testing.assert_close(products.product(inputs, weight.T.contiguous()).double(), inputs.double() @ weight.double().T,
                               rtol=0, atol=2e-6 * size * 10)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba"])
def test_a_model_computes_the_same_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(name)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    used, usual_linear = [], products.linear
    monkeypatch.setattr(products, "linear", lambda *given: used.append(1) or usual_linear(*given))
    with torch.no_grad():
        usual = model(ids).logits
        with products.FastProducts():
            fast = model(ids).logits
    torch.testing.assert_close(fast, usual, rtol=1e-4, atol=1e-4)
    assert len(used) > 6, "and it is this library that computed it"
