"""SliceGPT with one rotation: the moment, what a rotation changes, what is lost, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import outcomes
import secateur
import tiny
from secateur.calibration.samples import Samples
from secateur.calibration.stream_moment import StreamPass, moment
from secateur.cuts import Cuts
from secateur.forecast import dry_run
from secateur.network.source import open_model
from secateur.network.verify import CleanProcess
from secateur.tensor.directions import principal_directions, random_directions

WORDS = torch.tensor([[5, 9, 200, 31, 7, 8, 77, 140]])
COUNT, LENGTH, SKIP = 6, 16, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    drawn = torch.randint(3, tiny.VOCABULARY, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.json").write_text(json.dumps(drawn.tolist()))
    return tmp_path / "ids.json"


def recipe(ids: Path, **given: Any) -> secateur.Recipe:
    calibration = {"data": str(ids), "samples": COUNT, "length": LENGTH, "order": "first"}
    return secateur.Recipe.parse({"steps": [{"slicegpt": given}], "calibration": calibration})


def logits(directory: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(WORDS).logits


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


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_mqa", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("basis", ["pca", "random"])
def test_a_rotation_alone_changes_nothing(
    name: str, basis: str, model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    said = recipe(ids, ratio=0, basis=basis)
    secateur.compress(model(name), recipe=said, output=tmp_path / "out", evaluate=False, clean=clean)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(model(name)), atol=1e-4, rtol=1e-4)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model(name), tmp_path / "out"))
    assert not torch.allclose(before.get_input_embeddings().weight, after.get_input_embeddings().weight, atol=0.1)


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
    for basis in ("pca", "random"):
        said = recipe(ids, ratio=0.25, basis=basis)
        told = secateur.compress(tmp_path / "model", recipe=said, output=tmp_path / basis, evaluate=False, clean=clean)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / basis).config.hidden_size == 48
        error[basis] = float((logits(tmp_path / basis) - wanted).abs().max())
        share = told.receipt["decisions"][0]["notes"]["energy kept"]
        assert share == pytest.approx(1, abs=1e-5) if basis == "pca" else share < 0.9
    assert error["pca"] < 1e-3 < 100 * 1e-3 < error["random"]


def test_more_is_lost_the_more_is_cut(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    """And less than in random directions, on the tokens that the directions are made for."""
    tokens, source, error = torch.tensor(json.loads(ids.read_text())), model("llama_tied"), {}
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
        for ratio, basis in ((0.125, "pca"), (0.5, "pca"), (0.5, "random")):
            output = tmp_path / f"{basis}-{ratio}"
            said = recipe(ids, ratio=ratio, basis=basis)
            secateur.compress(source, recipe=said, output=output, evaluate=False, clean=clean)
            found = AutoModelForCausalLM.from_pretrained(output)(tokens).logits
            error[ratio, basis] = float((found - wanted).square().mean())
    assert error[0.125, "pca"] < error[0.5, "pca"] < error[0.5, "random"]


def test_head_and_embedding_of_a_tied_model_become_two(
    model: Callable[..., Path], ids: Path, tmp_path: Path, clean: CleanProcess
) -> None:
    source, said = model("llama_tied", dtype=torch.bfloat16, shard_size="50KB"), recipe(ids, ratio=0.25)
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
        secateur.compress(model(name), recipe=recipe(ids, ratio=0.25), output=output, evaluate=False, clean=clean)
        result = AutoModelForCausalLM.from_pretrained(output)
        for scale in [p for n, p in result.named_parameters() if n.endswith("norm.weight")]:
            torch.testing.assert_close(scale.detach() + added, torch.full((48,), (64 / 48) ** 0.5))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("phi", "subtracts the mean or has a bias"),
        ("gemma2", "not simply in front of"),
        ("mixtral", "no feed-forward layer, that is understood"),
        ("gpt2", "cannot say fewer channels"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    name: str, what: str, model: Callable[..., Path], ids: Path, tmp_path: Path
) -> None:
    with pytest.raises(secateur.RequestError, match=what) as refusal:
        secateur.compress(model(name), recipe=recipe(ids), output=tmp_path / "out")
    assert str(refusal.value).count(". ") <= 1 and not (tmp_path / "out").exists()


def test_live_modules_are_refused(ids: Path) -> None:
    with pytest.raises(secateur.RequestError, match="does not rotate live modules"):
        secateur.compress(tiny.make("llama"), recipe=recipe(ids))


def test_a_wrong_rotation_is_found_before_anything_is_written(
    model: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: CleanProcess
) -> None:
    """Scales that are folded wrongly: the whole network, whose stream is projected, knows nothing of that."""
    monkeypatch.setattr("secateur.network.rotation._added", lambda module: 0.01)
    with pytest.raises(secateur.RunError, match="computes something else"):
        secateur.compress(model("llama"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_mistake_in_writing_is_found_by_the_reload_check(
    model: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: CleanProcess
) -> None:
    right = Cuts.apply

    def wrong(self: Cuts, blocks: Any, tensors: dict[str, Tensor]) -> None:
        right(self, blocks, tensors)
        for key in [key for key in tensors if "layers.1.mlp.down_proj" in key]:
            tensors[key] = tensors[key].flip(0)

    monkeypatch.setattr(Cuts, "apply", wrong)
    with pytest.raises(secateur.RunError, match="its logits differ"):
        secateur.compress(model("llama"), recipe=recipe(ids), output=tmp_path / "out", evaluate=False, clean=clean)
