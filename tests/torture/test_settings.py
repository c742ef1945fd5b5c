"""Settings that are mistyped, out of range or of the wrong type: refused by one line that names the knob meant."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import pytest

Command = Callable[..., Any]

SECTION = "Rows and settings"
NEIGHBOURS = {
    "a": "sqwz", "b": "vghn", "c": "xdfv", "d": "serfcx", "e": "wsdr", "f": "drtgvc", "g": "ftyhbv", "h": "gyujnb",
    "i": "ujko", "j": "huikmn", "k": "jiolm", "l": "kop", "m": "njk", "n": "bhjm", "o": "iklp", "p": "ol", "q": "wa",
    "r": "edft", "s": "awedxz", "t": "rfgy", "u": "yhji", "v": "cfgb", "w": "qase", "x": "zsdc", "y": "tghu",
    "z": "asx", "_": "-o", "1": "2q", "2": "13w", "8": "79",
}  # fmt: skip


def swapped(name: str, draw: random.Random) -> str:
    at = draw.randrange(len(name) - 1)
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def dropped(name: str, draw: random.Random) -> str:
    at = draw.randrange(len(name))
    return name[:at] + name[at + 1 :]


def doubled(name: str, draw: random.Random) -> str:
    at = draw.randrange(len(name))
    return name[: at + 1] + name[at:]


def beside(name: str, draw: random.Random) -> str:
    at = draw.randrange(len(name))
    return name[:at] + draw.choice(NEIGHBOURS.get(name[at], "x")) + name[at + 1 :]


def joined(name: str, draw: random.Random) -> str:
    """Another word break, or none: learning-rate, learningrate, learningRate."""
    first, *rest = name.split("_")
    return draw.choice(["".join([first, *rest]), "".join([first, *(word.title() for word in rest)])])


def begun(name: str, draw: random.Random) -> str:
    """A beginning that nearly is the name."""
    return name[: -draw.randint(1, max(1, len(name) // 3))]


OPERATIONS = (swapped, dropped, doubled, beside, joined, begun)


def commands() -> dict[str, Any]:
    from lowrank_align.config import COMMANDS, METHODS

    return METHODS | COMMANDS


def typos(count: int) -> Iterator[tuple[str, str, str, str]]:
    """(command, setting, typo, how it is given), every setting of every method and command in turn, drawn by a seed."""
    draw = random.Random(20)
    every = [(command, name) for command, kind in commands().items() for name in kind.model_fields]
    given = ("flag", "yaml", "keyword")
    made = 0
    while made < count:
        draw.shuffle(every)
        for command, name in every:
            known = set(commands()[command].model_fields)
            typo = OPERATIONS[made % len(OPERATIONS)](name, draw)
            others = {one for one in known if one.startswith(typo)} - {name}
            as_flags = {one.replace("_", "-") for one in known} if given[made % len(given)] == "flag" else set()
            if (
                typo in known
                or typo.replace("_", "-") in as_flags
                or len(typo) < 2
                or others
                or typo.startswith(("-", "no_"))
            ):
                continue  # a name of its own, or the beginning of several
            if made == count:
                return
            yield command, name, typo, given[made % len(given)]
            made += 1


def test_mistyped_settings(tally: Any, times: Any, command: Command, tmp_path: Path) -> None:
    from lowrank_align.config import resolve
    from lowrank_align.errors import UserError

    count, refused, right, missed = times(90, 600), 0, 0, []
    for name, setting, typo, how in typos(count):
        kind = commands()[name]
        if how == "flag":
            shown = f"--{({'as_json': 'json'}.get(setting, setting)).replace('_', '-')}"
            outcome = command(name, f"--{typo.replace('_', '-')}", "1")
            code, message = outcome.code, outcome.err
        else:
            shown = setting
            file = tmp_path / "c.yaml"
            file.write_text(f"{typo}: 1\n")
            try:
                resolve(kind, *(({}, file) if how == "yaml" else ({typo: 1},)))
            except UserError as error:
                code, message = error.exit_code, str(error)
            else:
                code, message = 0, "taken"
        refused += (
            code == 2 and typo.replace("_", "-" if how == "flag" else "_") in message and message.count("\n") <= 1
        )
        if not (code == 2 and typo.replace("_", "-" if how == "flag" else "_") in message):
            missed.append(f"{name}: {typo} for {setting} as {how}: {code} {message.strip()[:120]}")
        elif f"did you mean {shown}?" in message:
            right += 1
        else:
            missed.append(f"{name}: {typo} for {setting}: {message.strip()[:120]}")
    note = f"the right name suggested for {right} of {count} ({100 * right / count:.1f} %)"
    tally(SECTION, "mistyped settings", "refused, exit code 2", held=refused, of=count, note=note)
    assert refused == count, "\n".join(missed)
    assert right >= 0.9 * count, "\n".join([note, *missed])


def test_keyword_arguments_are_checked_like_flags() -> None:
    """Also with None, which means that a flag was not given."""
    from lowrank_align.errors import UserError
    from lowrank_align.train import train

    for value in (1, None):
        with pytest.raises(UserError, match=r"^learning_rte: unknown setting \(did you mean learning_rate\?\)$"):
            train("dpo", model="m", data="d", out="o", learning_rte=value)
    with pytest.raises(UserError, match=r"did you mean dpo"):
        train("dop", model="m", data="d", out="o")


# ---- values


def filled(kind: Any) -> dict[str, Any]:
    """What a command cannot do without."""
    needed = {name for name, info in kind.model_fields.items() if info.is_required()}
    return {name: {"reward": ["r"], "to": "pairs", "kind": "pairs"}.get(name, "x") for name in needed}


def numbers(kind: Any) -> set[type]:
    """The number types that a setting takes."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return {found for part in get_args(kind) if part is not NoneType for found in numbers(part)}
    if hasattr(kind, "__metadata__"):
        return numbers(get_args(kind)[0])
    return {kind} if kind in (int, float) else set()


def bad_values(info: Any) -> list[Any]:
    """What no such setting takes, by its type and its bounds."""
    found = numbers(info.annotation)
    bad: list[Any] = ["many", "", "1e", "0x10", [1], {"a": 1}, "1,5", "١x", float("nan"), float("inf"), "-inf"]
    if found == {int}:
        bad += ["1.5", "1e3", 10**30]
    bounds = [part for part in (*info.metadata, *_inner(info.annotation)) if part is not None]
    for bound in bounds:
        low = getattr(bound, "gt", None)
        bad += [low, low - 1] if low is not None else []
        low = getattr(bound, "ge", None)
        bad += [low - 1] if low is not None else []
        high = getattr(bound, "lt", None)
        bad += [high] if high is not None else []
        high = getattr(bound, "le", None)
        bad += [max(high + 1, high * 1.5)] if high is not None else []
    return bad


def _inner(annotation: Any) -> list[Any]:
    """The bounds inside an optional type."""
    own = [part for meta in getattr(annotation, "__metadata__", ()) for part in getattr(meta, "metadata", [meta])]
    return own + [part for inner in get_args(annotation) for part in _inner(inner)]


FREE = {"threshold"}  # any finite number


def test_values_out_of_range_or_of_the_wrong_type(tally: Any, tmp_path: Path) -> None:
    """Every numeric setting of every command: one line that begins with the knob."""
    from lowrank_align.config import DATA_COMMANDS, resolve
    from lowrank_align.errors import UserError

    tried, wrong = 0, []
    for name, kind in (commands() | DATA_COMMANDS).items():
        for setting, info in kind.model_fields.items():
            if not numbers(info.annotation):
                continue
            for value in bad_values(info):
                if isinstance(value, int) and value == 10**30 and setting not in ("seed",):
                    continue  # the type alone does not forbid it; the plan and the data do
                tried += 1
                try:
                    resolve(kind, {**filled(kind), setting: value})
                except UserError as error:
                    line = str(error)
                    if not line.startswith(setting) or "\n" in line or error.exit_code != 2:
                        wrong.append(f"{name}: {setting}={value!r:.30}: {line}")
                else:
                    wrong.append(f"{name}: {setting}={value!r:.30}: taken")
    tally(SECTION, "values out of range or of the wrong type", "one line that begins with the knob",
          held=tried - len(wrong), of=tried)  # fmt: skip
    assert not wrong, "\n".join(wrong[:40])


def test_choices_and_switches(tally: Any) -> None:
    """A word that is none of the choices, and a switch that is neither on nor off."""
    from lowrank_align.config import resolve
    from lowrank_align.errors import UserError

    tried, wrong = 0, []
    for name, kind in commands().items():
        for setting, info in kind.model_fields.items():
            is_choice = "Literal" in str(info.annotation) and "list" not in str(info.annotation)
            if not is_choice and bool not in (info.annotation, *get_args(info.annotation)):
                continue
            for value in ("nf5x", 7, [], "\x1b[2J", "maybe"):
                tried += 1
                try:
                    resolve(kind, {**filled(kind), setting: value})
                except UserError as error:
                    if not str(error).startswith(setting) or "\n" in str(error):
                        wrong.append(f"{name}: {setting}={value!r}: {error}")
                else:
                    wrong.append(f"{name}: {setting}={value!r}: taken")
    tally(SECTION, "choices and switches of the wrong kind", "one line that begins with the knob",
          held=tried - len(wrong), of=tried)  # fmt: skip
    assert not wrong, "\n".join(wrong[:40])
    assert tried > 50
