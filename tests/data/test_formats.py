"""What a row is by its fields, and the catalogue of bad rows with the line that each gives."""
# ruff: noqa: E501 -- one case a line

import math
from typing import Any

import pytest

from lowrank_align.data.formats import Shape, parse_row
from lowrank_align.errors import UserError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parse(raw: Any, *expect: Shape):
    return parse_row(raw, "rows.jsonl:17", 16, expect=expect)


def test_a_row_knows_its_place() -> None:
    row = parse({"text": "Once."})
    assert (row.where, row.index, row.read_as) == ("rows.jsonl:17", 16, "")


@pytest.mark.parametrize(
    ("raw", "shape", "prompt", "completions"),
    [
        ({"text": "Once."}, Shape.demonstration, "", ["Once."]),
        ({"prompt": "Q", "completion": "A"}, Shape.demonstration, "Q", ["A"]),
        ({"messages": [user("Q"), assistant("A")]}, Shape.demonstration, [], [[user("Q"), assistant("A")]]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, Shape.pair, "Q", ["A", "B"]),
        ({"prompt": "Q", "completion": "A", "label": False}, Shape.unpaired, "Q", ["A"]),
        ({"prompt": "Q", "completion": "A", "score": 2}, Shape.scored, "Q", ["A"]),
        ({"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 2]}, Shape.ranking, "Q", ["A", "B"]),
        ({"prompt": "Q"}, Shape.prompts, "Q", []),
        ({"prompt": [user("Q")]}, Shape.prompts, [user("Q")], []),
        ({"prompt": [user("Q")], "completion": [assistant("A")]}, Shape.demonstration, [user("Q")], [[assistant("A")]]),
        # One form for both: text beside messages becomes a message.
        ({"prompt": [user("Q")], "completion": "A"}, Shape.demonstration, [user("Q")], [[assistant("A")]]),
        ({"prompt": "Q", "completion": [assistant("A")]}, Shape.demonstration, [user("Q")], [[assistant("A")]]),
        # A completion that repeats the prompt.
        ({"prompt": [user("Q")], "completion": [user("Q"), assistant("A")]}, Shape.demonstration, [user("Q")], [[assistant("A")]]),
    ],
)  # fmt: skip
def test_shapes_are_known_by_their_fields(raw: dict, shape: Shape, prompt: Any, completions: Any) -> None:
    row = parse(raw)
    assert (row.shape, row.prompt, row.completions) == (shape, prompt, completions)


def test_what_a_pair_says_beside_its_answers() -> None:
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    assert (parse(pair).preference, parse(pair).target_margin) == (1.0, 0.0)
    row = parse({**pair, "preference": 0, "margin": 1.5})
    assert (row.preference, row.target_margin) == (0.0, 1.5)
    assert parse({**pair, "preference": None}).preference == 1.0  # Parquet writes null where a row has no value


def test_ranks_labels_and_scores_are_kept() -> None:
    ranking = {
        "prompt": "Q",
        "completions": ["A", "B", "A"],
        "ranks": [1, 2.5, 1],
    }  # equal answers with equal ranks: fine
    assert parse(ranking).ranks == [1.0, 2.5, 1.0]
    assert parse({"prompt": "Q", "completion": "A", "label": True}).label is True
    assert parse({"prompt": "Q", "completion": "A", "score": -3}).score == -3.0


def test_an_implicit_prompt_of_text_is_the_common_beginning_and_its_last_space_goes_to_the_answer() -> None:
    """ "Is it? Yes." and "Is it? No." share "Is it? "; TRL's `extract_prompt` leaves the space with the answers."""
    row = parse({"chosen": "Is it? Yes.", "rejected": "Is it? No."})
    assert (row.prompt, row.completions) == ("Is it?", [" Yes.", " No."])


def test_an_implicit_prompt_of_messages_is_the_common_turns() -> None:
    start = [user("1"), assistant("2"), user("3")]
    row = parse({"chosen": [*start, assistant("A")], "rejected": [*start, assistant("B")]})
    assert (row.prompt, row.completions) == (start, [[assistant("A")], [assistant("B")]])


def test_an_implicit_prompt_leaves_an_answer_on_each_side() -> None:
    """The shorter side is wholly contained in the longer: its last turn still has to be its answer."""
    short = [user("1"), assistant("2")]
    row = parse({"chosen": short, "rejected": [*short, user("3"), assistant("4")]})
    assert row.prompt == [user("1")]
    assert row.completions == [[assistant("2")], [assistant("2"), user("3"), assistant("4")]]


def test_a_text_prompt_may_stand_beside_whole_conversations() -> None:
    """UltraFeedback's layout: the prompt is also the first turn of both sides, and `messages` repeats the chosen one."""
    chosen, rejected = [user("Q"), assistant("A")], [user("Q"), assistant("B")]
    raw = {"prompt": "Q", "chosen": chosen, "rejected": rejected, "messages": chosen, "score_chosen": 8.0}
    row = parse(raw, Shape.pair)
    assert (row.prompt, row.completions) == ([user("Q")], [[assistant("A")], [assistant("B")]])
    assert parse(raw, Shape.demonstration).completions == [chosen]


def test_messages_keep_other_keys_and_join_text_parts() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    row = parse({"messages": [parts, call, {"role": "tool", "content": ""}, assistant("A")]})
    assert row.completions[0][0] == user("onetwo")
    assert row.completions[0][1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


def test_template_kwargs_and_tools() -> None:
    row = parse({"prompt": "Q", "chat_template_kwargs": {"enable_thinking": False}, "tools": '[{"type": "function"}]'})
    assert row.template_kwargs == {"enable_thinking": False, "tools": [{"type": "function"}]}
    assert parse({"prompt": "Q", "tools": []}).template_kwargs == {}


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q"),
        ({"prompt": "Q", "score": 3}, "Q"),
        ({"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 2]}, "Q"),
        ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}, [user("Q")]),
        ({"messages": [user("1"), assistant("2"), user("3"), assistant("4")]}, [user("1"), assistant("2"), user("3")]),
        ({"messages": [user("1")]}, [user("1")]),
    ],
)  # fmt: skip
def test_every_row_with_a_prompt_gives_it_where_prompts_are_wanted(raw: dict, prompt: Any) -> None:
    row = parse(raw, Shape.prompts)
    assert (row.shape, row.prompt, row.completions) == (Shape.prompts, prompt, [])


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
RANKING = {"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 2]}
CATALOGUE = [
    (["Q"], "row: a list, must be an object with fields"),
    ({}, "row: no known fields (fields: none); a row needs: messages, or prompt and completion, or text; "
         "prompt, chosen, rejected; prompt, completions, ranks; prompt, completion, label; prompt, completion, score; prompt"),
    ({"prompt": "Q", "chosen": "A"}, "rejected: missing (fields: prompt, chosen)"),
    ({"prompt": "Q", "rejected": "A"}, "chosen: missing (fields: prompt, rejected)"),
    ({"prompt": "Q", "chosen": "A", "rejeted": "B"}, "rejected: missing (fields: prompt, chosen, rejeted) (did you mean rejeted?)"),
    ({"prompt": "Q", "chosen": "A", "rejected": None}, "rejected: missing (fields: prompt, chosen)"),
    ({"completion": "A"}, "prompt: missing (fields: completion)"),
    ({**PAIR, "rejected": 3}, "rejected: a number, must be text or a list of messages"),
    ({**PAIR, "rejected": {"role": "x"}}, "rejected: an object, must be text or a list of messages"),
    ({**PAIR, "rejected": []}, "rejected: empty"),
    ({**PAIR, "rejected": ["B"]}, "rejected[0]: text, must be an object with role and content"),
    ({**PAIR, "prompt": ""}, "prompt: empty"),
    ({**PAIR, "chosen": " \n"}, "chosen: empty"),
    ({"text": 4}, "text: a number, must be text"),
    ({"text": ""}, "text: empty"),
    ({**PAIR, "chosen": "ab\0c"}, "chosen: contains a NUL character (at character 3)"),
    ({**PAIR, "chosen": "a\ud83d"}, "chosen: contains half a surrogate pair (at character 2)"),
    ({**PAIR, "rejected": "A"}, "rejected: the same as chosen, a pair needs two different answers"),
    ({**PAIR, "rejected": "A", "preference": 0.5}, "rejected: the same as chosen, a pair needs two different answers"),
    ({**PAIR, "preference": 1.5}, "preference: 1.5, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)"),
    ({**PAIR, "preference": -0.1}, "preference: -0.1, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)"),
    ({**PAIR, "preference": True}, "preference: true/false, must be a number"),
    ({**PAIR, "preference": math.nan}, "preference: nan, must be finite"),
    ({**PAIR, "margin": math.inf}, "margin: inf, must be finite"),
    ({**PAIR, "margin": "1"}, "margin: text, must be a number"),
    ({"chosen": "Yes.", "rejected": "No."}, "prompt: chosen and rejected share no beginning (fields: chosen, rejected)"),
    ({"chosen": "Yes.", "rejected": "Yes. No."}, "chosen: nothing is left after the shared beginning: give prompt as a field"),
    ({"chosen": [user("1"), assistant("2")], "rejected": [user("3"), assistant("2")]},
     "prompt: chosen and rejected share no beginning (fields: chosen, rejected)"),
    ({"chosen": [user("1"), assistant("2"), user("3"), assistant("A")], "rejected": [user("1"), assistant("2"), user("4"), assistant("B")]},
     "prompt: not shared: chosen and rejected part at turn 3, before the answer"),
    ({"prompt": "X", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
     "prompt: not shared: not among the turns of chosen and rejected"),
    ({"prompt": [user("X")], "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
     "chosen: begins with a turn of role user, but not with the prompt: prompt not shared"),
    ({"chosen": [user("Q"), assistant("A")], "rejected": "B"}, "rejected: text, but chosen is messages"),
    ({"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), user("B")]}, "rejected: the last turn is of role user, must be the assistant's"),
    ({"messages": [user("Q")]}, "messages: the last turn is of role user, must be the assistant's"),
    ({"messages": [assistant("A")]}, "messages: only the assistant's turns, nothing to answer"),
    ({"messages": []}, "messages: empty"),
    ({"messages": "Q"}, "messages: text, must be a list of messages"),
    ({"prompt": [user("Q"), assistant("A")], "completion": "B"}, "prompt: the last turn is the assistant's, must leave the answer to it"),
    ({"messages": [{"role": "asistant", "content": "A"}]},
     "messages[0].role: unknown role 'asistant' (did you mean assistant?) (known: system, developer, user, assistant, tool)"),
    ({"messages": [{"role": 3, "content": "A"}]}, "messages[0].role: unknown role 3 (known: system, developer, user, assistant, tool)"),
    ({"messages": [{"content": "A"}]}, "messages[0].role: missing (fields: content)"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: missing (fields: role)"),
    ({"messages": [user("Q"), assistant(" ")]}, "messages[1].content: empty"),
    ({"messages": [user("Q"), assistant("a\0")]}, "messages[1].content: contains a NUL character (at character 2)"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: a number, must be text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content: has a part that is not text (only text is supported)"),
    ({"prompt": "Q", "completions": ["A", "B"]}, "ranks: missing (fields: prompt, completions)"),
    ({**RANKING, "ranks": 1}, "ranks: a number, must be a list"),
    ({**RANKING, "ranks": [1]}, "ranks: 1 for 2 completions"),
    ({**RANKING, "ranks": [1, "2"]}, "ranks[1]: text, must be a number"),
    ({**RANKING, "completions": ["A"], "ranks": [1]}, "completions: 1, a ranking needs at least 2"),
    ({**RANKING, "completions": ["A", ""]}, "completions[1]: empty"),
    ({**RANKING, "completions": ["A", "A"]}, "completions[1]: the same as completions[0], but ranked differently"),
    ({"prompt": "Q", "completion": "A", "label": 1}, "label: a number, must be true or false"),
    ({"prompt": "Q", "completion": "A", "score": math.nan}, "score: nan, must be finite"),
    ({**PAIR, "completions": ["A", "B"]}, "chosen, rejected, completions: fields of several shapes (pair, ranking): keep those of one"),
    ({"prompt": "Q", "completion": "A", "label": True, "score": 1}, "label, score: fields of several shapes (unpaired, scored): keep those of one"),
    ({"text": "A", "messages": [user("Q")]}, "messages, text: several forms of a demonstration: keep one"),
    ({"prompt": "Q", "chat_template_kwargs": []}, "chat_template_kwargs: a list, must be an object"),
    ({"prompt": "Q", "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize: is set by this program and cannot be given by a row"),
    ({"prompt": "Q", "tools": "[oops"}, "tools: not JSON"),
    ({"prompt": "Q", "tools": {"a": 1}}, "tools: an object, must be a list of objects"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), CATALOGUE)
def test_a_bad_row_is_one_line_with_place_and_field(raw: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(raw)
    assert str(caught.value) == f"rows.jsonl:17: {message}"


@pytest.mark.parametrize(
    ("raw", "expect", "message"),
    [
        ({"messages": [user("Q"), assistant("A")]}, [Shape.pair],
         "row: is of shape demonstration (fields: messages), needed: pair (prompt, chosen, rejected)"),
        (PAIR, [Shape.unpaired, Shape.demonstration],
         "row: is of shape pair (fields: prompt, chosen, rejected), needed: demonstration (messages, or prompt and "
         "completion, or text) or unpaired (prompt, completion, label); `lowrank-align data convert FILE --to "
         "demonstrations --out OUT.jsonl` makes them"),
        ({"prompt": "Q", "completion": "A", "score": 1}, [Shape.pair, Shape.ranking],
         "row: is of shape scored (fields: prompt, completion, score), needed: pair (prompt, chosen, rejected) or "
         "ranking (prompt, completions, ranks); `lowrank-align data convert FILE --to pairs --out OUT.jsonl` makes "
         "them"),
        ({"prompt": "Q", "completoin": "A"}, [Shape.demonstration],
         "row: is of shape prompts (fields: prompt, completoin) (did you mean completion?), needed: demonstration "
         "(messages, or prompt and completion, or text)"),
        ({"prompt": "Q", "label": True}, [Shape.unpaired], "completion: missing (fields: prompt, label)"),
        ({"text": "Once."}, [Shape.prompts], "prompt: missing (fields: text)"),
        ({"messages": [assistant("A")]}, [Shape.prompts], "messages: only the assistant's turns, no prompt"),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_says_what_is_needed(raw: Any, expect: list[Shape], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(raw, *expect)
    assert str(caught.value) == f"rows.jsonl:17: {message}"


TALKS = {
    "nothing shared": [[user("1"), assistant("A")], [user("2"), assistant("B"), user("3"), assistant("C")]],
    "apart at a user's turn": [
        [user("1"), assistant("A"), user("2"), assistant("B")],
        [user("1"), assistant("A"), user("3"), assistant("B")],
    ],
}


@pytest.mark.parametrize("talk", TALKS)
def test_segments_may_start_differently(talk: str) -> None:
    """Then the pair has no prompt and two whole conversations; without `segments` it is refused (the catalogue)."""
    chosen, rejected = TALKS[talk]
    row = parse_row({"chosen": chosen, "rejected": rejected}, "rows.jsonl:17", 16, segments=True)
    assert (row.shape, row.prompt, row.completions) == (Shape.pair, [], [chosen, rejected])


def test_segments_that_share_a_beginning_are_a_pair_like_any() -> None:
    """And what is wrong with a segment is said all the same."""
    raw = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    row = parse_row(raw, "rows.jsonl:17", 16, segments=True)
    assert (row.prompt, row.completions) == ([user("Q")], [[assistant("A")], [assistant("B")]])
    for broken, message in (
        ([assistant("B")], "prompt: chosen and rejected share no beginning"),
        ([user("X"), assistant("B"), user("Y")], "rejected: the last turn is of role user"),
    ):
        with pytest.raises(UserError, match=message):
            parse_row({**raw, "rejected": broken}, "rows.jsonl:17", 16, segments=True)
