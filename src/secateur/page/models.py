"""What only the models themselves can show: their spectra, and what they write."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.context import Progress
from secateur.errors import SecateurError
from secateur.figures import at
from secateur.files import human
from secateur.network.source import open_model
from secateur.page.gather import Run
from secateur.page.originals import AbsentError, Original, open_original
from secateur.page.spectra import Spectrum, spectra
from secateur.page.writing import Pair, Written, side_by_side, write
from secateur.paths import without_paths
from secateur.run import free_memory


@dataclass
class Shown:
    """Of one run. no_spectra, no_pairs: why they are not there; "" where they are, or were not asked for."""

    spectra: list[Spectrum] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    no_spectra: str = ""
    no_pairs: str = ""


@dataclass
class _Known:
    """An original, opened once for all runs that came from it."""

    original: Original | None = None
    absent: str = ""
    written: list[Written] | None = None


def look(
    runs: Sequence[Run],
    prompts: Sequence[str],
    tokens: int,
    seconds: float,
    work: Path,
    trust_remote_code: bool,
    progress: Progress,
) -> list[Shown]:
    """Opens originals and results, one at a time, for what is asked for.

    prompts: none for no writing. seconds: 0 for no spectra. work: an empty folder for originals that must be converted.
    """
    found = [Shown() for _ in runs]
    if not prompts and not seconds:
        return found
    known: dict[str, _Known] = {}
    with progress("reading", 2 * len(runs)) as bar:
        for shown, run in zip(found, runs, strict=True):
            name = f"{at(run.receipt, ('source', 'model'))} {at(run.receipt, ('source', 'sha256'))}"
            if name not in known:
                known[name] = _open(run, work / str(len(known)), trust_remote_code)
            if seconds:
                shown.spectra, shown.no_spectra = _spectra(run, known[name], seconds, trust_remote_code)
            bar.advance()
            if prompts:
                shown.pairs, shown.no_pairs = _write(run, known[name], prompts, tokens, trust_remote_code)
            bar.advance()
    return found


def _open(run: Run, work: Path, trust_remote_code: bool) -> _Known:
    work.mkdir()
    try:
        return _Known(open_original(run.receipt, work, trust_remote_code))
    except AbsentError as reason:
        return _Known(absent=_reason(reason, run))


def _reason(error: Exception, run: Run) -> str:
    """The end of a sentence that does not say where files lie on this machine."""
    said = str(error)
    for path in (str(run.path), str(at(run.receipt, ("source", "model")))):
        said = said.replace(path, Path(path).name) if Path(path).is_absolute() else said
    return str(without_paths(said)).rstrip(".")


def _spectra(run: Run, known: _Known, seconds: float, trust_remote_code: bool) -> tuple[list[Spectrum], str]:
    if known.original is None:
        return [], known.absent
    try:
        result = open_model(run.path, trust_remote_code=trust_remote_code)
        return list(spectra(run.receipt, known.original.source, result, seconds)), ""
    except SecateurError as error:
        return [], _reason(error, run)


def _write(
    run: Run, known: _Known, prompts: Sequence[str], tokens: int, trust_remote_code: bool
) -> tuple[list[Pair], str]:
    if known.original is None:
        return [], known.absent
    size = 4 * known.original.source.anatomy.parameters
    if size > free_memory() // 2:
        return [], f"the original in float32 takes {human(size)}, more than half of the memory that is free"
    try:
        if known.written is None:
            known.written = write(known.original.spec, prompts, tokens, trust_remote_code)
        ours = write(str(run.path), prompts, tokens, trust_remote_code)
    except SecateurError as error:
        return [], _reason(error, run)
    return [side_by_side(*each) for each in zip(prompts, known.written, ours, strict=True)], ""
