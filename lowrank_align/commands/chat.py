"""`lowrank-align chat`: talking in the terminal, with adapters to switch between on one base."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.style import Style
from rich.text import Text

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import ChatSettings
from lowrank_align.config.yaml_files import first_problem
from lowrank_align.conversation import Conversation, Reply, Sampling, Turn, Voices
from lowrank_align.data.chat import CONTROL_AS_TEXT, Renderer, notes_on
from lowrank_align.data.formats import Row, Shape
from lowrank_align.devices import check_device
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EXIT_DONE, EnvironmentProblem, UserError, is_out_of_memory, nearest
from lowrank_align.loading import model_folder, read_config, read_tokenizer
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.provenance import weights_hash
from lowrank_align.rollout import generator_for

DIM = Style(dim=True)
TEMPLATES = {"plain": "plain (the model has none of its own)"}
# What would move the cursor, ring or recolour becomes a sign for itself: a model's words must not work the terminal.
VISIBLE = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"}
VISIBLE |= {0x7F: "\u2421"} | {i: "\ufffd" for i in range(0x80, 0xA0)}


def chat(settings: ChatSettings) -> int:
    """Talk until /quit or the end of the input."""
    check_device(settings.device, settings.quantize, settings.attention)
    tokenizer, context = read_tokenizer(settings.model)
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template,
        max_length=min(settings.max_length, context),
        thinking=settings.thinking,
        thinking_if_possible=from_preset(settings, "thinking"),
    )
    screen, config = Screen(), read_config(settings.model)
    for line in preset_lines(settings, renderer, config):
        screen.note(line)
    if settings.adapter is not None:
        folder = model_folder(settings.model)
        adapters.check_before_load(settings.adapter, "policy", settings.model, weights_hash(folder), config)
    base = Base.of(settings)
    session = Session(base, renderer, settings, screen)
    session.run()
    return EXIT_DONE


class Screen:
    """Where it is said: answers and what was asked for on stdout, everything else on stderr."""

    def __init__(self) -> None:
        self._out, self._notes = Console(highlight=False), Console(highlight=False, stderr=True)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  being imported, it gives `input` its line editing and history

    def read(self) -> str | None:
        """A message, of several lines where they end in a backslash; None at the end."""
        lines: list[str] = []
        try:
            while not lines or lines[-1].endswith("\\"):
                lines.append(input(("... " if lines else "> ") if self.interactive else ""))
        except EOFError:
            if not lines:
                return None
        text = "\n".join(line.removesuffix("\\") for line in lines)
        return text.replace("\0", "").encode("utf-8", "replace").decode()  # what tokenizers refuse

    def say(self, text: str, *, dim: bool = False) -> None:
        """A bit of an answer, as it comes."""
        text = text.translate(VISIBLE)
        sys.stdout.write(DIM.render(text) if dim and self._out.is_terminal and text else text)
        sys.stdout.flush()

    def show(self, text: str) -> None:
        """What was asked for."""
        self._out.print(Text(text.translate(VISIBLE)), soft_wrap=True)

    def note(self, text: str) -> None:
        """What should be known."""
        self._notes.print(Text(text.translate(VISIBLE), style="dim"), soft_wrap=True)


class Session:
    """One person's talk: what is typed, and what it does."""

    def __init__(self, base: Base, renderer: Renderer, settings: ChatSettings, screen: Screen) -> None:
        self.base, self.renderer, self.settings, self.screen = base, renderer, settings, screen
        self.conversation = Conversation(settings.system)
        self.voices = Voices(base)
        if settings.adapter is not None:
            self.voices.use(settings.adapter)
        self.generator = generator_for(base.device, settings.seed, "chat")
        self.last = "nothing has been said yet"
        self.going_on = True

    def run(self) -> None:
        """Read, answer, and again."""
        source = self.renderer.template_source
        self.screen.note(
            f"{self.base.name}, {self.base.quantize}, on {self.base.device}; adapter: {self.voices.active}"
        )
        self.screen.note(f"chat template: {TEMPLATES.get(source, source)}")
        if prefix := self.voices.answer_prefix:
            self.screen.note(f"answers stand behind {prefix!r}, as in training")
        self.screen.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        with contextlib.suppress(KeyboardInterrupt):  # elsewhere than in an answer, Ctrl-C leaves
            while self.going_on and (line := self.screen.read()) is not None:
                try:
                    self._do(line.strip())
                except UserError as error:
                    self.screen.note(f"error: {error}")
        if self.screen.interactive and self.going_on:
            self.screen.say("\n")

    def _do(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            word, _, argument = line[1:].partition(" ")
            if word not in COMMANDS:
                close = nearest(word, COMMANDS).replace("mean ", "mean /")
                raise UserError(f"/{word}: no such command{close}; /help lists them")
            COMMANDS[word][0](self, argument.strip())
        elif line:
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, question: str) -> None:
        """Say the answer as it comes, and keep it; a question without an answer is taken back."""
        renderer = self.renderer.with_prefix(self.voices.answer_prefix)
        reply = Reply(
            self.base, self.voices.role, renderer, self.conversation, question, self._sampling(), self.generator
        )
        if notes_on([Row(Shape.prompts, self.conversation.messages(question), [])], renderer):
            self.screen.note(f"({CONTROL_AS_TEXT})")
        if reply.left_out:
            turns = f"{reply.left_out} turn" + "s" * (reply.left_out > 1)
            self.screen.note(f"(the context is full: left out the oldest {turns})")
        began, shown, stopped = time.perf_counter(), "", False
        try:
            with _interruptible() as asked:
                for piece in reply:
                    shown = piece.text
                    self.screen.say(piece.text, dim=piece.thinking)
                    if asked.is_set():
                        stopped = True
                        break
        except KeyboardInterrupt:
            stopped = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.screen.say("\n" * bool(shown))
            raise EnvironmentProblem("out of memory; /reset, or a smaller /tokens, may help") from error
        self.screen.say("\n" * (not shown.endswith("\n")))
        seconds = time.perf_counter() - began
        self.last = (
            f"{len(reply.ids)} tokens in {seconds:.1f} s ({len(reply.ids) / seconds:.1f} tokens/s), "
            f"context {len(reply.prompt_ids) + len(reply.ids)} of {reply.context_tokens}"
        )
        turn = reply.turn
        if not turn.answer:
            self.screen.note("(nothing was said; the question is taken back)")
            return
        if stopped:
            self.screen.note("(stopped)")
        elif not turn.finished:
            self.screen.note(f"(cut at {len(reply.ids)} tokens)")
        self.conversation.turns.append(turn)

    def _sampling(self) -> Sampling:
        return Sampling(self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p)

    # ---- commands

    def _help(self, _: str) -> None:
        width = max(len(f"/{word} {usage}") for word, (_, usage, _) in COMMANDS.items())
        lines = [f"{f'/{word} {usage}':<{width}}  {what}" for word, (_, usage, what) in COMMANDS.items()]
        lines += [
            "",
            "A line that ends in a backslash goes on in the next; //text sends text that begins with a slash.",
        ]
        self.screen.show("\n".join(lines))

    def _adapter(self, name: str) -> None:
        self.voices.use(_given(name, "/adapter RUN, or /adapter base"))
        prefix = self.voices.answer_prefix
        self.screen.note(f"(adapter: {self.voices.active}{f', answers behind {prefix!r}' * bool(prefix)})")

    def _adapters(self, _: str) -> None:
        marks = {True: "*", False: " "}
        self.screen.show("\n".join(f"{marks[name == self.voices.active]} {name}" for name in self.voices.names))

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        self.screen.note("(system prompt set)" if text else "(no system prompt)")

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self.screen.note("(a new conversation)")

    def _undo(self, _: str) -> None:
        self._take_back()
        self.screen.note(f"(taken back; {len(self.conversation.turns)} turns left)")

    def _retry(self, _: str) -> None:
        turn = self._take_back()
        before = len(self.conversation.turns)
        try:
            self._answer(turn.question)
        finally:
            if len(self.conversation.turns) == before:  # no other answer came
                self.conversation.turns.append(turn)

    def _take_back(self) -> Turn:
        if not self.conversation.turns:
            raise UserError("nothing has been said yet")
        return self.conversation.turns.pop()

    def _set(self, knob: str) -> Callable[[str], None]:
        def change(value: str) -> None:
            given = self.settings.model_dump() | {knob: _given(value, f"a number, now {getattr(self.settings, knob)}")}
            try:
                self.settings = ChatSettings(**given)
            except ValidationError as error:
                raise UserError(": ".join(first_problem(error))) from None
            self.screen.note(f"({knob} {getattr(self.settings, knob)})")

        return change

    def _save(self, name: str) -> None:
        path = Path(_given(name, "/save FILE.jsonl")).expanduser()
        if path.suffix != ".jsonl":
            raise UserError(f"{name}: name a .jsonl file")
        line = json.dumps(self.conversation.row(), ensure_ascii=False) + "\n"
        try:
            before = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise EnvironmentProblem(f"{name}: cannot be read ({error.strerror})") from error
        write_atomic(path, before + b"\n" * (bool(before) and not before.endswith(b"\n")) + line.encode())
        self.screen.note(f"({name}: {len(self.conversation.turns)} turns added as a row)")

    def _stats(self, _: str) -> None:
        self.screen.show(self.last)

    def _quit(self, _: str) -> None:
        self.going_on = False


def _given(argument: str, usage: str) -> str:
    if not argument:
        raise UserError(f"give {usage}")
    return argument


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C asks to stop after this token, so that no forward pass is cut in half; a second one interrupts at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: Any = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


Command = Callable[[Session, str], None]
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "adapter": (Session._adapter, "RUN", "let another adapter speak, loaded where it is new; base: the bare model"),
    "adapters": (Session._adapters, "", "those that are loaded; * speaks"),
    "system": (Session._system, "TEXT", "set the system prompt; without TEXT there is none"),
    "reset": (Session._reset, "", "begin a new conversation"),
    "retry": (Session._retry, "", "answer the last question anew"),
    "undo": (Session._undo, "", "take back the last question and its answer"),
    "temperature": (lambda s, x: s._set("temperature")(x), "X", "0 takes the likeliest token each time"),
    "top-p": (lambda s, x: s._set("top_p")(x), "X", "draw from the likeliest tokens with this share together"),
    "tokens": (lambda s, x: s._set("max_new_tokens")(x), "N", "the longest answer"),
    "save": (Session._save, "FILE", "append the conversation to a .jsonl file, as a demonstration"),
    "stats": (Session._stats, "", "how fast the last answer was, and how full the context is"),
    "help": (Session._help, "", "this list"),
    "quit": (Session._quit, "", "leave"),
}
