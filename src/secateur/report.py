"""What a person reads of a run: the measured card, the model card, the lines on the terminal."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from secateur.context import Progress, silent
from secateur.errors import SecateurError
from secateur.evaluation import ResultCard, evaluate, render
from secateur.evaluation.measure import Opened
from secateur.evaluation.task_files import without_folders
from secateur.files import human
from secateur.network.source import Source
from secateur.paths import without_paths
from secateur.recipe import Evaluate, Recipe
from secateur.registry import find

UNITS = {
    "neurons": "feed-forward neurons",
    "heads": "attention heads (by shared keys and values)",
    "queries": "query heads",
    "head_dims": "pairs of dimensions inside attention heads",
    "expert_neurons": "neurons inside each expert",
    "experts": "experts",
}
"""What the units of an axis are called."""
_WHY_CODE = (
    "Its blocks differ from each other, which the architecture has no words for: `per_layer_config` in `config.json` says "
    "what each block has, and `{code}` builds the blocks so, by the architecture's own classes. That file is code, so "
    "`transformers` asks for `trust_remote_code=True`; it needs nothing but `transformers` and `torch`."
)


def measure(
    original: Source,
    result: Source,
    wanted: Evaluate | bool,
    max_memory: int,
    progress: Progress = silent,
    reference: Opened | None = None,
    speed: bool = True,
) -> dict[str, Any] | None:
    """The result card of a finished run beside its source; None where nothing is to be measured or it does not fit.

    reference: the source as `open_reference` gave it, where many results are measured against it. speed: whether to measure
    it now.

    A failure here does not undo a run that is done: it is told in the place of the card.
    """
    if wanted is False:
        return None
    both = 4 * sum(p.numel() for source in (original, result) for p in source.skeleton.parameters())
    if both > max_memory:
        return {"skipped": f"both models in float32 take {human(both)}, above --max-memory ({human(max_memory)})"}
    options = wanted if isinstance(wanted, Evaluate) else Evaluate()
    try:
        card = evaluate(
            result.spec,
            reference or (original.spec if original.live is None else None),
            text=options.text,
            window=options.window,
            windows=options.windows,
            divergent=options.divergent,
            speed=speed,
            tasks=options.tasks,
            limit=options.limit,
            kick=options.kick,
            facts=options.facts,
            strict=False,
            trust_remote_code=original.trust_remote_code,
            progress=progress,
        )
    except SecateurError as error:
        return {"skipped": str(error)}
    except Exception as error:  # transformers' or a tokenizer's own; the result is written and checked by now
        return {"skipped": f"{type(error).__name__}: {error}"}
    return card.to_dict()


def summary(receipt: Mapping[str, Any]) -> list[str]:
    """One line per step: how many units or tokens are left, how many weights are zero, or which blocks are gone."""
    lines = []
    for decision in receipt["decisions"]:
        if matrices := decision.get("matrices"):
            removed, of = (sum(entry[key] for entry in matrices.values()) for key in ("removed", "of"))
            lines.append(f"{decision['method']}: {removed:,} of {of:,} weights ({removed / of:.2%}) are zero")
            lines[-1] += f", in {len(matrices)} matrices"
            continue
        if blocks := decision.get("blocks"):
            lines.append(_blocks_line(decision["method"], blocks))
            continue
        if words := decision.get("vocabulary"):
            lines.append(
                f"{decision['method']}: {words['kept']:,} of {words['of']:,} tokens kept, "
                f"{1 - words['kept'] / words['of']:.1%} removed"
            )
            continue
        for axis, units in decision["units"].items():
            kept, of = (sum(unit[key] for unit in units.values()) for key in ("kept", "of"))
            each = sorted({(unit["kept"], unit["of"]) for unit in units.values()})
            share, blocks = f"{1 - kept / of:.1%} removed", f"{len(units)} blocks"
            every = (decision.get("budget") or {}).get("reached", {}).get("units", {}).get(axis, {})
            if every.get("blocks", 0) > len(units):  # the others keep all that they have
                share = (
                    f"{1 - every['after'] / every['before']:.1%} removed ({share.split()[0]} of those in these blocks)"
                )
                blocks = f"{len(units)} of {every['blocks']} blocks"
            alike = f"{each[0][0]} of {each[0][1]} in each of {blocks}"
            differing = f"differing widths ({each[0][0]} to {each[-1][0]} in {blocks})"
            lines.append(f"{decision['method']}: {UNITS[axis]} {alike if len(each) == 1 else differing}, {share}")
        if channels := decision.get("channels"):
            share = 1 - channels["kept"] / channels["of"]
            lines.append(f"{decision['method']}: channels {channels['kept']} of {channels['of']}, {share:.1%} removed")
            if "asked" in channels:
                lines[-1] += f" (asked for {channels['asked']}, which the configuration cannot say)"
        elif not decision["units"]:
            lines.append(f"{decision['method']}: nothing was cut")
        elif budget := decision.get("budget"):
            lines.append(f"{decision['method']}: {budget_line(budget)}")
    return lines


def asked_line(asked: Mapping[str, Any]) -> str:
    """A budget as it was asked for, in words."""
    of = asked["of"].replace("_", "-")
    if "target" in asked:
        if asked["target"] < 1:
            return f"asked for {_brief(asked['target'])} of the {of}"
        return f"asked for {asked['target']:,} {of}"
    return f"asked for {_brief(asked['ratio'])} of the {of} less" if "ratio" in asked else "asked for ratios of its own"


def budget_line(budget: Mapping[str, Any]) -> str:
    """What was asked for and what was reached."""
    reached = [
        f"{name.replace('_', '-')} {told['before']:,} → {told['after']:,} (−{1 - told['after'] / told['before']:.1%})"
        for name, told in budget["reached"].items()
        if name != "units"
    ]
    said = f"reached {', '.join(reached)} for {budget['reached']['multiply_adds']['tokens']} tokens"
    return f"{asked_line(budget['asked'])}, {said}" if budget["asked"] else said


def _blocks_line(method: str, blocks: Mapping[str, Any]) -> str:
    """Which blocks were removed, and by what scores."""
    removed, scores = blocks["removed"], blocks["scores"]
    what = f"the {blocks['part'].replace('_', '-')} of " if "part" in blocks else ""
    said = f"{method}: {what}{len(removed)} of {blocks['of']} blocks removed ({len(removed) / blocks['of']:.1%})"
    if removed:
        said += f": {', '.join(map(str, removed))}"
    for what, indices in (("removed", removed), ("kept", blocks["kept"])):
        found = [scores[str(index)] for index in indices if str(index) in scores]
        if found:
            said += f"; scores of those {what} {min(found):.4g} to {max(found):.4g}"
    return said


def show(receipt: Mapping[str, Any], output: Path, console: Console) -> None:
    """Prints what a finished run did and measured."""
    for line in summary(receipt):
        console.print(line, highlight=False)
    for decision in receipt["decisions"]:
        for name, value in decision["notes"].items():
            console.print(f"  {name}: {_brief(value)}", highlight=False)
        for sentence in decision["warnings"]:
            console.print(f"  note: {sentence}", style="yellow", highlight=False)
    if stored := receipt.get("stored"):
        sizes = "; ".join(
            f"{name} {human(size['bytes'])}" + (f", {human(size['zstd'])} under zstd" if size["zstd"] else "")
            for name, size in stored.items()
        )
        console.print(f"stored: {sizes}", highlight=False)
    check = receipt["reload_check"]
    console.print(
        f"reload check: {check['how']}; largest relative difference {check['largest_difference']:.1g}", highlight=False
    )
    card = receipt.get("card")
    if card and "skipped" in card:
        console.print(f"not measured: {card['skipped']}", style="yellow", highlight=False)
    elif card:
        console.print(render(ResultCard.from_dict(card)))
    console.print(
        f"done in {receipt['seconds']:.0f} s, peak memory {human(receipt['peak_memory'])}: {output}", highlight=False
    )


def _brief(value: Any) -> str:
    """A note's value in a line: long lists of numbers by their range, histories by their first and last entry. Tables inside
    it, with a mapping for each matrix or block, are left to the receipt.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_brief(entry)}" for name, entry in value.items() if not _is_table(entry))
    if isinstance(value, list) and len(value) > 4 and all(isinstance(entry, int | float) for entry in value):
        return f"{min(value):.4g} to {max(value):.4g}, mean {sum(value) / len(value):.4g}"
    if isinstance(value, list):
        return f"{_brief(value[0])} → {_brief(value[-1])}" if len(value) > 4 else "; ".join(map(_brief, value))
    return str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def model_card(receipt: Mapping[str, Any]) -> str:
    """README.md of the result: front matter for the hub, what was done, what was measured, how to repeat it.

    It is made to be published, so nothing in it says where files lie on this machine.
    """
    source = receipt["source"]
    base = source["base_model"] or source["model"]
    methods = [find(decision["method"]) for decision in receipt["decisions"]]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["secateur", *(m.name for m in methods)]}
    if source["licence"]:
        front["license"] = source["licence"]
    # the hub links a base model and refuses what it cannot link; of a directory here `base` is the folder's name alone
    if base == source["model"] and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front["base_model"] = base
    code = receipt.get("code", [])
    trust, why = (", trust_remote_code=True", _WHY_CODE.format(code=", ".join(code))) if code else ("", "")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        f"# {base}, compressed",
        f"Made with Secateur (base: {base}). It opens with plain `transformers`:",
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{trust})\n```',
        why,
        "## What was done",
        "\n".join(f"- {line}" for line in summary(receipt)),
        "\n".join(f"- {without_paths(sentence)}" for d in receipt["decisions"] for sentence in d["warnings"]),
        f"Reload check: {receipt['reload_check']['how']}.",
        f"```yaml\n{yaml.safe_dump(_publishable(receipt['recipe']), sort_keys=False)}```",
        "## Methods",
        "\n".join(f"- `{m.name}`: {m.summary} {m.paper}".rstrip() for m in methods),
    ]
    card = receipt.get("card")
    if card and "skipped" not in card:
        console = Console(record=True, width=110, file=io.StringIO())
        named = {"model": "this model", "reference": base}
        columns = {side: {**card[side], "name": name} for side, name in named.items() if card[side]}
        console.print(render(ResultCard.from_dict(without_paths({**card, **columns}))))
        parts += ["## Measured", f"```\n{console.export_text().rstrip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _publishable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the model, and with the bare names of files."""
    plain = {name: value for name, value in recipe.items() if name != "model"}
    steps = []
    for step in plain["steps"]:
        [(name, parameters)] = step.items()
        read = find(name).validate(parameters)
        bare = {key: Path(value).name if isinstance(read[key], Path) else value for key, value in parameters.items()}
        steps.append({name: bare})
    if isinstance(plain.get("evaluate"), dict) and (text := plain["evaluate"].get("text")):
        plain["evaluate"] = {**plain["evaluate"], "text": Path(text).name}
    if isinstance(measured := plain.get("evaluate"), dict):
        facts = measured.get("facts")
        tasks = [without_folders(task) for task in measured.get("tasks", [])]
        plain["evaluate"] = {**measured, "tasks": tasks, "facts": facts and Path(facts).name}
    if not (steps and Recipe.parse(recipe).calibrated):
        plain.pop("calibration", None)
    elif not (data := plain["calibration"]["data"]).startswith("dataset:"):
        plain["calibration"] = {**plain["calibration"], "data": Path(data).name}
    published: dict[str, Any] = without_paths({**plain, "steps": steps})
    return published


def shape(source: Source) -> dict[str, Any]:
    """What a network is made of, for the receipt. token_parameters: in tables with a row for each token, tied ones once."""
    network = source.anatomy
    repeated = {name for group in network.tied for name in group[1:]}
    tables = [name for name in dict.fromkeys((*network.embeddings, network.head)) if name and name not in repeated]
    sizes = [source.skeleton.get_parameter(name).shape for name in tables]
    return {
        "class": type(source.skeleton).__name__,
        "blocks": len(network.blocks),
        "hidden": network.hidden,
        "vocabulary": network.vocabulary,
        "parameters": network.parameters,
        "token_parameters": sum(size.numel() for size in sizes if size[0] == network.vocabulary),
    }


def inspection(source: Source) -> dict[str, Any]:
    """What `secateur inspect` tells, as plain data."""
    from secateur.network.anatomy import to_dict

    stored: dict[str, int] = {}
    for info in source.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        stored[name] = stored.get(name, 0) + info.bytes
    return {
        "model": str(source.spec),
        "class": type(source.skeleton).__name__,
        "licence": source.place.licence,
        "weights": source.place.weights,
        "stored_bytes": stored,
        **to_dict(source.anatomy),
    }


def show_inspection(source: Source, console: Console) -> None:
    """Prints a model's structure: one line for each run of equal blocks."""
    network = source.anatomy
    console.print(
        f"{source.spec}: {type(source.skeleton).__name__}, {network.parameters:,} parameters, "
        f"{len(network.blocks)} blocks, hidden {network.hidden}, vocabulary {network.vocabulary}, "
        f"{'tied' if network.tied else 'untied'} embeddings, stored as {source.place.weights}",
        highlight=False,
    )
    table = Table(
        Column("blocks", no_wrap=True),
        Column("kind", no_wrap=True),
        "attention",
        "feed-forward",
        "parallel",
        "parameters",
        "note",
    )
    rows: list[tuple[list[int], tuple[str, ...]]] = []
    for block in network.blocks:
        attention, inner = block.attention, block.feed_forward
        experts = block.experts
        described: tuple[str, ...] = (
            block.kind,
            f"{attention.kind}, {attention.heads} heads over {attention.kv_heads}, {attention.head_dim} wide"
            + (", fused" if attention.fused else "")
            if attention
            else "–",
            f"{experts.count} experts, {experts.width} wide"
            + (f"; shared {inner.units}" if inner else "")
            + ("" if experts.neurons else "; their neurons were not recognised")
            if experts
            else f"{'gated' if inner.gate else 'plain'}, {inner.hidden} → {inner.units}" if inner else "–",
            {True: "yes", False: "no", None: "unknown"}[block.parallel],
            f"{sum(source.skeleton.get_parameter(name).numel() for name in block.parameters):,}",
            block.note,
        )  # fmt: skip
        if rows and rows[-1][1] == described:
            rows[-1][0].append(block.index)
        else:
            rows.append(([block.index], described))
    for indices, described in rows:
        table.add_row(f"{indices[0]}–{indices[-1]}" if len(indices) > 1 else str(indices[0]), *described)
    console.print(table)
