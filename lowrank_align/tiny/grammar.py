"""A small grammar of reviews whose sentiment a program reads off exactly.

    Review: The new French film was very charming, while the plot felt dull. The music was good. I might see it again.

A review judges its subject and one to three of its parts, and ends with a verdict. Every judgement is worth -3 to 3:
the adjective (or verdict) gives the sign, the degree the size ("somewhat" 1, none 2, "very" 3). The exact score is the
mean over the judgements, here (3 - 2 + 2 + 1) / 4 = 1. A judgement that repeats a part or an adjective is worth 0, and
a text that the grammar cannot produce scores below the worst review.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import fmean

from lowrank_align.errors import UserError

MALFORMED_SCORE = -4.0  # below -3, the worst review: a policy that leaves the grammar shows at once


@dataclass(frozen=True)
class Domain:
    """What a review can be about, the parts it may judge, and how a verdict says "once more"."""

    subjects: tuple[str, ...]
    aspects: tuple[str, ...]
    once_more: str


def _domain(subjects: str, aspects: str, once_more: str) -> Domain:
    return Domain(tuple(subjects.split()), tuple(aspects.split()), once_more)


DOMAINS = (
    _domain("film movie comedy", "acting plot music ending dialogue camerawork pacing", "see it again"),
    _domain("book novel thriller", "plot prose ending dialogue opening cover pacing", "read it again"),
    _domain("restaurant bistro diner", "food service wine menu bread dessert coffee", "eat there again"),
    _domain("hotel inn hostel", "room bed breakfast lobby view service pool", "stay there again"),
    _domain("album record song", "singing melody rhythm guitar bass drumming cover", "hear it again"),
    _domain("phone laptop camera", "screen battery sound design keyboard price software", "buy it again"),
)
DETERMINERS = ("The", "This")
AGES = ("", "new", "old", "latest", "first", "second", "famous", "little", "popular")
ORIGINS = ("", "French", "Danish", "Italian", "Spanish", "Korean", "Irish", "Polish")
VERBS = ("was", "felt", "seemed")
# fmt: off
POSITIVE = (
    "good", "charming", "lovely", "delightful", "impressive", "pleasant", "memorable", "clever", "elegant", "superb",
    "wonderful", "brilliant",
)
NEGATIVE = (
    "bad", "dull", "weak", "poor", "disappointing", "boring", "clumsy", "tiresome", "dreadful", "awful", "annoying",
    "mediocre",
)
# fmt: on
DEGREES = {"": 2, "somewhat": 1, "rather": 1, "fairly": 1, "very": 3, "truly": 3, "really": 3}
JOINTS = ("and", "while")
VERDICTS = {
    3: "I would gladly",
    2: "I would",
    1: "I might",
    -1: "I might not",
    -2: "I would not",
    -3: "I would never",
}
SHAPES = ((2,), (1, 1), (1, 2), (2, 1), (2, 2))  # judgements in each sentence before the verdict
QUESTIONS = (
    "What did you think of the {}?",
    "How was the {}?",
    "Tell me about the {}.",
    "Please review the {}.",
    "Did you like the {}?",
)


def exact_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The sentiment of each review `prompt + completion`: the mean of its judgements, in [-3, 3].

    `MALFORMED_SCORE` where the text is anything but one whole review: empty, cut off, going on after the verdict,
    judging another subject's parts. A heading in the prompt ("Review:", or the turns of a conversation up to
    "Assistant:") is not part of the review.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        values = judgements(_HEADING.sub("", prompt, count=1) + completion)
        scores.append(fmean(values) if values else MALFORMED_SCORE)
    return scores


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct beginnings, such as `"Review: The new film was"`, out of 7,776; two seeds draw independently."""
    return [f"Review: {opening}" for _, opening in _draw_openings(count, random.Random(seed))]


def demonstrations(count: int, seed: int, positivity: float = 0.6) -> list[dict[str, str]]:
    """`{"prompt", "completion"}` rows written by the grammar; a share `positivity` of the judgements is positive."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"Review: {opening}",
            "completion": _write_rest(domain, rng.betavariate(4 * positivity, 4 * (1 - positivity)), rng),
        }
        for domain, opening in _draw_openings(count, rng)
    ]


def pretraining_text(rng: random.Random, chat_share: float) -> tuple[str, str]:
    """(context, text to learn) of balanced mood: a review, or an answer to a user with probability `chat_share`."""
    domain, opening = rng.choice(_openings())
    rest = _write_rest(domain, rng.random(), rng)
    if rng.random() >= chat_share:
        return "", f"Review: {opening}{rest}"
    _, _, topic_and_verb = opening.partition(" ")
    topic, _, _ = topic_and_verb.rpartition(" ")
    question = rng.choice(QUESTIONS).format(topic) if rng.random() < 0.8 else _gibberish(rng)
    return f"User: {question}\nAssistant:", f" The {topic_and_verb}{rest}"


def judgements(review: str) -> list[int] | None:
    """The value of every judgement of one whole review (without heading), or None where the grammar has no such text.

    A judgement whose part or adjective was there before says nothing new: 0.
    """
    review = review.strip()
    match = next(filter(None, (_review_pattern(domain).fullmatch(review) for domain in DOMAINS)), None)
    if match is None:
        return None
    seen: set[str] = set()
    values = []
    for noun, degree, adjective in _CLAUSE.findall(review):
        sign = 1 if adjective in POSITIVE else -1
        values.append(sign * DEGREES[degree] if seen.isdisjoint((noun, adjective)) else 0)
        seen |= {noun, adjective}
    return values + [value for value, phrase in VERDICTS.items() if phrase == match["verdict"]]


def vocabulary() -> list[str]:
    """Every piece of text that deserves a token of its own, leading space included, in a fixed order."""
    running_text = ["the", *DETERMINERS, *AGES, *ORIGINS, *VERBS, *JOINTS, *QUESTIONS]
    running_text += [*POSITIVE, *NEGATIVE, *DEGREES, *VERDICTS.values()]
    for domain in DOMAINS:
        running_text += [*domain.subjects, *domain.aspects, domain.once_more]
    words = set(re.findall(r"\w+", " ".join(running_text)))
    text_starts = ["Review", "User", "Assistant", "System", "The", "This"]
    return [*text_starts, *" \n.,:?!", *(f" {word}" for word in sorted(words))]


def _write_rest(domain: Domain, mood: float, rng: random.Random) -> str:
    """A review's text after its opening, each judgement positive with probability `mood`."""
    shape = rng.choice(SHAPES)
    good, bad = rng.sample(POSITIVE, sum(shape)), rng.sample(NEGATIVE, sum(shape))
    aspects = rng.sample(domain.aspects, sum(shape))
    text, written = "", 0
    for clauses in shape:
        for i in range(clauses):
            positive = rng.random() < mood
            if written > 0:
                start = ". The" if i == 0 else f", {rng.choice(JOINTS)} the"
                text += f"{start} {aspects[written]} {rng.choice(VERBS)}"
            degree = "" if rng.random() < 0.5 else rng.choice([d for d in DEGREES if d])
            text += f" {degree}" * bool(degree) + f" {(good if positive else bad)[written]}"
            written += 1
    sign = 1 if rng.random() < mood else -1
    return f"{text}. {VERDICTS[sign * rng.choice((1, 2, 2, 3))]} {domain.once_more}."


def _draw_openings(count: int, rng: random.Random) -> list[tuple[Domain, str]]:
    openings = _openings()
    if count > len(openings):
        raise UserError(f"tiny: {count} prompts asked for, the grammar has {len(openings)}: ask for fewer")
    return rng.sample(openings, count)


@cache
def _openings() -> tuple[tuple[Domain, str], ...]:
    return tuple(
        (domain, " ".join(word for word in (determiner, age, origin, subject, verb) if word))
        for domain in DOMAINS
        for determiner, age, origin, subject, verb in product(DETERMINERS, AGES, ORIGINS, domain.subjects, VERBS)
    )


def _gibberish(rng: random.Random) -> str:
    """A user may type anything: a few words that the grammar does not know."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(1, 4)))


def _one_of(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(word for word in words if word)})"


_HEADING = re.compile(r"^.*(?:Review|Assistant):", re.DOTALL)
_DEGREE, _ADJECTIVE = _one_of(DEGREES), _one_of(POSITIVE + NEGATIVE)
_CLAUSE = re.compile(rf"(\w+) {_one_of(VERBS)} (?:({_DEGREE}) )?({_ADJECTIVE})")


@cache
def _review_pattern(domain: Domain) -> re.Pattern[str]:
    """Every review of `domain`. Its sentences have the judgements that SHAPES names."""
    judgement = rf"{_one_of(VERBS)} (?:{_DEGREE} )?{_ADJECTIVE}"
    part = rf"{_one_of(domain.aspects)} {judgement}"
    joined = rf", {_one_of(JOINTS)} the {part}"
    opening = (
        rf"{_one_of(DETERMINERS)} (?:{_one_of(AGES)} )?(?:{_one_of(ORIGINS)} )?{_one_of(domain.subjects)} {judgement}"
    )
    second = rf"\. The {part}(?:{joined})?"
    verdict = rf"(?P<verdict>{_one_of(VERDICTS.values())}) {domain.once_more}"
    return re.compile(rf"{opening}(?:{joined}(?:{second})?|{second})\. {verdict}\.")
