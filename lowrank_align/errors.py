"""Everything a user's mistake or machine can cause, as one line and an exit code.

A `UserError` is printed as its message alone, never as a traceback; anything else that escapes is a bug.
Messages say what, where, and what to do: `pairs.jsonl:17: rejected: missing (fields: prompt, chosen)`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_DATA_OR_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_NUMERIC = 4
EXIT_RESUMABLE = 75

# In lower case, how torch, its backends, bitsandbytes and the C library say it, few of them by an error of its own.
# `_status_alloc_failed`: cuBLAS, cuDNN and their relatives; `_out_of_`: Intel's level zero.
OUT_OF_MEMORY = (
    "out of memory",
    "_status_alloc_failed",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "_out_of_device_memory",
    "_out_of_host_memory",
)


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


class NoNumbers(NumericError):
    """What one step has to learn from is not finite; the loop leaves that step out."""


class Stopped(UserError):
    """Stopped on request with everything saved; `--resume` goes on."""

    exit_code = EXIT_RESUMABLE


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean X?)"` for the closest known name, or an empty string where none is close.

    Dashes, underscores and case are no difference; the only name that begins so wins over one that looks alike.
    """
    plain = {_plain(one): one for one in known}
    wanted = _plain(name)
    begun = [one for one in plain if len(wanted) > 2 and one.startswith(wanted)]
    if wanted in plain:
        matches = [wanted]
    else:
        matches = begun if len(begun) == 1 else get_close_matches(wanted, list(plain), n=1, cutoff=0.6)
    return f" (did you mean {plain[matches[0]]}?)" if matches else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").strip("_") or name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in any of the wordings, that memory ran out."""
    said = isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, which is no `Exception` and has no class that could be imported."""
    return type(error).__name__ == "PanicException"


def said_shortly(error: BaseException) -> str:
    """The beginning of what an error says, on one line."""
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__


@contextmanager
def memory_for(what: str, otherwise: str) -> Iterator[None]:
    """EnvironmentProblem `out of memory WHAT (as the error says it); OTHERWISE` where it runs out inside."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        raise EnvironmentProblem(f"out of memory {what} ({said_shortly(error)}); {otherwise}") from error
