"""What the rows become as tokens: how long, what is cut or dropped, what is trained, and whether it ends."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from lowrank_align.data.audit.findings import SHOWN, Finding, Severity, Tally, counted, part
from lowrank_align.data.chat import BECAME_EQUAL, NO_ROOM, NOTHING_TRAINED, Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.errors import UserError
from lowrank_align.trees import Completion, TreeRow

Track = Callable[[Sequence[Row]], Iterable[Row]]  # goes through the rows, and shows how far it is
UNCUT = sys.maxsize  # a max_length that cuts nothing

# The renderer's notes by the code that the audit has for them; they begin with these words.
NOTES = {
    "the prompt's last token merges": "prompt-merges",
    "the generation prompt is not": "generation-prompt-differs",
    "the template does not show where": "answer-not-found",
    "an answer that opens": "answer-opens",
    "the chat template leaves out": "template-leaves-out",
}
HARMLESS = ("answer-opens", "odd")
NOTES_ADVICE = {
    "prompt-merges": "end the prompt where a word ends and begin the completion with the space, or use messages",
    "generation-prompt-differs": "while chatting the model begins its answer from other tokens than it was trained on",
    "answer-not-found": "use another template (--chat-template)",
    "template-leaves-out": "use another template (--chat-template), or move what these turns say into the user's",
}
TOLD_ELSEWHERE = "control tokens within messages"  # by `texts`, which names them


@dataclass(frozen=True, slots=True)
class Measured:
    """One row in tokens. Lengths are those before anything is cut; a row that gives no tokens has none."""

    where: str
    shape: Shape
    prompt_tokens: int = 0
    completion_tokens: tuple[int, ...] = ()
    trained_tokens: int = 0  # over all completions, after cutting
    cut_tokens: int = 0
    dropped: str = ""  # why training leaves it out
    refused: str = ""  # the template's error
    notes: tuple[str, ...] = ()
    finished: bool = True  # False where the row says that its text goes on
    ends: bool = True  # the last trained token of every completion is an end token, where nothing is cut
    trains_end: bool = False  # an end token is trained, after cutting
    open_turns: int = 0  # earlier answers of the conversation without an end token
    double_bos: bool = False
    double_end: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion: what `max_length` is about."""
        return self.prompt_tokens + max(self.completion_tokens, default=0)


@dataclass(frozen=True)
class Spread:
    """How a length is spread over the rows; median and the rest are lengths that occur (nearest rank)."""

    median: int
    p90: int
    longest: int
    where: str  # the row of the longest
    total: int


def measure(rows: Sequence[Row], whole: Renderer, cut: Renderer, track: Track = iter) -> list[Measured]:
    """Every row in tokens. `whole` is a renderer with `max_length` UNCUT, `cut` the one that training would use."""
    return [_measure(row, whole, cut) for row in track(rows)]


def spreads(measured: Sequence[Measured]) -> dict[str, Spread]:
    """The lengths in tokens by name. `tree_row` only where rows have several completions, the rest as there are."""
    rows = [m for m in measured if m.prompt_tokens]
    lengths = {"prompt": [(m.prompt_tokens, m.where) for m in rows]}
    if answered := [m for m in rows if m.completion_tokens]:
        lengths["completion"] = [(tokens, m.where) for m in answered for tokens in m.completion_tokens]
        lengths["prompt_and_completion"] = [(m.longest, m.where) for m in answered]
        if any(len(m.completion_tokens) > 1 for m in answered):
            lengths["tree_row"] = [(m.prompt_tokens + sum(m.completion_tokens), m.where) for m in answered]
        lengths["trained"] = [(m.trained_tokens, m.where) for m in answered if not m.dropped]
    return {name: _spread(values) for name, values in lengths.items() if values}


def length_findings(measured: Sequence[Measured], max_length: int, context: int) -> list[Finding]:
    """Rows that are cut, dropped, or leave nothing to train."""
    found, needed = [], max((m.longest + (not m.completion_tokens) for m in measured), default=0)
    kept, of = [m for m in measured if not m.dropped and not m.refused], len(measured)
    if refused := [m for m in measured if m.refused]:
        what = f"the chat template refuses {part(len(refused), of)}"
        advice = "mend them, use another template (--chat-template), or let --skip-bad set them aside"
        told = [m.refused for m in refused[:SHOWN]]
        found.append(_of(refused).finding("error", "template-refuses", what, advice, details=told, stops=True))
    room = f"--max-length {needed} takes every row whole" if needed <= context else _too_long(measured, context)
    cut_equal = [m for m in measured if m.dropped == BECAME_EQUAL and m.longest > max_length]
    equal = [m for m in measured if m.dropped == BECAME_EQUAL and m.longest <= max_length]
    no_room = [m for m in measured if m.dropped == NO_ROOM] + cut_equal
    if no_room:
        reasons = " or ".join(sorted({m.dropped for m in no_room}, reverse=True))
        what = f"{part(len(no_room), of)} dropped at max_length {max_length}: {reasons}"
        found.append(_notable(no_room, measured, "rows-dropped", what, room))
    if cut := [m for m in kept if m.cut_tokens]:
        tokens = counted(sum(m.cut_tokens for m in cut), "token")
        what = f"{part(len(cut), of)} cut at max_length {max_length}, by {tokens}"
        found.append(_notable(cut, measured, "rows-cut", what, room))
    if equal:
        what = f"{part(len(equal), of)} dropped: their answers are the same once the template has written them"
        found.append(_of(equal).finding("warning", "answers-equal", what, "remove them: they differ in nothing"))
    if nothing := [m for m in measured if m.dropped == NOTHING_TRAINED]:
        what = f"{part(len(nothing), of)} dropped: nothing in them is trained"
        advice = "`lowrank-align show` prints what is trained; the template must show where an answer stands"
        found.append(_of(nothing).finding("warning", "nothing-trained", what, advice))
    if measured and not kept:
        what = f"no row is left to train on, of {len(measured):,}"
        found.append(Finding("error", "no-row-left", what, len(measured), advice=room if no_room else "", stops=True))
    return found


def end_findings(measured: Sequence[Measured], end_tokens: str) -> list[Finding]:
    """Whether the answers' ends are trained: what is not trained to end does not stop."""
    kept = [m for m in measured if not m.dropped and not m.refused and m.completion_tokens]
    found, of = [], len(measured)
    if missing := [m for m in kept if not m.ends]:
        what = f"not trained to end: {part(len(missing), of)}, uncut, whose last trained token is not {end_tokens}"
        advice = "`lowrank-align show` prints it; use a template that ends an answer with its end token"
        found.append(_of(missing).finding("error", "end-of-turn-missing", what, advice))
    elif kept and not any(m.trains_end for m in kept):
        declared = all(not m.finished for m in kept)
        what = f"no row trains an end token ({end_tokens}): " + (
            "all say that their text goes on (finished: false)"
            if declared
            else "every answer is cut, or goes on by its own words"
            if any(not m.finished for m in kept)
            else "every answer is cut"
        )
        advice = "the model will not learn from these rows to stop"
        if not declared:
            advice += '; raise --max-length or shorten the texts; where they are meant to go on, say "finished": false'
        severity: Severity = "warning" if declared else "error"
        found.append(_of(kept).finding(severity, "no-end-trained" if declared else "end-of-turn-missing", what, advice))
    elif unfinished := [m for m in kept if not m.finished]:
        what = f"finished: false, so that no end token is trained, in {part(len(unfinished), of)}"
        found.append(_of(unfinished).finding("note", "unfinished", what))
    if turns := [m for m in kept if m.open_turns]:
        what = f"earlier answers without an end token in {part(len(turns), of)}"
        advice = "train on the last answer alone (--train-on last), or use another template"
        found.append(_of(turns).finding("warning", "turn-end-missing", what, advice))
    if double := [m for m in kept if m.double_end]:
        what = f"two end tokens after the answer in {part(len(double), of)}"
        found.append(
            _of(double).finding("warning", "double-eos", what, "leave the end token out of the text: it is added")
        )
    if begins := [m for m in measured if m.double_bos]:
        what = f"two BOS tokens at the beginning of {part(len(begins), of)}"
        found.append(_of(begins).finding("warning", "double-bos", what, "leave BOS out of the text: it is added"))
    return found


def note_findings(measured: Sequence[Measured]) -> list[Finding]:
    """What the renderer found odd, by its own words."""
    tallies: dict[str, Tally] = {}
    for m in measured:
        for note in dict.fromkeys(m.notes):
            if not note.startswith(TOLD_ELSEWHERE):
                tallies.setdefault(note, Tally()).add(m.where)
    found = []
    for note, tally in tallies.items():
        code = next((code for begins, code in NOTES.items() if note.startswith(begins)), "odd")
        severity: Severity = "note" if code in HARMLESS else tally.severity(len(measured))
        found.append(
            tally.finding(severity, code, f"{part(tally.rows, len(measured))}: {note}", NOTES_ADVICE.get(code, ""))
        )
    return found


def _measure(row: Row, whole: Renderer, cut: Renderer) -> Measured:
    try:
        if not row.completions:
            tokens = len(whole.prompt_ids(row))
            return Measured(row.where, row.shape, tokens, dropped=NO_ROOM if tokens >= cut.max_length else "")
        full = whole.tree_row(row)
        tree = full.tree
        if tree is None:
            return Measured(row.where, row.shape, dropped=full.dropped or "", notes=full.notes)
        lengths = tuple(len(completion.ids) for completion in tree.completions)
        too_long = len(tree.prompt_ids) + max(lengths) > cut.max_length
        used = cut.tree_row(row) if too_long else full
    except UserError as error:
        return Measured(row.where, row.shape, refused=str(error))
    ends, bos = set(cut.end_ids), cut.tokenizer.bos_token_id
    return Measured(
        row.where,
        row.shape,
        len(tree.prompt_ids),
        lengths,
        sum(sum(c.mask) for c in used.tree.completions) if used.tree else 0,
        used.truncated_tokens,
        used.dropped or "",
        notes=full.notes,
        finished=row.finished,
        ends=not row.finished or all(c.ids[-1] in ends or calls_tool(row, k) for k, c in enumerate(tree.completions)),
        trains_end=trains_end(used.tree, ends),
        open_turns=sum(_open_turns(completion, ends) for completion in tree.completions),
        double_bos=bos is not None and [*tree.prompt_ids[:2], *tree.completions[0].ids[:1]][:2] == [bos] * 2,
        double_end=any(len(c.ids) > 1 and {*c.ids[-2:]} <= ends for c in tree.completions),
    )


def trains_end(tree: TreeRow | None, end_ids: set[int]) -> bool:
    """Whether any trained token of the row is an end token; looked for from the end, where it stands."""
    completions = tree.completions if tree else []
    return any(
        trained and i in end_ids
        for c in completions
        for i, trained in zip(reversed(c.ids), reversed(c.mask), strict=True)
    )


def _open_turns(completion: Completion, end_ids: set[int]) -> int:
    """How many stretches of trained tokens, but the last, have no end token at their end."""
    at, last = 0, []
    for is_trained, run in groupby(completion.mask):
        at += len(list(run))
        last += [completion.ids[at - 1]] if is_trained else []
    return sum(i not in end_ids for i in last[:-1])


def calls_tool(row: Row, k: int) -> bool:
    """A turn that calls a tool may end with a token of its own."""
    completion = row.completions[k]
    return not isinstance(completion, str) and bool(completion[-1].get("tool_calls"))


def _too_long(measured: Sequence[Measured], context: int) -> str:
    over = sum(m.longest > context for m in measured)
    return f"{counted(over, 'row')} longer than the model's context of {context} tokens: shorten or split them"


def _notable(rows: Sequence[Measured], of: Sequence[Measured], code: str, what: str, advice: str) -> Finding:
    tally = _of(rows)
    return tally.finding(tally.severity(len(of)), code, what, advice)


def _of(measured: Iterable[Measured]) -> Tally:
    tally = Tally()
    for m in measured:
        tally.add(m.where)
    return tally


def _spread(values: Sequence[tuple[int, str]]) -> Spread:
    lengths = sorted(length for length, _ in values)
    longest, where = max(values, key=lambda value: value[0])
    median, p90 = (lengths[-(-tenths * len(lengths) // 10) - 1] for tenths in (5, 9))
    return Spread(median, p90, longest, where, sum(lengths))
