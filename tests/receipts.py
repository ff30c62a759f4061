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
            "divergence": {"kl": 0.04, "agreement": 0.9, "protocol": PROTOCOL},
            "speed": {
                "prefill": pace(512, 0.12, 0.10, 0.14), "decode": pace(32, 0.09, 0.07, 0.11), "pairs": 10,
                "dtype": "float32", "device": "cpu", "threads": 2,
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


def unit(kept: int, of: int, calibration: float = 0.03, held_out: float = 0.035) -> dict[str, Any]:
    return {"kept": kept, "of": of, "calibration_error": calibration, "held_out_error": held_out}


def column(parameters: int, multiply_adds: int, perplexity: float, size: int) -> dict[str, Any]:
    import math

    return {
        "name": "m", "parameters": parameters, "multiply_adds": multiply_adds, "multiply_adds_tokens": 512,
        "bytes_on_disk": size, "disk_format": "safetensors",
        "memory": {"peak": 8 * parameters, "baseline": 2, "tokens": 512, "dtype": "float32"},
        "perplexity": {"perplexity": perplexity, "nll": math.log(perplexity), "protocol": deepcopy(PROTOCOL)},
    }  # fmt: skip


def pace(tokens: int, middle: float, lower: float, upper: float) -> dict[str, Any]:
    def spread(factor: float) -> dict[str, Any]:
        return {"median": factor, "lower": factor * 0.98, "upper": factor * 1.02, "samples": [factor]}

    gain = {"median": middle, "lower": lower, "upper": upper, "samples": [middle]}
    return {"tokens": tokens, "model": spread(500 * (1 + middle)), "reference": spread(500), "gain": gain}


def put(made: Any, way: str, value: Any) -> None:
    """Puts a value at a way through mappings and lists, such as card__model__parameters; None takes away what is there."""
    *keys, last = [int(key) if key.isdigit() and isinstance(made, list) else key for key in way.split("__")]
    for key in keys:
        made = made[int(key)] if isinstance(made, list) else made[key]
    if value is None:
        made.pop(last, None)
    else:
        made[last] = value


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
