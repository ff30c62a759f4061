"""Dimensions inside heads: which are turned together, what a cut network computes, what is counted, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import outcome
import secateur
import tiny
from secateur.checks import check_steps
from secateur.forecast import dry_run
from secateur.network.head_dims import find_head_dims
from secateur.network.head_probe import pairs_of
from secateur.network.head_views import PairUnits, ValueUnits, common_pairs
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess

Make = Callable[..., Path]
CUT = (
    "llama", "llama_mha", "llama_mqa", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi",
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed",
)  # fmt: skip
# The configuration ties the size of a head to their number, or heads are normalised together, or lie interleaved.
REFUSED = tuple(sorted(set(tiny.ARCHITECTURES) - set(CUT)))
FIRST = ("llama", "qwen3", "gemma3", "phi")  # plain, norms of heads, two kinds of positions, turned in part
SIZE, KEPT = 16, 10
WORDS = torch.randint(3, tiny.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path | None = None, method: str = "random_units", **given: Any) -> secateur.Recipe:
    step = {method: {"axis": "head_dims", "ratio": 0.3, **given}}
    calibration = {"calibration": {"data": str(ids), "samples": 6, "length": 16}} if ids else {}
    return secateur.Recipe.parse({"steps": [step], **calibration})


def cut(source: Any, output: Path | None, said: secateur.Recipe | None = None, **options: Any) -> secateur.run.Result:
    return secateur.compress(source, recipe=said or recipe(), output=output, evaluate=False, **options)


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, words: Tensor = WORDS) -> Tensor:
    return model(words).logits


def silence(model: Any, source: Path, output: Path) -> Any:
    """The whole model with what was cut zero, written here by names: rows of queries, columns of the output matrix; norms of
    heads are those of the dimensions that stay.
    """
    units = load_file(output / "secateur/kept.safetensors")
    for index, layer in enumerate(model.model.layers):
        dims = open_model(source).anatomy.blocks[index].attention.dims
        kept = sorted(dim for pair in units[f"block {index}, head_dims"].tolist() for dim in dims.pairs[pair])
        values = units[f"block {index}, head_dims, values"].tolist()
        gone = [dim for dim in range(SIZE) if dim not in kept]
        attention, heads = layer.self_attn, dims.heads
        fused = getattr(attention, "qkv_proj", None)
        queries = attention.q_proj if fused is None else fused
        out = getattr(attention, "o_proj", None) or attention.dense
        with torch.no_grad():
            for head in range(heads):
                rows = [head * SIZE + dim for dim in gone]
                queries.weight[rows] = 0
                if queries.bias is not None:
                    queries.bias[rows] = 0
                share = values[head // (heads // dims.kv_heads)]
                out.weight[:, [head * SIZE + dim for dim in range(SIZE) if dim not in share]] = 0
        for name in ("q_norm", "k_norm"):
            if norm := getattr(attention, name, None):
                norm.forward = _norm_over(norm, kept)
    return model


def _norm_over(norm: Any, kept: list[int]) -> Callable[[Tensor], Tensor]:
    plus = type(norm).__name__.startswith("Gemma")  # which stores its scales less one
    eps = norm.eps if plus else norm.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        mean = x[..., kept].square().mean(-1, keepdim=True)
        found = torch.zeros_like(x)
        found[..., kept] = (x * torch.rsqrt(mean + eps) * (norm.weight + plus))[..., kept]
        return found

    return forward


def _marked(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FIRST else pytest.mark.every) for name in names]


@pytest.mark.parametrize("name", _marked(CUT))
def test_the_cut_network_is_the_whole_one_with_silent_dimensions(
    name: str, model: Make, clean: CleanProcess, tmp_path: Path
) -> None:
    source, output = model(name), tmp_path / "out"
    receipt = cut(source, output, clean=clean).receipt
    result = loaded(output)
    assert not (output / "modeling_heterogeneous.py").exists(), "a plain model"
    wanted = logits(silence(loaded(source), source, output))
    difference = (logits(result) - wanted).abs().max() / wanted.abs().max()
    assert difference <= 1e-5 and (logits(result) - logits(loaded(source))).abs().max() > 0.1
    there = clean.logits(output, WORDS.tolist())
    torch.testing.assert_close(there, logits(result), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.generate(WORDS, **options), result.generate(WORDS, use_cache=False, **options))
    for block in open_model(output).anatomy.blocks:
        assert block.attention and block.attention.head_dim == KEPT
    decided = receipt["decisions"][0]
    assert set(map(str, decided["units"]["head_dims"].values())) == {"{'kept': 5, 'of': 8}"}
    assert decided["budget"]["reached"]["parameters"] == {
        "before": outcome.parameters(loaded(source)), "after": outcome.parameters(result)
    }  # fmt: skip


@pytest.mark.parametrize("name", _marked(CUT))
def test_a_live_module_becomes_what_its_directory_would(name: str, model: Make, tmp_path: Path) -> None:
    live = tiny.make(name)
    found = cut(live, None).model
    cut(model(name), tmp_path / "out")
    wanted = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(logits(found), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(live), logits(loaded(model(name))))
    found.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(tmp_path / "saved")), wanted, atol=1e-5, rtol=1e-5)
