"""The command line: thin, made from the settings in `config.py`; what is slow to import, its command imports."""

import argparse
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from lowrank_align import __version__
from lowrank_align.config import COMMANDS as OTHER_COMMANDS
from lowrank_align.config import DATA_COMMANDS, METHODS, Settings, resolve
from lowrank_align.config.knobs import kinds
from lowrank_align.errors import (
    EXIT_DATA_OR_CONFIG,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_RESUMABLE,
    Stopped,
    UserError,
    is_out_of_memory,
    nearest,
)
from lowrank_align.stopping import ends_interrupt
from lowrank_align.terminal import Visible, make_console, say, visible

SHORT_FLAGS = {"completions": "-n", "rows": "-n", "group_size": "-G"}
OTHER_NAMES = {"as_json": "json"}  # pydantic's models have a method of that name
POSITIONAL = {"presets": "name", "data import": "file", "data export": "kind", "data convert": "file"}
# what settings that several commands share are called in their help
GROUPS = {
    "ModelSettings": "the model",
    "TrainSettings": "training",
    "OnlineSettings": "answers and what they are worth",
    "SamplerSettings": "rollouts from a server",
    "RowsSettings": "rows",
    "ReadingSettings": "rows",
    "DataSettings": "the store",
}
RUN_CODE = {"plan", "audit", "show", "generate", "chat", "eval", "score", "logps", "studio"}  # and training
PLAIN = 4  # settings that share nothing: themselves, Settings, BaseModel, object


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (see `errors.py`). A user's mistake is one line on stderr."""
    _print_anything()
    parser, words = make_parser(), sys.argv[1:] if argv is None else list(argv)
    known = command_names()
    if words and not words[0].startswith("-") and words[0] not in known:
        parser.error(f"{words[0]}: no such command{nearest(words[0], known)} (there are: {', '.join(known)})")
    arguments = vars(parser.parse_args(words))
    command = arguments.pop("command")
    if command is None:
        parser.print_help()
        return EXIT_DONE
    _quiet_libraries()
    try:
        if command not in METHODS and "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{command}: is one process; start it without accelerate launch or torchrun")
        with ends_interrupt() if command in METHODS else nullcontext():
            return _run(command, arguments)
    except UserError as error:
        # one line, whatever a user's function raised; what was stopped on request is no error
        if not error.said:
            say(*["error:"] * (not isinstance(error, Stopped)), *str(error).splitlines(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted" + "; --resume goes on from the last checkpoint, if there is one" * (command in METHODS),
            file=sys.stderr,
        )
        return EXIT_RESUMABLE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print("error: out of memory; take a smaller model, --batch-size, --max-length or --rank", file=sys.stderr)
            return EXIT_ENVIRONMENT
        if not isinstance(error, OSError):
            raise
        # no permission, a full disk, a name that is too long: wherever nothing better was said
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error).splitlines()[0]
        say(f"error: {what}", file=sys.stderr)
        return EXIT_ENVIRONMENT


def command_names() -> tuple[str, ...]:
    """Every command, methods that were added by `methods.register` among them."""
    return ("demo", *METHODS, *OTHER_COMMANDS, "data", "runs")


def _instead(flag: str, known: Sequence[str]) -> str:
    """What was meant: rows are --data for some methods and --prompts for the others."""
    rows = {"--data": "--prompts", "--prompts": "--data"}.get(flag)
    return f" (here it is {rows})" if rows in known else nearest(flag, known)


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag. No abbreviations: a new knob would change what they mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
            known = re.findall(r"--[\w-]+", self.format_usage())
            named = ", ".join(f"{flag}: no such flag{_instead(flag, known)}" for flag in flags)
            self.error(named or f"{unknown[0]}: unexpected; every value needs its flag")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_DATA_OR_CONFIG, f"error: {visible(message, keep='')}\n")


def make_parser() -> argparse.ArgumentParser:
    """All commands with their flags; nothing heavy is imported for it."""
    parser = Parser(
        prog="lowrank-align",
        description="Align a language model to your own taste on one GPU: roles are adapters on one frozen 4-bit base.",
    )
    parser.add_argument("--version", action="version", version=f"lowrank-align {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="The whole loop on one base: SFT, pairs, reward model, DPO, PPO, and a table"
    )
    demo.add_argument(
        "--out",
        default="runs/demo",
        help="folder of the demo's runs and report; its own is replaced (default: %(default)s)",
    )
    demo.add_argument("--model", help="a model folder, a hub id or tiny (default: the preset's, else tiny)")
    demo.add_argument("--preset", metavar="NAME", help="settings of the methods (default: those of tiny)")
    demo.add_argument(
        "--score", metavar="MODULE:FUNCTION", help="exact score of completions: needed with another model than tiny"
    )
    demo.add_argument("--quantize", choices=("nf4", "int8", "none"), default="nf4", help="(default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a tenth of the steps: shows the way, not the results")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    for name, settings in (METHODS | OTHER_COMMANDS).items():
        _add_command(commands, name, settings)
    data = commands.add_parser(
        "data", help="Rows into and out of the store of judgements", description="The store of judgements, in one file."
    ).add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, settings in DATA_COMMANDS.items():
        _add_command(data, name, settings, f"data {name}")
    runs = commands.add_parser("runs", help="List, compare and delete runs")
    runs.add_argument("folder", nargs="?", default="runs", help="(default: %(default)s)")
    runs.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="settings and last figures of two runs, side by side"
    )
    runs.add_argument("--delete", metavar="RUN", help="delete a run")
    runs.add_argument("--yes", action="store_true", help="delete without asking")
    return parser


def _run(command: str, arguments: dict[str, Any]) -> int:
    if command == "runs":
        return _runs(**arguments)
    if command == "demo":
        from lowrank_align.apps.demo import run_demo

        return run_demo(**arguments)
    if command == "data":
        what = arguments.pop("what")
        command, settings_class = f"data {what}", DATA_COMMANDS[what]
    else:
        settings_class = (METHODS | OTHER_COMMANDS)[command]
    trusted = arguments.pop("trust_remote_code", False)
    settings = resolve(settings_class, arguments, arguments.pop("config", None))
    if trusted:
        from lowrank_align.remote_code import trust

        trust(settings.model)  # type: ignore[attr-defined]
    if command in METHODS:
        from lowrank_align.train import train

        train(settings)  # type: ignore[arg-type]
    elif command == "studio":
        from lowrank_align.apps.studio import run_studio

        return run_studio(settings)  # type: ignore[arg-type]
    elif command == "frontier":
        from lowrank_align.apps.frontier import run_frontier

        return run_frontier(settings)  # type: ignore[arg-type]
    else:
        from lowrank_align import commands

        return commands.run(command, settings)
    return EXIT_DONE


def _runs(folder: str, compare: list[str] | None, delete: str | None, yes: bool) -> int:
    from lowrank_align.listing import delete_run, deletion_notice, print_comparison, print_runs

    console = make_console()
    if compare:
        print_comparison(Path(compare[0]), Path(compare[1]), console)
    elif delete:
        console.print(deletion_notice(Path(delete)), markup=False)
        if not yes and not _confirmed():
            console.print("kept")
            return EXIT_DONE
        console.print(delete_run(Path(delete)), markup=False)
    else:
        print_runs(Path(folder), console)
    return EXIT_DONE


def _confirmed() -> bool:
    try:
        return input("delete? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody there to answer
        return False


def _add_command(commands: Any, name: str, settings: type[Settings], whole_name: str = "") -> None:
    text = (settings.__doc__ or "").strip()
    parser = commands.add_parser(name, help=text.rstrip("."), description=text)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with these settings; flags win")
    if (whole_name or name) in {*METHODS, *RUN_CODE}:  # no setting: no file may give it, and no run keeps it
        text = "Run the Python files in the model's folder, for models that need them. Read them first."
        parser.add_argument("--trust-remote-code", action="store_true", default=argparse.SUPPRESS, help=text)
    groups: dict[type[Settings], Any] = {}
    for field, info in sorted(settings.model_fields.items(), key=lambda item: _depth(settings, item[0])):
        if POSITIONAL.get(whole_name or name) == field:
            parser.add_argument(field, nargs=None if info.is_required() else "?", help=info.description)
            continue
        owner = _owner(settings, field)
        if owner not in groups:
            title = GROUPS.get(owner.__name__, f"of {whole_name or name}")
            groups[owner] = parser.add_argument_group(title) if len(settings.__mro__) > PLAIN else parser
        _add_flag(groups[owner], field, info)


def _owner(settings: type[Settings], field: str) -> type[Settings]:
    """The class that a setting was last written down in: the command's own, or one that it shares with others."""
    return next(kind for kind in settings.__mro__ if field in vars(kind).get("__annotations__", {}))


def _depth(settings: type[Settings], field: str) -> tuple[int, int]:
    """A command's own settings come before those that it shares, each class's in the order they are written down."""
    owner = _owner(settings, field)
    return settings.__mro__.index(owner), list(vars(owner)["__annotations__"]).index(field)


def _add_flag(parser: Any, name: str, info: FieldInfo) -> None:
    """One flag a field. Values stay text: pydantic reads and checks them, for flags and YAML alike."""
    flags = [
        f"--{OTHER_NAMES.get(name, name).replace('_', '-')}",
        *([SHORT_FLAGS[name]] if name in SHORT_FLAGS else []),
    ]
    description = " ".join((info.description or "").split()).replace("%", "%%")
    options: dict[str, Any] = {"default": None, "dest": name, "help": description + _shown_default(info)}
    types = kinds(info.annotation)
    if bool in types:
        options["action"] = argparse.BooleanOptionalAction
    elif list in types:
        options |= {"nargs": "+", "metavar": "X" if "float" in str(info.annotation) else "NAME"}
    else:
        choices = [value for kind in types if get_origin(kind) is Literal for value in get_args(kind)]
        numbers = {int: "N", float: "X"}
        metavar = "|".join(choices) or next((numbers[kind] for kind in types if kind in numbers), name.upper())
        options["metavar"] = metavar
    parser.add_argument(*flags, **options)


def _shown_default(info: FieldInfo) -> str:
    """None says nothing: what it means is in the description."""
    if info.is_required() or info.default is None:
        return ""
    shown = " ".join(map(str, info.default)) or "none" if isinstance(info.default, list) else info.default
    if isinstance(shown, bool):
        shown = "yes" if shown else "no"
    return f" (default: {shown})"


def _print_anything() -> None:
    """What a terminal's encoding lacks is escaped instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Our own log lines, and of the libraries' only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Visible("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lowrank_align").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it misses a package that only the hub has
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|accelerate)\b")
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler")  # a first step that is not finite
