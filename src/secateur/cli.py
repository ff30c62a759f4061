"""The command line."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from secateur.axis_options import as_options
from secateur.context import process_group
from secateur.errors import RequestError
from secateur.files import human
from secateur.options import (
    AsJson,
    AskKick,
    CalibrationData,
    Debug,
    Device,
    Divergent,
    FactsFile,
    Length,
    Limit,
    LogLevel,
    MaxMemory,
    Measured,
    Model,
    Pairs,
    Quiet,
    Samples,
    TaskNames,
    Text,
    Trust,
    Window,
    Windows,
    WrittenDtype,
    refuse_unused,
)
from secateur.terminal import bars, console, print_forecast, print_method, size_of, told

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Takes a trained network and gives back a smaller, faster one that loads everywhere.",
)


_NOT_MEASURED = "beside --no-evaluate, where nothing is measured; leave one of them out"
_MEASURING = ("text", "window", "windows", "divergent", "tasks", "limit", "kick", "facts", "pairs")


@app.command()
def compress(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A directory, hub id, .gguf file or package:NAME.")] = None,
    method: Annotated[str | None, typer.Option(help="A method; `secateur methods` lists them.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, or STEP.key=value for a recipe.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe, or the secateur.json of an earlier run.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to write.")] = None,
    seed: Annotated[int | None, typer.Option(help="Every random stream follows from it.")] = None,
    dtype: WrittenDtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of going on.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and needed; write nothing.")] = False,
    calibration: CalibrationData = None,
    samples: Samples = None,
    length: Length = None,
    text: Text = None,
    windows: Windows = None,
    evaluate: Measured = True,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Compresses MODEL and writes it as an ordinary model directory that plain transformers opens."""
    # joined before anything can fail, so that what fails in every process is told by one
    with told(log_level, debug), process_group():
        from secateur.forecast import dry_run
        from secateur.recipe import Evaluate, Recipe
        from secateur.report import show
        from secateur.run import compress as run

        if (method is None) == (recipe is None):
            raise RequestError("give either --method NAME or --recipe FILE.")
        refuse_unused(context, (("text", "windows"), evaluate, _NOT_MEASURED))
        plan = Recipe.read(recipe).override(set_ or []) if recipe else Recipe.of(str(method), set_ or [])
        asked = {name: value for name, value in (("text", text), ("windows", windows)) if value is not None}
        if asked:
            # what else the recipe wants measured stays as it is
            wanted = plan.evaluate if isinstance(plan.evaluate, Evaluate) else Evaluate()
            plan = plan.model_copy(update={"evaluate": wanted.model_copy(update=asked)})
        learned = {"data": calibration, "samples": samples, "length": length}
        plan = plan.with_calibration({key: value for key, value in learned.items() if value is not None})
        if output is None:
            raise RequestError("name the directory to write with --output DIR.")
        options: dict[str, Any] = {"recipe": plan, "output": output, "seed": seed, "dtype": dtype, "device": device}
        if dry:
            print_forecast(dry_run(model, restart=restart, trust_remote_code=trust_remote_code, **options))
            return
        for caution in dict.fromkeys(step.registered.caution for step in plan.steps):
            if caution and not quiet:
                console.print(f"note: {caution}", style="yellow", highlight=False)
        result = run(
            model,
            max_memory=size_of(max_memory),
            restart=restart,
            evaluate=evaluate,
            trust_remote_code=trust_remote_code,
            progress=bars(quiet),
            **options,
        )
        if result.receipt:
            show(result.receipt, output, console)


@app.command()
def evaluate(
    context: typer.Context,
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The model it was made from.")] = None,
    text: Text = None,
    window: Window = None,
    windows: Windows = None,
    dtype: Annotated[str, typer.Option(help="Both models are loaded in it.")] = "float32",
    device: Device = "cpu",
    speed: Annotated[bool, typer.Option(help="Measure tokens a second.")] = True,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs of speed measurements.")] = 10,
    prefill: Annotated[list[int] | None, typer.Option(help="Tokens read at once for speed; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences at once for speed; may be repeated.")] = None,
    decode: Annotated[int, typer.Option(help="Tokens written one by one for speed; 0 for none.")] = 32,
    divergent: Divergent = False,
    prompts: Annotated[int, typer.Option(help="Prompts for --divergent, from the text or self-written.")] = 64,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    continuation: Annotated[int, typer.Option(help="Tokens that each prompt is gone on with.")] = 64,
    seed: Annotated[int, typer.Option(help="Of self-written text and prompts, and of speed's tokens.")] = 0,
    tasks: TaskNames = None,
    limit: Limit = None,
    kick: AskKick = False,
    facts: FactsFile = None,
    json_: Annotated[str | None, typer.Option("--json", help="Write the card as JSON to FILE, or - for here.")] = None,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Measures MODEL: size, memory, speed, perplexity, tasks, and its divergence from a reference."""
    with told(log_level, debug):
        from secateur.evaluation import Continuations, render, write_json
        from secateur.evaluation import evaluate as run

        read, writes = text is not None or reference is not None, text is None and reference is not None
        refuse_unused(
            context,
            (("pairs", "prefill", "batch", "decode"), speed, "beside --no-speed; leave one of them out"),
            (("prompts", "prompt_length", "continuation"), divergent, "without --divergent; add it, or leave that out"),
            (("window", "windows"), read, "where nothing is read; add --text or --reference, or leave that out"),
            (("seed",), speed or writes, "with --text and --no-speed, where nothing is drawn; leave it out"),
        )
        written = Continuations(prompts, prompt_length, continuation)
        card = run(
            model, reference, text=text, window=window, windows=windows, dtype=dtype, device=device, speed=speed,
            pairs=pairs, prefill=prefill, batch=batch or 1, decode=decode, divergent=divergent and written, seed=seed,
            tasks=tasks or (), limit=limit, kick=kick, facts=facts,
            trust_remote_code=trust_remote_code, progress=bars(quiet),
        )  # fmt: skip
        if json_ != "-":
            console.print(render(card))
        if json_:
            write_json(card, json_)


@app.command()
def compare(
    context: typer.Context,
    model: Model,
    recipe: Annotated[list[Path] | None, typer.Option(help="A YAML recipe, or a receipt; once for each.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method of one step; once for each.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for all; STEP.key=value for those that have it.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(help="key=value,value: a row for each; several are combined.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for the table and the results.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="parameters=, multiply_adds= or bytes=: a fraction that stays, or a number, for all."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="By which fraction a result may miss the budget.")] = 0.01,
    keep: Annotated[str, typer.Option(help="Which results stay on disk: all, front or none.")] = "all",
    seed: Annotated[list[int] | None, typer.Option(help="Once for each run of every recipe.")] = None,
    calibration: CalibrationData = None,
    samples: Samples = None,
    length: Length = None,
    text: Text = None,
    window: Window = None,
    windows: Windows = None,
    divergent: Divergent = False,
    tasks: TaskNames = None,
    limit: Limit = None,
    kick: AskKick = False,
    facts: FactsFile = None,
    dtype: WrittenDtype = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    evaluate: Measured = True,
    pairs: Pairs = 10,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Compares recipes on MODEL: each as `compress` would do it, all measured alike, in one table."""
    with told(log_level, debug), process_group():
        from secateur.comparison import Budget, entries, render
        from secateur.comparison import compare as run

        refuse_unused(
            context,
            (("tolerance",), budget is not None, "without --budget; add it, or leave that out"),
            (_MEASURING, evaluate, _NOT_MEASURED),
        )
        learned = {"data": calibration, "samples": samples, "length": length}
        learned = {key: value for key, value in learned.items() if value is not None}
        rows = entries(recipe or (), method or (), set_ or (), grid or (), learned)
        if output is None:
            raise RequestError("name the directory to write with --output DIR.")
        done = run(
            model, {row.name: row.recipe for row in rows}, output=output, keep=keep, seeds=seed or (), text=text,
            budget=Budget.parse(budget, tolerance) if budget else None, window=window, windows=windows,
            divergent=divergent, tasks=tasks or (), limit=limit, kick=kick, facts=facts, dtype=dtype, device=device,
            max_memory=size_of(max_memory), evaluate=evaluate, pairs=pairs,
            trust_remote_code=trust_remote_code, progress=bars(quiet),
        )  # fmt: skip
        if int(os.environ.get("RANK", "0")) == 0:
            console.print(render(done.summary))


@app.command()
@as_options
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    json_: AsJson = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,  # as for every command; there is nothing here but the result
    **axes: list[str] | None,
) -> None:
    """Lists the methods, all or those with the values asked for, or shows one with its parameters."""
    with told(log_level, debug):
        from secateur import registry
        from secateur.taxonomy import matching

        wanted = {axis: values for axis, values in axes.items() if values}
        if name and wanted:
            raise RequestError(f"give a method's name or --{next(iter(wanted))}, not both.")
        chosen = [registry.find(name)] if name else matching(registry.methods().values(), wanted)
        if json_:
            cards = [method.card() for method in chosen]
            typer.echo(json.dumps(cards[0] if name else cards, indent=2))
        elif name:
            print_method(chosen[0].card())
        else:
            table = Table(Column("method", no_wrap=True), "kind", "data", "paper", "what it does")
            for method in chosen:
                table.add_row(method.name, method.kind, method.data, method.paper or "our own", method.summary)
            console.print(table if chosen else "no method is all of this.")


@app.command()
def inspect(
    model: Model,
    json_: AsJson = False,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,  # as for every command; there is nothing here but the result
) -> None:
    """Shows the structure of MODEL without reading its weights."""
    with told(log_level, debug):
        from secateur.network.source import open_model
        from secateur.report import inspection, show_inspection

        source = open_model(model, trust_remote_code=trust_remote_code)
        if json_:
            typer.echo(json.dumps(inspection(source), indent=2))
        else:
            show_inspection(source, console)


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="gguf, onnx, or padded (one width for blocks that differ).")],
    output: Annotated[Path, typer.Option(help="File (gguf) or directory to write; must not exist.")],
    dtype: Annotated[str | None, typer.Option(help="gguf: f32, f16, bf16, q8_0; default the model's own.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="The card as JSON.")] = False,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Writes MODEL in another format and checks what was written."""
    with told(log_level, debug):
        from secateur.export import export as run

        done = run(model, to, output, dtype, trust_remote_code)
        if json_:
            typer.echo(json.dumps(done.to_dict(), indent=2))
        elif not quiet:
            for line in done.lines():
                console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def loads(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens each loader generates.")] = 8,
    json_: AsJson = False,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Tries what loads MODEL: every loader in a clean process, its logits compared with those of transformers."""
    with told(log_level, debug):
        from secateur.loads import loads as run
        from secateur.loads import table

        rows = []
        with bars(quiet)("loaders", 0) as bar:
            for row in run(model, trust_remote_code, tokens):
                rows.append(row)
                bar.advance(1)
        if json_:
            typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
        else:
            console.print(table(rows))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What compress or compare has written.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write; an earlier report is replaced.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What both models go on from; repeat it for more.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens they write.")] = 48,
    generate: Annotated[bool, typer.Option(help="Show what both write, which loads the models.")] = True,
    spectra: Annotated[bool, typer.Option(help="Show singular values before and after.")] = True,
    trust_remote_code: Trust = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Writes one self-contained HTML page about finished runs."""
    with told(log_level, debug):
        from secateur.page import write_report
        from secateur.page.writing import PROMPTS

        written = write_report(
            directories, output, prompts=prompt or PROMPTS, tokens=tokens, generate=generate, spectra=spectra,
            trust_remote_code=trust_remote_code, progress=bars(quiet),
        )  # fmt: skip
        if not quiet:
            console.print(f"{written}: {human(written.stat().st_size)}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def explain(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a finished run.", show_default=False)],
    figures: Annotated[bool, typer.Option("--figures", help="Name the figures that each sentence rests on.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="As JSON, with these figures.")] = False,
    log_level: LogLevel = "warning",
    debug: Debug = False,
    quiet: Quiet = False,  # as for every command; there is nothing here but the result
) -> None:
    """Says in plain words what a run did, what it cost and gained, and what to try next."""
    with told(log_level, debug):
        from secateur.explain import explain as tell

        explanation = tell(run)
        if json_:
            typer.echo(json.dumps(explanation.to_dict(), indent=2))
        else:
            for line in explanation.lines(figures):
                console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def main() -> None:
    app()
