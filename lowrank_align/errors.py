"""Everything a user's mistake or machine can cause, as one line and an exit code.

A `UserError` is printed as its message alone, never as a traceback; anything else that escapes is a bug.
Messages say what, where, and what to do: `pairs.jsonl:17: rejected: missing (fields: prompt, chosen)`.
"""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_DATA_OR_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_NUMERIC = 4
EXIT_RESUMABLE = 75


class UserError(Exception):
    """Wrong data or configuration: the user can mend it."""

    exit_code = EXIT_DATA_OR_CONFIG
    said = False  # whether another process of the same run says it


class EnvironmentProblem(UserError):
    """The machine lacks something: a GPU, memory, disk, a library."""

    exit_code = EXIT_ENVIRONMENT


class NumericError(UserError):
    """Loss, gradient or reward left the finite numbers more often than a run may tolerate."""

    exit_code = EXIT_NUMERIC


class Stopped(UserError):
    """Stopped on request with everything saved; `--resume` goes on."""

    exit_code = EXIT_RESUMABLE


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean X?)"` for the closest known name, or an empty string where none is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""
