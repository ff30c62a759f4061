"""Statistics on drawn tokens: the law they are drawn by, and equality with an ordinary forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.calibration.synthetic import EXPONENT, OFFSET, SyntheticGram, synthetic_grams, zipf_tokens
from secateur.errors import RunError
from secateur.network.source import open_model


def test_tokens_follow_the_law() -> None:
    tokens = zipf_tokens(50, 200_000, torch.Generator().manual_seed(0))
    assert tokens.shape[1] == 64
    shares = tokens.flatten().bincount(minlength=50).double() / tokens.numel()
    law = (torch.arange(50, dtype=torch.float64) + OFFSET) ** -EXPONENT
    torch.testing.assert_close(shares, law / law.sum(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gpt_neox"])
def test_grams_are_those_of_an_ordinary_forward(name: str, model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_model(model(name))
    grams: dict[int, SyntheticGram] = {}
    synthetic_grams(source, torch.Generator().manual_seed(3), grams.__setitem__, length=16)
    assert sorted(grams) == [0, 1, 2]

    whole = AutoModelForCausalLM.from_pretrained(model(name)).eval()
    ids = zipf_tokens(source.anatomy.vocabulary, 4 * 160, torch.Generator().manual_seed(3), 16)
    seen: dict[int, torch.Tensor] = {}
    for block in source.anatomy.blocks:
        down = whole.get_submodule(block.feed_forward.down.parameter.removesuffix(".weight"))
        down.register_forward_pre_hook(lambda _, inputs, index=block.index: seen.__setitem__(index, inputs[0]))
    with torch.no_grad():
        whole(ids)
    for index, gram in grams.items():
        responses = seen[index].reshape(-1, 160)
        assert gram.tokens == len(responses) == 640
        torch.testing.assert_close(gram.matrix, responses.T @ responses / 640, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gram.mean, responses.mean(dim=0), atol=1e-5, rtol=1e-4)

    grams[1].write(tmp_path / "gram.safetensors")
    again = SyntheticGram.read(tmp_path / "gram.safetensors")
    assert torch.equal(again.matrix, grams[1].matrix)
    assert again.tokens == 640


def test_a_response_that_is_not_finite_stops_at_its_block(model: Callable[..., Path]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model("llama"))
    with torch.no_grad():
        whole.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        whole.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(RunError, match="block 1"):
        synthetic_grams(open_model(whole), torch.Generator().manual_seed(0), lambda block, gram: None)
