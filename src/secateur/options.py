"""Options that several commands share, each declared once, and whether one was given that would change nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur.errors import RequestError

Model = Annotated[str, typer.Argument(help="A directory, a hub id, a .gguf file, or package:NAME.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own code run.")]
LogLevel = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]

WrittenDtype = Annotated[
    str | None, typer.Option(help="Of the result: float32, bfloat16 or float16; default the source's own.")
]
Device = Annotated[str, typer.Option(help="Where tensors are computed.")]
MaxMemory = Annotated[
    str | None, typer.Option(help="What whole models may take when checked and measured, such as 8GB.")
]
CalibrationData = Annotated[
    str | None, typer.Option(help="What data-driven methods learn from: a text or JSON file, dataset:NAME, or self.")
]
Samples = Annotated[int | None, typer.Option(help="How many calibration sequences.")]
Length = Annotated[int | None, typer.Option(help="Tokens of each.")]

Measured = Annotated[bool, typer.Option(help="Measure what was compressed against the original.")]
Text = Annotated[
    Path | None, typer.Option(help="A text file for perplexity; without one the reference writes its own text.")
]
Window = Annotated[int | None, typer.Option(min=1, help="Tokens read at once.")]
Windows = Annotated[int | None, typer.Option(min=1, help="How many of the first windows of the text; default all.")]
Divergent = Annotated[bool, typer.Option("--divergent", help="How far greedy texts go along with the reference's.")]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(help="FILE.yaml[=DATA], NAME=DATA for a shipped task, or one of lm-eval's; once for each."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask only the first questions of each task.")]
AskKick = Annotated[bool, typer.Option("--kick", help="Ask for facts, summaries and instructions (LLM-KICK).")]
FactsFile = Annotated[Path | None, typer.Option(help="Facts of your own, JSONL; asks as --kick does.")]
Pairs = Annotated[int, typer.Option(min=0, help="Interleaved pairs of speed measurements; 0 for none.")]


def refuse_unused(context: typer.Context, *rules: tuple[Sequence[str], bool, str]) -> None:
    """Raises RequestError naming options that were given and would change nothing.

    rules: names of parameters, whether they are used, and why not, as the end of a sentence.
    """
    written = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for names, used, why in rules:
        given = [
            written[name]
            for name in names
            if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
        ]
        if given and not used:
            raise RequestError(f"{' and '.join(given)} would change nothing {why}.")
