"""Tree rows: one prompt with K completions hanging from it, computed in one pass.

K = 1 is a demonstration, K = 2 a pair, K > 2 a ranking or a group of rollouts. The prompt's tokens stand once; every
completion attends to the prompt and to itself, and its positions go on from the prompt's end (prefix sharing, Wang &
Hegde 2024, arXiv 2410.20305). Models with a recurrent state cannot do that and get flat rows, one per completion;
every consumer sees the same `TreeBatch` either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["tree", "flat"]
PADDING = -1
PROMPT = 0


@dataclass(frozen=True)
class Completion:
    """The tokens of one completion and which of them count (are trained, are summed into `logps`)."""

    ids: list[int]
    mask: list[bool]  # same length as ids
    hidden: Sequence[bool] = ()  # tokens that no later one sees, where any are


@dataclass(frozen=True)
class Comparison:
    """`preference` in [0, 1] that completion `first` beats `second` (1 surely, 0.5 a tie), by `target_margin`."""

    first: int
    second: int
    preference: float = 1.0
    target_margin: float = 0.0


@dataclass(frozen=True)
class TreeRow:
    """One training row after tokenisation. `index` is its place in the data file, `prompt_text` what stands there."""

    prompt_ids: list[int]  # at least one token: the last one predicts every completion's first token
    completions: list[Completion]
    comparisons: tuple[Comparison, ...] = ()
    index: int = 0
    prompt_text: str = ""  # for reward functions and samples
    chat: bool = False  # whether the prompt is a conversation, where that is asked for
    prompt_hidden: Sequence[bool] = ()  # tokens of the prompt that no later one sees, where any are
    label: bool | None = None  # of an unpaired row: whether its completion is good

    @property
    def tokens(self) -> int:
        """Of the prompt and all completions."""
        return len(self.prompt_ids) + sum(len(c.ids) for c in self.completions)

    @property
    def ranks(self) -> list[int]:
        """1 for the completions that nothing beats, and so on; equal ranks where neither beats the other."""
        losers = [c.second if c.preference > 0.5 else c.first for c in self.comparisons if c.preference != 0.5]
        return [1 + losers.count(k) for k in range(len(self.completions))]


def longest_rows(rows: Sequence[TreeRow], count: int) -> list[TreeRow]:
    """The rows with most tokens, the longest first; of rows that are not in memory, as near as they know."""
    known = getattr(rows, "longest", None)
    return known(count) if known else sorted(rows, key=lambda row: -row.tokens)[:count]


@dataclass(frozen=True)
class TreeBatch:
    """R rows of T tokens holding N completions of at most C tokens, and where each completion's tokens stand.

    Indices into the R x T grid are flat (row * T + column), so one `index_select` gathers from hidden states (R, T, H).
    """

    input_ids: Tensor  # (R, T)
    position_ids: Tensor  # (R, T)
    segment_ids: Tensor  # (R, T): 0 the prompt, k the k-th completion of the row, -1 padding
    targets: Tensor  # (N, C) the completions' tokens
    predict_from: Tensor  # (N, C) flat index of the state that predicts each token
    token_at: Tensor  # (N, C) flat index of the token itself
    token_mask: Tensor  # (N, C) bool: a token, not padding
    completion_mask: Tensor  # (N, C) bool: the token counts
    row_of: Tensor  # (N,) the tree row that each completion belongs to
    layout: Layout
    lengths: tuple[tuple[int, ...], ...]  # of each row: its prompt's and its completions' tokens
    hidden: Tensor | None = None  # (R, T) bool: no later token sees this one; None where none is

    def to(self, device: torch.device | str) -> "TreeBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def last_token_at(self) -> Tensor:
        """(N,) flat index of each completion's last real token, where a reward model's score is read."""
        last = self.token_mask.sum(dim=1) - 1
        return self.token_at.gather(1, last[:, None]).squeeze(1)

    @property
    def num_tokens(self) -> Tensor:
        """(N,) tokens of each completion that count."""
        return self.completion_mask.sum(dim=1)


def collate(rows: Sequence[TreeRow], layout: Layout = "tree", pad_id: int = 0) -> TreeBatch:
    """Tree rows -> one right-padded batch. With `layout="flat"` every completion gets a row of its own."""
    lines: list[_Line] = []
    for number, row in enumerate(rows):
        groups = [row.completions] if layout == "tree" else [[c] for c in row.completions]
        lines += [_Line(row.prompt_ids, group, number, row.prompt_hidden) for group in groups]
    width = max(len(line.prompt) + sum(len(c.ids) for c in line.completions) for line in lines)
    longest = max(len(c.ids) for line in lines for c in line.completions)
    count = sum(len(line.completions) for line in lines)

    input_ids = torch.full((len(lines), width), pad_id)
    position_ids = torch.zeros(len(lines), width, dtype=torch.long)
    segment_ids = torch.full((len(lines), width), PADDING)
    targets, predict_from, token_at = (torch.zeros(count, longest, dtype=torch.long) for _ in range(3))
    token_mask, completion_mask = (torch.zeros(count, longest, dtype=torch.bool) for _ in range(2))
    row_of = torch.zeros(count, dtype=torch.long)

    n = 0
    for r, line in enumerate(lines):
        start = len(line.prompt)
        input_ids[r, :start] = torch.tensor(line.prompt)
        position_ids[r, :start] = torch.arange(start)
        segment_ids[r, :start] = PROMPT
        column = start
        for k, completion in enumerate(line.completions, start=1):
            length = len(completion.ids)
            here = slice(column, column + length)
            input_ids[r, here] = torch.tensor(completion.ids)
            position_ids[r, here] = torch.arange(start, start + length)
            segment_ids[r, here] = k
            at = r * width + torch.arange(column, column + length)
            targets[n, :length] = torch.tensor(completion.ids)
            token_at[n, :length] = at
            predict_from[n, 0] = r * width + start - 1  # every completion is first predicted by the prompt's last token
            predict_from[n, 1:length] = at[:-1]
            token_mask[n, :length] = True
            completion_mask[n, :length] = torch.tensor(completion.mask)
            row_of[n] = line.row
            column += length
            n += 1
    return TreeBatch(
        input_ids,
        position_ids,
        segment_ids,
        targets,
        predict_from,
        token_at,
        token_mask,
        completion_mask,
        row_of,
        layout,
        tuple((len(line.prompt), *(len(c.ids) for c in line.completions)) for line in lines),
        _hidden(lines, width),
    )


class Comparisons(NamedTuple):
    """P comparisons between the N completions of a batch."""

    first: Tensor  # (P,) index into the N completions
    second: Tensor  # (P,)
    preference: Tensor  # (P,) in [0, 1]
    target_margin: Tensor  # (P,)
    row_of: Tensor  # (P,) the tree row


def collate_comparisons(rows: Sequence[TreeRow], device: torch.device | str = "cpu") -> Comparisons:
    """The rows' comparisons with completions counted through the whole batch, in `collate`'s order."""
    start, found = 0, []
    for number, row in enumerate(rows):
        found += [(start + c.first, start + c.second, c.preference, c.target_margin, number) for c in row.comparisons]
        start += len(row.completions)
    first, second, preference, margin, row_of = zip(*found, strict=True)
    places = [torch.tensor(column, dtype=torch.long, device=device) for column in (first, second, row_of)]
    labels = [torch.tensor(column, dtype=torch.float32, device=device) for column in (preference, margin)]
    return Comparisons(places[0], places[1], labels[0], labels[1], places[2])


def attention_mask(batch: TreeBatch, window: int | None = None) -> Tensor:
    """(R, 1, T, T) bool, True = may attend: not later, same row, on the prompt or on its own completion.

    `window` cuts by *position* distance, as a sliding-window layer would on the separate row. Hidden tokens are seen by
    themselves alone. Padding attends to itself alone, since a row of the mask without any True gives NaN.
    """
    segment, position = batch.segment_ids, batch.position_ids
    query, key = segment[:, :, None], segment[:, None, :]
    column = torch.arange(segment.shape[1], device=segment.device)
    mask = (column[:, None] >= column[None, :]) & ((key == PROMPT) | (key == query)) & (query != PADDING)
    if batch.hidden is not None:
        mask &= ~batch.hidden[:, None, :]
    if window is not None:
        mask &= position[:, :, None] - position[:, None, :] < window
    mask |= torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device)
    return mask[:, None]


@dataclass(frozen=True)
class _Line:
    prompt: list[int]
    completions: list[Completion]
    row: int
    prompt_hidden: Sequence[bool]


def _hidden(lines: Sequence[_Line], width: int) -> Tensor | None:
    if not any(any(line.prompt_hidden) or any(any(c.hidden) for c in line.completions) for line in lines):
        return None
    found = torch.zeros(len(lines), width, dtype=torch.bool)
    for r, line in enumerate(lines):
        parts = [(line.prompt, line.prompt_hidden), *((c.ids, c.hidden) for c in line.completions)]
        marks = [mark for ids, hidden in parts for mark in (hidden or [False] * len(ids))]
        found[r, : len(marks)] = torch.tensor(marks)
    return found
