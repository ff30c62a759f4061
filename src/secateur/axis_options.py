"""Options of the command line that are made from the surveys' axes, so that these are listed once."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from secateur.taxonomy import AXES


def as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a typer command, which takes them as **axes, a repeatable option for each axis: --kind, --data and so on."""
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            axis,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                list[str] | None, typer.Option(help=f"Only these; {each.what}: {', '.join(each.values)}.")
            ],
        )
        for axis, each in AXES.items()
    ]

    @functools.wraps(command)
    def called(*args: Any, **given: Any) -> None:
        command(*args, **given)

    called.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    called.__annotations__ = {each.name: each.annotation for each in [*own, *options]}
    return called
