"""What every command does alike: options that they share, bars, tables, errors told in one sentence."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from secateur.context import Advance, silent
from secateur.context import Progress as Bars
from secateur.errors import RequestError, SecateurError
from secateur.files import human, parse_size

# where nobody watches, in a file or a pipe, lines are long enough for a table
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)


def print_method(card: dict[str, Any]) -> None:
    console.print(f"{card['name']} ({card['kind']}): {card['summary']}", highlight=False)
    for key in ("paper", "claim", "data", "scope"):
        console.print(f"  {key}: {card[key] or 'our own'}", highlight=False)
    if card["caution"]:
        console.print(f"  note: {card['caution']}", style="yellow", highlight=False)
    console.print("  by the surveys' axes (each is an option of `secateur methods`):", highlight=False)
    for axis, values in card["taxonomy"].items():
        console.print(f"    {axis}: {', '.join(values)}", highlight=False)
    table = Table(Column("parameter", no_wrap=True), "default", "meaning")
    for name, entry in card["parameters"].items():
        table.add_row(name, json.dumps(entry["default"]), entry["help"])
    console.print(table)


def print_forecast(said: dict[str, Any]) -> None:
    from secateur.report import UNITS, asked_line

    for each in said["budgets"]:
        console.print(f"{each['method']}: {asked_line(each['asked'])}", highlight=False)
    for axis, units in said["units"].items():
        widths = {(unit["kept"], unit["of"]) for unit in units.values()}
        cut = ", ".join(f"{of} → {kept}" for kept, of in sorted(widths))
        console.print(f"would cut: {UNITS[axis]} {cut} in {len(units)} blocks", highlight=False)
    for each in said["budgets"]:
        if each["allocation"]:
            console.print(
                f"{each['allocation']} divides this among the blocks: their widths follow from weights or data in the run, "
                "and about as many units go in all",
                highlight=False,
            )
    if channels := said["channels"]:
        console.print(f"would cut: channels {channels['of']} → {channels['kept']}", highlight=False)
    if blocks := said["blocks"]:
        console.print(f"would remove: {blocks['of'] - blocks['kept']} of {blocks['of']} blocks", highlight=False)
    for each in said["parts"]:
        what = each["part"].replace("_", "-")
        console.print(
            f"would remove: the {what} of {each['of'] - each['kept']} of {each['of']} blocks", highlight=False
        )
    if words := said["vocabulary"]:
        console.print(f"would keep: {words['kept']:,} of {words['of']:,} tokens", highlight=False)
    for each in said["zeros"]:
        console.print(
            f"would zero: {each['removed']:,} of {each['of']:,} weights ({each['removed'] / each['of']:.2%}) in "
            f"{each['matrices']} matrices; zeros alone make nothing smaller or faster",
            highlight=False,
        )
    after = said["parameters_after"]
    if undecided := said["undecided"]:
        console.print(
            f"decided in the run: what {' and '.join(undecided)} cuts, so these are upper bounds:", highlight=False
        )
    if after == said["parameters"]:
        console.print(f"parameters: {after:,}, as many as before", highlight=False)
    else:
        less = f"−{1 - after / said['parameters']:.1%}"
        console.print(f"parameters: {said['parameters']:,} → {after:,} ({less})", highlight=False)
    work = said["multiply_adds"]
    if work and work["after"] != work["before"]:
        less = f"−{1 - work['after'] / work['before']:.1%}"
        console.print(
            f"multiply-adds of {work['tokens']} tokens: {work['before']:,} → {work['after']:,} ({less})",
            highlight=False,
        )
    console.print(f"would write: {human(said['bytes_written'])} to {said['output']}", highlight=False)
    console.print(f"disk needed: {human(said['disk_needed'])}, free: {human(said['disk_free'])}", highlight=False)
    console.print(f"memory needed: about {human(said['memory_needed'])}", highlight=False)
    console.print(f"time: {said['time']}", highlight=False)
    console.print("nothing was written.", highlight=False)


def size_of(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError:
        raise RequestError(f"--max-memory {text} is not a size; write it like 8GB or 512MB.") from None


def bars(quiet: bool) -> Bars:
    """Bars on a terminal, plain lines elsewhere, nothing when quiet or in any but the first process."""
    if quiet or int(os.environ.get("RANK", "0")) > 0:
        return silent
    return _bars if errors.is_terminal else _lines


@contextmanager
def _bars(label: str, total: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description:>9}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as bars:
        yield _Bar(bars, bars.add_task(label, total=total))


@contextmanager
def _lines(label: str, total: int) -> Iterator[Advance]:
    errors.print(f"{label} …", highlight=False)
    with silent(label, total) as bar:
        yield bar


class _Bar:
    def __init__(self, bars: Progress, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1, /) -> None:
        self._bars.advance(self._task, steps)


@contextmanager
def told(log_level: str, debug: bool) -> Iterator[None]:
    """Turns errors into one sentence and an exit code; a traceback only with --debug."""
    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        errors.print("error: --log-level is debug, info, warning or error.", highlight=False)
        sys.exit(2)
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if not debug:
        _quiet_libraries(log_level)
    try:
        yield
    except SecateurError as error:
        if debug:
            raise
        if not error.told:
            errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here.")
        sys.exit(130)
    except (MemoryError, OSError, RuntimeError) as error:
        if debug or (isinstance(error, RuntimeError) and not _out_of_memory(error)):
            raise
        what = str(error) if isinstance(error, OSError) else "there is not enough memory"
        errors.print(f"error: {what}; remove the cause and try again.", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says so: by a class of its own on an accelerator, on the CPU only in the words of its allocator."""
    told = ("not enough memory", "can't allocate memory", "out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in told)


def _quiet_libraries(log_level: str) -> None:
    """transformers prints bars and warnings of its own while it loads; ours say what matters."""
    import transformers

    if log_level.upper() not in ("DEBUG", "INFO"):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
