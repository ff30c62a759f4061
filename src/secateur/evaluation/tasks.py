"""Tasks, as lm-eval asks and scores them, on models that are loaded already.

Definitions are lm-eval's YAML, requests and scores are lm-eval's own: what is here finds the data, says in a sentence what
is wrong with it, keeps what is foreign from running, and puts the figures on the card. lm-eval is imported only here, and
only when a task is asked for.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import PreTrainedModel

from secateur.context import Progress, silent
from secateur.errors import RequestError, RunError, SecateurError, suggest
from secateur.evaluation.forward import evaluating
from secateur.evaluation.lm_eval_engine import language_model, offline, quiet, sandboxed, seeded, without_bars
from secateur.evaluation.task_files import (
    Asked,
    TaskSource,
    check_installed,
    is_local,
    read_definition,
    shipped,
)


class TaskScore(BaseModel):
    """One metric of one task. n: questions that were asked, of `of` that there are. shots: examples before each question.

    value, stderr: of the model; reference, reference_stderr: of its reference. change_stderr: of value - reference, over
    the same questions, which is much less than both errors together; for metrics that are means. What was not measured, or
    has no error that lm-eval knows, is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    metric: str
    value: float
    stderr: float | None = None
    reference: float | None = None
    reference_stderr: float | None = None
    change_stderr: float | None = None
    n: int
    of: int | None = None
    shots: int | None = None
    higher_is_better: bool | None = None
    source: TaskSource


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready for one model after another. asked: lm-eval's tasks and groups of each spec."""

    asked: Mapping[str, Any]
    sources: Mapping[str, TaskSource]
    limit: int | None
    local: bool
    trusted: bool

    def __bool__(self) -> bool:
        return bool(self.asked)


def load_tasks(specs: Sequence[str], limit: int | None = None, trust_remote_code: bool = False) -> Tasks:
    """Reads definitions and data, and tries every question on its templates.

    specs: as `Asked` reads them. limit: how many of the first questions of each task are asked; all by default.

    Raises RequestError where a definition or data is missing or does not fit together, lm-eval is not installed, or foreign
    code would run. Tasks whose data are files do not use the network, and leave nothing in any cache.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"--limit {limit} asks nothing; ask for at least 1 question.")
    wanted = [Asked.parse(spec) for spec in specs]
    if not wanted:
        return Tasks({}, {}, limit, True, trust_remote_code)
    check_installed()
    asked, sources, local = {}, {}, True
    with tempfile.TemporaryDirectory() as cache:
        for each in wanted:
            found, source, here = _load(each, cache, limit, trust_remote_code)
            for name in (*found["tasks"], *found["groups"]):
                if name in sources:
                    raise RequestError(
                        f"the task {name} is asked for twice, by {each.spec} too; give one another name."
                    )
                sources[name] = source
            asked[each.spec] = found
            local = local and here
    return Tasks(asked, sources, limit, local, trust_remote_code)


def check_limit(limit: int | None, asked: bool) -> None:
    """Raises RequestError for a number of questions where nothing asks any. asked: whether something does."""
    if limit is not None and not asked:
        raise RequestError(
            "--limit says how many questions are asked, and none are; add --tasks, --kick or --facts, or leave it out."
        )


def check_tasks(specs: Sequence[str], limit: int | None = None, trust_remote_code: bool = False) -> None:
    """Raises RequestError as `load_tasks` does: for a run that asks them at its end."""
    load_tasks(specs, limit, trust_remote_code)


def score(
    tasks: Tasks,
    module: nn.Module,
    tokenizer: Any,
    reference: tuple[nn.Module, Any] | None = None,
    progress: Progress = silent,
    known: dict[Any, Any] | None = None,
) -> tuple[TaskScore, ...]:
    """Asks every task of the model, and of its reference.

    known: what the reference has answered before, so that it is asked once for many models; what it answers is added.
    module: a transformers model, tokenizer: its own. Sequences are read one by one, so a score does not depend on what else
    is asked. Raises RequestError where one of them cannot be asked, RunError where logits are not finite or lm-eval fails.
    """
    scores: list[TaskScore] = []
    for spec, loaded in tasks.asked.items():
        ours = _run(spec, loaded, tasks, module, tokenizer, progress)
        # by what is asked, not by its name alone: files change
        key, theirs = (spec, tasks.limit, repr(sorted(tasks.sources.items()))), None
        if reference is not None:
            known = {} if known is None else known
            if key not in known:
                known[key] = _run(spec, loaded, tasks, *reference, progress)
            theirs = known[key]
        for name, figures in ours["results"].items():
            scores += _scores(name, figures, tasks.sources[name], ours, theirs)
    return tuple(scores)


def _load(asked: Asked, cache: str, limit: int | None, trust: bool) -> tuple[Any, TaskSource, bool]:
    """lm-eval's tasks and groups, where they come from, and whether all of it lies on this machine."""
    if asked.file is None:
        return _load_own(asked, limit)
    config, source = read_definition(asked, trust)
    local = is_local(config)
    if isinstance(config.get("dataset_path"), str) and not callable(config.get("custom_dataset")):
        kwargs = config.get("dataset_kwargs") or {}
        # in memory, so that the folder may go
        config["dataset_kwargs"] = kwargs | ({"cache_dir": cache, "keep_in_memory": True} if local else {})
        if columns := kwargs.get("column_names"):
            import datasets

            # text as it stands: files without names say no types either, and one file's numbers are another's words
            config["dataset_kwargs"]["features"] = datasets.Features(
                {name: datasets.Value("string") for name in columns}
            )
    with quiet(), ExitStack() as held:
        if local:
            held.enter_context(offline())
        if not trust:
            held.enter_context(sandboxed())
            _check_metrics(config, asked)
        from lm_eval.tasks import TaskManager

        columns = _columns(config, asked) if local else None
        if columns is not None:
            _check_columns(config, columns, asked)
        try:
            loaded = TaskManager(include_defaults=False).load([config])
            for task in loaded["tasks"].values():
                _check_rows(task, asked, limit)
        except SecateurError:
            raise
        except Exception as error:  # lm-eval, its templates and the datasets library each raise their own
            has = f"; its rows have {', '.join(columns)}" if columns else ""
            where = "" if local else "; name a file of it, " + f"{asked.file}=DATA, where there is no network"
            raise RequestError(f"the task {asked.spec} does not fit its data: {_line(error)}{has}{where}.") from error
    return loaded, source, local


def _load_own(asked: Asked, limit: int | None) -> tuple[Any, TaskSource, bool]:
    """A task or group of lm-eval's own, whose data comes from the hub."""
    with quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        if asked.name not in manager.task_index:
            known = shipped() + manager.all_tasks
            raise RequestError(
                f"there is no task '{asked.name}'.{suggest(asked.name, known)} With data of your own: FILE.yaml, or "
                f"NAME=DATA for {', '.join(shipped())}; lm-eval's own tasks: lm-eval ls tasks."
            )
        try:
            loaded = manager.load([asked.name])
            for task in loaded["tasks"].values():
                _check_rows(task, asked, limit)
        except SecateurError:
            raise
        except Exception as error:  # the hub's, or what a task's own code needs
            data = f"; with its data in a file, {asked.name}=FILE needs no network" if asked.name in shipped() else ""
            raise RequestError(
                f"lm-eval's task {asked.name} could not be loaded (its data comes from the hub): {_line(error)}{data}."
            ) from error
    return loaded, TaskSource(definition=f"lm-eval's own {asked.name}"), False


def _columns(config: Mapping[str, Any], asked: Asked) -> list[str]:
    """The columns of the questions. Raises RequestError where the data cannot be read, or is empty."""
    import datasets

    split = config.get("test_split") or config.get("validation_split")
    try:
        data = datasets.load_dataset(config["dataset_path"], split=split, **config["dataset_kwargs"])
    except Exception as error:  # its reason is one level down, in the reader's own words
        raise RequestError(f"the data of {asked.spec} cannot be read: {_line(error.__cause__ or error)}.") from error
    if not len(data):
        raise RequestError(f"the data of {asked.spec} holds no questions.")
    return list(data.column_names)


def _check_columns(config: Mapping[str, Any], columns: Sequence[str], asked: Asked) -> None:
    """lm-eval takes a column that is not there for a constant text, and would score every answer as wrong."""
    choices = config.get("doc_to_choice")
    constants = choices if isinstance(choices, list) else []
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        name = config.get(key)
        if isinstance(name, str) and name.isidentifier() and name not in columns and name not in constants:
            raise RequestError(
                f"the data of {asked.spec} has no column '{name}', which the task's {key} names; its rows have "
                f"{', '.join(columns)}."
            )


def _check_metrics(config: Mapping[str, Any], asked: Asked) -> None:
    """lm-eval fetches a metric that it does not know from the hub, and runs it."""
    import lm_eval.api.metrics  # noqa: F401, they register themselves
    from lm_eval.api.registry import metric_registry

    for entry in config.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, Mapping) else entry
        if isinstance(name, str) and name not in metric_registry:
            raise RequestError(
                f"{asked.file}: the metric '{name}' is not one of lm-eval's own.{suggest(name, metric_registry)} Fetching "
                "it from the hub runs its code; allow that with --trust-remote-code."
            )


def _check_rows(task: Any, asked: Asked, limit: int | None) -> None:
    """Every question must have its answer among its choices: lm-eval would warn, and score it as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for index, row in task.doc_iterator(limit=limit):
        try:
            choices = task.doc_to_choice(row)
            gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        except Exception as error:  # a template of its own, on what may stand in a row
            raise RequestError(f"{asked.spec}, row {index + 1} of the data: {_line(error)}.") from error
        for one in gold if isinstance(gold, list) else [gold]:
            if (isinstance(one, int) and not 0 <= one < len(choices)) or (isinstance(one, str) and one not in choices):
                raise RequestError(
                    f"{asked.spec}, row {index + 1} of the data: the right answer is {one!r}, and the choices are "
                    f"{_brief(choices)}; the task may be meant for other columns."
                )


def _run(
    spec: str, loaded: Any, tasks: Tasks, module: nn.Module, tokenizer: Any, progress: Progress
) -> Mapping[str, Any]:
    """What lm-eval's `evaluate` gives for one model."""
    if not isinstance(module, PreTrainedModel):
        raise RequestError(
            f"tasks are asked of transformers models, and {type(module).__name__} is a module of its own."
        )
    if tokenizer is None:
        raise RequestError(f"{type(module).__name__} has no tokenizer, so it cannot be asked {spec}; add its files.")
    with quiet(), ExitStack() as held:
        if tasks.local:
            held.enter_context(offline())
        if not tasks.trusted:
            held.enter_context(sandboxed())
        held.enter_context(seeded())
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        requests = 0
        for task in loaded["tasks"].values():
            # as lm-eval's simple_evaluate does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            # it shows bars of its own while it writes its prompts
            if not isinstance(task.build_all_requests, partial):
                task.build_all_requests = partial(without_bars, task.build_all_requests)
            rows = len(task.eval_docs) if tasks.limit is None else min(tasks.limit, len(task.eval_docs))
            choices = (
                len(task.doc_to_choice(next(iter(task.eval_docs)))) if task.OUTPUT_TYPE == "multiple_choice" else 1
            )
            requests += rows * choices
        with evaluating(module), progress(f"task {spec.partition('=')[0]}", requests) as bar:
            try:
                return evaluate(
                    language_model(module, tokenizer, bar, spec),
                    loaded,
                    limit=tasks.limit,
                    confirm_run_unsafe_code=tasks.trusted,
                )
            except SecateurError:
                raise
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # a metric's, or what a model makes of a prompt
                raise RunError(f"lm-eval failed on the task {spec}: {_line(error)}.") from error


def _scores(
    name: str,
    figures: Mapping[str, Any],
    source: TaskSource,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any] | None,
) -> Iterator[TaskScore]:
    """The scores of one task or group, by metric."""
    before: Mapping[str, Any] = theirs["results"][name] if theirs else {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or _number(value) is None:
            continue
        error = f"{metric}_stderr,{filtered}"
        counts = ours["n-samples"].get(name, {})
        yield TaskScore(
            name=name,
            metric=metric if filtered == "none" else f"{metric} ({filtered})",
            value=value,
            stderr=_number(figures.get(error)),
            reference=_number(before.get(key)),
            reference_stderr=_number(before.get(error)),
            change_stderr=_paired(name, metric, filtered, figures, ours, theirs) if theirs else None,
            n=counts.get("effective", figures["sample_len"]),
            of=counts.get("original"),
            shots=ours["n-shot"].get(name),
            higher_is_better=ours["higher_is_better"].get(name, {}).get(metric),
            source=source,
        )


def _paired(
    name: str,
    metric: str,
    filtered: str,
    figures: Mapping[str, Any],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> float | None:
    """The standard error of the difference, question by question; None for a metric that is not their mean."""
    pairs = [
        [
            sample[metric]
            for sample in side.get("samples", {}).get(name, [])
            if sample["filter"] == filtered and metric in sample
        ]
        for side in (ours, theirs)
    ]
    if len(pairs[0]) != len(pairs[1]) or len(pairs[0]) < 2:
        return None
    if any(_number(value) is None for side in pairs for value in side):
        return None
    means = [sum(side) / len(side) for side in pairs]
    if not math.isclose(means[0], figures[f"{metric},{filtered}"], rel_tol=1e-9, abs_tol=1e-12):
        return None
    return mean_error([after - before for after, before in zip(*pairs, strict=True)])


def mean_error(values: Sequence[float]) -> float:
    """The standard error of the mean of at least two values."""
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def _number(value: Any) -> float | None:
    """A figure; None for what lm-eval says in its place ("N/A")."""
    return float(value) if not isinstance(value, str) and value is not None and hasattr(value, "__float__") else None


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _brief(choices: Sequence[str]) -> str:
    return ", ".join(choice if len(choice) <= 40 else choice[:37] + "…" for choice in map(str, choices))
