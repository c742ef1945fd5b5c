"""The command line: thin, made from the settings in `config.py`; what takes time to import is imported in its command."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lowrank_align import __version__
from lowrank_align.config import (
    METHODS,
    GenerateSettings,
    LogpsSettings,
    ScoreSettings,
    Settings,
    ShowSettings,
    resolve,
)
from lowrank_align.errors import EXIT_DONE, EXIT_RESUMABLE, UserError

SHORT_FLAGS = {"completions": "-n", "rows": "-n"}
OTHER_COMMANDS: dict[str, type[Settings]] = {
    "generate": GenerateSettings,
    "score": ScoreSettings,
    "logps": LogpsSettings,
    "show": ShowSettings,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (see `errors.py`). A user's mistake is one line on stderr."""
    parser = make_parser()
    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    if command is None:
        parser.print_help()
        return EXIT_DONE
    _quiet_libraries()
    try:
        return _run(command, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_RESUMABLE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def make_parser() -> argparse.ArgumentParser:
    """All commands with their flags; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(
        prog="lowrank-align",
        description="Align a language model to your own taste on one GPU: every role an adapter on one frozen 4-bit base.",
    )
    parser.add_argument("--version", action="version", version=f"lowrank-align {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="the whole loop on one base: SFT, pairs, reward model, DPO, PPO, and a table"
    )
    demo.add_argument(
        "--out",
        default="runs/demo",
        help="folder of the demo's runs and report; its own is replaced (default: %(default)s)",
    )
    demo.add_argument("--model", default="tiny", help="a model folder, a hub id or tiny (default: %(default)s)")
    demo.add_argument(
        "--score", metavar="MODULE:FUNCTION", help="exact score of completions: needed with --model other than tiny"
    )
    demo.add_argument("--quantize", choices=("nf4", "int8", "none"), default="nf4", help="(default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a tenth of the steps: shows the way, not the results")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    for name, settings in (METHODS | OTHER_COMMANDS).items():
        _add_command(commands, name, settings)
    runs = commands.add_parser("runs", help="list, compare and delete runs")
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
    settings_class = (METHODS | OTHER_COMMANDS)[command]
    settings = resolve(settings_class, arguments, arguments.pop("config", None))
    if command in METHODS:
        from lowrank_align.train import train

        train(settings)  # type: ignore[arg-type]
    else:
        from lowrank_align import commands

        getattr(commands, command)(settings)
    return EXIT_DONE


def _runs(folder: str, compare: list[str] | None, delete: str | None, yes: bool) -> int:
    from rich.console import Console

    from lowrank_align.runs import delete_run, deletion_notice, print_comparison, print_runs

    console = Console(highlight=False)
    if compare:
        print_comparison(Path(compare[0]), Path(compare[1]), console)
    elif delete:
        console.print(deletion_notice(Path(delete)), markup=False)
        if not yes and input("delete? [y/N] ").strip().lower() not in ("y", "yes"):
            console.print("kept")
            return EXIT_DONE
        console.print(delete_run(Path(delete)), markup=False)
    else:
        print_runs(Path(folder), console)
    return EXIT_DONE


def _add_command(commands: Any, name: str, settings: type[Settings]) -> None:
    text = (settings.__doc__ or "").strip()
    parser = commands.add_parser(name, help=text[0].lower() + text[1:].rstrip("."), description=text)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with these settings; flags win")
    for field, info in settings.model_fields.items():
        _add_flag(parser, field, info)


def _add_flag(parser: argparse.ArgumentParser, name: str, info: FieldInfo) -> None:
    """One flag a field. Values stay text: pydantic reads and checks them, for flags and YAML alike."""
    flags = [f"--{name.replace('_', '-')}", *([SHORT_FLAGS[name]] if name in SHORT_FLAGS else [])]
    description = " ".join((info.description or "").split()).replace("%", "%%")
    if not info.is_required() and info.default not in (None, False, []):
        description += f" (default: {info.default})"
    options: dict[str, Any] = {"default": None, "dest": name, "help": description}
    kinds = _kinds(info.annotation)
    if bool in kinds:
        options["action"] = argparse.BooleanOptionalAction if info.default else "store_const"
        if not info.default:
            options["const"] = True
    elif list in kinds:
        options |= {"nargs": "+", "metavar": "NAME"}
    else:
        choices = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        numbers = {int: "N", float: "X"}
        metavar = "|".join(choices) or next((numbers[kind] for kind in kinds if kind in numbers), name.upper())
        options["metavar"] = metavar
    parser.add_argument(*flags, **options)


def _kinds(annotation: Any) -> list[Any]:
    """The plain types in an annotation: `int | None` -> [int], `list[str]` -> [list]."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) if part is not NoneType for kind in _kinds(part)]
    if hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return [annotation if origin is None or origin is Literal else origin]


def _quiet_libraries() -> None:
    """Our own log lines, and of the libraries' only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lowrank_align").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|accelerate)\b")
