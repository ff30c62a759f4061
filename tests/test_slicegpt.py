"""SliceGPT, with a basis for each place and with one: what a rotation changes, what is lost, what is refused.

That results with matrices beside parts are used, saved, trained and loaded like others with code is in test_heterogeneous.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import outcomes
import secateur
import tiny
from secateur.calibration.samples import Samples
from secateur.calibration.stream_moment import StreamPass, moment
from secateur.cuts import Cuts
from secateur.export import export
from secateur.forecast import dry_run
from secateur.network import stream_roles
from secateur.network.bases import Bases
from secateur.network.modelling_file import FILE
from secateur.network.norms import without_mean
from secateur.network.rotation import centred
from secateur.network.source import open_model
from secateur.network.stream_roles import find_roles
from secateur.network.verify import CleanProcess
from secateur.tensor.directions import principal_directions, random_directions

WORDS = torch.tensor([[5, 9, 200, 31, 7, 8, 77, 140]])
COUNT, LENGTH, SKIP = 6, 16, 4


def write_ids(folder: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    (folder / "ids.json").write_text(json.dumps(drawn.tolist()))
    return folder / "ids.json"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return write_ids(tmp_path)


def recipe(ids: Path, *others: dict[str, Any], **given: Any) -> secateur.Recipe:
    calibration = {"data": str(ids), "samples": COUNT, "length": LENGTH, "order": "first"}
    return secateur.Recipe.parse({"steps": [{"slicegpt": given}, *others], "calibration": calibration})


def load(directory: Path, **options: Any) -> Any:
    code = {"trust_remote_code": True} if (directory / FILE).exists() else {}
    return AutoModelForCausalLM.from_pretrained(directory, **code, **options).eval()


def logits(directory: Path, tokens: Tensor = WORDS) -> Tensor:
    with torch.no_grad():
        return load(directory, dtype=torch.float32)(tokens).logits


@pytest.fixture(scope="module")
def sliced(model: Callable[..., Path], clean: CleanProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has lost a quarter of its stream, and its tokens beside it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("sliced")
    write_ids(folder)
    said = recipe(folder / "ids.json", ratio=0.25)
    secateur.compress(model("llama_tied"), recipe=said, output=folder / "out", evaluate=False, clean=clean)
    return folder / "out"


def test_principal_directions_of_a_known_moment() -> None:
    basis = random_directions(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    energy = torch.tensor([1.0, 7.0, 3.0, 9.0, 2.0], dtype=torch.float64)
    found = principal_directions(basis @ energy.diag() @ basis.T)
    wanted = basis[:, energy.argsort(descending=True)]
    torch.testing.assert_close(found * (found * wanted).sum(dim=0).sign(), wanted)
    assert (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_the_moment_is_that_of_what_norms_are_given(ids: Path, tmp_path: Path) -> None:
    """Each token counts by its direction; the stream behind the last block is seen too."""
    sequences = list(torch.tensor(json.loads(ids.read_text())))
    tokens = StreamPass(
        open_model(tiny.make("llama")), Samples(sequences, [], "ids"), tmp_path, torch.float32, skip=SKIP
    )
    tokens.run()
    model, caught = tiny.make("llama"), list[Tensor]()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_pre_hook(lambda _, given: caught.append(given[0].detach()))
    with torch.no_grad():
        model(torch.stack(sequences))
    assert len(caught) == 2 * tiny.BLOCKS + 1
    total, count = torch.zeros(tiny.HIDDEN, tiny.HIDDEN, dtype=torch.float64), 0
    for states in caught:
        for x in states[:, SKIP:].reshape(-1, tiny.HIDDEN).double():
            x = x / x.square().mean().sqrt()
            total += torch.outer(x, x)
            count += 1
    torch.testing.assert_close(tokens.moment().matrix, total / count, atol=1e-6, rtol=1e-5)
    assert not moment(torch.zeros(2, 3)).any()


FIRST = [("llama", "one", "pca"), ("gemma", "one", "random"), ("qwen3", "each", "pca"), ("gemma", "each", "pca"),
         ("opt", "each", "pca"), ("falcon_new", "each", "random")]  # fmt: skip
CENTRED = ("opt", "gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "falcon", "falcon_new", "phi")
CASES = [
    *product(
        ("llama", "llama_tied", "llama_mqa", "mistral", "qwen3", "gemma", "phi3"), ("each", "one"), ("pca", "random")
    ),
    *product(CENTRED, ("each",), ("pca", "random")),
]


@pytest.mark.parametrize(
    ("name", "rotation", "basis"),
    [pytest.param(*case, marks=[pytest.mark.every] * (case not in FIRST)) for case in CASES],
)
def test_a_rotation_alone_changes_nothing(
    name: str, rotation: str, basis: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    said = recipe(ids, ratio=0, rotation=rotation, basis=basis)
    secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model(name)), atol=1e-5, rtol=1e-5)
    before, after = (load(path) for path in (model(name), tmp_path / "out"))
    assert not torch.allclose(before.get_input_embeddings().weight, after.get_input_embeddings().weight, atol=0.1)


@pytest.mark.every
def test_directions_that_nobody_uses_cost_nothing(ids: Path, tmp_path: Path, clean: CleanProcess) -> None:
    """A stream that lies in 48 of 64 dimensions, none of them a channel: the principal components find it, channels and
    random directions do not.
    """
    live = tiny.make("llama")
    used = random_directions(tiny.HIDDEN, torch.Generator().manual_seed(3))[:, :48].float()
    keep = used @ used.T
    with torch.no_grad():
        live.model.embed_tokens.weight.copy_(live.model.embed_tokens.weight @ keep)
        for layer in live.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(keep @ writer.weight)
    live.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    wanted, error = logits(tmp_path / "model"), {}
    for rotation, basis in (("each", "pca"), ("one", "pca"), ("one", "random")):
        said, output = recipe(ids, ratio=0.25, rotation=rotation, basis=basis), tmp_path / rotation / basis
        told = secateur.compress(tmp_path / "model", recipe=said, output=output, evaluate=False, clean=clean)
        assert load(output).config.hidden_size == 48
        error[rotation, basis] = float((logits(output) - wanted).abs().max())
        share = told.receipt["decisions"][0]["notes"]["energy kept"]
        assert share == pytest.approx(1, abs=1e-5) if basis == "pca" else share < 0.9
    assert max(error["each", "pca"], error["one", "pca"]) < 1e-3 < 100 * 1e-3 < error["one", "random"]


@pytest.mark.parametrize("rotation", ["each", pytest.param("one", marks=pytest.mark.every)])
def test_more_is_lost_the_more_is_cut(
    rotation: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """And less than in random directions, on the tokens that the directions are made for."""
    tokens, source = torch.tensor(json.loads(ids.read_text())), model("llama_tied")
    wanted, error, energy = logits(source, tokens), {}, {}
    for case in ((0.125, "pca"), (0.5, "pca"), (0.5, "random")):
        ratio, basis = case
        said, output = recipe(ids, ratio=ratio, rotation=rotation, basis=basis), tmp_path / f"{basis}-{ratio}"
        told = secateur.compress(source, recipe=said, output=output, evaluate=False, clean=clean)
        error[case] = float((logits(output, tokens) - wanted).square().mean())
        energy[case] = told.receipt["decisions"][0]["notes"]["energy kept"]
    assert error[0.125, "pca"] < error[0.5, "pca"] < error[0.5, "random"]
    assert energy[0.125, "pca"] > energy[0.5, "pca"]


def test_head_and_embedding_of_a_tied_model_become_two(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    source = model("llama_tied", dtype=torch.bfloat16, shard_size="50KB")
    said = recipe(ids, ratio=0.25, rotation="one")
    told = dry_run(source, recipe=said, output=tmp_path / "out")
    secateur.compress(source, recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert result.dtype == torch.bfloat16 and result.config.tie_word_embeddings is False
    assert not torch.equal(result.lm_head.weight, result.model.embed_tokens.weight)
    assert result.lm_head.weight.shape == result.model.embed_tokens.weight.shape == (tiny.VOCABULARY, 48)
    assert told["parameters_after"] == outcomes.parameters(result)


def test_scales_of_norms_are_one_constant(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """√(h/d): norms go on dividing by all channels. Gemma adds 1 to a scale itself."""
    for name, added in (("llama", 0.0), ("gemma", 1.0)):
        output = tmp_path / name
        said = recipe(ids, ratio=0.25, rotation="one")
        secateur.compress(model(name), recipe=said, output=output, evaluate=False, clean=clean)
        result = AutoModelForCausalLM.from_pretrained(output)
        for scale in [p for n, p in result.named_parameters() if n.endswith("norm.weight")]:
            torch.testing.assert_close(scale.detach() + added, torch.full((48,), (64 / 48) ** 0.5))


@pytest.mark.parametrize(
    ("name", "rotation", "what"),
    [
        ("phi", "one", "subtracts the mean or has a bias"),
        ("gpt2", "one", "cannot say fewer channels"),
        ("gemma2", "each", "not simply in front of"),
        ("mixtral", "each", "no feed-forward layer, that is understood"),
        ("bloom", "each", "not exactly one norm in front of its head"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    name: str, rotation: str, what: str, model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=what) as refusal:
        secateur.compress(model(name), recipe=recipe(ids, rotation=rotation), output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


def test_norms_behind_what_they_norm_are_refused(ids: Path, tmp_path: Path) -> None:
    """The stream of such a network is what its norms give, as in the smallest OPT but one."""
    config = tiny.ARCHITECTURES["opt"]()
    config.do_layer_norm_before = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(secateur.RequestError, match="cannot be rotated"):
        secateur.compress(tmp_path / "model", recipe=recipe(ids), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CENTRED)
@torch.no_grad()
def test_norms_need_not_subtract_a_mean_that_nothing_adds(name: str) -> None:
    """Before anything is sliced, the network of RMSNorms is the one of LayerNorms."""
    live, same = tiny.make(name), tiny.make(name)
    same.lm_head.weight = torch.nn.Parameter(same.lm_head.weight.clone())  # a head that shares the embedding no more
    roles = find_roles(live, open_model(live).anatomy, name)
    assert {*roles.norms} == {n for n, m in live.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    for parameter, tensor in centred(roles, dict(live.named_parameters())).items():
        same.get_parameter(parameter).copy_(tensor)
    seen, means = list[Tensor](), list[Tensor]()
    for model, kept in ((live, means), (same, seen)):
        for path in roles.norms:
            model.get_submodule(path).register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0].mean(-1)))
    with without_mean(same, roles.norms):
        found = same(WORDS).logits
    torch.testing.assert_close(found, live(WORDS).logits, atol=1e-5, rtol=1e-5)
    assert max(float(mean.abs().max()) for mean in seen) < 1e-6 < 0.01 < max(float(m.abs().max()) for m in means)
    with without_mean(live, roles.norms):
        assert (live(WORDS).logits - found).abs().max() > 1e-3, "which it is not by itself"


@pytest.mark.parametrize("name", ["gpt_neox", pytest.param("gpt_neox_sequential", marks=pytest.mark.every)])
@torch.no_grad()
def test_a_stream_without_mean_is_projected_too(
    name: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """As below, of LayerNorms, and with attention and feed-forward side by side, which share one basis."""
    secateur.compress(model(name), recipe=recipe(ids, ratio=0.25), output=tmp_path / "out", evaluate=False, clean=clean)
    dense, result = load(model(name)), load(tmp_path / "out")
    tokens = torch.cat([torch.tensor(json.loads(ids.read_text())), WORDS.repeat(1, 2)])
    body, kept, parallel = dense.gpt_neox, 48, dense.config.use_parallel_residual
    assert result.get_input_embeddings().weight.shape[1] == kept and result.config.hidden_size == tiny.HIDDEN
    shortcuts = [n for n, _ in result.named_parameters() if n.endswith("_shortcut.weight")]
    assert len(shortcuts) == (1 if parallel else 2) * tiny.BLOCKS

    def norm(x: Tensor, module: torch.nn.LayerNorm) -> Tensor:
        epsilon = module.eps * kept / tiny.HIDDEN
        return module.weight * x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() + module.bias

    def project(x: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        rows = x[:COUNT].reshape(-1, tiny.HIDDEN).double()
        rows = rows / rows.square().mean(dim=-1, keepdim=True).sqrt()
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -kept:].float()
        return x @ basis @ basis.T

    x = body.embed_in(tokens)
    positions = body.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    for layer in body.layers:
        x = project(x)
        attended = layer.attention(norm(x, layer.input_layernorm), None, position_embeddings=positions)[0]
        if parallel:
            x = x + attended + layer.mlp(norm(x, layer.post_attention_layernorm))
        else:
            x = project(x + attended)
            x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
    wanted = dense.lm_head(norm(project(x), body.final_layer_norm))
    torch.testing.assert_close(result(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - dense(tokens).logits).abs().max() > 0.1, "which is not what the whole one does"


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.every) for n in ("falcon_new", "phi"))])
def test_what_is_counted_where_norms_lose_their_biases(
    name: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """Matrices without a bias get one, those of a head that shared the embedding too; other precisions, several files."""
    source = model(name, dtype=torch.bfloat16, shard_size="50KB")
    said = recipe(ids, ratio=0.25)
    told = dry_run(source, recipe=said, output=tmp_path / "out")
    done = secateur.compress(source, recipe=said, output=tmp_path / "out", evaluate=False, clean=clean).receipt
    result = load(tmp_path / "out", dtype="auto")
    budget = done["decisions"][0]["budget"]["reached"]["parameters"]
    assert told["parameters_after"] == outcomes.parameters(result) == budget["after"]
    assert result.dtype == torch.bfloat16 and result.lm_head.bias.abs().max() > 0
    assert all(isinstance(m, torch.nn.RMSNorm) for n, m in result.named_modules() if "norm" in n or ".ln_" in n)


@pytest.mark.parametrize("rotation", ["each", "one"])
def test_live_modules_are_refused(rotation: str, ids: Path) -> None:
    with pytest.raises(secateur.RequestError, match="does not rotate live modules"):
        secateur.compress(tiny.make("llama"), recipe=recipe(ids, rotation=rotation))


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ([{"layer_drop": {"remove": 1}}], "remove blocks first"),
        ([{"layer_drop": {"remove": 1, "part": "attention"}}], "remove blocks first"),
        ([{"minitron": {"axis": "channels"}}], "channels first"),
        ([{"random_units": {"axis": "head_dims"}}], "dimensions first"),
    ],
)
def test_what_cannot_be_done_to_a_turned_network_is_refused(
    others: list, what: str, model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=what):
        secateur.compress(model("llama"), recipe=recipe(ids, *others), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_to_a_result_is_refused(sliced: Path, tmp_path: Path) -> None:
    calibration = recipe(sliced.parent / "ids.json").plain()["calibration"]
    for step, what in (
        ({"layer_drop": {"remove": 1}}, "another basis behind each"),
        ({"minitron": {"axis": "channels"}}, "others behind each part"),
        ({"slicegpt": {}}, "others behind each part"),
    ):
        with pytest.raises(secateur.RequestError, match=what):
            given = secateur.Recipe.parse({"steps": [step], "calibration": calibration})
            secateur.compress(sliced, recipe=given, output=tmp_path / "out")
    for form, what in (("padded", "no padding"), ("gguf", "no place for")):
        with pytest.raises(secateur.RequestError, match=what):
            export(sliced, form, tmp_path / f"out.{form}")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.every
@pytest.mark.parametrize("name", ["gpt2", "falcon_new"])
def test_a_result_of_other_norms_is_compressed_further(
    name: str, model: Callable[..., Path], ids: Path, clean: CleanProcess, tmp_path: Path
) -> None:
    said = recipe(ids, ratio=0.25)
    secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    for step in ({"magnitude": {}}, {"random_units": {"axis": "neurons", "ratio": 0.5}}):
        output, given = tmp_path / next(iter(step)), secateur.Recipe.parse({"steps": [step]})
        secateur.compress(tmp_path / "out", recipe=given, output=output, evaluate=False, clean=clean)
        assert (output / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def test_a_result_is_compressed_further(sliced: Path, clean: CleanProcess, tmp_path: Path) -> None:
    """Matrices beside parts stay as they are; neurons and heads may go block by block."""
    turns = {name: p for name, p in load(sliced).named_parameters() if "shortcut" in name}
    assert len(turns) == 2 * tiny.BLOCKS
    for step in ({"magnitude": {}}, {"random_units": {"axis": ["heads", "neurons"], "ratio": 0.5}}):
        output = tmp_path / next(iter(step))
        given = secateur.Recipe.parse({"steps": [step]})
        secateur.compress(sliced, recipe=given, output=output, evaluate=False, clean=clean)
        after = dict(load(output).named_parameters())
        assert all(torch.equal(after[name], turned) for name, turned in turns.items())


def test_without_its_code_a_result_does_not_load(
    sliced: Path, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """Plain transformers would leave the matrices out and compute something else."""
    secateur.compress(model("gpt2"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)
    for result in (sliced, tmp_path / "out"):
        with pytest.raises((RuntimeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(result)
        kind = getattr(transformers, {sliced: "LlamaForCausalLM"}.get(result, "GPT2LMHeadModel"))
        with pytest.raises((RuntimeError, ValueError)):
            kind.from_pretrained(result)


def test_matrices_beside_parts_are_counted(
    model: Callable[..., Path], sliced: Path, ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    result, one = load(sliced), tmp_path / "one"
    budget = json.loads((sliced / "secateur.json").read_text())["decisions"][0]["budget"]["reached"]
    told = dry_run(model("llama_tied"), recipe=recipe(ids, ratio=0.25), output=tmp_path / "out")
    assert outcomes.parameters(result) == budget["parameters"]["after"] == told["parameters_after"]
    said = recipe(ids, ratio=0.25, rotation="one")
    secateur.compress(model("llama_tied"), recipe=said, output=one, evaluate=False, clean=clean)
    alike = json.loads((one / "secateur.json").read_text())["decisions"][0]["budget"]["reached"]
    more = 2 * tiny.BLOCKS * 48**2
    assert budget["parameters"]["after"] - alike["parameters"]["after"] == more
    tokens = budget["multiply_adds"]["tokens"]
    assert budget["multiply_adds"]["after"] - alike["multiply_adds"]["after"] == tokens * more


@torch.no_grad()
def test_it_computes_what_a_projected_stream_does(sliced: Path, model: Callable[..., Path]) -> None:
    """The whole model's own modules, with the stream projected to the principal components in front of every norm, written
    out: x → x Q Qᵀ, each Q from the tokens behind all projections before it.
    """
    dense, kept = load(model("llama_tied")), load(sliced).config.hidden_size
    tokens = torch.cat([torch.tensor(json.loads((sliced.parent / "ids.json").read_text())), WORDS.repeat(1, 2)])
    body, epsilon = dense.model, dense.config.rms_norm_eps * kept / tiny.HIDDEN

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()

    def project(x: Tensor) -> Tensor:
        rows = x[:COUNT].reshape(-1, tiny.HIDDEN).double()
        rows = rows / rows.square().mean(dim=-1, keepdim=True).sqrt()
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -kept:].float()
        return x @ basis @ basis.T

    x = body.embed_tokens(tokens)
    positions = body.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    for layer in body.layers:
        x = project(x)
        x = x + layer.self_attn(norm(x, layer.input_layernorm.weight), positions, None)[0]
        x = project(x)
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm.weight))
    wanted = dense.lm_head(norm(project(x), body.norm.weight))
    found = logits(sliced, tokens)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - dense(tokens).logits).abs().max() > 0.1, "which is not what the whole one does"


@pytest.mark.parametrize("rotation", ["each", "one"])
def test_a_wrong_rotation_is_found_before_anything_is_written(
    rotation: str,
    model: Callable[..., Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clean: CleanProcess,
) -> None:
    """Scales that are folded wrongly, or matrices that turn the wrong way: the whole network, whose stream is projected,
    knows nothing of either.
    """
    if rotation == "one":
        monkeypatch.setattr("secateur.network.norms._added", lambda module: 0.01)
    else:
        right = Bases.turn
        monkeypatch.setattr(Bases, "turn", lambda self, place: right(self, place).T)
    said = recipe(ids, rotation=rotation)
    with pytest.raises(secateur.RunError, match="computes something else"):
        secateur.compress(model("llama"), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_wrong_centring_is_found_before_anything_is_written(
    model: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: CleanProcess
) -> None:
    """A bias that is added to the stream with its mean."""
    right = stream_roles.find_roles

    def wrong(*given: Any) -> Any:
        roles = right(*given)
        return replace(roles, writers={n: w for n, w in roles.writers.items() if not n.endswith("1.mlp.c_proj.bias")})

    for where in ("secateur.network.rotation", "secateur.network.channels", "secateur.calibration.sliced_stream"):
        monkeypatch.setattr(f"{where}.find_roles", wrong)
    with pytest.raises(secateur.RunError, match="centred network .* computes something else"):
        secateur.compress(model("gpt2"), recipe=recipe(ids, ratio=0), output=tmp_path / "out", clean=clean)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("what", ["layers.1.mlp.down_proj", "layers.1.attention_shortcut"])
def test_a_mistake_in_writing_is_found_by_the_reload_check(
    what: str,
    model: Callable[..., Path],
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clean: CleanProcess,
) -> None:
    right = Cuts.apply

    def wrong(self: Cuts, blocks: Any, tensors: dict[str, Tensor]) -> None:
        right(self, blocks, tensors)
        for key in [key for key in tensors if what in key]:
            tensors[key] = tensors[key].flip(0)

    monkeypatch.setattr(Cuts, "apply", wrong)
    with pytest.raises(secateur.RunError, match="its logits differ"):
        secateur.compress(model("llama"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)
