"""Running a network with one block in memory, and the check of what was written."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur import conclusion
from secateur.network.source import Source, open_model
from secateur.network.stream import pieces, streamed_logits
from secateur.network.verify import CleanProcess, prompt, stored

Make = Callable[..., Path]
IDS = torch.tensor([prompt(tiny.VOCABULARY), list(range(40, 72))])
FIRST = ("llama", "llama_tied", "gpt2", "gemma2", "opt", "phi3", "mixtral", "qwen2_moe", "qwen3_moe_mixed", "mamba")
ALL = [pytest.param(name, marks=() if name in FIRST else pytest.mark.every) for name in tiny.ARCHITECTURES]


@pytest.mark.parametrize("name", ALL)
def test_streamed_logits_are_those_of_the_whole_model(name: str, model: Make) -> None:
    source = open_model(model(name))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model(name), dtype=torch.float32).eval()(IDS).logits
    found = streamed_logits(source.skeleton, source.anatomy, stored(source), IDS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_block_is_in_memory_at_a_time(name: str, model: Make) -> None:
    source = open_model(model(name))
    network, skeleton = source.anatomy, source.skeleton
    inside = {parameter: block.index for block in network.blocks for parameter in block.parameters}
    peaks: list[tuple[int, int]] = []

    def look(*_: object) -> None:
        # what waits to be read is on no device, or one number seen in every place
        here = [n for n, p in skeleton.named_parameters() if not p.is_meta and p.untyped_storage().nbytes() > 4]
        blocks = {inside[n] for n in here if n in inside}
        peaks.append((len(blocks), len([n for n in here if n not in inside])))

    fetch = stored(source)

    def watched(names: Sequence[str]) -> dict[str, Tensor]:
        look()
        return dict(fetch(names))

    handles = [module.register_forward_hook(look) for module in skeleton.modules()]
    streamed_logits(skeleton, network, watched, IDS)
    for handle in handles:
        handle.remove()
    assert max(blocks for blocks, _ in peaks) == 1
    assert max(outside for _, outside in peaks) <= 2, "scale and bias of one norm at most"
    assert all(parameter.is_meta for parameter in skeleton.parameters()), "and nothing stays behind"


def test_a_failure_leaves_nothing_in_memory(model: Make) -> None:
    source = open_model(model("llama"))
    fetch = stored(source)

    def broken(names: Sequence[str]) -> dict[str, Tensor]:
        if any(name.startswith("model.layers.1") for name in names):
            raise ZeroDivisionError
        return dict(fetch(names))

    with pytest.raises(ZeroDivisionError):
        streamed_logits(source.skeleton, source.anatomy, broken, IDS)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    streamed_logits(source.skeleton, source.anatomy, fetch, IDS)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi3"])
def test_pieces_hold_every_tensor_once(name: str, model: Make) -> None:
    source = open_model(model(name))
    for size, count in ((1, 4), (10**9, 2)):
        found = pieces(source, size)
        keys = [key for piece in found for key in piece.keys]
        assert len(keys) == len(set(keys)) and set(keys) == set(source.tensors)
        assert [block for piece in found for block in piece.blocks] == [0, 1, 2]
        assert [piece.index for piece in found] == list(range(count))


# The reload check.


def test_the_reload_check_says_how_it_was_made(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    for memory, said in ((None, "clean process"), (1, "above --max-memory")):
        output = tmp_path / str(memory)
        result = secateur.compress(
            model("llama"), "random_units", output=output, evaluate=False, clean=clean, max_memory=memory
        )
        assert said in result.receipt["reload_check"]["how"]
        assert said in (output / "README.md").read_text()
        assert result.receipt["reload_check"]["largest_difference"] < 1e-5
    exported = [(tmp_path / each / "config.json").read_bytes() for each in ("None", "1")]
    assert exported[0] == exported[1]


def _flipped(output: Path) -> None:
    """One bit of one weight in the middle of a shard."""
    shard = output / "model-00003-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + size])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    content[8 + size + start + 7] ^= 0x40  # the highest bit of an exponent
    shard.write_bytes(content)


def _swapped(output: Path) -> None:
    """Two neurons have changed places in one matrix, as a wrong cut would leave them."""
    shard = output / "model-00003-of-00004.safetensors"
    tensors = load_file(shard)
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = up[torch.tensor([1, 0, *range(2, len(up))])]
    save_file(tensors, shard, {"format": "pt"})


def _lost(output: Path) -> None:
    """A tensor is in neither shard nor index; transformers fills it with random numbers and warns."""
    shard, index = output / "model-00003-of-00004.safetensors", output / "model.safetensors.index.json"
    tensors, said = load_file(shard), json.loads(index.read_text())
    for name in ("model.layers.1.mlp.up_proj.weight",):
        del tensors[name], said["weight_map"][name]
    save_file(tensors, shard, {"format": "pt"})
    index.write_text(json.dumps(said))


def _torn(output: Path) -> None:
    shard = output / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("damage", [_flipped, _swapped, _lost, _torn])
def test_a_damaged_result_fails_the_run(
    damage: Callable[[Path], None],
    memory: int | None,
    model: Make,
    clean: CleanProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = conclusion.open_model

    def open_damaged(spec: object, **options: object) -> Source:
        if spec == tmp_path / "out":
            damage(tmp_path / "out")
        return opened(spec, **options)

    options = {"evaluate": False, "clean": clean, "max_memory": memory, "shard_bytes": 1}
    with monkeypatch.context() as patch:
        patch.setattr(conclusion, "open_model", open_damaged)
        with pytest.raises(secateur.RunError) as failure:
            secateur.compress(model("llama"), "random_units", output=tmp_path / "out", **options)
    assert failure.value.exit_code == 1 and str(tmp_path / "out") in str(failure.value)
    assert not (tmp_path / "out" / "secateur.json").exists(), "it never looks finished"
    secateur.compress(model("llama"), "random_units", output=tmp_path / "out", restart=True, **options)
