"""What can go wrong, as sentences a person can act on."""

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Something a person must know: one sentence that names the thing, what was found, and what to do."""

    exit_code = 1
    # set where another process of the same run has told it already
    told = False


class RequestError(SecateurError):
    """The request was wrong; nothing was written. Exit code 2."""

    exit_code = 2


class RunError(SecateurError):
    """The run failed on the way and can be resumed by the same command. Exit code 1."""

    exit_code = 1


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" when one of the `known` names is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
