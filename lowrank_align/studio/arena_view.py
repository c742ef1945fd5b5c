"""The arena as a page shows it: the battle without names, the results in words and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_align.errors import UserError
from lowrank_align.ratings import WinRate
from lowrank_align.studio.answers import Source
from lowrank_align.studio.arena import Arena, Revealed
from lowrank_align.studio.matchmaking import Match, Setup
from lowrank_align.studio.pairs import said
from lowrank_align.studio.standings import IDENTICAL, Judged, Standings

ELO = 400 / math.log(10)  # points for a nat of log-odds, as in chess
MEAN_POINTS = 1000
ENOUGH_VOTES = 10  # before a side is told to win too often, or not
FEW_VOTES = "No votes yet. Every vote is kept, and is a pair to train on as well."


@dataclass(frozen=True)
class Shown:
    """The battle on the page, by side. It tells nothing of who plays: no names, no speed, no token counts."""

    battle_id: str = ""
    prompt: str = ""
    texts: tuple[str, str] = ("", "")
    states: tuple[str, str] = ("", "")
    streaming: bool = False
    message: str = ""


@dataclass(frozen=True)
class Table:
    headers: list[str]
    rows: list[list[Any]]


def shown_now(arena: Arena) -> Shown:
    """The arena at this moment."""
    match = arena.current
    if match is None:
        return Shown(message=arena.problem and _sentence(arena.problem))
    left, right = match.shown
    return Shown(
        match.id,
        said(match.prompt),
        (match.text(left), match.text(right)),
        (_state(match, left), _state(match, right)),
        not match.done,
        _sentence(f"{match.error}: skip this battle (S)") if match.error else "",
    )


def _state(match: Match, index: int) -> str:
    if match.record is not None:
        return ""
    answer = match.answers[index]
    if answer.error:
        return "could not be drawn"
    if not answer.done:
        return "writing ..." if answer.text else "thinking ..." if answer.thought else "waiting for its turn ..."
    if not answer.text:
        return "an empty answer"
    return "" if answer.finished else "cut at the longest answer"


def setup_from(voices: Sequence[str], temperatures: str, max_new_tokens: float | None, typed: str) -> Setup:
    """Every voice at every temperature. UserError for a temperature or a length that is none."""
    try:
        warm = [float(part) for part in temperatures.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise UserError(f"temperatures: {temperatures!r}, must be numbers with commas between: 0.7, 1.0") from None
    if not warm or not all(0 <= t <= 5 for t in warm):
        raise UserError("temperatures: give at least one, each from 0 to 5")
    if not max_new_tokens or max_new_tokens < 1:
        raise UserError("longest answer: must be 1 token or more")
    longest = int(max_new_tokens)
    players = [Source(voice, temperature=t, max_new_tokens=longest) for voice in voices for t in dict.fromkeys(warm)]
    return Setup(tuple(players), tuple(line.strip() for line in typed.splitlines() if line.strip()))


def setup_as_typed(setup: Setup, settings: Any) -> tuple[list[str], str, int, str]:
    """The same the other way: voices, temperatures, longest answer, prompts; the studio's own without players."""
    players = setup.players or (Source("", settings.temperature, max_new_tokens=settings.max_new_tokens),)
    voices = list(dict.fromkeys(player.voice for player in players if player.voice))
    temperatures = ", ".join(f"{t:g}" for t in dict.fromkeys(player.temperature for player in players))
    return voices, temperatures, players[0].max_new_tokens, "\n".join(setup.typed)


def revealed(last: Revealed | None) -> str:
    """Who stood where, for a moment after the vote."""
    if last is None:
        return ""
    left, right = last.names
    if last.verdict == IDENTICAL:
        return f"{left} and {right} gave the same answer: a tie"
    won = {"a": "A won", "b": "B won", "tie": "a tie", "bad": "both bad", "skip": "skipped"}
    return f"{won[last.verdict]} · A: {left} · B: {right}"


# ---- results


def table(found: Standings) -> Table:
    """Two players by their win rate, more by their rating; the best first."""
    counts = ["battles", "won", "tied", "lost"]
    rows: list[list[Any]] = []
    for rating in found.ratings:
        rate = found.win_rates[rating.name]
        record = [rating.battles, rating.wins, rating.ties, rating.losses]
        if len(found.names) == 2:
            rows.append([rating.name, _percent(rate.rate), _between(rate), *record])
        else:
            low, high = (_points(value) for value in (rating.low, rating.high))
            rows.append([rating.name, _points(rating.strength), f"{low} to {high}", _percent(rate.rate), *record])
    if len(found.names) == 2:
        return Table(["player", "win rate", "95 % interval", *counts], rows)
    return Table(["player", "rating", "95 % interval", "win rate", *counts], rows)


def summary(found: Standings) -> str:
    """What the votes say, a line each."""
    if not found.battles:
        return FEW_VOTES
    lines = [_two(found)] if len(found.names) == 2 else _several(found)
    if found.left.total:
        lines.append(_left(found.left))
    if found.identical:
        many = f"{found.identical} battles were ties" if found.identical > 1 else "1 battle was a tie"
        lines.append(f"{many} because both answers were the same.")
    lines.append(_agreement(found))
    return "\n".join(lines)


def _two(found: Standings) -> str:
    first, second = found.names
    rate = found.win_rates[first]
    line = f"{first} wins {_with_interval(rate)} of {_battles(rate.total)} against {second}"
    if rate.low > 0.5:
        return f"{line}: it is better."
    if rate.high < 0.5:
        return f"{line}: {second} is better."
    return f"{line}. Who is better is not clear yet: 50 % lies in that range, and more votes narrow it."


def _several(found: Standings) -> list[str]:
    rules = {
        "At least even with every other (Condorcet)": found.winners.condorcet,
        "Beats the most others (Copeland)": found.winners.copeland,
        "The highest mean win rate over all others (Borda)": found.winners.borda,
    }
    lines = [f"{_battles(found.battles)} among {len(found.names)} players."]
    lines += [f"{rule}: {', '.join(names) or 'nobody yet'}." for rule, names in rules.items()]
    lines.append(f"Rating: Elo points by Bradley-Terry, {MEAN_POINTS} is the mean; intervals by resampling prompts.")
    return lines


def _left(left: WinRate) -> str:
    line = f"The left answer won {_with_interval(left)} of {_votes(left.total)}"
    if left.total < ENOUGH_VOTES:
        return f"{line}: too few votes to say more."
    if left.low <= 0.5 <= left.high:
        return f"{line}: sides do not seem to matter."
    return f"{line}: sides are random, so they should not matter; read the other side first for a while."


def _agreement(found: Standings) -> str:
    shared = found.agreement
    if not shared.comparisons:
        return "Agreement between annotators: no battle was judged by two yet."
    alpha = "" if math.isnan(shared.alpha) else f", Krippendorff's alpha {shared.alpha:.2f}"
    share = f"{_percent(shared.share)} ({_percent(shared.low, '')}-{_percent(shared.high)})"
    return f"Annotators agree in {share} of {shared.comparisons} comparisons on the same battle{alpha}."


def judged_in_words(reward: str, judged: Judged) -> str:
    """A reward run beside the votes, also while it scores."""
    if judged.done < judged.total:
        return f"Scoring {judged.done} of {judged.total} ..."
    if not judged.agreement.total:
        return f"{reward} could score none of the {judged.total} battles: their texts are too long for it."
    rate = judged.agreement
    line = f"{reward} scores the better answer higher in {_with_interval(rate)} of {_votes(rate.total)} for a side"
    return line + (f"; {judged.left_out} could not be scored." if judged.left_out else ".")


def _with_interval(rate: WinRate) -> str:
    return f"{_percent(rate.rate)} ({_between(rate)})"


def _between(rate: WinRate) -> str:
    return f"{_percent(rate.low, '')}-{_percent(rate.high)}"


def _percent(share: float, unit: str = " %") -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}{unit}"


def _points(strength: float) -> int:
    return round(MEAN_POINTS + ELO * strength)


def _battles(count: int) -> str:
    return f"{count} battle{'s' * (count != 1)}"


def _votes(count: int) -> str:
    return f"{count} vote{'s' * (count != 1)}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))
