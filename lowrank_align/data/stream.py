"""Text out of tokens as they come: whole characters only, and which part of it is the model thinking aloud."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_INCOMPLETE = "\ufffd"  # what tokenizers make of a character's first bytes


class Piece(NamedTuple):
    """A bit of an answer. The marks around a thought are part of it."""

    text: str
    thinking: bool


class TextStream:
    """Token ids in, text out; joined, the pieces are what decoding all ids at once gives.

    Every step decodes the tokens since the last whole piece, with that piece's own before them: SentencePiece drops the
    space before whatever comes first. A character whose bytes are not all there waits for the rest.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = self._told = 0  # the last piece's tokens are _ids[_begin:_told]

    def push(self, token: int) -> str:
        """What `token` adds; empty where the text cannot be told yet."""
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end: the bytes of a character that never became whole."""
        text = self._rest()
        self._begin = self._told = len(self._ids)
        return text

    def _rest(self) -> str:
        known = self._decode(self._ids[self._begin : self._told])
        return self._decode(self._ids[self._begin :])[len(known) :]


class Thoughts:
    """Tells thinking from answering, by the marks `<think>` and `</think>`, also where they come in bits."""

    def __init__(self, thinking: bool) -> None:
        """`thinking`: whether the prompt has opened a thought already."""
        self.thinking = thinking
        self._held = ""

    def push(self, text: str) -> Iterator[Piece]:
        """The pieces of `text`; an end that may be the beginning of a mark is held back."""
        self._held += text
        while (at := self._held.find(self._mark)) >= 0:
            # The closing mark ends the thought, the opening one begins it.
            end = at + len(CLOSE) if self.thinking else at
            yield from self._tell(end)
            self.thinking = not self.thinking
            if self.thinking:
                yield from self._tell(len(OPEN))
        yield from self._tell(len(self._held) - self._overlap())

    def flush(self) -> Iterator[Piece]:
        """What was held back."""
        yield from self._tell(len(self._held))

    @property
    def _mark(self) -> str:
        return CLOSE if self.thinking else OPEN

    def _overlap(self) -> int:
        """How many characters at the end are the beginning of the mark that may come."""
        return next((n for n in range(len(self._mark) - 1, 0, -1) if self._held.endswith(self._mark[:n])), 0)

    def _tell(self, end: int) -> Iterator[Piece]:
        text, self._held = self._held[:end], self._held[end:]
        if text:
            yield Piece(text, self.thinking)
