"""The one renderer: rows to token ids and masks, the same for every method.

Text. Prompt and completion are tokenised as one text, with the special tokens that the tokenizer adds; the prompt is
the longest common token prefix of the prompt alone and of the prompt with each completion, as TRL has it. The end token
follows each completion, once. Of a `text` row everything but the first token is trained. Where the prompt has no token
of its own, BOS (or the end token) stands in its place, so that the completion's first token is trained too.

Messages. The chat template writes the whole conversation, which is tokenised once; trained are the assistant's turns,
each with the token that ends it, never the whitespace after that. See `template` for how they are found. Control tokens
within a message are ordinary text; in text rows they are what they say.

Answer prefix. A text that a method trained with before the answer: encoded apart from what stands around it, so that
its ids are the same in training and in generation. It is never trained itself; control tokens in it are ordinary text.
None stands in a `text` row, which is no answer.

Too long. Completions are cut at `max_length` and then have no end token. A row is dropped if its prompt leaves no room,
or if what was cut made its answers equal or left nothing to train.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowrank_align.data.assembly import became_equal, behind, common_prefix, comparisons_of, trimmed
from lowrank_align.data.bad_rows import BadRows
from lowrank_align.data.encoder import Encoder, panics_told
from lowrank_align.data.formats import Message, Row, Shape
from lowrank_align.data.template import PLAIN_TEMPLATE, ChatTemplate
from lowrank_align.errors import UserError
from lowrank_align.trees import Completion, TreeRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PLAIN_TEMPLATE", "Rendered", "RenderedRows", "Renderer", "render_all"]

TrainOn = Literal["all", "last"]
CONTROL_AS_TEXT = "control tokens within messages are taken as text"
CONTROL_ACTS = "control tokens within texts act as such (within messages they would be text)"
NO_ROOM = "the prompt leaves no room"
NOTHING_TRAINED = "no trained token is left"
BECAME_EQUAL = "the answers are equal after cutting"


@dataclass(frozen=True)
class Rendered:
    """One row as tokens, or why it was dropped."""

    tree: TreeRow | None
    dropped: str | None = None
    cut_tokens: tuple[int, ...] = ()  # of each completion
    notes: tuple[str, ...] = ()  # what was odd, in words for the log

    @property
    def truncated_tokens(self) -> int:
        return sum(self.cut_tokens)


@dataclass(frozen=True)
class RenderedRows:
    """All rows as tokens. What was dropped, cut or odd is listed, so that the caller can say so."""

    tree_rows: list[TreeRow]
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (where, reason)
    truncated: int = 0  # rows with a cut completion
    truncated_tokens: int = 0
    skipped: int = 0  # rows that the template refuses, set aside by `skip_bad`
    notes: Counter[str] = field(default_factory=Counter)  # rows by what was odd about them


def render_all(render: Callable[[Row], Rendered], rows: Sequence[Row], *, skip_bad: Path | None = None) -> RenderedRows:
    """Renders every row, with `Renderer.tree_row` or what a method has in its place.

    Raises `UserError` for rows that the template refuses, all at once (with `skip_bad` they are added to that file
    instead), and where no row is left.
    """
    bad, done = BadRows(skip_bad), []
    for row in rows:
        try:
            done.append((row.where, render(row)))
        except UserError as error:
            bad.add(row.where, str(error), vars(row))  # asdict would copy, and fail at what is nested deep
    skipped = bad.settle(len(done), append=True)
    trees = [rendered.tree for _, rendered in done if rendered.tree]
    dropped = [(where, rendered.dropped) for where, rendered in done if rendered.dropped]
    if not trees:
        reasons = ", ".join(f"{count}: {reason}" for reason, count in Counter(r for _, r in dropped).most_common())
        raise UserError(
            f"no row is left of {len(rows)} ({reasons or 'no rows'}); raise --max-length or shorten the prompts"
        )
    cut = [rendered.truncated_tokens for _, rendered in done if rendered.tree and rendered.truncated_tokens]
    notes = Counter(note for _, rendered in done for note in set(rendered.notes))
    return RenderedRows(trees, dropped, len(cut), sum(cut), skipped, notes)


def notes_on(rows: Sequence[Row], renderer: "Renderer") -> Counter[str]:
    """What to say about prompts that are only answered: in how many the control tokens are text, or act."""
    holding = (row for row in rows if renderer.holds_control(replace(row, completions=[])))
    return Counter(CONTROL_ACTS if isinstance(row.prompt, str) else CONTROL_AS_TEXT for row in holding)


class Renderer:
    """Rows to ids and masks, and ids to text, with one tokenizer and one chat template."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat_template: str | None = None,
        train_on: TrainOn = "all",
        max_length: int,
        thinking: bool | None = None,
        thinking_if_possible: bool = False,
    ) -> None:
        """`chat_template`: a .jinja file, one of the tokenizer's named templates, or `plain`; None is the model's own,
        or `PLAIN_TEMPLATE` where it has none. `train_on`: all assistant turns of a completion, or the last only.
        `max_length`: tokens of the prompt and one completion. `thinking` sets the template's switch; a template without
        one is an error, unless with `thinking_if_possible` (a preset asked for it). Raises `UserError`.
        """
        if max_length < 2:
            raise UserError(f"max_length: {max_length}, must be at least 2 (one token of prompt, one of answer)")
        self.tokenizer, self.train_on, self.max_length = tokenizer, train_on, max_length
        self._encoder = Encoder(tokenizer)
        self._template = ChatTemplate(tokenizer, chat_template, self._encoder.added, thinking)
        self.thinking_switch = self._template.switch  # the variable's name, None where the template has none
        if thinking is not None and self.thinking_switch is None and not thinking_if_possible:
            flag, whose = "--thinking" if thinking else "--no-thinking", self._template.source
            raise UserError(f"{flag}: the chat template ({whose}) has no switch for it; leave it out")
        ends = [self._template.turn_end_id, self._encoder.eos_id]
        self.end_ids: list[int] = list(dict.fromkeys(i for i in ends if i is not None))  # generation stops at these
        if not self.end_ids:
            raise UserError(
                "the tokenizer has no end token (eos_token), nor does the chat template end a turn with one"
            )
        self._end_of_text = self._encoder.eos_id if self._encoder.eos_id is not None else self.end_ids[0]
        pads = [tokenizer.pad_token_id, tokenizer.unk_token_id, self._end_of_text]
        self.pad_id: int = next(i for i in pads if i is not None)  # masked wherever it stands
        self.template_source = self._template.source  # "the model's own", "named by the user" or "plain"
        self.answer_prefix = ""  # what stands before every answer, see `with_prefix`
        self.prefix_ids: list[int] = []
        self.turn_end_id = self._template.turn_end_id  # the token that ends a turn, None where the template has none

    def with_prefix(self, answer_prefix: str) -> "Renderer":
        """This renderer for a voice that answers behind `answer_prefix`: a copy, everything else shared.

        UserError where the text has a control token that the tokenizer cannot write as text.
        """
        renderer = copy(self)
        renderer.answer_prefix = answer_prefix
        renderer.prefix_ids = self._encoder.middle(answer_prefix, control_as_text=True)
        return renderer

    def tree_row(self, row: Row, prefixes: Sequence[str] | None = None) -> Rendered:
        """The row's prompt, completions and comparisons, cut to `max_length`; its own errors name `row.where`.

        `prefixes`: the text before each completion; without them, `answer_prefix` before all, but for a `text` row's.
        It stands before the first trained token and counts towards `max_length`.
        """
        if not row.completions:
            raise ValueError(f"{row.where}: a row without completions has nothing to train on")
        if prefixes is None:
            before = [[] if _is_text(row) else self.prefix_ids] * len(row.completions)
        else:
            before = [self._encoder.middle(text, control_as_text=True) for text in prefixes]
        try:
            prompt_length, whole, notes = self._chat(row) if _is_chat(row) else self._text(row, apart=any(before))
        except UserError as error:
            raise UserError(f"{row.where}: {_field(row)}: {error}") from None
        if not row.finished:
            whole = [self.without_end(completion) for completion in whole]
        rooms = [self.max_length - prompt_length - len(ids) for ids in before]
        if not all(any(completion.mask) for completion in whole):
            return Rendered(None, NOTHING_TRAINED, notes=notes)
        if min(rooms) <= 0:
            return Rendered(None, NO_ROOM, notes=notes)
        prompt_ids = whole[0].ids[:prompt_length]
        places = [slice(prompt_length, prompt_length + room) for room in rooms]
        completions = [trimmed(c.ids[place], c.mask[place]) for c, place in zip(whole, places, strict=True)]
        cut = tuple(max(len(c.ids) - place.stop, 0) for c, place in zip(whole, places, strict=True))
        comparisons = comparisons_of(row)
        if not all(completion.ids for completion in completions):
            return Rendered(None, NOTHING_TRAINED, notes=notes)
        if became_equal(row, completions, comparisons):
            return Rendered(None, BECAME_EQUAL, notes=notes)
        completions = [behind(ids, completion) for ids, completion in zip(before, completions, strict=True)]
        return Rendered(TreeRow(prompt_ids, completions, comparisons, row.index), None, cut, notes)

    def prompt_ids(self, row: Row) -> list[int]:
        """What the model gets when it has to answer: at least one token; a chat with the generation prompt.

        The answer prefix stands at its end.
        """
        try:
            return [*self._prompt_ids(row), *self.prefix_ids]
        except UserError as error:
            raise UserError(f"{row.where}: {_field(row)}: {error}") from None

    def _prompt_ids(self, row: Row) -> list[int]:
        if not _is_chat(row):
            if row.prompt:
                return self._encoder.prompt(str(row.prompt)) or [self._context_id]
            return self._encoder.text(str(row.completions[0]))[:1]
        messages = _messages(row.prompt) or _messages(row.completions[0])
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        kwargs = self._encoder.protect_value(row.template_kwargs)
        ids = self._encoder.chat(self._template.render(self._encoder.protect(messages), kwargs, open_turn=True)).ids
        self._check_kept_as_text(messages, row, ids, open_turn=True)
        return ids

    def holds_control(self, row: Row) -> bool:
        """Whether control tokens stand in what the row says: in messages they are taken as text, in texts they act."""
        return self._encoder.holds_control([row.prompt, row.completions, row.template_kwargs])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens. Templates may put a space or newline before an answer: strip it."""
        with panics_told(self.tokenizer):
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def plain_ids(self, text: str) -> list[int]:
        """Of a text that no template writes and to which nothing is added; its control tokens act."""
        with panics_told(self.tokenizer):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def template_hash(self) -> str:
        """SHA-256 of the template's text, for `provenance.json`."""
        return self._template.hash()

    @property
    def template(self) -> ChatTemplate:
        """The chat template, for what is exported with a model."""
        return self._template

    def without_end(self, completion: Completion) -> Completion:
        """Less the end tokens behind it: the text goes on, it was only cut."""
        length = len(completion.ids)
        while length and completion.ids[length - 1] in self.end_ids:
            length -= 1
        return Completion(completion.ids[:length], completion.mask[:length])

    @property
    def _context_id(self) -> int:
        """What stands before a completion whose prompt has no token."""
        return self._encoder.bos_id if self._encoder.bos_id is not None else self._end_of_text

    def _text(self, row: Row, *, apart: bool = False) -> tuple[int, list[Completion], tuple[str, ...]]:
        """Prompt length in tokens, and each completion behind the prompt, of a row of text.

        `apart`: something will stand between the two, so that no token may hold a part of both.
        """
        prompt = str(row.prompt)
        notes: tuple[str, ...] = ()
        whole = [self._encoder.text(prompt + str(completion)) for completion in row.completions]
        if row.prompt and apart:
            alone = self._encoder.prompt(prompt)
            shared = len(alone)
            whole = [[*alone, *self._encoder.middle(str(c), control_as_text=False)] for c in row.completions]
        elif row.prompt:
            alone = self._encoder.prompt(prompt)
            shared = common_prefix([alone, *whole])
            if 0 < shared < len(alone):
                notes = ("the prompt's last token merges with the completion's first",)
        else:
            shared = 1
        if any(self._encoder.control_in(ids[1:-1]) for ids in whole):  # BOS and the end token may be written out
            notes = (*notes, CONTROL_ACTS)
        whole = [ids if ids[-1:] == [self._end_of_text] else [*ids, self._end_of_text] for ids in whole]
        if not shared:
            whole, shared = [[self._context_id, *ids] for ids in whole], 1
        masks = [[False] * shared + [True] * (len(ids) - shared) for ids in whole]
        return shared, [Completion(ids, mask) for ids, mask in zip(whole, masks, strict=True)], notes

    def _chat(self, row: Row) -> tuple[int, list[Completion], tuple[str, ...]]:
        """Prompt length in tokens, and each completion behind the prompt, of a row of messages."""
        prompt = self._encoder.protect(_messages(row.prompt))
        notes: dict[str, None] = {}
        whole = []
        for completion in row.completions:
            conversation = [*prompt, *self._encoder.protect(_messages(completion))]
            whole.append(self._conversation(conversation, row, notes))
        if self.holds_control(row):
            notes[CONTROL_AS_TEXT] = None
        first_trained = [completion.mask.index(True) for completion in whole if any(completion.mask)]
        shared = min([common_prefix([completion.ids for completion in whole]), *first_trained])
        if not shared:
            whole = [Completion([self._context_id, *c.ids], [False, *c.mask]) for c in whole]
            shared = 1
        return shared, whole, tuple(notes)

    def _check_kept_as_text(
        self, messages: Sequence[Message], row: Row, ids: Sequence[int], *, open_turn: bool = False
    ) -> None:
        """UserError where a template's filters have made control tokens of a row's out of what was marked as text."""
        if not self._encoder.holds_control([*messages, row.template_kwargs]):
            return
        clean: list[Message] = self._encoder.without_control(messages)
        kwargs = self._encoder.without_control(row.template_kwargs)
        text = self._template.render(self._encoder.protect(clean), kwargs, open_turn=open_turn)
        if self._encoder.control_in(ids) != self._encoder.control_in(self._encoder.chat(text).ids):
            raise UserError("contains control tokens, which the chat template does not leave as text")

    def _conversation(self, messages: list[Message], row: Row, notes: dict[str, None]) -> Completion:
        """A whole conversation with its trained tokens marked, ended after the last of them."""
        turns = self._template.turns(messages, self._encoder.protect_value(row.template_kwargs), len(row.prompt))
        notes.update(dict.fromkeys(turns.notes))
        encoded = self._encoder.chat(turns.text)
        self._check_kept_as_text(messages, row, encoded.ids)
        last = len(messages) - 1
        trained = [span for i, span in turns.spans.items() if self.train_on == "all" or i == last]
        masks = [encoded.covering(*span) for span in trained]
        mask = [any(marks) for marks in zip(*masks, strict=True)] if masks else [False] * len(encoded.ids)
        completion = trimmed(encoded.ids, mask)
        ends = {*self._encoder.added.values(), *self.end_ids}
        if completion.ids and last in turns.spans and completion.ids[-1] not in ends:
            return Completion([*completion.ids, self._end_of_text], [*completion.mask, True])
        return completion


def _is_chat(row: Row) -> bool:
    return not isinstance(row.completions[0] if row.completions else row.prompt, str)


def _is_text(row: Row) -> bool:
    """A text by itself: such a row has no prompt."""
    return row.shape == Shape.demonstration and not row.prompt and not _is_chat(row)


def _messages(text: str | list[Message]) -> list[Message]:
    return [] if isinstance(text, str) else text


def _field(row: Row) -> str:
    """The field to name when a whole row is refused."""
    return "prompt" if row.prompt else "messages"
