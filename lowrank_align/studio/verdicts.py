"""What is said of a talk's answers, as the store keeps it: thumbs, and pairs of two answers to one question."""

from typing import TYPE_CHECKING

from lowrank_align.errors import UserError
from lowrank_align.store import Judgement, Record
from lowrank_align.store.encoding import content_id
from lowrank_align.studio.asking import cleaned
from lowrank_align.studio.chatting import Chat
from lowrank_align.studio.talk import WRITTEN, Response

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio


def rate(studio: "Studio", chat: Chat, response_id: str, liked: bool | None) -> None:
    """A thumb up, down, or taken back (None); an answer has one of each annotator, however often it is pressed."""
    exchange, number = chat.talk.find(response_id)
    response = exchange.responses[number]
    _check(response)
    record_id = content_id(["rating", response.id])
    if liked is not None:
        record = Record(
            kind="rating",
            prompt=chat.talk.prompt_of(response),
            completions=(response.completion(),),
            origin="chat",
            versions=studio.versions(),
            id=record_id,
        )
        _judge(studio, chat, record, Judgement(verdict="liked" if liked else "disliked"))
    elif (entry := studio.store.entry(record_id, chat.annotator)) is not None and not entry.judgement.deleted:
        studio.store.delete(record_id, chat.annotator, expected_version=entry.version)
    chat.update(response_id, liked=liked)


def prefer(studio: "Studio", chat: Chat, better_id: str, worse_id: str, reason: str = "") -> Record:
    """Make a pair of two answers to one question. UserError where they are not, or where no trainer would take them."""
    found = [chat.talk.find(response_id) for response_id in (better_id, worse_id)]
    # As they came: of two side by side, the left one is the first.
    responses = [exchange.responses[number] for exchange, number in sorted(found, key=lambda place: place[1])]
    prompt = chat.talk.prompt_of(*responses)
    for response in responses:
        _check(response)
    if responses[0].text == responses[-1].text:
        raise UserError("the two answers are the same: a pair needs two different ones")
    record = Record(
        kind="pair",
        prompt=prompt,
        completions=tuple(response.completion() for response in responses),
        origin="chat",
        versions=studio.versions(),
        id=content_id(["pair", *sorted((better_id, worse_id))]),
    )
    ranks = (1.0, 2.0) if responses[0].id == better_id else (2.0, 1.0)
    _judge(studio, chat, record, Judgement(verdict="preferred", ranks=ranks, reason=reason))
    return record


def mend(studio: "Studio", chat: Chat, response_id: str, text: str, reason: str = "") -> Record:
    """Make a pair of an answer and its mended text, which is the better one; the talk goes on from it."""
    exchange, number = chat.talk.find(response_id)
    text, old = cleaned(text), exchange.responses[number]
    if text == old.text:
        raise UserError("the text is as it was: change it first, so that there are two answers to make a pair of")
    mended = Response(text, WRITTEN, system=old.system, left_out=old.left_out, id=content_id(["mended", old.id, text]))
    _check(mended)
    _check(old)
    if mended.id not in [response.id for response in exchange.responses]:
        chat.add(exchange.id, mended)
    return prefer(studio, chat, mended.id, response_id, reason)


def _judge(studio: "Studio", chat: Chat, record: Record, judgement: Judgement) -> None:
    """Keep the verdict, in place of an older one on the same answers: the record's id says which those are."""
    with chat.lock:
        entry = studio.store.entry(record.id, chat.annotator)
        if studio.store.find(record.id) is None:
            studio.store.add(record)
        if entry is None or entry.judgement != judgement:
            version = entry.version if entry else 0
            studio.store.judge(record.id, chat.annotator, judgement, expected_version=version)


def _check(response: Response) -> None:
    if not response.text.strip():
        raise UserError("the answer is empty, and no trainer takes that: regenerate it first")
