"""Writes docs/methods.md from the registry: nothing is listed twice.

python docs/build.py
"""

import json
from pathlib import Path

from secateur.registry import methods

HEAD = """# Methods

One section per registered method, written by `make docs` from its card. `secateur methods NAME` prints the same.
"""


def section(card: dict) -> str:
    facts = {
        "Paper": card["paper"] or "our own",
        "Source's claim": card["claim"],
        "When": card["when"],
        "Speed-up": card["speedup"],
        "Decides by": card["decides"],
        "Data": card["data"],
        "Called once for each": card["scope"],
    }
    rows = [
        f"| `{name}` | `{json.dumps(entry['default'])}` | {entry['help'].replace('|', '/')} |"
        for name, entry in card["parameters"].items()
    ]
    return "\n".join(
        [
            f"## {card['name']}",
            "",
            card["summary"],
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            "| parameter | default | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"```\nsecateur compress MODEL --method {card['name']} --output DIR\n```",
            "",
        ]
    )


def main() -> None:
    cards = [method.card() for method in methods().values()]
    table = ["| method | kind | data | paper |", "| --- | --- | --- | --- |"]
    table += [f"| [{c['name']}](#{c['name']}) | {c['kind']} | {c['data']} | {c['paper'] or 'our own'} |" for c in cards]
    text = "\n".join([HEAD, *table, "", *(section(card) for card in cards)])
    Path(__file__).with_name("methods.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
