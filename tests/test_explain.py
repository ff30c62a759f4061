"""What is said of a run follows from figures of its receipt: each advice with the figure that asks for it and without."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from command import secateur
from receipts import BLOCKS, full, kicked, leaves, lost, old, pruned, put, receipt, unit
from secateur import RequestError, explain, registry
from secateur.advice import RULES
from secateur.figures import at, block_of, kind_of, pointer
from secateur.recipe import Recipe
from secateur.registry import methods
from secateur.report import show
from secateur.telling import Sentence


def _all(made: dict[str, Any]) -> list[Sentence]:
    return [sentence for part in explain(made).parts.values() for sentence in part]


def _next(made: dict[str, Any]) -> str:
    return "\n".join(sentence.text for sentence in explain(made).next)


def _blind(**figures: Any) -> dict[str, Any]:
    """A run of a method that read no text."""
    return receipt("magnitude_units", decisions__0__notes={}, **figures)


FELL = {"card__tasks__0__value": 0.3}
FORGOT = {"card__kick__scores__0": kicked("closed book", 0.5, 0.625, chance=0.25)}
LOST = kicked("open book", 0.4, 0.82, chance=0.25)

# the advice by a word of it, a receipt that asks for it, and the same with the one figure changed that does not
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lost without text": ("read no text", _blind(**lost(90)), _blind(**lost(31))),
    "lost with text": ("second moment", receipt(**lost(90)), receipt(**lost(31))),
    "fits already": ("second moment", receipt("llm_pruner", **lost(90)), receipt("unit_surgeon", **lost(90))),
    "ruined": ("ratio=0.1 ", receipt(**lost(90)), receipt(**lost(50))),
    "few samples": (
        "--samples 32",
        receipt(**{"decisions__0__notes__mean held out error": 0.09}),
        receipt(**{"decisions__0__notes__mean held out error": 0.034}),
    ),
    "enough samples": (
        "more samples would change little",
        receipt(**{"decisions__0__notes__mean held out error": 0.0301}, **lost(90)),
        receipt(**{"decisions__0__notes__mean held out error": 0.036}, **lost(90)),
    ),
    "concentrated": (
        "block 4 has",
        receipt(decisions__0__units__neurons__4=unit(1216, 1536, 0.3, 0.5)),
        receipt(decisions__0__units__neurons__4=unit(1216, 1536, 0.03, 0.05)),
    ),
    "zeros": ("nothing is smaller", pruned(), receipt()),
    "slow": (
        "where multiply-adds promise",
        receipt(card__speed__prefill__gain={"median": 0.03, "lower": 0.02, "upper": 0.04}),
        receipt(card__speed__prefill__gain={"median": 0.11, "lower": 0.10, "upper": 0.12}),
    ),
    "noisy": (
        "machine was busy",
        receipt(card__speed__prefill__gain={"median": 0.03, "lower": -0.2, "upper": 0.3}),
        receipt(card__speed__prefill__gain={"median": 0.03, "lower": 0.02, "upper": 0.04}),
    ),
    "odd width, slow": (
        "1213 are not multiples of 32",
        receipt(
            decisions__0__units__neurons__4=unit(1213, 1536),
            card__speed__prefill__gain={"median": 0.03, "lower": 0.02, "upper": 0.04},
        ),
        receipt(card__speed__prefill__gain={"median": 0.03, "lower": 0.02, "upper": 0.04}),
    ),
    "odd width, not measured": (
        "1213 is not a multiple of 32",
        receipt(decisions__0__units__neurons__4=unit(1213, 1536), card__speed=None),
        receipt(card__speed=None),
    ),
    "tables": (
        "Embedding and head hold 24 %".replace(" %", "%"),
        receipt(shape__token_parameters=28_311_552),
        receipt(),
    ),
    "quantized source": (
        "secateur export",
        receipt(card__reference__disk_format="gguf", card__reference__bytes_on_disk=98_000_000),
        receipt(card__reference__disk_format="gguf"),
    ),
    "missed budget": (
        "was asked for 107,200,000 parameters",
        receipt(decisions__0__budget__asked={"target": 0.8, "of": "parameters"}),
        receipt(decisions__0__budget__asked={"target": 0.8805, "of": "parameters"}),
    ),
    "not measured": ("Nothing was measured", receipt(card=None), receipt()),
    "skipped": ("above --max-memory", receipt(card={"skipped": "both take 9 GB, above --max-memory"}), receipt()),
    "no text": (
        "No text was given",
        receipt(card__model__perplexity=None, card__reference__perplexity=None),
        receipt(),
    ),
    "little text": ("on 255 tokens", receipt(card__model__perplexity__protocol__tokens=255), receipt()),
    "room": ("there is room", receipt(), receipt(**lost(35))),
    "room, as far as is known": ("`secateur evaluate DIR --reference org/base --kick` says", receipt(), full()),
    "no room for a task": ("there is room", full(), full(**FELL)),
    "no room for knowledge": ("there is room", full(), full(**FORGOT)),
    "a task fell": ("acc 0.350 → 0.300), where perplexity", full(**FELL), full()),
    "a task that fell within its error": (
        "goes before its perplexity does; try `secateur compress org/base --method flap --set ratio=0.1 ",
        full(**FELL),
        full(**FELL, card__tasks__0__change_stderr=0.026),
    ),
    "less is better": (
        "goes before its perplexity does",
        full(card__tasks__0__value=0.4, card__tasks__0__higher_is_better=False),
        full(card__tasks__0__value=0.4),
    ),
    "knowledge fell without text": (
        "Scores fell by more than two standard errors (kick: closed book 0.625 → 0.500), where perplexity rose",
        full(**FORGOT, recipe__steps=[{"magnitude_units": {}}], decisions__0__method="magnitude_units"),
        full(recipe__steps=[{"magnitude_units": {}}], decisions__0__method="magnitude_units"),
    ),
    "fallen scores are repaired": ("second moment", full(**FORGOT), full()),
    "still read": ("still found in a text", full(**FORGOT), full(**FORGOT, card__kick__scores__1=LOST)),
    "few questions": (
        "Of arc acc on 500 questions only a change of more than 0.060",
        full(card__tasks__0__change_stderr=0.03),
        full(),
    ),
    "long measuring": (
        "--no-evaluate",
        receipt(timings__measuring=900.0, seconds=1006.0),
        receipt(timings__measuring=100.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_advice_follows_from_a_figure(case: str) -> None:
    words, asks, asks_not = CASES[case]
    assert words in _next(asks)
    assert words not in _next(asks_not)


def test_every_rule_speaks_for_some_receipt() -> None:
    from secateur.telling import Told

    silent = {rule.__name__ for rule in RULES}
    for _, asks, _ in CASES.values():
        silent -= {rule.__name__ for rule in RULES if list(rule(Told(asks)))}
    assert not silent


@pytest.mark.parametrize("made", [case[1] for case in CASES.values()], ids=list(CASES))
def test_every_sentence_names_figures_that_stand_in_the_receipt(made: dict[str, Any]) -> None:
    for sentence in _all(made):
        assert sentence.text and sentence.text[-1] in ".:", sentence.text
        for where, value in sentence.figures.items():
            keys = [part.replace("~1", "/").replace("~0", "~") for part in where.split("/")[1:]]
            found: Any = made
            for key in keys:
                found = found[int(key)] if isinstance(found, list) else found[key]
            assert found == value
    # only what says that nothing was measured rests on what is not there
    assert [s.text for s in _all(made) if not s.figures] == []


def test_what_was_done_cost_and_gained() -> None:
    told = explain(receipt(card__reference__perplexity__perplexity=29.0))
    done, cost, gained = ("\n".join(s.text for s in part) for part in (told.done, told.cost, told.gained))
    assert "org/base was compressed in 1 step, seed 3." in done
    assert "1216 of 1536 in each of 10 blocks, 20.8% removed" in done
    assert "learned from 8 sequences (text.txt), 2,048 tokens in all, and 256 more were held out" in done
    assert "Perplexity rose from 29 to 30 (1.03 times), on wikitext2/test.txt." in cost
    assert "same token first as the original for 90.0 % of the tokens" in cost
    assert "off by 3.5 % on held-out tokens and 3.0 % on those it learned from" in cost
    assert "The run took 2 min and 1.3 GB of memory at its peak." in cost
    assert "Parameters: 134,000,000 → 118,000,000 (-11.9%)." in gained
    assert (
        "Reading (prefill) is 12% faster than the original; quartiles +10% to +14%; 500.0 → 560.0 tokens a second."
        in gained
    )


def test_what_did_not_get_faster_is_said() -> None:
    gained = explain(receipt(card__speed__decode__gain={"median": -0.2, "lower": -0.3, "upper": -0.1})).gained
    assert any("Writing (decoding) is 20% slower than the original" in sentence.text for sentence in gained)
    gained = explain(receipt(card__speed__decode__gain={"median": 0.01, "lower": -0.1, "upper": 0.1})).gained
    assert any("Writing (decoding) is not measurably faster or slower" in sentence.text for sentence in gained)


def test_tasks_and_divergent_tokens_are_told() -> None:
    divergent = {"quantiles": {"0.5": 17}, "censored": 0.1, "share": 0.4, "continuation": 64}
    tasks = [{"name": "arc", "metric": "acc", "value": 0.31, "reference": 0.35, "n": 500}]
    cost = "\n".join(s.text for s in explain(receipt(card__divergent=divergent, card__tasks=tasks)).cost)
    assert "half of its texts leave the original's by token 18; 10.0 % never leave it" in cost
    assert "arc acc: 0.310; the original has 0.350, a change of -0.040, on 500 questions." in cost
    censored = {**divergent, "quantiles": {"0.5": None}}
    assert "stay with the original's for all 64 tokens" in "\n".join(
        s.text for s in explain(receipt(card__divergent=censored)).cost
    )


NOT_SAID = {
    "samples": "single measurements, of which medians and quartiles are said",
    "perplexity/perplexity": "said from its logarithm",
    "drop": "said of what does not match",
    "perplexity/protocol": "how it was measured, which the card prints; only the text is said",
    "divergence/protocol": "the same",
    "bits_per_byte": "said in place of a perplexity where vocabularies differ",
    "memory/baseline|memory/tokens|decoded|multiply_adds_tokens": "how it was measured",
    "model/lower|model/upper|reference/lower|reference/upper|joules/lower|joules/upper": "spreads of what gains are made of",
    "multiply_adds": "of phases, from which expected gains are made",
    "decode/tokens|pairs|threads": "how speed was measured",
    "divergent/(quantiles/0.(1|25|75|9)|survival|ties|tolerance|prompt|continuation|tokens)": "the curve around the middle",
    "tasks/0/(of|shots)|kick/of|kick/written|kick/scores/./n": "how it was asked",
    "kick/scores/./(stderr|reference_stderr)": "the error of the change is what tells",
}


def test_every_number_of_the_card_that_means_something_alone_is_said() -> None:
    """Changing one changes what is said, but for those that another sentence or the printed card says better."""
    made = full()
    before = [sentence.text for sentence in _all(made)]
    passed_over = re.compile("|".join(NOT_SAID))
    deaf = set()
    for keys in leaves(made["card"]):
        changed = full()
        put(changed, "__".join(["card", *map(str, keys)]), 1.5 * at(made["card"], keys))
        if [sentence.text for sentence in _all(changed)] == before:
            deaf.add("/".join(map(str, keys)))
    assert not {each for each in deaf if not passed_over.search(each)}


def test_what_scores_and_the_card_say_is_told() -> None:
    cost = "\n".join(sentence.text for sentence in explain(full(**FORGOT)).cost)
    for said in (
        "arc acc: 0.340 ± 0.021; the original has 0.350 ± 0.022, a change of -0.010 ± 0.011, on 500 questions.",
        "closed book 0.500 (0.625), a change of -0.125 ± 0.010; open book 0.810 (0.820), a change of -0.010 ± 0.010;",
        "In 2 of 3 tasks of LLM-KICK it matches the original", "it does not in closed book (20.0 % lower).",
        "Something that a reader must know.", "On average 25.2 tokens come before the first other one",
    ):  # fmt: skip
        assert said in cost, said
    gained = "\n".join(sentence.text for sentence in explain(full()).gained)
    for said in (
        "Writing (decoding) behind 1,024 tokens, 4 at once is 9% faster than the original",
        "Reading (prefill) of 512 tokens takes 1 → 0.5 J a token (-50.0%), of the whole machine.",
        "Memory while writing: 790 MB → 789 MB (-0.1%).", "Multiply-adds promise that reading is 12.3% faster.",
    ):  # fmt: skip
        assert said in gained, said


def _commands(made: dict[str, Any]) -> list[str]:
    return re.findall(r"`(secateur compress [^`]*)`", _next(made))


def _steps(*steps: tuple[str, dict[str, Any]], **figures: Any) -> dict[str, Any]:
    """A run of several steps."""
    runs = [receipt(name, parameters, **figures) for name, parameters in steps]
    made = runs[0]
    made["recipe"]["steps"] = [run["recipe"]["steps"][0] for run in runs]
    made["decisions"] = [run["decisions"][0] for run in runs]
    return made


def test_commands_keep_the_settings_of_the_run() -> None:
    [more] = _commands(receipt("flap", {"ratio": 0.2, "axis": ["heads"], "allocation": "alphapruning"}))
    assert more == (
        "secateur compress org/base --method flap --set 'axis=[\"heads\"]' --set allocation=alphapruning --set ratio=0.3 "
        "--calibration FILE --output NEW"
    )
    asked = shlex.split(more)
    settings = [asked[place + 1] for place, part in enumerate(asked) if part == "--set"]
    [step] = Recipe.of("flap", settings).steps
    assert step.parameters["axis"] == ["heads"] and "alphapruning" in step.parameters["allocation"]
    cut = {"target": 110_000_000, "axis": ["heads"]}
    blind = receipt("magnitude_units", cut, decisions__0__notes={}, decisions__0__units={}, **lost(90))
    [other] = _commands(blind)  # another method, the same cut, and nothing on a ratio that was not in force
    assert "--set target=110000000" in other and "heads" in other and "ratio=" not in other


@pytest.mark.parametrize("decided", [{"target": 110_000_000}, {"ratios": [0.2] * BLOCKS}, {"of": "parameters"}])
def test_a_ratio_that_did_not_decide_alone_is_not_changed(decided: dict[str, Any]) -> None:
    told = _next(receipt("flap", decided)) + _next(receipt("flap", decided, **lost(90)))
    assert "there is room" not in told and "each half costs" not in told
    assert "ratio=" not in _next(receipt("block_influence", {"remove": 1}))


def test_several_steps_are_changed_together() -> None:
    several = (("flap", {"ratio": 0.2}), ("flap", {"ratio": 0.4}))
    assert _commands(_steps(*several)) == [
        "secateur compress org/base --recipe DIR/secateur.json --set 0.ratio=0.3 --set 1.ratio=0.6 --output NEW"
    ]
    assert "--set 0.ratio=0.1 --set 1.ratio=0.2 " in _next(_steps(*several, **lost(90)))


def test_an_allocation_is_named_and_credited_with_what_it_read() -> None:
    made = pruned("magnitude", **lost(90))
    made["recipe"]["steps"] = [{"magnitude": {"allocation": {"divergent_tokens": {}}}}]
    made["decisions"][0]["notes"] = {"calibration": {"data": "text.txt", "sequences": 6, "tokens": 1536}}
    done = "\n".join(sentence.text for sentence in explain(made).done)
    assert "its budget divided by divergent_tokens (" in done and "2311.01544" in done
    assert "divergent_tokens learned from 6 sequences" in done and "magnitude learned" not in done
    assert "magnitude read no text" in _next(made)
    made["recipe"]["steps"] = [{"wanda": {"allocation": {"divergent_tokens": {}}}}]
    made["decisions"][0]["method"] = "wanda"
    assert "wanda and divergent_tokens learned from 6" in "\n".join(s.text for s in explain(made).done)


def test_prices_of_every_matrix_are_left_to_the_receipt() -> None:
    prices = {f"model.layers.{block}.mlp.up_proj.weight": {"0.1": 0.25, "0.5": 0.75} for block in range(BLOCKS)}
    together = {"first": 0.31, "corrected": 0.12}
    made = pruned()
    made["decisions"][0]["notes"] = {
        "divergent tokens": {"tokens": 512, "price": 0.2, "together": together, "alone": prices}
    }
    made["decisions"][0]["notes"]["divergent tokens"]["alone"] = prices
    made["card"] = {"skipped": "not asked for."}
    console = Console(record=True, width=200, file=io.StringIO())
    show(made, Path("out"), console)
    said = console.export_text()
    assert "divergent tokens: tokens 512, price 0.2, together first 0.31, corrected 0.12\n" in said
    assert "up_proj" not in said


def test_vocabularies_that_differ_are_compared_by_bytes() -> None:
    made = receipt(card__model__perplexity__protocol__vocabulary=3000, **lost(900))
    for side, bits in (("model", 1.1), ("reference", 1.0)):
        made["card"][side]["perplexity"]["bits_per_byte"] = bits
    assert "Bits per byte went from 1.0000 to 1.1000 (+10.0%)" in "\n".join(s.text for s in explain(made).cost)
    assert "900" not in _next(made)


def test_methods_are_named_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are named read text; where they were not registered, others would be."""

    def named() -> set[str]:
        [said] = [s.text for s in explain(_blind(**lost(90))).next if "read no text" in s.text]
        return set(re.findall(r"\w+", said.split("Methods that do")[1])) & set(registry.methods())

    first = named()
    assert first and all(methods()[name].data == "calibration text" for name in first)
    rest = {name: method for name, method in methods().items() if name not in first}
    monkeypatch.setattr(registry, "_registry", rest)
    assert named() and not named() & first


def test_a_method_that_is_not_registered_is_told_without_its_card() -> None:
    told = explain(receipt("some_method_of_yours", **lost(90)))
    assert told.done[1].text.startswith("some_method_of_yours: feed-forward neurons 1216 of 1536")


def test_names_say_block_and_kind() -> None:
    assert block_of("model.layers.12.mlp.experts.3.up_proj.weight") == 12
    assert kind_of("model.layers.12.mlp.experts.3.up_proj.weight") == "mlp.experts.*.up_proj"
    assert kind_of("model.layers.12.mlp.experts.gate_up_proj[7]") == "mlp.experts.gate_up_proj"
    assert block_of("lm_head.weight") is None
    assert pointer(("decisions", 0, "a/b~c")) == "/decisions/0/a~1b~0c"
    assert at({"a": [{"b": 2}]}, ("a", 0, "b")) == 2
    assert at({"a": [{"b": 2}]}, ("a", 1, "b")) is None


def test_the_command(tmp_path: Any) -> None:
    (tmp_path / "secateur.json").write_text(json.dumps(receipt(**lost(90))))
    told = secateur("explain", tmp_path)
    assert told.code == 0 and told.out.startswith("What was done\n- org/base was compressed")
    assert "/card/model" not in told.out
    assert "/card/model/perplexity/perplexity = 90" in secateur("explain", tmp_path, "--figures").out
    plain = json.loads(secateur("explain", tmp_path / "secateur.json", "--json").out)
    assert plain["next"][0]["figures"] and set(plain) == {"done", "cost", "gained", "next"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no secateur.json"),
        ({"compare.json": "{}"}, "is a comparison of several runs"),
        ({".secateur/run.json": "{}"}, "is not finished"),
        ({"secateur.json": "{"}, "could not be read"),
        ({"secateur.json": "[1]"}, "holds no mapping"),
        ({"secateur.json": '{"a": 1}'}, "is not the receipt of a run"),
        (
            {
                "secateur.json": '{"recipe": {}, "source": {}, "decisions": [{"method": "x", "units": {"0": {"kept": 1}}}]}'
            },
            "receipt of another version",
        ),
    ],
)
def test_what_is_no_finished_run_is_refused(tmp_path: Any, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    told = secateur("explain", tmp_path)
    assert told.code == 2 and said in told.err and told.out == ""
    with pytest.raises(RequestError):
        explain(tmp_path)


def test_old_receipts_lack_parts() -> None:
    told = explain(old())
    assert told.done and told.next
