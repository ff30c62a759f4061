"""Models whose blocks differ in width, in heads, in parts: written, opened by plain transformers, used and trained."""

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import outcomes
import secateur
import tiny
from secateur.files import write_json
from secateur.network.anatomy import Anatomy, Attention, Block
from secateur.network.heterogeneous import BlockShape, heterogeneous_config
from secateur.network.modelling_file import FILE, is_ours
from secateur.network.source import open_model
from secateur.network.store import copy_companions, model_code, raw_config
from secateur.network.surgery import cut_tensors, silence_tensors
from secateur.network.verify import CleanProcess
from secateur.network.views import Cut

ARCHITECTURES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox")
# Not cut but turned: its stream has another basis in front of every norm, and matrices beside its parts.
# Of gpt2 and gpt_neox it is wider than any configuration can say with their heads, its norms are others, and what had no
# bias has one; attention and feed-forward of gpt_neox stand side by side.
TURNED = {"turned llama": "llama_tied", "turned gpt2": "gpt2", "turned gpt_neox": "gpt_neox"}
LLAMA = "turned llama"
# Their attention is as wide as the residual stream, so fewer heads would be wider ones.
FIXED_HEADS = ("opt", "gpt2", "gpt_neox")
FEWER_HEADS = BlockShape(heads=2, kv_heads=1)
# Block 0 without attention is the hard one: a cache tells by its first layer how long it is.
SHAPES = {
    0: BlockShape(units=33, skip=("attention",)),
    1: BlockShape(units=96),
    2: BlockShape(skip=("feed_forward",)),
}
IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 150, 2], [11, 4, 8, 301, 90, 21, 64, 17]])
Make = Callable[..., Path]


def shapes_for(name: str) -> dict[int, BlockShape]:
    return SHAPES if name in FIXED_HEADS else SHAPES | {2: replace(FEWER_HEADS, skip=("feed_forward",))}


def _heads(tensors: dict, block: Block, attention: Attention, kept: list[int], kept_kv: list[int]) -> dict:
    """Parameters of an attention with only these heads; of a fused matrix q, k and v follow each other."""

    def channels(heads: list[int], start: int = 0) -> torch.Tensor:
        each = [torch.arange(head * attention.head_dim, (head + 1) * attention.head_dim) for head in heads]
        return torch.cat(each) + start

    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    if attention.fused:
        rows = torch.cat([channels(kept), channels(kept_kv, q), channels(kept_kv, q + kv)])
        cut = dict.fromkeys(attention.q, rows)
    else:
        cut = dict.fromkeys(attention.q, channels(kept)) | dict.fromkeys(
            [*attention.k, *attention.v], channels(kept_kv)
        )
    changed = {}
    for weight, rows in cut.items():
        for name in (weight, weight.replace(".weight", ".bias")):
            if name in tensors:
                changed[name] = tensors[name][rows]
    return changed | {name: tensors[name][:, channels(kept)] for name in attention.o}


def _silent(tensors: dict, matrix: str, columns: torch.Tensor, dim: int) -> dict:
    """An output matrix that takes nothing from these columns; from all of them, and its bias says nothing either."""
    quiet = {matrix: tensors[matrix].index_fill(dim, columns, 0)}
    bias = matrix.replace(".weight", ".bias")
    if len(columns) == tensors[matrix].shape[dim] and bias in tensors:
        quiet[bias] = torch.zeros_like(tensors[bias])
    return quiet


def cut_and_silenced(model: nn.Module, network: Anatomy, shapes: dict[int, BlockShape]) -> tuple[dict, dict]:
    """The parameters of a model cut to `shapes`, and those of the whole one in which the same is silent."""
    cut = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    silent = dict(cut)
    for index, shape in shapes.items():
        block = network.blocks[index]
        inner, attention = block.feed_forward, block.attention
        if shape.units:
            drawn = torch.randperm(inner.units, generator=torch.Generator().manual_seed(index))
            kept = drawn[: shape.units].sort().values
            silent |= silence_tensors(silent, inner.group, Cut(kept))
            cut |= cut_tensors(cut, inner.group, Cut(kept))
        if shape.heads:  # the last group: one key-value head, and the query heads that share it
            dim = 1
            gone = torch.arange((attention.heads - shape.heads) * attention.head_dim)
            silent |= _silent(silent, attention.o[0], gone, dim)
            kept_heads = list(range(attention.heads - shape.heads, attention.heads))
            cut |= _heads(cut, block, attention, kept_heads, [attention.kv_heads - 1])
        if "attention" in shape.skip:
            output = attention.o[0]
            silent |= _silent(silent, output, torch.arange(silent[output].shape[1]), 1)
            cut = {name: tensor for name, tensor in cut.items() if not name.startswith(attention.module + ".")}
        if "feed_forward" in shape.skip:
            down = inner.down
            silent |= _silent(silent, down.parameter, torch.arange(inner.units), down.dim)
            gone = {part.parameter for part in inner.group.slices} | {inner.down_bias}
            cut = {name: tensor for name, tensor in cut.items() if name not in gone}
    return cut, silent


def write(source: Path, target: Path, shapes: dict[int, BlockShape], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Writes a model cut to `shapes`; returns the whole one in which the same is silent."""
    opened = open_model(source)
    raw = heterogeneous_config(opened, raw_config(opened), shapes)
    model = AutoModelForCausalLM.from_pretrained(source)
    cut, silent = cut_and_silenced(model, opened.anatomy, shapes)
    model.load_state_dict(silent, strict=False)
    target.mkdir(parents=True, exist_ok=True)
    save_file({k: t.to(dtype).contiguous() for k, t in cut.items()}, target / "model.safetensors", {"format": "pt"})
    copy_companions(opened, target)
    for name, text in model_code(opened, raw).items():
        (target / name).write_text(text)
    write_json(target / "config.json", raw | {"dtype": str(dtype).removeprefix("torch.")})
    return model.eval()


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


def turned(source: Path, folder: Path, clean: CleanProcess, **options: Any) -> Path:
    """A model that is only turned, by matrices that are far from doing nothing."""
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    write_json(folder / "ids.json", drawn.tolist())
    calibration = {"data": str(folder / "ids.json"), "samples": 6, "length": 16}
    recipe = secateur.Recipe.parse({"steps": [{"slicegpt": {"ratio": 0}}], "calibration": calibration})
    secateur.compress(source, recipe=recipe, output=folder / "out", evaluate=False, clean=clean, **options)
    matrices = [p for name, p in load(folder / "out").named_parameters() if name.endswith("_shortcut.weight")]
    assert matrices and all(matrix.abs().max() > 0.5 for matrix in matrices)
    return folder / "out"


@pytest.fixture(scope="session")
def written(
    model: Make, clean: CleanProcess, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, nn.Module]]:
    """A cut model's directory and the silenced whole model, made once. Tests must not change them."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def get(name: str) -> tuple[Path, nn.Module]:
        if name not in made and name in TURNED:
            directory, source = tmp_path_factory.mktemp("turned"), model(TURNED[name])
            made[name] = turned(source, directory, clean), AutoModelForCausalLM.from_pretrained(source).eval()
        if name not in made:
            directory = tmp_path_factory.mktemp("cut") / name
            made[name] = directory, write(model(name), directory, shapes_for(name))
        return made[name]

    return get


each = pytest.mark.parametrize(
    "name", (*ARCHITECTURES, *(pytest.param(n, marks=[pytest.mark.every] * (n == "turned gpt_neox")) for n in TURNED))
)


@each
def test_a_cut_model_computes_what_the_silenced_one_does(name: str, written: Callable, clean: CleanProcess) -> None:
    directory, silent = written(name)
    expected = logits(silent)
    cut = load(directory)
    assert (outcomes.parameters(cut) < outcomes.parameters(silent)) == (name not in TURNED)
    for there in (logits(cut), clean.logits(directory, IDS.tolist(), trust_remote_code=True)):
        torch.testing.assert_close(there, expected, atol=1e-4, rtol=1e-4)
    assert type(cut).__module__.endswith(FILE.removesuffix(".py"))
    tied = cut.get_input_embeddings().weight is cut.get_output_embeddings().weight
    assert name in TURNED or tied == (silent.get_input_embeddings().weight is silent.get_output_embeddings().weight)
    assert cut.generation_config.eos_token_id == silent.generation_config.eos_token_id


@each
def test_it_generates_with_every_cache_and_attention(name: str, written: Callable) -> None:
    directory, silent = written(name)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], 1)
    ids, mask = torch.cat([padded, IDS[1:]]), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    expected = silent.generate(ids, attention_mask=mask, use_cache=False, **options)
    kinds = (
        ["eager", "sdpa"] if silent._supports_sdpa else ["eager"]
    )  # an architecture that caps its scores has no other
    for kind in kinds:
        cut = load(directory, attn_implementation=kind)
        for cached in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
            got = cut.generate(ids, attention_mask=mask, **cached, **options)
            assert got.tolist() == expected.tolist(), (kind, cached)
        alone = cut.generate(IDS[:1, :5], **options)
        assert alone[0].tolist() == expected[0, 3:].tolist(), "padding changes nothing"
        other = next((each for each in kinds if each != kind), kind)
        cut.set_attn_implementation(other)
        said = {module.config._attn_implementation for module in cut.modules() if hasattr(module, "config")}
        assert said == {other}, "blocks with a configuration of their own follow"
        torch.testing.assert_close(logits(cut), logits(silent), atol=1e-4, rtol=1e-4)


@each
def test_a_saved_copy_loads_again(name: str, written: Callable, clean: CleanProcess, tmp_path: Path) -> None:
    directory, silent = written(name)
    load(directory).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / FILE).read_bytes() == (directory / FILE).read_bytes()
    again = clean.logits(tmp_path / "copy", IDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(again, logits(silent), atol=1e-4, rtol=1e-4)
    assert is_ours(tmp_path / "copy"), "a copy is as well known as the original"
    [entry] = {json.loads((tmp_path / "copy" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]}
    kind = get_class_from_dynamic_module(entry, tmp_path / "copy")
    kind.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / FILE).exists(), "also where the class was taken by its name"


@each
def test_it_learns(name: str, written: Callable) -> None:
    directory, _ = written(name)
    losses, gradients = [], []
    for checkpointing in (False, True):
        cut = load(directory)
        cut.train()
        for module in cut.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for rate in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        if checkpointing:
            cut.activation_checkpointing_enable()
        optimizer = torch.optim.SGD(cut.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = cut(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gradients.append([p.grad.clone() for p in cut.parameters() if p.grad is not None])
    assert losses[2] < losses[0] and losses[3:] == pytest.approx(losses[:3], rel=1e-4)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", LLAMA])
def test_half_precision(name: str, dtype: torch.dtype, written: Callable, model: Make, tmp_path: Path) -> None:
    if name == LLAMA:
        directory, silent = written(name)
        load(directory, dtype=dtype).save_pretrained(tmp_path / "half")
    else:
        silent = write(model(name), tmp_path / "half", shapes_for(name), dtype)
    cut = load(tmp_path / "half", dtype="auto")
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    apart = 0.2 if name == LLAMA else 0.1  # what is rounded in another basis is rounded otherwise
    torch.testing.assert_close(logits(cut), logits(deepcopy(silent).to(dtype)), atol=apart, rtol=0.1)
    said = cut.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert said.shape == (2, 11)


@pytest.mark.parametrize("name", ["llama", LLAMA])
def test_the_model_without_its_head(name: str, written: Callable) -> None:
    directory, silent = written(name)
    body = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        states = body(IDS)[0]
        if name == LLAMA:  # in another basis, behind a norm without its scale
            states = load(directory).lm_head(states) - silent.lm_head(silent.model(IDS)[0])
        torch.testing.assert_close(
            states, torch.zeros_like(states) if name == LLAMA else silent.model(IDS)[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", FIXED_HEADS)
def test_heads_that_are_as_wide_as_the_stream_divided_stay(name: str, model: Make) -> None:
    source = open_model(model(name))
    with pytest.raises(secateur.RequestError, match="keep all heads"):
        heterogeneous_config(source, raw_config(source), {1: BlockShape(heads=2, kv_heads=2)})


@pytest.mark.parametrize(
    "shape", [BlockShape(units=7), BlockShape(skip=("attention",)), BlockShape(heads=2, kv_heads=2)]
)
def test_blocks_that_read_no_width_are_refused(shape: BlockShape, model: Make) -> None:
    source = open_model(model("bloom"))
    with pytest.raises(secateur.RequestError, match="BloomForCausalLM"):
        heterogeneous_config(source, raw_config(source), {1: shape})


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({3: BlockShape(units=7)}, "no block 3"),
        ({0: BlockShape(units=161)}, "160 feed-forward neurons"),
        ({0: BlockShape(units=0)}, "at least 1"),
        ({0: BlockShape(heads=3, kv_heads=2)}, "3 heads over 2"),
        ({0: BlockShape(units=7, skip=("feed_forward",))}, "none or is to skip"),
        ({0: BlockShape(skip=("mlp",))}, "cannot skip 'mlp'"),
    ],
)
def test_shapes_that_cannot_be(shapes: dict, said: str, model: Make) -> None:
    source = open_model(model("llama"))
    with pytest.raises(secateur.RequestError, match=said):
        heterogeneous_config(source, raw_config(source), shapes)


@pytest.mark.parametrize(
    "shape", [BlockShape(units=33), FEWER_HEADS, BlockShape(skip=("attention",)), BlockShape(skip=("feed_forward",))]
)
def test_without_its_code_it_fails_loudly(shape: BlockShape, model: Make, tmp_path: Path) -> None:
    write(model("llama"), tmp_path / "cut", {1: shape})
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_what_it_brings_needs_transformers_and_torch_alone(written: Callable, tmp_path: Path) -> None:
    directory, silent = written("qwen3")
    program = (
        "import sys; from transformers import AutoModelForCausalLM; import torch\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True).eval()\n"
        "assert not [name for name in sys.modules if name.startswith('secateur')]\n"
        f"torch.save(model(torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(silent), atol=1e-4, rtol=1e-4)


WIDTHS = [144, 64, 112]
RATIOS = {"ratios": [0.1, 0.6, 0.3], "multiple_of": 1, "episodes": 1}


@pytest.fixture(scope="session")
def pruned(model: Make, clean: CleanProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a method whose ratios differ."""
    output = tmp_path_factory.mktemp("pruned") / "llama"
    secateur.compress(model("llama"), "prunenet", RATIOS, output=output, evaluate=False, clean=clean)
    return output


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_ratios_that_differ_are_saved(pruned: Path) -> None:
    receipt = json.loads((pruned / "secateur.json").read_text())
    assert receipt["code"] == [FILE] and FILE in receipt["files"]
    assert "clean process" in receipt["reload_check"]["how"]
    card = (pruned / "README.md").read_text()
    assert "trust_remote_code=True" in card and FILE in card
    assert [block.feed_forward.units for block in open_model(pruned).anatomy.blocks] == WIDTHS
    assert secateur.evaluate(pruned, speed=False).model.parameters == open_model(pruned).anatomy.parameters


def test_equal_ratios_need_no_code(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    secateur.compress(
        model("llama"), "prunenet", RATIOS | {"ratios": [0.1] * 3}, output=tmp_path / "out", evaluate=False, clean=clean
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 144 and not {"auto_map", "per_layer_config"} & set(config)
    assert not (tmp_path / "out" / FILE).exists()
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


def test_a_result_is_compressed_further(pruned: Path, clean: CleanProcess, tmp_path: Path) -> None:
    def again(method: str, parameters: dict, name: str) -> Path:
        secateur.compress(pruned, method, parameters, output=tmp_path / name, evaluate=False, clean=clean)
        return tmp_path / name

    narrower = again("prunenet", RATIOS | {"ratios": [0.5, 0.0, 0.5]}, "narrower")
    assert [block.feed_forward.units for block in open_model(narrower).anatomy.blocks] == [72, 64, 56]
    sparse = again("magnitude", {"pattern": 0.5}, "sparse")
    assert [block.feed_forward.units for block in open_model(sparse).anatomy.blocks] == WIDTHS
    assert (sparse / FILE).read_bytes() == (pruned / FILE).read_bytes()
    level = again("prunenet", RATIOS | {"ratios": [1 - 64 / width for width in WIDTHS]}, "level")
    assert (
        not (level / FILE).exists() and type(AutoModelForCausalLM.from_pretrained(level)).__name__ == "LlamaForCausalLM"
    )


def test_steps_follow_each_other_and_a_live_model_is_saved(clean: CleanProcess, tmp_path: Path) -> None:
    recipe = secateur.Recipe.parse(
        {"steps": [{"prunenet": RATIOS}, {"random_units": {"ratio": 0.5, "multiple_of": 1}}]}
    )
    secateur.compress(tiny.make("qwen2"), recipe=recipe, output=tmp_path / "out", evaluate=False, clean=clean)
    units = [block.feed_forward.units for block in open_model(tmp_path / "out").anatomy.blocks]
    assert units == [width // 2 for width in WIDTHS]


def test_a_live_module_that_was_cut_unevenly_is_saved(pruned: Path, clean: CleanProcess, tmp_path: Path) -> None:
    uneven = secateur.compress(tiny.make("llama"), "prunenet", RATIOS).model
    for name, module in (("plain", uneven), ("loaded", load(pruned))):
        for method, parameters, widths in (
            ("random_units", {"ratio": 0.5, "multiple_of": 1}, [72, 32, 56]),
            ("magnitude", {"pattern": 0.5}, WIDTHS),
        ):
            output = tmp_path / f"{name}-{method}"
            secateur.compress(module, method, parameters, output=output, evaluate=False, clean=clean)
            assert [block.feed_forward.units for block in open_model(output).anatomy.blocks] == widths


def test_a_dry_run_tells_the_widths(model: Make, tmp_path: Path) -> None:
    from secateur.forecast import dry_run

    recipe = secateur.Recipe.parse({"steps": [{"prunenet": RATIOS}]})
    said = dry_run(model("llama"), recipe=recipe, output=tmp_path / "out")
    assert [entry["kept"] for entry in said["units"]["neurons"].values()] == WIDTHS and not (tmp_path / "out").exists()


def test_anatomy_shows_what_each_block_has(written: Callable) -> None:
    blocks = open_model(written("llama")[0]).anatomy.blocks
    assert [block.feed_forward and block.feed_forward.units for block in blocks] == [33, 96, None]
    heads = [block.attention and (block.attention.heads, block.attention.kv_heads) for block in blocks]
    assert heads == [None, (4, 2), (2, 1)]


def test_an_empty_block_is_a_block(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    silent = write(model("llama"), tmp_path / "cut", {0: BlockShape(skip=("attention", "feed_forward"))})
    there = clean.logits(tmp_path / "cut", IDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(silent), atol=1e-4, rtol=1e-4)
    found = open_model(tmp_path / "cut").anatomy.blocks
    assert [bool(block.attention) for block in found] == [False, True, True]


def test_experts_stay_where_attention_goes(model: Make, clean: CleanProcess, tmp_path: Path) -> None:
    silent = write(model("mixtral"), tmp_path / "cut", {1: BlockShape(skip=("attention",)), 2: FEWER_HEADS})
    there = clean.logits(tmp_path / "cut", IDS.tolist(), trust_remote_code=True)
    torch.testing.assert_close(there, logits(silent), atol=1e-4, rtol=1e-4)


MARK = "raise SystemExit('foreign code ran')\n"


def _change_code(directory: Path) -> None:
    (directory / FILE).write_text((directory / FILE).read_text() + MARK)


def _name_another_file(directory: Path) -> None:
    (directory / "mine.py").write_text(MARK)
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"auto_map": config["auto_map"] | {"AutoConfig": "mine.Config"}})


def _bring_a_tokenizer(directory: Path) -> None:
    (directory / "mine.py").write_text(MARK)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(directory / "tokenizer_config.json", config | {"auto_map": {"AutoTokenizer": ["mine.Words", None]}})


@pytest.mark.parametrize("change", [_change_code, _name_another_file, _bring_a_tokenizer])
def test_code_that_is_not_ours_does_not_run(change: Callable, pruned: Path, tmp_path: Path) -> None:
    assert is_ours(pruned)
    copy = _copy(pruned, tmp_path / "copy")
    change(copy)
    for act in (
        lambda: open_model(copy),
        lambda: secateur.evaluate(copy, speed=False),
        lambda: secateur.compress(copy, "magnitude", {"pattern": 0.5}, output=tmp_path / "out"),
    ):
        with pytest.raises(secateur.RequestError, match="--trust-remote-code"):
            act()
    assert not (tmp_path / "out").exists()


def test_changed_code_runs_on_a_persons_word(pruned: Path, tmp_path: Path) -> None:
    copy = _copy(pruned, tmp_path / "copy")
    (copy / FILE).write_text((copy / FILE).read_text() + "\n# looked at\n")
    opened = open_model(copy, trust_remote_code=True)
    assert [block.feed_forward.units for block in opened.anatomy.blocks] == WIDTHS


def test_a_tokenizer_goes_along(pruned: Path) -> None:
    assert AutoTokenizer.from_pretrained(pruned)("here").input_ids == tiny.tokenizer()("here").input_ids
