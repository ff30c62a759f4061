"""Dimensions inside heads: which are turned together, what a cut network computes, what is counted, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import outcomes
import secateur
import tiny
from secateur.checks import check_steps
from secateur.forecast import dry_run
from secateur.network.head_probe import pairs_of
from secateur.network.head_views import common_pairs
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess

Make = Callable[..., Path]
# turned side by side and in part; not in every block; with factors on cosines, and a score that belongs to no dimension
OTHERS = {
    "glm": tiny._config("Glm", **tiny._SHARED, **tiny._HEAD),
    "smollm3": tiny._config("SmolLM3", **tiny._SHARED, no_rope_layers=[1, 0, 1]),
    "gpt_oss": tiny._config("GptOss", **tiny._SHARED, **tiny._HEAD, num_local_experts=4, num_experts_per_tok=2),
}
CUT = (
    "llama", "llama_mha", "llama_mqa", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi",
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe_mixed",
)  # fmt: skip
# The configuration ties the size of a head to their number or checks factors by it (Phi-3), heads are normalised together or
# lie interleaved, or there are none.
REFUSED = tuple(sorted(set(tiny.ARCHITECTURES) - set(CUT)))
FIRST = ("llama", "qwen3", "glm")  # plain, norms of heads, turned side by side and in part
SIZE, KEPT = 16, 10
WORDS = torch.randint(3, tiny.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in OTHERS.items():
        monkeypatch.setitem(tiny.ARCHITECTURES, name, config)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path | None = None, method: str = "random_units", **given: Any) -> secateur.Recipe:
    step = {method: {"axis": "head_dims", "ratio": 0.3, **given}}
    calibration = {"calibration": {"data": str(ids), "samples": 6, "length": 16, "held_out": 0}} if ids else {}
    return secateur.Recipe.parse({"steps": [step], **calibration})


def cut(source: Any, output: Path | None, said: secateur.Recipe | None = None, **options: Any) -> secateur.run.Result:
    return secateur.compress(source, recipe=said or recipe(), output=output, evaluate=False, **options)


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
def logits(model: Any, words: Tensor = WORDS) -> Tensor:
    return model(words).logits


def silence(model: Any, source: Path, output: Path) -> Any:
    """The whole model with what was cut zero, written here by names: rows of queries, columns of the output matrix; norms of
    heads are those of the dimensions that stay.
    """
    units = load_file(output / "secateur/kept.safetensors")
    blocks = open_model(source).anatomy.blocks
    turned = max((block.attention.dims for block in blocks), key=lambda dims: dims.turned)
    for index, layer in enumerate(model.model.layers):
        dims = replace(turned, heads=blocks[index].attention.heads, kv_heads=blocks[index].attention.kv_heads)
        kept = sorted(dim for pair in units[f"block {index}, head_dims"].tolist() for dim in dims.pairs[pair])
        values = units[f"block {index}, head_dims, values"].tolist()
        gone = [dim for dim in range(SIZE) if dim not in kept]
        attention, heads = layer.self_attn, dims.heads
        queries = attention.q_proj
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


@pytest.mark.parametrize("name", _marked((*CUT, *OTHERS)))
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
    assert all(block.attention and block.attention.head_dim == KEPT for block in open_model(output).anatomy.blocks)
    decided = receipt["decisions"][0]
    assert set(map(str, decided["units"]["head_dims"].values())) == {"{'kept': 5, 'of': 8}"}
    assert decided["budget"]["reached"]["parameters"] == {
        "before": outcomes.parameters(loaded(source)), "after": outcomes.parameters(result)
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.every) for name in (*CUT, *OTHERS)]
)
def test_a_live_module_becomes_what_its_directory_would(name: str, model: Make, tmp_path: Path) -> None:
    live = tiny.make(name)
    found = cut(live, None).model
    cut(model(name), tmp_path / "out")
    wanted = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(logits(found), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(live), logits(loaded(model(name))))
    found.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded(tmp_path / "saved")), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "phi3" else pytest.mark.every) for n in REFUSED])
def test_what_cannot_lose_dimensions_is_refused_before_anything_is_written(
    name: str, model: Make, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match="dimension|attention") as refusal:
        cut(model(name), tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
        "short_factor": [1 + 0.1 * pair for pair in range(8)], "long_factor": [2 + 0.3 * pair for pair in range(8)],
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}  # fmt: skip


def turned_by(rope: dict[str, Any], directory: Path) -> Path:
    tiny.save("llama", directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"rope_parameters": rope}))
    return directory


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "longrope" else pytest.mark.every) for k in ROPES])
def test_frequencies_are_kept_whatever_made_them(kind: str, clean: CleanProcess, tmp_path: Path) -> None:
    """Within the length that a model was first made for and beyond it, where longrope takes other factors."""
    source, output = turned_by(ROPES[kind], tmp_path / "source"), tmp_path / "out"
    if kind == "dynamic":
        with pytest.raises(secateur.RequestError, match="attention that was recognised"):
            cut(source, output)
        return
    cut(source, output, clean=clean)
    silent, result = silence(loaded(source), source, output), loaded(output)
    for words in (WORDS, WORDS[:, :20]):
        wanted = logits(silent, words)
        assert (logits(result, words) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(result.generate(WORDS, **options), silent.generate(WORDS, **options))


@pytest.mark.every
def test_old_names_of_rotations_are_kept(model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    """Configurations of older checkpoints say rope_theta and rope_scaling, and so do readers of that time."""
    source = turned_by({}, tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    del raw["rope_parameters"]
    (source / "config.json").write_text(json.dumps(raw | {"rope_theta": 5000.0, "rope_scaling": None}))
    cut(source, tmp_path / "out", clean=clean)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["rope_theta"] == said["rope_scaling"]["rope_theta"] == 5000.0 and "rope_parameters" not in said
    assert len(said["rope_scaling"]["short_factor"]) == KEPT // 2 and said["head_dim"] == KEPT


def test_queries_are_rounded_once(model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    """In bfloat16 what queries are multiplied by is rounded; the check of the run expects just that."""
    source = model("llama", dtype=torch.bfloat16)
    said = cut(source, tmp_path / "out", clean=clean).receipt
    assert said["reload_check"]["largest_difference"] <= 1e-5
    before, after = stored(source), stored(tmp_path / "out")
    name = "model.layers.1.self_attn.{}_proj.weight"
    units = load_file(tmp_path / "out/secateur/kept.safetensors")
    dims = torch.tensor([part for shift in (0, 8) for part in (units["block 1, head_dims"] + shift).tolist()])
    for part, factor in (("q", (KEPT / SIZE) ** 0.5), ("k", 1.0)):
        rows = before[name.format(part)].unflatten(0, (-1, SIZE))[:, dims].flatten(0, 1)
        assert torch.equal(after[name.format(part)], (rows.float() * factor).bfloat16())
    values = units["block 1, head_dims, values"]
    rows = torch.cat([before[name.format("v")].unflatten(0, (-1, SIZE))[head, values[head]] for head in range(2)])
    assert torch.equal(after[name.format("v")], rows)
    live = tiny.make("llama").bfloat16()
    assert cut(live, None).model.config.head_dim == KEPT


def test_a_check_of_the_run_sees_a_wrong_factor(model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = secateur.network.head_config._longrope

    def wrong(*args: Any) -> dict[str, Any]:
        said = right(*args)
        return said | {"attention_factor": 1.1}

    monkeypatch.setattr("secateur.network.head_config._longrope", wrong)
    with pytest.raises(secateur.RequestError, match="does not compute what it does with the others silent"):
        cut(model("llama"), tmp_path / "out")


def test_every_pair_is_found_by_what_it_meets() -> None:
    assert pairs_of(8, 8, "halves") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert pairs_of(8, 4, "halves") == ((0, 2), (1, 3), (4, 5), (6, 7))
    assert pairs_of(8, 4, "neighbours") == ((0, 1), (2, 3), (4, 5), (6, 7))
    dims = open_model(tiny.make("phi")).anatomy.blocks[1].attention.dims
    assert dims and (dims.layout, dims.turned) == ("halves", 8)
    fused = open_model(tiny.make("phi3")).anatomy.blocks[0].attention.dims
    assert [part[0].offset for part in (fused.queries, fused.keys, fused.values)] == [0, 64, 96]


def by_hand(method: str, ids: Path) -> tuple[Tensor, dict[int, Tensor]]:
    """The pairs and, by block, the dimensions of values that stay of `llama_mqa`, by loops over the dense model."""
    live, total, values = tiny.make("llama_mqa"), torch.zeros(8, dtype=torch.float64), {}
    drawn = torch.tensor(json.loads(ids.read_text()))
    for index, layer in enumerate(live.model.layers):
        attention, seen = layer.self_attn, {}
        handles = [
            getattr(attention, f"{part}_proj").register_forward_hook(
                lambda _, given, out, part=part, seen=seen: seen.update({part: given[0] if part == "o" else out})
            )
            for part in "qko"
        ]
        logits(live, drawn)
        q, k, o = (seen[part][:, 4:].double().unflatten(-1, (-1, SIZE)).flatten(0, 1) for part in "qko")
        for handle in handles:
            handle.remove()
        wq, wk, wv, wo = (getattr(attention, f"{part}_proj").weight.detach().double() for part in "qkvo")
        pairs, found = torch.zeros(8, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
        for dim in range(SIZE):
            for head in range(4):
                row, column = wq[head * SIZE + dim], wo[:, head * SIZE + dim]
                if method == "magnitude_units":
                    pairs[dim % 8] += row.square().sum()
                else:
                    one, other = (q[:, head, dim], o[:, head, dim])
                    spread = [x.var(unbiased=False) if method == "flap" else x.square().mean() for x in (one, other)]
                    pairs[dim % 8] += spread[0] * k[:, 0, dim].square().mean()
                    found[dim] += spread[1] * column.square().sum()
            if method == "magnitude_units":
                found[dim] = wv[dim].square().sum()
        pairs = pairs.sqrt() if method == "magnitude_units" else pairs
        total += pairs / pairs.mean()
        values[index] = found.argsort(descending=True)[:KEPT].sort().values
    return total.argsort(descending=True)[: KEPT // 2].sort().values, values


@pytest.mark.parametrize(
    "method", ["wanda_units", *(pytest.param(m, marks=pytest.mark.every) for m in ("magnitude_units", "flap"))]
)
def test_the_best_by_hand_are_kept(method: str, model: Make, ids: Path, tmp_path: Path, clean: CleanProcess) -> None:
    text = None if method == "magnitude_units" else ids
    source = model("llama_mqa")
    cut(source, tmp_path / "out", recipe(text, method), clean=clean)
    units = load_file(tmp_path / "out/secateur/kept.safetensors")
    pairs, values = by_hand(method, ids)
    assert pairs.tolist() != list(range(KEPT // 2))
    for index in range(tiny.BLOCKS):
        assert units[f"block {index}, head_dims"].tolist() == pairs.tolist()
        assert units[f"block {index}, head_dims, values"].tolist() == [values[index].tolist()]
    bias = [stored(each)["model.layers.0.self_attn.o_proj.bias"] for each in (source, tmp_path / "out")]
    assert torch.equal(*bias) == (method != "flap"), "which takes over the mean of what goes"


def test_beside_neurons_and_after_a_kill(
    model: Make, ids: Path, tmp_path: Path, clean: CleanProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens pass through blocks whose heads have lost dimensions when neurons are chosen, norms of heads too."""
    said = recipe(ids, "wanda_units", axis=["head_dims", "neurons"])

    def run(output: Path) -> None:
        cut(model("qwen3"), output, said, clean=clean, shard_bytes=1)

    run(tmp_path / "first")
    result = loaded(tmp_path / "first")
    assert (result.config.head_dim, result.config.intermediate_size) == (KEPT, 128)
    silent = silence(loaded(model("qwen3")), model("qwen3"), tmp_path / "first")
    drawn, seen = torch.tensor(json.loads(ids.read_text())), {}
    for index, layer in enumerate(silent.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given, index=index: seen.update({index: given[0][:, 4:]})
        )
    logits(silent, drawn)
    norms = seen[0].flatten(0, 1).square().mean(0) * silent.model.layers[0].mlp.down_proj.weight.square().sum(0)
    kept = load_file(tmp_path / "first/secateur/kept.safetensors")["block 0, neurons"]
    assert kept.tolist() == norms.argsort(descending=True)[:128].sort().values.tolist()
    for renames in (9,):
        with monkeypatch.context() as patch:
            outcomes.kill_at_rename(patch, renames)
            with pytest.raises(outcomes.Killed):
                run(tmp_path / str(renames))
        run(tmp_path / str(renames))
        assert outcomes.promised(tmp_path / "first") == outcomes.promised(tmp_path / str(renames))


@pytest.mark.parametrize("first", ["head_dims", pytest.param("heads", marks=pytest.mark.every)])
def test_heads_in_another_step(first: str, model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    """Whatever comes first, the dry run tells what is left."""
    second = "heads" if first == "head_dims" else "head_dims"
    steps = [{"magnitude_units": {"axis": axis, "ratio": 0.5 if axis == "heads" else 0.3}} for axis in (first, second)]
    said = secateur.Recipe.parse({"steps": steps})
    told = dry_run(model("qwen3"), recipe=said, output=tmp_path / "out")
    cut(model("qwen3"), tmp_path / "out", said, clean=clean)
    result = loaded(tmp_path / "out")
    assert (result.config.head_dim, result.config.num_attention_heads) == (KEPT, 2)
    assert told["parameters_after"] == outcomes.parameters(result)
    assert told["multiply_adds"]["after"] == secateur.evaluation.arithmetic.multiply_adds(result, 256)


@pytest.mark.every
def test_a_budget_in_parameters(model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    source = model("llama")
    whole = outcomes.parameters(loaded(source))
    said = recipe(of="parameters", ratio=0.05)
    cut(source, tmp_path / "out", said, clean=clean)
    result = loaded(tmp_path / "out")
    pair = tiny.BLOCKS * 2 * 12 * tiny.HIDDEN  # two dimensions of four heads that ask and read, two that answer twice
    assert abs(outcomes.parameters(result) - 0.95 * whole) <= pair / 2 and result.config.head_dim < SIZE


@pytest.mark.parametrize("method", [pytest.param("random_units", marks=pytest.mark.every), "wanda_units"])
def test_a_dry_run_times_the_decision(method: str, model: Make, ids: Path, tmp_path: Path) -> None:
    said = recipe(ids if method == "wanda_units" else None, method)
    told = dry_run(model("llama"), recipe=said, output=tmp_path / "out")
    assert told["seconds"] > 0 and told["units"]["head_dims"]["0"] == {"kept": 5, "of": 8}
    assert not (tmp_path / "out").exists()


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([{"random_units": {"axis": ["heads", "head_dims"]}}], "lie across each other"),
    ([{"random_units": {"axis": "head_dims", "ratios": [0.1, 0.2, 0.5]}}], "give one ratio"),
    ([{"random_units": {"axis": "head_dims", "allocation": "alphapruning"}}], "nothing to divide"),
    ([{"random_units": {"axis": "head_dims", "ratio": 0.9}}], "leaves none of 8 units"),
    ([{"unit_surgeon": {"axis": "head_dims"}}], "only, not head_dims"),
    (
        [{"random_units": {"ratios": [0.2, 0.4, 0.2]}}, {"random_units": {"axis": "head_dims"}}],
        "put the step that cuts dimensions first",
    ),
]


def test_wrong_requests(model: Make) -> None:
    source = open_model(model("llama"))
    for steps, said in WRONG:
        with pytest.raises(secateur.RequestError, match=said):
            check_steps(source, secateur.Recipe.parse({"steps": steps}).steps)


@pytest.mark.every
def test_blocks_may_differ_afterwards(model: Make, tmp_path: Path, clean: CleanProcess) -> None:
    steps = [{"random_units": {"axis": "head_dims"}}, {"random_units": {"ratios": [0.2, 0.4, 0.2]}}]
    cut(model("llama"), tmp_path / "out", secateur.Recipe.parse({"steps": steps}), clean=clean)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {layer.self_attn.head_dim for layer in result.model.layers} == {12}
    assert {layer.mlp.gate_proj.out_features for layer in result.model.layers} == {96, 128}
    with pytest.raises(secateur.RequestError, match="put the step that cuts them first"):
        cut(tmp_path / "out", tmp_path / "again")


def test_one_turned_pair_stays_and_equal_scores_keep_the_first() -> None:
    scores = {0: torch.tensor([0.0, 0.0, 9.0, 8.0]), 1: torch.tensor([0.0, 0.0, 1.0, 1.0])}
    assert common_pairs(scores, 2, 0).tolist() == [2, 3]
    assert common_pairs(scores, 2, 2).tolist() == [0, 2]
    assert common_pairs({0: torch.ones(4)}, 2, 2).tolist() == [0, 1]
    # a block whose scores are a thousand times as large decides no more than another
    one, other = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5.0, 1.0, 1.0])
    assert common_pairs({0: one, 1: other}, 1, 0).tolist() == common_pairs({0: one, 1: 1000 * other}, 1, 0).tolist()
