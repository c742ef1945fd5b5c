"""What the judgements in the rows say: whether length decides, how many are ties, how labels and scores are spread."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowrank_align.data.audit.findings import Finding, Tally, counted, part
from lowrank_align.data.formats import Row, Shape

FEW_CHOICES = 20  # fewer say nothing about a bias
BIASED, LEANING = 0.7, 0.6  # share of choices that length alone predicts


@dataclass(frozen=True)
class LengthBias:
    """How often the better answer is the longer one."""

    choices: int  # decided comparisons
    longer: int
    equal: int
    mean_better_tokens: float
    mean_worse_tokens: float

    @property
    def share(self) -> float:
        """Of the choices, how many "take the longer one" gets right; equal lengths count half."""
        return (self.longer + self.equal / 2) / self.choices


def decided(row: Row) -> Iterator[tuple[int, int]]:
    """(better, worse) completion of every comparison in the row that is no tie."""
    if row.shape is Shape.pair and row.preference != 0.5:
        yield (0, 1) if row.preference > 0.5 else (1, 0)
    elif row.ranks is not None:
        ranks = row.ranks
        yield from ((i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j])


def length_bias(rows: Sequence[Row], lengths: Mapping[int, Sequence[int]]) -> LengthBias | None:
    """Over the rows that have `lengths`, the tokens of each completion by the row's index; None without a choice."""
    choices = longer = equal = better_tokens = worse_tokens = 0
    for row in rows:
        tokens = lengths.get(row.index, ())
        if len(tokens) != len(row.completions):  # a method may join them, or take two of a ranking
            continue
        for better, worse in decided(row):
            choices += 1
            longer += tokens[better] > tokens[worse]
            equal += tokens[better] == tokens[worse]
            better_tokens += tokens[better]
            worse_tokens += tokens[worse]
    if not choices:
        return None
    return LengthBias(choices, longer, equal, better_tokens / choices, worse_tokens / choices)


def length_bias_findings(bias: LengthBias | None) -> list[Finding]:
    """A bias that a model trained on these choices would take over."""
    if bias is None or bias.choices < FEW_CHOICES:
        return []
    predicts = max(bias.share, 1 - bias.share)
    if predicts < LEANING:
        return []
    way = "longer" if bias.share > 0.5 else "shorter"
    means = f"{bias.mean_better_tokens:.0f} tokens on average against {bias.mean_worse_tokens:.0f}"
    what = f"length alone predicts {100 * predicts:.0f} % of {counted(bias.choices, 'choice')}:"
    what += f" the {way} answer wins ({means})"
    advice = f"expect {way} answers of a model trained on these, or add choices that go the other way"
    return [Finding("warning" if predicts >= BIASED else "note", "length-bias", what, advice=advice)]


def judgement_findings(rows: Sequence[Row]) -> list[Finding]:
    """Judgements that teach nothing, or not what their names say."""
    found = []
    compared = [row for row in rows if row.shape in (Shape.pair, Shape.ranking)]
    if compared and not any(True for row in compared for _ in decided(row)):
        what = "every comparison is a tie"
        found.append(Finding("warning", "only-ties", what, len(compared), advice="nothing can be preferred after them"))
    turned = Tally()
    for row in compared:
        if row.preference < 0.5:
            turned.add(row.where)
    if turned.rows:
        what = (
            f"a preference below 0.5, so that the rejected answer is the better one, in {part(turned.rows, len(rows))}"
        )
        found.append(turned.finding("note", "preference-reversed", what))
    labels = {row.label for row in rows if row.shape is Shape.unpaired}
    if len(labels) == 1:
        what = f"every label is {str(labels.pop()).lower()}"
        found.append(Finding("warning", "one-label", what, advice="a taste needs answers of both kinds"))
    scores = [row.score for row in rows if row.shape is Shape.scored]
    if len(scores) > 1 and len(set(scores)) == 1:
        what = f"every score is {scores[0]:g}"
        found.append(Finding("warning", "constant-scores", what, len(scores), advice="equal scores teach nothing"))
    return found


def judgement_figures(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Ties, labels, scores, turns; None where the rows have no such thing."""
    compared = [row for row in rows if row.shape in (Shape.pair, Shape.ranking)]
    labels = [row.label for row in rows if row.shape is Shape.unpaired]
    scores = [row.score for row in rows if row.score is not None]
    talks = [list(_roles(row)) for row in rows if row.shape is Shape.demonstration]
    return {
        "ties": sum(_ties(row) for row in compared) if compared else None,
        "label_true_share": sum(map(bool, labels)) / len(labels) if labels else None,
        "score_min": min(scores, default=None),
        "score_max": max(scores, default=None),
        "assistant_turns": sum(roles.count("assistant") for roles in talks) if talks else None,
        "system_prompts": sum("system" in roles or "developer" in roles for roles in talks) if talks else None,
    }


def _ties(row: Row) -> int:
    if row.ranks is None:
        return int(row.preference == 0.5)
    pairs = len(row.ranks) * (len(row.ranks) - 1) // 2
    return pairs - sum(1 for _ in decided(row))


def _roles(row: Row) -> Iterable[str]:
    """Who speaks; a completion of text is the assistant's."""
    for text in (row.prompt, *row.completions):
        if not isinstance(text, str):
            yield from (message["role"] for message in text)
    yield from ("assistant" for text in row.completions if isinstance(text, str))
