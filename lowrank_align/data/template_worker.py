"""Renders chat templates in a process of its own: python template_worker.py, a JSON object a line in, one out.

A template is a program of whoever made the model. transformers renders it in a sandbox, but without a limit on time and
memory, and none can be kept inside one process: 10**10**10 is a single step. So `template_room` gives each template
this process, which ends where one takes too much, and which can open no file from the first template on.

The environment is the one of transformers' `apply_chat_template`. Known here are the standard library and Jinja alone:
nothing of the project, so that a start takes a tenth of a second.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.debug  # what renders or fails imports these later, when no file can be opened any more
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

CPU_SECONDS = 10.0  # of one rendering
MEMORY_BYTES = 2**30
MOST_CHARACTERS = 16_000_000

# Templates that print today's date would make a resumed run differ from an uninterrupted one. All of them get the date
# that Llama 3's templates fall back to; a row's `chat_template_kwargs` can set `date_string` where a template reads it.
DATE = {"%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday"}
# Names a message's reasoning is passed under. The first is the one that templates read; gpt-oss' reads the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class TooMuch(Exception):
    """A template went over its limit."""


def main() -> None:
    confine()
    for line in sys.stdin.buffer:
        try:
            answer = rendered(**json.loads(line))
        except MemoryError:
            answer = {"error": f"takes more than {MEMORY_BYTES // 2**20} MiB of memory", "limit": True}
        except TooMuch as error:
            answer = {"error": str(error), "limit": True}
        except Exception as error:  # whatever a template raises
            answer = {"error": " ".join(str(error).split())[:2000] or type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def confine() -> None:
    """Take from this process what no template needs, where the system can: files, sockets, memory without end."""
    warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; this one ends with its input
    try:
        import resource
    except ImportError:  # Windows
        return
    # no descriptor at all: the pipes are open already, and who closed one could open a file in its place
    limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 0}
    for what, limit in {**limits, resource.RLIMIT_CORE: 0}.items():
        _, hard = resource.getrlimit(what)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(what, (limit, limit))
        except (OSError, ValueError):  # macOS knows some of them in name alone
            continue


def warm_up() -> None:
    """Everything that is imported when it is first needed, such as the codec of escapes in a template's texts."""
    for template in ("{% for x in ['\\n'] %}{{ [x, 1.5] | tojson(indent=1) }}{% endfor %}", "{{ 1 / 0 }}", "{% if %}"):
        try:
            compile_template(template).render(x={"a": "\u00e9"})
        except Exception as error:  # the last two
            str(error).encode("utf-8", "backslashreplace")


def rendered(template: str, values: dict[str, Any], marked: bool) -> dict[str, Any]:
    """`text`, and with `marked` the `spans` of what stands in the template's generation blocks."""
    values["messages"] = [with_reasoning(message) for message in values["messages"]]
    blocks: list[str] = []
    with limited():
        compiled, length = compile_template(template), 0  # which works out constants: also that takes its time
        with compiled.environment.tracking(blocks) as spans:  # type: ignore[attr-defined]
            for block in compiled.generate(**values):
                blocks.append(block)
                length += len(block)
                if length > MOST_CHARACTERS:
                    raise TooMuch(f"writes more than {MOST_CHARACTERS:,} characters")
    return {"text": "".join(blocks), "spans": spans if marked else []}


@contextmanager
def limited() -> Iterator[None]:
    """Ends this process by SIGPROF after `CPU_SECONDS` of computing, wherever it is; not while the machine sleeps."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message under all names that its reasoning goes by, less what is null."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: where the assistant's words stand."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(tracking=self.tracking)
        self._blocks: list[str] = []
        self._spans: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self._blocks))
        self._spans.append((start, start + len(text)))
        return text

    @contextmanager
    def tracking(self, blocks: list[str]) -> Iterator[list[tuple[int, int]]]:
        self._blocks, self._spans = blocks, []
        yield self._spans


class PlainDict:
    """`dict(...)` without the class's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore: they lead to the interpreter's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    for code, value in DATE.items():
        pattern = pattern.replace(code, value)
    return pattern


@lru_cache
def compile_template(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PlainDict(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


if __name__ == "__main__":
    main()
