"""Writes docs/methods/ from the registry and docs/figures.yaml: one page for each method, and a table of all.

python docs/build.py

Whatever else lies in docs/methods/ is removed, so a method that is gone leaves no page.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import yaml

from secateur.recipe import Recipe
from secateur.registry import Method, methods
from secateur.taxonomy import AXES

HERE = Path(__file__).parent

HEAD = """# Methods

Every registered method, on a page of its own. `make docs` writes these pages from the registry: what a method needs,
takes and claims is what its signature and its card say. `secateur methods NAME` prints the same, and `secateur methods`
finds methods by what stands in the last table, such as `secateur methods --kind structure --data none`.

[Which method when](../which_method.md) helps to choose.
"""

AXES_HEAD = """## The axes

Methods stand on the axes of two surveys, A (arXiv:2308.06767) and B (arXiv:2402.09748), as far as these are known here; see
`secateur/taxonomy.py` for what is ours. Each axis is an option of `secateur methods`, may be given several times, and
several axes combine.
"""


def read_figures() -> dict[str, list[dict[str, Any]]]:
    """What was measured: {method: [{what, value, conditions, command, parameters}]}."""
    return yaml.safe_load((HERE / "figures.yaml").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def paper(address: str) -> str:
    if not address:
        return "our own"
    number = address.removeprefix("arXiv:")
    return f"[{address}](https://arxiv.org/abs/{number})" if number != address else address


def command(method: Method) -> str:
    """A command that runs it with its defaults."""
    text = " --calibration FILE" if Recipe.parse({"steps": [method.name]}).calibrated else ""
    return f"secateur compress MODEL --method {method.name}{text} --output DIR"


def measured(entries: list[dict[str, Any]]) -> list[str]:
    if not entries:
        return ["Nothing has been measured with this method yet."]
    largest = max((entry["parameters"] for entry in entries if entry.get("parameters")), default=None)
    rows = [[entry["what"], entry["value"], entry["conditions"], f"`{entry['command']}`"] for entry in entries]
    lines = table(["what", "measured", "conditions", "command"], rows)
    return (
        [*lines, "", f"Largest trained model with a recorded run: {largest / 1e6:.1f} M parameters."]
        if largest
        else lines
    )


def page(method: Method, figures: list[dict[str, Any]]) -> str:
    card = method.card()
    module = inspect.getmodule(method.function)
    story = inspect.cleandoc((module and module.__doc__) or "")
    facts = {
        "Paper": paper(card["paper"]),
        "Source's claim": card["claim"],
        "Reads": card["data"],
        "Called once for each": card["scope"],
        "Cuts": card["cuts"],
    }
    parameters = [
        [f"`{name}`", f"`{json.dumps(entry['default'])}`", entry["help"]] for name, entry in card["parameters"].items()
    ]
    taxonomy = [[axis, ", ".join(values)] for axis, values in card["taxonomy"].items()]
    return "\n".join(
        [
            f"# {card['name']}",
            "",
            card["summary"],
            "",
            *(f"- {name}: {value}" for name, value in facts.items() if value),
            "",
            *([f"**Note**: {card['caution']}", ""] if card["caution"] else []),
            "```sh",
            command(method),
            "```",
            "",
            "## Parameters",
            "",
            *table(["parameter", "default", "meaning"], parameters),
            "",
            "## Measured",
            "",
            *measured(figures),
            "",
            "## What it is, and what differs from its source",
            "",
            story,
            "",
            "## On the surveys' axes",
            "",
            *table(["axis", "value"], taxonomy),
            "",
        ]
    )


def overview(known: list[Method]) -> str:
    shown = ("kind", "granularity", "data", "gradients", "speedup", "runtime")
    rows = [
        [f"[{m.name}]({m.name}.md)", m.summary, *(", ".join(m.taxonomy[axis]) for axis in shown), paper(m.paper)]
        for m in known
    ]
    axes = [[f"`--{name}`", axis.survey, axis.what, ", ".join(axis.values)] for name, axis in AXES.items()]
    return "\n".join(
        [
            HEAD,
            *table(["method", "what it does", *shown, "paper"], rows),
            "",
            AXES_HEAD,
            *table(["axis", "survey", "what it says", "values"], axes),
            "",
        ]
    )


def main() -> None:
    known, figures = list(methods().values()), read_figures()
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    pages = {"index": overview(known), **{m.name: page(m, figures.get(m.name, [])) for m in known}}
    for path in folder.iterdir():
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
