"""What methods are told of a matrix's inputs, against plain forward hooks on the model as transformers loads it."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import secateur
import tiny
import watched
from secateur import registry
from secateur.calibration import propagation
from secateur.calibration.collector import Collector
from secateur.calibration.statistics import GatedNorms, Gram, InputNorms, Moments
from secateur.registry import Budget, Mask, Weight

Make = Callable[..., Path]
Seen = dict[str, dict[str, Any]]
UNEQUAL = (16, 9, 16, 5, 16, 9)


FIRST = ("llama", "gpt2", "phi3", "mixtral", "mamba")


def marked(*names: str) -> list[Any]:
    """Cases for the rest of the matrix."""
    return [pytest.param(name, marks=pytest.mark.every) for name in names]


def draw(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.fixture
def ids(tmp_path: Path) -> Callable[..., Path]:
    """Writes sequences as a JSON file."""

    def write(sequences: Sequence[Tensor], name: str = "ids.json") -> Path:
        (tmp_path / name).write_text(json.dumps([each.tolist() for each in sequences]))
        return tmp_path / name

    return write


@pytest.fixture
def probe() -> Iterator[Seen]:
    """Two methods that prune by magnitude and note what they are given, "probe" everything, "probe_norms" no Gram."""
    seen: Seen = {}

    def note(weight: Weight, **given: Any) -> None:
        seen[weight.name] = given

    card: dict[str, Any] = {
        "kind": "weights", "paper": "", "claim": "none", "when": "after training", "criterion": "random",
        "schedule": "one-shot",
    }  # fmt: skip

    @registry.method("probe", **card, speedup="specific")
    def probe(
        weight: Weight, norms: InputNorms, gated: GatedNorms, moments: Moments, gram: Gram, budget: Budget
    ) -> Mask:
        """Notes."""
        note(weight, norms=norms, gated=gated, moments=moments, gram=gram)
        return Mask(budget.mask(weight.matrix.abs()))

    @registry.method("probe_norms", **card, speedup="specific")
    def probe_norms(weight: Weight, norms: InputNorms, moments: Moments, budget: Budget) -> Mask:
        """Notes."""
        note(weight, norms=norms, moments=moments)
        return Mask(budget.mask(weight.matrix.abs()))

    yield seen
    del registry._registry["probe"], registry._registry["probe_norms"]


def recipe(method: str, data: Path, samples: int, parameters: dict[str, Any] | None = None, **settings: Any) -> Any:
    calibration = {"data": str(data), "samples": samples, "length": 16, "held_out": 0, "order": "first", **settings}
    return secateur.Recipe.parse({"steps": [{method: parameters or {}}], "calibration": calibration})


def _told(given: dict[str, Any]) -> dict[str, Tensor]:
    moments = given["moments"]
    said = {"squares": given["norms"].squares, "mean": moments.mean, "variance": moments.variance}
    if "gram" in given:
        said |= {"gated": given["gated"].squares, "gram": given["gram"].matrix}
    return said


@pytest.mark.parametrize("name", [*FIRST, *marked(*(name for name in tiny.ARCHITECTURES if name not in FIRST))])
def test_statistics_are_those_of_plain_hooks(name: str, ids: Callable[..., Path], probe: Seen) -> None:
    """Sequences of unequal length, so that padding would show; each expert's tokens, with the gates that it was given."""
    model, sequences = tiny.make(name), draw(UNEQUAL)
    everything = {"targets": ["*"]} if name == "mamba" else {}  # the matrix that widens the step is left out otherwise
    secateur.compress(model, recipe=recipe("probe", ids(sequences), 6, everything, inputs="dense"))
    expected = watched.inputs(model, sequences)
    outside = {name for name in expected if name.endswith(("lm_head.weight", "embed_out.weight", "expert_gate.weight"))}
    assert set(probe) == set(expected) - outside
    for matrix, given in probe.items():
        inputs, gates = expected[matrix]
        assert given["norms"].tokens == given["gram"].tokens == len(inputs), matrix
        direct = watched.sums(inputs, gates)
        for what, tensor in _told(given).items():
            assert watched.relative(tensor, direct[what]) < 1e-5, (matrix, what)
        assert_close(given["norms"].norms.double(), inputs.double().square().mean(dim=0).sqrt(), rtol=1e-4, atol=1e-6)
        assert torch.equal(given["gram"].matrix, given["gram"].matrix.T)
        assert torch.equal(given["norms"].squares, given["gram"].matrix.diagonal()), "one statistic, not two"


@pytest.mark.parametrize("name", ["llama", *marked("mixtral")])
def test_without_a_gram_norms_and_moments_are_the_same(name: str, ids: Callable[..., Path], probe: Seen) -> None:
    model, sequences = tiny.make(name), draw(UNEQUAL)
    secateur.compress(model, recipe=recipe("probe_norms", ids(sequences), 6, inputs="dense"))
    expected = watched.inputs(model, sequences)
    for matrix, given in probe.items():
        direct = watched.sums(*expected[matrix])
        for what, tensor in _told(given).items():
            assert watched.relative(tensor, direct[what]) < 1e-5, (matrix, what)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]),
        (
            "gptj",
            [("q_proj", "k_proj", "v_proj", "fc_in"), ("out_proj",), ("fc_out",)],
        ),  # attention beside feed-forward
        ("opt", [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)]),
    ],
)
def test_matrices_that_read_one_tensor_share_one_statistic(
    name: str, groups: list[tuple[str, ...]], ids: Callable[..., Path], probe: Seen
) -> None:
    secateur.compress(tiny.make(name), recipe=recipe("probe", ids(draw([16] * 4)), 4))
    shared: dict[tuple[int, int], set[str]] = {}
    for matrix, given in probe.items():
        parts = matrix.split(".")
        block = int(next(part for part in parts if part.isdecimal()))
        shared.setdefault((block, id(given["gram"])), set()).add(parts[-2])
    found = [members for (block, _), members in sorted(shared.items()) if block == 1]
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


def test_experts_that_read_one_tensor_share_nothing(ids: Callable[..., Path], probe: Seen) -> None:
    secateur.compress(tiny.make("mixtral"), recipe=recipe("probe", ids(draw([16] * 4)), 4))
    experts = [id(given["gram"]) for matrix, given in probe.items() if "[" in matrix]
    assert len(set(experts)) == len(experts) == tiny.BLOCKS * 4 * 2
    first = [given["norms"].tokens for matrix, given in probe.items() if "layers.1.mlp.experts.gate_up_proj" in matrix]
    assert sum(first) == 2 * 64 and len(set(first)) > 1, "each token goes to two experts, and not always the same"


def test_matrices_with_one_input_elsewhere_are_not_mixed_up() -> None:
    """A tensor that has gone leaves its place in memory to the next one; statistics must not take them for the same."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    refs = [
        secateur.network.matrices.MatrixRef(f"{i}.weight", f"{i}.weight", None, 8, 8, False, 0, "other")
        for i in range(6)
    ]
    batch = propagation.Batch(0, torch.zeros(1, 5, dtype=torch.int64), 0, False)
    collector = Collector(refs, dict(model.named_parameters()), {"gram"}, None, [batch])
    states = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = {}
    with torch.no_grad():
        x = states
        for index, layer in enumerate(model):
            expected[f"{index}.weight"] = x[0].T @ x[0]
            x = layer(x)
        with collector.watching(batch):
            model(states)
    for name, statistics in collector.results().items():
        assert_close(statistics.view(Gram).matrix, expected[name])


def test_one_input_is_one_in_whatever_shape_and_order() -> None:
    """As a view of another shape, turned, and multiplied from the other side; a copy of it is another."""
    model = nn.ModuleList(nn.Linear(8, 3, bias=False) for _ in range(6))
    refs = [
        secateur.network.matrices.MatrixRef(f"{i}.weight", f"{i}.weight", None, 3, 8, False, 0, "other")
        for i in range(6)
    ]
    batch = propagation.Batch(0, torch.zeros(1, 5, dtype=torch.int64), 0, False)
    collector = Collector(refs, dict(model.named_parameters()), {"gram"}, None, [batch])
    flat, turned = torch.randn(5, 8), torch.randn(1, 8, 5).mT
    with torch.no_grad(), collector.watching(batch):
        model[0](flat)
        model[1](flat.view(1, 5, 8))
        torch.matmul(model[2].weight, flat.T)
        model[3](turned)
        model[4](turned)
        model[5](flat.clone())
    found = collector.results()
    shared = [[found[f"{i}.weight"] is found[f"{j}.weight"] for j in range(6)] for i in range(6)]
    groups = [{0, 1, 2}, {3, 4}, {5}]
    assert shared == [[any({i, j} <= group for group in groups) for j in range(6)] for i in range(6)]
    assert_close(found["2.weight"].view(Gram).matrix, flat.T @ flat)
    assert_close(found["4.weight"].view(Gram).matrix, turned[0].T @ turned[0])


# On the way through the network.


@pytest.mark.parametrize("name", ["llama", *marked("mixtral", "gpt2", "phi3", "mamba", "gemma3")])
def test_inputs_come_through_the_compressed_blocks(
    name: str, model: Make, ids: Callable[..., Path], probe: Seen, tmp_path: Path, clean: Any
) -> None:
    """The statistics of block n are those behind the written blocks 0 to n − 1, with block n itself still dense."""
    sequences = draw(UNEQUAL)
    given = recipe("probe", ids(sequences), 6, {"pattern": 0.6})
    secateur.compress(model(name), recipe=given, output=tmp_path / "out", evaluate=False, clean=clean)
    dense, written = (AutoModelForCausalLM.from_pretrained(each) for each in (model(name), tmp_path / "out"))
    paths = [block.path for block in secateur.network.source.open_model(model(name)).anatomy.blocks]
    mixed, unlike = AutoModelForCausalLM.from_pretrained(model(name)), 0
    for path in paths:
        expected = watched.inputs(mixed, sequences)
        behind = watched.inputs(dense, sequences)
        for matrix in (each for each in probe if each.startswith(path + ".")):
            gram = probe[matrix]["gram"]
            direct = watched.sums(*expected[matrix])["gram"]
            assert gram.tokens == len(expected[matrix][0]) and watched.relative(gram.matrix, direct) < 1e-5, matrix
            unlike += watched.relative(gram.matrix, watched.sums(*behind[matrix])["gram"]) > 1e-3
        mixed.get_submodule(path).load_state_dict(written.get_submodule(path).state_dict())
    assert unlike > len(probe) / 2, "and are not those of the dense model"


STEPS = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    # experts see other tokens in every batch, so they are settled together, at the end
    "mixtral": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("experts",)],
    "gptj": [("q_proj", "k_proj", "v_proj", "fc_in"), ("out_proj", "fc_out")],
}


@pytest.mark.parametrize("most", [4096, *marked(20)])  # tokens of a batch
@pytest.mark.parametrize("name", ["llama", *marked("mixtral", "gptj")])
def test_sequential_inputs_come_through_what_is_before_them_in_the_block(
    name: str, most: int, model: Make, ids: Callable[..., Path], probe: Seen, tmp_path: Path, clean: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(propagation, "MOST_TOKENS", most)
    sequences = draw(UNEQUAL)
    given = recipe("probe", ids(sequences), 6, {"pattern": 0.6}, sequential=True)
    secateur.compress(model(name), recipe=given, output=tmp_path / "out", evaluate=False, clean=clean)
    mixed, written = (AutoModelForCausalLM.from_pretrained(each) for each in (model(name), tmp_path / "out"))
    after, checked = dict(written.named_parameters()), 0
    for block in secateur.network.source.open_model(model(name)).anatomy.blocks:
        for group in STEPS[name]:
            expected = watched.inputs(mixed, sequences)
            matrices = [
                each for each in probe if each.startswith(block.path + ".") and set(group) & set(each.split("."))
            ]
            for matrix in matrices:
                direct = watched.sums(*expected[matrix])["gram"]
                assert watched.relative(probe[matrix]["gram"].matrix, direct) < 1e-5, matrix
            with torch.no_grad():
                for parameter in {each.partition("[")[0] for each in matrices}:
                    mixed.get_parameter(parameter).copy_(after[parameter])
            checked += len(matrices)
    assert checked == len(probe)


@pytest.mark.parametrize("name", ["mixtral", *marked("llama", "gpt2", "mamba")])
@pytest.mark.parametrize("inputs", ["rounded", *marked("compressed", "dense")])
def test_hidden_states_are_those_of_the_result(
    inputs: str, name: str, model: Make, ids: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    clean: Any,
) -> None:  # fmt: skip
    """What each block is given, batch by batch; through new weights as they are rounded when they are written."""
    method, source = ("sparsegpt", model(name, dtype=torch.bfloat16)) if inputs == "rounded" else ("wanda", model(name))
    sequences, states = draw(UNEQUAL), {}
    forget = propagation.Propagation.forget

    def keep(self: propagation.Propagation, block: int) -> None:
        states[block] = [self._read(block, batch) for batch in self.batches], self.batches
        forget(self, block)

    monkeypatch.setattr(propagation.Propagation, "forget", keep)
    given = recipe(method, ids(sequences), 6, inputs="dense" if inputs == "dense" else "compressed")
    secateur.compress(source, recipe=given, output=tmp_path / "out", evaluate=False, clean=clean, shard_bytes=1)
    written = source if inputs == "dense" else tmp_path / "out"
    whole = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    paths = [block.path for block in secateur.network.source.open_model(source).anatomy.blocks]
    assert sorted(states) == list(range(tiny.BLOCKS))
    for block, path in enumerate(paths):
        met: list[Tensor] = []
        handle = whole.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, met=met: met.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        kept, batches = states[block]
        with torch.no_grad():
            for batch, found in zip(batches, kept, strict=True):
                whole(input_ids=batch.ids, use_cache=False)
                assert_close(found, met.pop(), rtol=1e-5, atol=1e-5)
        handle.remove()
    assert not (tmp_path / "out" / ".secateur").exists()


def test_no_later_hidden_states_than_are_needed(
    model: Make, ids: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: Any
) -> None:
    """Two files at most at any time, and none that the last block would write."""
    found: list[set[str]] = []
    forget = propagation.Propagation.forget

    def look(self: propagation.Propagation, block: int) -> None:
        found.append({path.name for path in self.folder.iterdir()})
        forget(self, block)

    monkeypatch.setattr(propagation.Propagation, "forget", look)
    for inputs in ("compressed", "dense"):
        found.clear()
        given = recipe("wanda", ids(draw([16] * 4)), 4, inputs=inputs)
        secateur.compress(model("llama"), recipe=given, output=tmp_path / inputs, evaluate=False, clean=clean)
        assert found == [{"0.states", "1.states"}, {"1.states", "2.states"}, {"2.states"}], inputs


def _masks(result: Any) -> dict[str, Tensor]:
    return {name: parameter != 0 for name, parameter in result.model.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize("method", ["sparsegpt", *marked("wanda")])
def test_passes_in_bfloat16_are_close(method: str, ids: Callable[..., Path]) -> None:
    model, data = tiny.make("llama"), ids(draw([16] * 16))
    precise, rough = (
        secateur.compress(model, recipe=recipe(method, data, 12, held_out=4, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    one, other = _masks(precise), _masks(rough)
    same = sum(int((one[name] == other[name]).sum()) for name in one) / sum(mask.numel() for mask in one.values())
    assert 0.97 < same < 1
    for name, entry in precise.receipt["decisions"][0]["matrices"].items():
        said = rough.receipt["decisions"][0]["matrices"][name]
        for error in ("calibration_error", "held_out_error"):
            assert said[error] == pytest.approx(entry[error], rel=0.15), name
    for name, parameter in rough.model.named_parameters():
        assert parameter.dtype == torch.float32
        if method == "wanda":  # what stays is as precise as it was: the passes alone are not
            kept = parameter != 0
            assert torch.equal(parameter[kept], model.get_parameter(name)[kept])


@pytest.mark.parametrize("name", ["llama", *marked("mixtral")])
def test_the_size_of_batches_does_not_matter(
    name: str, ids: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.make(name), ids(draw([16] * 8 + [7] * 4))

    def run() -> tuple[dict[str, Tensor], int]:
        counts: list[int] = []
        made = propagation.Propagation.capture
        with monkeypatch.context() as patch:
            patch.setattr(
                propagation.Propagation, "capture", lambda s, f: (counts.append(len(s.batches)), made(s, f))[1]
            )
            return _masks(secateur.compress(model, recipe=recipe("wanda", data, 12))), counts[0]

    usual, batches = run()
    assert batches == 2, "one for each length"
    for limit, size, number in (("MOST_TOKENS", 40, 5), ("ACTIVATION_BYTES", 1, 12)):
        with monkeypatch.context() as patch:
            patch.setattr(propagation, limit, size)
            other, batches = run()
        assert batches == number
        different = sum(int((usual[key] != other[key]).sum()) for key in usual)
        assert different <= 1e-3 * sum(mask.numel() for mask in usual.values())


def test_blocks_that_are_run_twice_are_refused(ids: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passing tokens through each block once would tell something else than the model computes."""
    monkeypatch.setitem(tiny.ARCHITECTURES, "hrm_text", tiny._config("HrmText", **tiny._BASE))
    with pytest.raises(secateur.RequestError, match=r"once each .*L_module\.layers\.0"):
        secateur.compress(tiny.make("hrm_text"), recipe=recipe("wanda", ids(draw([16])), 1))


def test_blocks_with_something_between_them_are_refused(ids: Callable[..., Path]) -> None:
    model = tiny.make("llama")
    data = ids(draw([16]))
    secateur.compress(model, recipe=recipe("wanda", data, 1))

    class Between(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            states = self.embed_tokens(input_ids)
            places = torch.arange(input_ids.shape[1]).unsqueeze(0)
            turned = self.rotary_emb(states, places)
            for layer in self.layers:
                states = 1.5 * layer(states, position_embeddings=turned, position_ids=places)
            return type("Output", (), {"last_hidden_state": self.norm(states), "past_key_values": None,
                                       "hidden_states": None, "attentions": None})()  # fmt: skip

    model.model.__class__ = Between
    with pytest.raises(secateur.RequestError, match=r"one after the other .*layers\.1\b"):
        secateur.compress(model, recipe=recipe("wanda", data, 1))


def test_matrices_whose_products_are_not_seen_are_refused(
    ids: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that run all at once, as in Llama 4: to prune them by magnitude would pretend that they saw no token."""
    settings = {**tiny._SHARED, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
    config = tiny._config("Llama4Text", **settings, intermediate_size_mlp=160, interleave_moe_layer_step=1)
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama4", config)
    model, data = tiny.make("llama4"), ids(draw([16]))
    with pytest.raises(secateur.RequestError, match=r"layers\.0\.feed_forward\.experts\.gate_up_proj .*targets"):
        secateur.compress(model, recipe=recipe("wanda", data, 1))
    pruned = secateur.compress(model, recipe=recipe("wanda", data, 1, {"targets": ["attention", "feed_forward"]}))
    assert len(pruned.receipt["decisions"][0]["matrices"]) == 7 * tiny.BLOCKS
