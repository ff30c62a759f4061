"""Speed in several settings, energy, counted work and memory by phase."""

from pathlib import Path

import pytest
import torch

from secateur.errors import RequestError
from secateur.evaluation import Meter, evaluate, memory, multiply_adds, speed, speeds
from test_evaluation import Fixed, llama, words
from test_evaluation_card import Clock, saved, shown, slow  # noqa: F401 (a fixture)


def test_every_setting_has_its_turns_in_each_round() -> None:
    clock, seen = Clock(), []
    model, reference = slow(llama(), clock, 0.01), slow(llama(1), clock, 0.02)
    for name, each in (("model", model), ("reference", reference)):
        each.register_forward_pre_hook(lambda _, given, name=name: seen.append((name, tuple(given[0].shape))))
    found = speeds(model, reference, prefill=[8, 4], batch=[1, 3], decode=0, pairs=2, clock=clock)
    assert [(each.prefill.tokens, each.batch) for each in found] == [(8, 1), (8, 3), (4, 1), (4, 3)]
    assert all(each.order == ("reference", "model", "model", "reference") for each in found)
    shapes = [(1, 8), (3, 8), (1, 4), (3, 4)]
    warm = [(name, shape) for shape in shapes for name in ("reference", "model")]
    turned = [(name, shape) for shape in shapes for name in ("model", "reference")]
    assert seen == warm + warm + turned
    for each in found:
        # the clock counts what lies in one sequence, so a batch of three reads three times as fast
        assert each.prefill.model.median == pytest.approx(100 * each.batch)
        assert each.prefill.gain.median == pytest.approx(1.0)


def test_one_setting_is_the_first_of_several() -> None:
    def measured(**options):
        clock = Clock()
        return slow(llama(), clock, 0.01), clock, options

    model, clock, _ = measured()
    alone = speed(model, prefill=8, batch=2, decode=3, pairs=2, clock=clock)
    model, clock, _ = measured()
    [first, _] = speeds(model, prefill=[8], batch=[2, 1], decode=3, pairs=2, clock=clock)
    assert (alone.batch, alone.prefill.tokens, alone.decode.tokens) == (2, 8, 3)
    assert first.prefill.model.median == pytest.approx(alone.prefill.model.median)


def test_work_is_that_of_the_real_shapes() -> None:
    model, reference = llama(), llama(1)
    found = speed(model, reference, prefill=8, batch=2, decode=4, pairs=1)
    steps = sum(multiply_adds(model, 1, context=8 + token) for token in range(4))
    assert found.prefill.multiply_adds == 2 * multiply_adds(model, 8) and found.decode.multiply_adds == 2 * steps
    assert found.prefill.expected_gain == 0
    assert speed(model, prefill=8, pairs=1).prefill.expected_gain is None


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"batch": [0]}, {"prefill": [0]}, {"batch": []}):
        with pytest.raises(RequestError, match="at least 1 pair"):
            speeds(llama(), **wrong)
    with pytest.raises(RequestError, match="64 positions"):
        speeds(llama(), prefill=[8, 60], decode=10)


def counter(folder: Path, zone: str, name: str, value: int, span: int = 10**9) -> Path:
    (folder / zone).mkdir()
    for file, content in (("name", name), ("energy_uj", value), ("max_energy_range_uj", span)):
        (folder / zone / file).write_text(f"{content}\n")
    return folder / zone / "energy_uj"


def test_energy_is_that_of_packages_and_memory(tmp_path: Path) -> None:
    package = counter(tmp_path, "intel-rapl:0", "package-0", 999_000_000, 10**9 - 1)
    other = counter(tmp_path, "intel-rapl:1", "package-1", 0)
    memory_ = counter(tmp_path, "intel-rapl:0:1", "dram", 5)
    counter(tmp_path, "intel-rapl:0:0", "core", 7)  # a part of the package
    counter(tmp_path, "intel-rapl:2", "psys", 7)  # everything once more
    meter = Meter.find(tmp_path)
    assert meter.names == ("package-0", "dram", "package-1")
    before = meter.read()
    package.write_text("2000000\n")  # round once: 1 000 000 to the end, and 2 000 000
    other.write_text("500000\n")
    memory_.write_text("1000005\n")
    assert meter.joules(before, meter.read()) == pytest.approx(3.0 + 0.5 + 1.0)


def test_no_energy_where_no_counter_can_be_read(tmp_path: Path) -> None:
    assert Meter.find(tmp_path) is None and Meter.find(tmp_path / "missing") is None
    counter(tmp_path, "intel-rapl:0", "package-0", 5).unlink()
    counter(tmp_path, "intel-rapl:1", "package-1", 5).write_text("denied")
    assert Meter.find(tmp_path) is None


def test_joules_a_token(tmp_path: Path) -> None:
    file = counter(tmp_path, "intel-rapl:0", "package-0", 0)
    clock = Clock()

    def costly(model, joules: float):
        def spend(_module, given, _output):
            spent = int(joules * 1e6 * given[0].numel())
            file.write_text(str(int(file.read_text()) + spent))

        model.register_forward_hook(spend)
        return slow(model, clock, 0.01)

    model, reference = costly(llama(), 0.5), costly(llama(1), 0.75)
    found = speed(model, reference, prefill=8, batch=2, decode=4, pairs=2, clock=clock, meter=Meter.find(tmp_path))
    assert found.energy == ("package-0",)
    for pace in (found.prefill, found.decode):
        assert (pace.joules.median, pace.reference_joules.median) == pytest.approx((0.5, 0.75))
    without = speed(llama(), prefill=8, pairs=1)
    assert without.prefill.joules is None and without.energy == ()


def test_the_table_of_settings() -> None:
    pair = (llama(), words()), (llama(1), words())
    card = evaluate(*pair, prefill=[8, 4], batch=[1, 2], decode=2, pairs=1)
    assert [(each.prefill.tokens, each.batch) for each in (card.speed, *card.more_speed)] == [
        (8, 1), (8, 2), (4, 1), (4, 2),
    ]  # fmt: skip
    text = shown(card)
    assert "at once" in text and "2 behind 8" in text and "+0.0 %" in text
    assert card.model.multiply_adds_tokens == 8, "the first setting is the card's"
    plain = evaluate(*pair, prefill=8, decode=2, pairs=1)
    assert plain.more_speed == () and "at once" not in shown(plain) and "batch 1, float32" in shown(plain)
    alone = evaluate(pair[0], prefill=[8, 4], decode=0, pairs=1)
    assert "at once" in shown(alone) and "expected" not in shown(alone)


def test_a_module_without_a_cache_is_read_only() -> None:
    model = Fixed([0.0] * 9)
    model.embedding = torch.nn.Embedding(9, 1)
    assert [each.decode for each in speeds(model, prefill=[4, 6], pairs=1)] == [None, None]


def test_memory_by_phase(saved) -> None:  # noqa: F811
    found = memory(saved, tokens=32)
    phases = [found.loading, found.prefill, found.decode]
    if found.loading is None:
        pytest.skip("this system cannot set a high-water mark back")
    assert max(phases) == found.peak and found.decoded == 16
    assert min(phases) > found.baseline / 2
    size = 30_000 * 512 * 4
    assert found.loading - found.baseline > 0.5 * size, "the weights are there"
    # 32 rows of logits of 30 000 tokens beside them, and one row
    assert found.prefill > found.decode
