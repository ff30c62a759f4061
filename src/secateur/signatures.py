"""What the signature and the docstring of a method say, read for the registry."""

import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import BeforeValidator

from secateur.contract import NEEDS


def either(needs: Mapping[str, type], only: Mapping[str, Mapping[str, Any]], hints: Mapping[str, Any]) -> set[str]:
    """Of what is asked for under parameters, what reads the same and together covers every value of one of them."""
    found: set[str] = set()
    for data in {NEEDS[needs[name]].data for name in only}:
        alike = {name: only[name] for name in only if NEEDS[needs[name]].data == data and len(only[name]) == 1}
        for key, hint in hints.items():
            names = {name for name, when in alike.items() if key in when}
            if typing.get_origin(hint) is Literal and {only[name][key] for name in names} == {*typing.get_args(hint)}:
                found |= names
    return found


def is_other(field: pydantic.fields.FieldInfo) -> bool:
    """Whether a parameter names another method."""
    return any(
        isinstance(entry, BeforeValidator) and entry.func.__qualname__.startswith("_other") for entry in field.metadata
    )


def parameter_help(docstring: str) -> dict[str, str]:
    """{parameter: text} from the "Args:" section of a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if not section:
        return {}
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)", section.group(1), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
