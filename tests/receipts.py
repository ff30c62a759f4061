"""Receipts made by hand: what a run would have written, with the figures that a test needs."""

from copy import deepcopy
from typing import Any

BLOCKS = 10


def receipt(method: str = "flap", parameters: dict[str, Any] | None = None, **figures: Any) -> dict[str, Any]:
    """A run of one method that cut neurons, learned from text and lost nothing much; `figures` replace entries at the ways
    that their names say: card__model__parameters=100.
    """
    made: dict[str, Any] = {
        "recipe": {"model": "org/base", "seed": 3, "dtype": None, "steps": [{method: parameters or {"ratio": 0.2}}]},
        "source": {"model": "org/base", "base_model": "org/base", "licence": "apache-2.0", "sha256": {"m": "ab12"}},
        "decisions": [
            {
                "step": 0,
                "method": method,
                "units": {"neurons": {str(block): unit(1216, 1536) for block in range(BLOCKS)}},
                "budget": {
                    "asked": {"ratio": 0.2, "of": "units"},
                    "reached": {
                        "units": {"neurons": {"before": 15360, "after": 12160}},
                        "parameters": {"before": 134_000_000, "after": 118_000_000},
                        "multiply_adds": {"before": 73_000_000, "after": 65_000_000, "tokens": 512},
                    },
                },
                "notes": {
                    "calibration": {"data": "text.txt", "sequences": 8, "tokens": 2048, "held_out_tokens": 256},
                    "mean calibration error": 0.03,
                    "mean held out error": 0.035,
                },
                "warnings": [],
            }
        ],
        "shape": {"class": "SomeModel", "blocks": BLOCKS, "hidden": 576, "vocabulary": 4000, "parameters": 118_000_000,
                  "token_parameters": 2_304_000},
        "reload_check": {"how": "loaded by plain transformers in a clean process", "largest_difference": 2e-6, "tokens": 32},
        "threads": 2,
        "versions": {"secateur": "0.1.0", "torch": "2.13.0"},
        "card": {
            "format": "secateur-card/1",
            "model": column(118_000_000, 65_000_000, 30.0, 236_000_000),
            "reference": column(134_000_000, 73_000_000, 29.0, 269_000_000),
            "divergence": {"kl": 0.04, "agreement": 0.9, "protocol": deepcopy(PROTOCOL)},
            "speed": {
                "prefill": pace(512, 0.12, 0.10, 0.14), "decode": pace(32, 0.09, 0.07, 0.11), "pairs": 10,
                "order": ["reference", "model"], "dtype": "float32", "device": "cpu", "threads": 2,
            },
            "expected_gain": 0.123,
            "notes": [],
        },
        "timings": {"opening": 1.0, "step 0: flap": 100.0, "reload check": 5.0, "measuring": 40.0},
        "seconds": 146.0,
        "peak_memory": 1_300_000_000,
        "identity": {"source": []},
    }  # fmt: skip
    for way, value in figures.items():
        put(made, way, value)
    return made


PROTOCOL = {
    "text": "wikitext2/test.txt", "sha256": "696cca6b65a1", "tokenizer": "T", "vocabulary": 4000, "bos": False,
    "window": 1024, "stride": 1024, "windows": 16, "tokens": 16368, "unused": 0, "dtype": "float32",
}  # fmt: skip


def full(**figures: Any) -> dict[str, Any]:
    """The same with every part that a card can have: tasks, LLM-KICK, divergent tokens, several settings, energy, memory
    by phase. Nothing in it fell certainly.
    """
    made = receipt()
    card = made["card"]
    for side, more in (("model", 0), ("reference", 10**6)):
        card[side]["memory"] |= {"loading": 123_000_000 + more, "prefill": 456_000_000 + more,
                                 "decode": 789_000_000 + more, "decoded": 16}  # fmt: skip
        card[side]["perplexity"]["bits_per_byte"] = 1.25 if side == "model" else 1.125
    card["more_speed"] = [deepcopy(card["speed"]) | {"batch": 4}]
    card["more_speed"][0]["prefill"]["tokens"] = 1024
    for place, speed in enumerate((card["speed"], *card["more_speed"])):
        speed["energy"] = ["package-0"]
        for phase, taken in (("prefill", 0.5), ("decode", 0.75)):
            own = taken + 0.125 * place
            speed[phase] |= {"joules": spread(own), "reference_joules": spread(2 * own),
                             "multiply_adds": 65_000_000_000, "reference_multiply_adds": 73_000_000_000}  # fmt: skip
    card["divergent"] = {
        "quantiles": {"0.1": 1, "0.25": 3, "0.5": 17, "0.75": 41, "0.9": None}, "mean": 25.25, "censored": 0.28,
        "share": 0.41, "corrected": 0.07, "survival": [[1, 0.95], [17, 0.5], [41, 0.28]], "ties": 0.0125,
        "tolerance": 0.0001, "prompts": 64, "prompt": 32, "continuation": 48, "tokens": 3000, "text": "t.txt",
        "sha256": "cd" * 32, "dtype": "float32",
    }  # fmt: skip
    card["tasks"] = [
        {"name": "arc", "metric": "acc", "value": 0.34, "stderr": 0.021, "reference": 0.35, "reference_stderr": 0.022,
         "change_stderr": 0.011, "n": 500, "of": 2376, "shots": 3, "higher_is_better": True,
         "source": {"definition": "arc.yaml", "sha256": "ef" * 32, "data": {"arc.jsonl": "01" * 32}}},
    ]  # fmt: skip
    card["kick"] = {
        "facts": "facts.jsonl", "sha256": "23" * 32, "of": 400, "written": 64, "chat": False,
        "scores": [kicked("closed book", 0.6, 0.625, chance=0.25), kicked("open book", 0.81, 0.82, chance=0.25),
                   kicked("summarisation", 0.3, 0.31, kl=0.125, agreement=0.83)],
    }  # fmt: skip
    card["notes"] = ["Something that a reader must know."]
    for way, value in figures.items():
        put(made, way, value)
    return made


def kicked(task: str, value: float, reference: float, error: float = 0.01, **more: float) -> dict[str, Any]:
    """A score of LLM-KICK. error: of the change."""
    drop = 1 - value / reference
    return {"task": task, "n": 40, "value": value, "stderr": 0.081, "reference": reference, "reference_stderr": 0.072,
            "change_stderr": error, "drop": drop, "matching": drop <= 0.05, "chance": None, "kl": None, "agreement": None,
            **more}  # fmt: skip


def old() -> dict[str, Any]:
    """A receipt that lacks all that has not always been there."""
    made = receipt()
    for key in (
        "shape",
        "card",
        "timings",
        "seconds",
        "peak_memory",
        "threads",
        "versions",
        "reload_check",
        "identity",
    ):
        made.pop(key)
    for key in ("budget", "notes", "warnings"):
        made["decisions"][0].pop(key)
    for entry in made["decisions"][0]["units"]["neurons"].values():
        entry.pop("calibration_error")
        entry.pop("held_out_error")
    return made


def unit(kept: int, of: int, calibration: float = 0.03, held_out: float = 0.035) -> dict[str, Any]:
    return {"kept": kept, "of": of, "calibration_error": calibration, "held_out_error": held_out}


def column(parameters: int, multiply_adds: int, perplexity: float, size: int) -> dict[str, Any]:
    import math

    return {
        "name": "m", "parameters": parameters, "multiply_adds": multiply_adds, "multiply_adds_tokens": 512,
        "bytes_on_disk": size, "disk_format": "safetensors",
        "memory": {"peak": 8 * parameters, "baseline": 300_000_000, "tokens": 512, "dtype": "float32"},
        "perplexity": {"perplexity": perplexity, "nll": math.log(perplexity), "protocol": deepcopy(PROTOCOL)},
    }  # fmt: skip


def pace(tokens: int, middle: float, lower: float, upper: float) -> dict[str, Any]:
    gain = {"median": middle, "lower": lower, "upper": upper, "samples": [middle]}
    return {"tokens": tokens, "model": spread(500 * (1 + middle)), "reference": spread(500), "gain": gain}


def spread(middle: float) -> dict[str, Any]:
    return {"median": middle, "lower": middle * 0.98, "upper": middle * 1.02, "samples": [middle]}


def put(made: Any, way: str, value: Any) -> None:
    """Puts a value at a way through mappings and lists, such as card__model__parameters; None takes away what is there."""
    *keys, last = way.split("__")
    for key in keys:
        made = made[int(key)] if isinstance(made, list) else made[key]
    if isinstance(made, list):
        made[int(last)] = value
    elif value is None:
        made.pop(last, None)
    else:
        made[last] = value


def leaves(card: Any, *keys: str | int) -> list[tuple[str | int, ...]]:
    """The ways to all numbers in plain data."""
    if isinstance(card, bool) or not isinstance(card, dict | list | int | float):
        return []
    if isinstance(card, int | float):
        return [keys]
    entries = card.items() if isinstance(card, dict) else enumerate(card)
    return [way for key, entry in entries for way in leaves(entry, *keys, key)]


def lost(perplexity: float) -> dict[str, Any]:
    """Figures of a model with that perplexity, where the original has 29."""
    import math

    return {"card__model__perplexity__perplexity": perplexity, "card__model__perplexity__nll": math.log(perplexity)}


def pruned(method: str = "magnitude", **figures: Any) -> dict[str, Any]:
    """A run that wrote zeros into two matrices of each block."""
    made = receipt(method, {"pattern": "0.5"})
    names = [f"model.layers.{block}.mlp.{name}.weight" for block in range(BLOCKS) for name in ("up_proj", "down_proj")]
    made["decisions"][0].pop("budget")
    made["decisions"][0].pop("units")
    made["decisions"][0]["notes"] = {}
    made["decisions"][0]["matrices"] = {name: {"removed": 5000, "of": 10000, "updated": False} for name in names}
    made["zeros"] = {"zeros": 5000 * len(names), "of": 10000 * len(names)}
    made["stored"] = {
        "source": {"bytes": 269_000_000, "zstd": 250_000_000},
        "result": {"bytes": 269_000_000, "zstd": 150_000_000},
    }
    for key in ("parameters", "multiply_adds", "bytes_on_disk"):
        made["card"]["model"][key] = made["card"]["reference"][key]
    made["card"]["expected_gain"] = 0.0
    for way, value in figures.items():
        put(made, way, value)
    return made
