"""A tokenizer with the habits that training needs: BOS once, offsets, control tokens in a user's text kept as text."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowrank_align.data.messages import Message
from lowrank_align.errors import UserError, is_panic, said_shortly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around a control token that a user's text contains, so that it is told from the template's own.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each the characters it covers; a token that the text does not have covers none."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def covering(self, start: int, end: int) -> list[bool]:
        """Which tokens cover at least one character of [start, end)."""
        return [first < end and last > start for first, last in self.spans]


class Encoder:
    """Text and rendered conversations to ids and back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer {type(tokenizer).__name__} tells no offsets: a fast one is needed")
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        trial = self._call("a").ids
        self._adds_bos = self.bos_id is not None and trial[:1] == [self.bos_id]
        self._adds_eos = self.eos_id is not None and trial[-1:] == [self.eos_id]
        added = tokenizer.added_tokens_decoder
        # Whitespace as an added token (Gemma's "\n") is text like any other.
        self.added = {token.content: i for i, token in added.items() if not token.content.isspace()}
        special = [token.content for token in added.values() if token.special and not token.content.isspace()]
        tokens = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or "(?!)"
        self._control = re.compile(tokens)
        self._beginnings = {text[:length] for text in special for length in range(1, len(text))}
        self._longest = max(map(len, special), default=0)
        # Unknown characters are no control token, though the token for them is special.
        self._control_ids = {self.added[text]: text for text in special if self.added[text] != tokenizer.unk_token_id}
        self._marked = re.compile(f"{_OPEN}({tokens}){_CLOSE}|{_OPEN}|{_CLOSE}")

    def text(self, text: str) -> list[int]:
        """A text with the special tokens that the tokenizer adds; BOS once, also where the text has it already."""
        ids = self._call(text).ids
        return ids[1:] if self._adds_bos and ids[:2] == [self.bos_id] * 2 else ids

    def prompt(self, text: str) -> list[int]:
        """A text that goes on: as `text`, without the end token that some tokenizers add."""
        ids = self.text(text)
        return ids[:-1] if self._adds_eos and len(ids) > 1 else ids

    def chat(self, text: str) -> Encoded:
        """A conversation that a template wrote out: no special tokens added, but for a BOS that the template left out.

        Control tokens between the marks of `protect` become ordinary text; the marks are no part of any token.
        """
        has_marks = _OPEN in text or _CLOSE in text
        whole = self._joined(self._pieces(text)) if has_marks else self._call(text, add_special_tokens=False)
        ids, spans = whole.ids, whole.spans
        self._refuse_made(text, whole)
        if self._adds_bos and ids[:1] != [self.bos_id]:
            ids, spans = [self.bos_id or 0, *ids], [(0, 0), *spans]
        return Encoded(ids, spans)

    def middle(self, text: str, *, control_as_text: bool) -> list[int]:
        """A text that stands in the middle of another; UserError for a control token that cannot be written as text."""
        if not control_as_text:
            return self._piece(text, False).ids if text else []
        ids: list[int] = []
        for _, piece, is_plain in self._pieces(self._protect(text)):
            encoded = self._piece(piece, is_plain)
            self._refuse_made(piece, encoded)
            ids += encoded.ids
        return ids

    def protect(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with every control token in a content, a thought or a tool call marked as text."""
        return [{**self.protect_value(message), "role": message["role"]} for message in messages]  # type: ignore[typeddict-item]

    def protect_value(self, value: Any) -> Any:
        """A value of a row that a template may print, as deep as it goes, with every control token marked as text."""
        return _on_texts(self._protect, value)

    def without_control(self, value: Any) -> Any:
        """The value with a letter for every control token, to see which ones a template writes by itself."""
        return _on_texts(lambda text: self._control.sub("x", text), value)

    def holds_control(self, value: Any) -> bool:
        """Whether control tokens stand in a text, or in any text of a value."""
        found: list[bool] = []
        _on_texts(lambda text: found.append(self._control.search(text) is not None), value)
        return any(found)

    def control_in(self, ids: Sequence[int]) -> list[int]:
        """The control tokens among `ids`, in their order."""
        return [i for i in ids if i in self._control_ids]

    def _protect(self, content: str) -> str:
        content = content.replace(_OPEN, "").replace(_CLOSE, "")  # marks must not be forged
        content = self._control.sub(f"{_OPEN}\\g<0>{_CLOSE}", content)
        end = content.rstrip()  # templates strip, and what they put after it must not complete a token
        if any(end[-length:] in self._beginnings for length in range(1, min(self._longest, len(end) + 1))):
            return f"{end}{_OPEN}{content[len(end) :]}"
        return content

    def _pieces(self, text: str) -> list[tuple[int, str, bool]]:
        """(start, text, whether it is a protected control token) of what stands between the marks."""
        pieces, at = [], 0
        for match in self._marked.finditer(text):
            pieces.append((at, text[at : match.start()], False))
            if match[1]:
                pieces.append((match.start(1), match[1], True))
            at = match.end()
        return [piece for piece in [*pieces, (at, text[at:], False)] if piece[1]]

    def _joined(self, pieces: Sequence[tuple[int, str, bool]]) -> Encoded:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, piece, is_plain in pieces:
            part = self._piece(piece, is_plain) if start else self._call(piece, add_special_tokens=False)
            ids += part.ids
            spans += [(first + start, last + start) for first, last in part.spans]
        return Encoded(ids, spans)

    def _piece(self, text: str, is_plain: bool) -> Encoded:
        """A piece from the middle, encoded after a newline: SentencePiece adds a space to the beginning of a text."""
        kwargs = {"add_special_tokens": False, "split_special_tokens": is_plain}
        newline = self._call("\n", **kwargs).ids
        encoded = self._call("\n" + text, **kwargs)
        if encoded.ids[: len(newline)] == newline:
            spans = [(first - 1, last - 1) for first, last in encoded.spans[len(newline) :]]
            encoded = Encoded(encoded.ids[len(newline) :], spans)
        else:
            encoded = self._call(text, **kwargs)
        if is_plain and self.added[text] in encoded.ids:
            raise UserError(f"contains the control token {text}, which this tokenizer cannot write as text")
        return encoded

    def _refuse_made(self, text: str, encoded: Encoded) -> None:
        """Normalisation can make a control token of other characters (of full-width ones, say)."""
        for i, (start, end) in zip(encoded.ids, encoded.spans, strict=True):
            if i in self._control_ids and end > start and self._control_ids[i] not in text[start:end]:
                raise UserError(f"contains text that this tokenizer reads as the control token {self._control_ids[i]}")

    def _call(self, text: str, **kwargs: Any) -> Encoded:
        with panics_told(self.tokenizer):
            out = self.tokenizer(text, return_offsets_mapping=True, verbose=False, **kwargs)
        return Encoded(out["input_ids"], out["offset_mapping"])


@contextmanager
def panics_told(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """UserError where a pattern in a tokenizer.json takes more steps than the library does for it."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        what = f"{tokenizer.name_or_path}: its tokenizer breaks off at this text ({said_shortly(error)})"
        raise UserError(f"{what}; leave the text out, or take a model with another tokenizer.json") from None


def _on_texts(change: Callable[[str], object], value: Any) -> Any:
    """`value` with every text in it changed, keys too. UserError where it is nested deeper than Python recurses."""
    try:
        return _changed(change, value)
    except RecursionError:
        raise UserError("nested too deep") from None


def _changed(change: Callable[[str], object], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(change, key): _changed(change, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(change, inner) for inner in value]
    return value
