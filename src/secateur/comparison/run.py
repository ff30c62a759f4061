"""Does a comparison: every recipe as `compress` would, then all measured alike, then one table.

Runs come first, all of them, so that nothing is in memory beside one; then each result is measured against the reference,
which is loaded once; speed comes last, in one process, while nothing else of the comparison runs.
"""

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secateur.comparison.budget import Budget, Fitted, fit, whole
from secateur.comparison.entries import Entry, checked, measured_alike
from secateur.comparison.measuring import Measuring, labelled
from secateur.comparison.state import RUNS, TABLE, State, task_data
from secateur.comparison.summary import card_of, common_quality, fronts_of, row_of
from secateur.comparison.table import write_csv
from secateur.context import Progress, alone, barrier, forget_peak, give_back_memory, process_group, processes, silent
from secateur.errors import RequestError, RunError, SecateurError
from secateur.evaluation import multiply_adds
from secateur.evaluation.memory import bytes_on_disk
from secateur.files import read_json, sha256
from secateur.network.source import check_device, open_model
from secateur.network.store import check_output
from secateur.network.verify import CleanProcess
from secateur.recipe import Evaluate, Recipe
from secateur.run import compress, free_memory, scanned
from secateur.unit_budgets import tokens_counted
from secateur.workspace import RECEIPT

logger = logging.getLogger(__name__)
KEEP = ("all", "front", "none")


@dataclass(frozen=True)
class Compared:
    """What a comparison gave.

    Args:
        output: its directory.
        summary: everything in it in plain data, as in compare.json.
    """

    output: Path
    summary: dict[str, Any]


def compare(
    model: str | Path,
    recipes: Mapping[str, Recipe | Path | str],
    *,
    output: str | Path,
    budget: Budget | str | None = None,
    seeds: Sequence[int] = (),
    text: str | Path | None = None,
    window: int | None = None,
    windows: int | None = None,
    divergent: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    kick: bool = False,
    facts: str | Path | None = None,
    keep: str = "all",
    dtype: str | None = None,
    device: str = "cpu",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    evaluate: bool = True,
    pairs: int = 10,
    shard_bytes: int = 256 * 10**6,
    progress: Progress = silent,
    clean: CleanProcess | None = None,
) -> Compared:
    """Does every recipe to one model and measures all results alike; what fails is told in its row.

    Args:
        model: a directory, hub id, `.gguf` file or `package:NAME`.
        recipes: what each row is called, and its recipe or the path of one.
        output: directory for the table and the results.
        budget: what every result is to count, such as "parameters=0.8"; None leaves the recipes as they are.
        seeds: every recipe is run with each of them; default its own.
        text, window, windows, divergent, tasks, limit, kick, facts: what is measured, instead of what the recipes say; see
            `evaluate`.
        keep: which results stay on disk when the table is written: all, those on a front (and those of which nothing could
            be measured), or none.
        evaluate: whether results are measured; their sizes are counted in any case.
        pairs: interleaved pairs of speed measurements for each row; 0 for none.
        dtype, device, max_memory, trust_remote_code, shard_bytes, clean: as in `compress`.

    Started by torchrun, processes share the runs out, each of which is a run of one process.

    Raises RequestError when the request is wrong (nothing was written), RunError when no recipe gave a result. Stopped at
    any moment, the same call goes on: what is finished is not done again, but what failed is, runs and measurements.
    """
    asked = {
        "text": text and str(text), "window": window, "windows": windows, "divergent": divergent or None,
        "tasks": list(tasks) or None, "limit": limit, "kick": kick or None, "facts": facts and str(facts),
    }  # fmt: skip
    read = {name: each if isinstance(each, Recipe) else Recipe.read(Path(each)) for name, each in recipes.items()}
    named = [Entry(name, recipe) for name, recipe in read.items()]
    found = measured_alike(checked(named), {key: value for key, value in asked.items() if value is not None})
    for entry in found:
        entry.recipe.check_files()
    wanted = found[0].recipe.evaluate  # all want the same
    if evaluate and isinstance(wanted, Evaluate):
        wanted.check(trust_remote_code)
    if keep not in KEEP:
        raise RequestError(f"keep={keep} is none of all, front and none.")
    if len(set(seeds)) != len(seeds):
        raise RequestError("a seed is named twice; each gives one run, so name it once.")
    comparison = _Comparison(
        str(model), found, Path(output), Budget.parse(budget) if isinstance(budget, str) else budget, tuple(seeds), keep,
        dtype, device, free_memory() // 2 if max_memory is None else max_memory, trust_remote_code, evaluate, pairs,
        shard_bytes, progress, clean,
    )  # fmt: skip
    with process_group():
        return comparison.go()


@dataclass(frozen=True)
class _Run:
    """One run of a row.

    key: its name among files. plan: None where it is refused before it begins, and `refusal` says why.
    """

    entry: Entry
    key: str
    seed: int
    plan: Recipe | None
    fitted: Fitted | None = None
    refusal: str = ""


@dataclass
class _Comparison:
    """One comparison, from the request to the table; parameters as `compare` takes them."""

    spec: str
    entries: list[Entry]
    output: Path
    budget: Budget | None
    seeds: tuple[int, ...]
    keep: str
    dtype: str | None
    device: str
    max_memory: int
    trust_remote_code: bool
    evaluate: bool
    pairs: int
    shard_bytes: int
    progress: Progress
    clean: CleanProcess | None

    def go(self) -> Compared:
        begun = time.time()
        check_device(self.device)
        self.source = open_model(self.spec, trust_remote_code=self.trust_remote_code)
        check_output(self.output, self.source)
        self.state = State(self.output, self._identity())
        self.measuring = Measuring(
            self.spec, self.source, self.output, self.state, self.evaluate and self.entries[0].recipe.evaluate,
            self.max_memory, self.pairs, self.trust_remote_code, self.progress,
        )  # fmt: skip
        found = self.state.check()
        before = read_json(self.output / TABLE) if found == "finished" else {}
        known = {
            told["run"]: told for row in before.get("rows", ()) for told in row["seeds"] if told["status"] != "failed"
        }
        lacking = [told for told in known.values() if self.measuring.lacks(told)]
        barrier()  # nobody writes before everybody has looked
        rank, world = processes()
        complete = len(known) == len(self.entries) * max(1, len(self.seeds))
        if found == "finished" and complete and not lacking:
            if rank == 0:
                self.state.abandon()  # what a kill at the very end left
                self._keep_less(before)
            barrier()
            return self._compared()
        if self.budget:  # what no recipe can meet is refused before anything is written
            self.budget.wanted(whole(self.source, self.entries[0].recipe, self.budget.measure))
        runs = self._runs()
        self._begin(found, known, not complete)
        told = {run.key: self.state.read(run.key) for run in runs}
        barrier()  # everybody has read what is known before anybody adds to it
        pending = [run for run in runs if not _over(told[run.key])]
        with alone(), nullcontext(self.clean) if self.clean or not pending else CleanProcess() as clean:
            for run in pending[rank::world]:
                self.state.write(run.key, self._do(run, clean))
        barrier()
        told = {run.key: self.state.read(run.key) for run in runs}
        barrier()
        unmeasured = [run.key for run in runs if self.measuring.lacks(told[run.key])]
        with alone():
            for key in unmeasured[rank::world]:
                self.measuring.measure(key)
        barrier()
        if rank == 0:
            with alone():
                self._finish(runs, begun)
        barrier()
        return self._compared()

    def _compared(self) -> Compared:
        """What the table says. Raises RunError where no recipe gave a result."""
        summary = read_json(self.output / TABLE)
        rows = summary["rows"]
        if not any(row["status"] == "done" for row in rows):
            raise RunError(
                f"none of {len(rows)} recipes gave a result, the first because: {rows[0]['error']} {self.output / TABLE} "
                "says why of each."
            )
        return Compared(self.output, summary)

    def _identity(self) -> dict[str, Any]:
        evaluated = self.entries[0].recipe.evaluate
        wanted = evaluated if isinstance(evaluated, Evaluate) else Evaluate()
        text, facts = wanted.text, wanted.facts if self.evaluate else None
        return {
            "model": self.spec,
            "source": self.source.quick_print(),
            "recipes": {entry.name: entry.recipe.identity() for entry in self.entries},
            "seeds": list(self.seeds),
            "budget": self.budget.told() if self.budget else None,
            "evaluate": self.evaluate and self.entries[0].recipe.plain()["evaluate"],
            "text": sha256(text) if text else None,
            "task data": task_data(wanted.tasks, self.trust_remote_code) if self.evaluate and wanted.tasks else None,
            "facts": sha256(facts) if facts else None,
            "pairs": self.pairs,
            "dtype": self.dtype,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "shard_bytes": self.shard_bytes,
            "versions": {name: version(name) for name in ("secateur", "torch", "transformers")},
        }

    def _runs(self) -> list[_Run]:
        """Every recipe with every seed, told to meet the budget."""
        runs = []
        for entry in self.entries:
            plan: Recipe | None = Recipe.parse(entry.recipe.plain() | {"dtype": self.dtype or entry.recipe.dtype})
            fitted, refusal = None, ""
            if self.budget and plan:
                try:
                    fitted = fit(self.source, plan, self.budget)
                    plan = fitted.recipe
                except RequestError as error:
                    plan, refusal = None, str(error)
            for seed in self.seeds or (entry.recipe.seed,):
                key = f"{entry.folder}/seed-{seed}" if len(self.seeds) > 1 else entry.folder
                own = plan.model_copy(update={"seed": seed}) if plan else None
                runs.append(_Run(entry, key, seed, own, fitted, refusal))
        return runs

    def _begin(self, found: str, known: Mapping[str, Mapping[str, Any]], to_run: bool) -> None:
        """The first process takes the directory and does what all runs need alike; all learn of it if it cannot be done.

        to_run: whether there are runs left that need it.
        """
        outcome: list[Any] = [None]
        if processes()[0] == 0:
            try:
                with alone():
                    if found != "begun":
                        self.state.begin(known)
                    if to_run:
                        shared = self.state.shared
                        source = open_model(self.spec, work=shared, trust_remote_code=self.trust_remote_code)
                        scanned(source, shared, self.progress)
            except RequestError as error:
                outcome[0] = error
                if found == "fresh":
                    self.state.abandon()
        if processes()[1] > 1:
            torch.distributed.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]

    def _do(self, run: _Run, clean: CleanProcess | None) -> dict[str, Any]:
        """One run, exactly as `compress` does it. Returns: what is known of it, whatever became of it."""
        told: dict[str, Any] = {"run": run.key, "seed": run.seed, "recipe": (run.plan or run.entry.recipe).plain()}
        if run.plan is None:
            return told | {"status": "refused", "error": run.refusal}
        gc.collect()
        give_back_memory()
        forget_peak()
        output = self.output / RUNS / run.key
        try:
            receipt = compress(
                self.spec, recipe=run.plan, output=output, device=self.device, max_memory=self.max_memory,
                trust_remote_code=self.trust_remote_code, evaluate=False, shard_bytes=self.shard_bytes,
                progress=labelled(self.progress, run.key), clean=clean, shared=self.state.shared,
            ).receipt  # fmt: skip
            achieved = self._count(output, receipt)
        except RequestError as error:
            return told | {"status": "refused", "error": str(error)}
        except SecateurError as error:
            return told | {"status": "failed", "error": str(error)}
        except Exception as error:  # a method's own, or a library's: the other recipes go on
            logger.debug("%s failed", run.key, exc_info=True)
            return told | {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        cautions = [step.registered.caution for step in run.plan.steps if step.registered.caution]
        return told | {
            "status": "done", "error": None, "seconds": receipt["seconds"], "peak_memory": receipt["peak_memory"],
            "achieved": achieved, "cautions": list(dict.fromkeys(cautions)),
            "budget": run.fitted.reached(achieved, self.budget.tolerance) if run.fitted and self.budget else None,
            "result": f"{RUNS}/{run.key}", "receipt": f"{RUNS}/{run.key}/{RECEIPT}",
        }  # fmt: skip

    def _count(self, output: Path, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """What a result counts, by its own files and shapes."""
        result = open_model(output, trust_remote_code=self.trust_remote_code)
        return {
            "parameters": result.anatomy.parameters,
            "multiply_adds": multiply_adds(result.skeleton, tokens_counted(self.source)),
            "bytes": bytes_on_disk(output),
            "zeros": receipt.get("zeros", {}).get("zeros", 0),
        }

    def _finish(self, runs: Sequence[_Run], begun: float) -> None:
        """Speeds, the table, and what stays on disk."""
        rows, quality = self._rows(runs)
        for row in rows:
            if row["card"]:
                self.measuring.time(row["run"])
        rows, quality = self._rows(runs)
        fronts = fronts_of(rows, quality)
        for row in rows:
            row["fronts"] = [figure for figure, front in fronts.items() if row["name"] in front["rows"]]
        for row in rows:
            for told in row["seeds"]:
                if told.get("card"):
                    self.measuring.complete(told["run"], told["card"])
        let_go = self._let_go(rows)
        first = self.entries[0].recipe
        summary = {
            "format": "secateur-compare/1",
            "model": self.spec,
            "reference": {
                "parameters": self.source.anatomy.parameters,
                "multiply_adds": multiply_adds(self.source.skeleton, tokens_counted(self.source)),
                "bytes": bytes_on_disk(self.spec),
                "weights": self.source.place.weights,
            },
            "budget": self.budget.told() if self.budget else None,
            "protocol": {
                "evaluate": first.plain()["evaluate"] if self.evaluate else False, "quality": quality,
                "multiply_adds_tokens": tokens_counted(self.source), "pairs": self.pairs, "device": self.device,
                "threads": torch.get_num_threads(), "seeds": list(self.seeds),
            },
            "rows": rows,
            "fronts": fronts,
            "seconds": round(time.time() - begun, 3),
        }  # fmt: skip
        write_csv(self.output / "compare.csv", summary)
        self.state.finish(summary, let_go)

    def _let_go(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """The runs whose results do not stay, which their rows then say."""
        let_go = []
        for row in rows:
            beaten = row["quality"] is not None and not row["fronts"]
            if self.keep == "none" or (self.keep == "front" and beaten):
                for told in row["seeds"]:
                    if told["status"] == "done":
                        let_go.append(told["run"])
                        row["result"] = told["result"] = None
        return let_go

    def _keep_less(self, summary: dict[str, Any]) -> None:
        """Lets results of a finished comparison go, where this call keeps fewer."""
        let_go = self._let_go(summary["rows"])
        if any(path.name != RECEIPT for run in let_go for path in (self.output / RUNS / run).glob("*")):
            write_csv(self.output / "compare.csv", summary)
            self.state.let_go(summary, let_go)

    def _rows(self, runs: Sequence[_Run]) -> tuple[list[dict[str, Any]], Any]:
        """The rows as far as they are known, and what their quality is told by."""
        told = {run.key: self.state.read(run.key) for run in runs}
        cards = [card for each in told.values() if (card := card_of(each or {}))]
        quality = common_quality(cards)
        rows = []
        for entry in self.entries:
            own = [each for run in runs if run.entry is entry and (each := told[run.key])]
            rows.append(row_of(entry.name, own, quality))
        return rows, quality


def _over(told: Mapping[str, Any] | None) -> bool:
    """Whether nothing is left to run: what failed is tried again."""
    return told is not None and told["status"] != "failed"
