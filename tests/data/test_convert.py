"""Rows of other projects: what they become, and that errors keep the names of the user's file."""
# ruff: noqa: E501 -- one case a line

from typing import Any

import pytest

from lowrank_align.data.formats import Row, Shape, parse_row
from lowrank_align.errors import UserError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parse(raw: Any, *expect: Shape) -> Row:
    return parse_row(raw, "rows.json:1", 0, expect=expect)


HUMAN = {"from": "human", "value": "Q"}
GPT = {"from": "gpt", "value": "A"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("raw", "read_as", "shape", "prompt", "completions"),
    [
        ({"conversations": [HUMAN, GPT]}, "ShareGPT", Shape.demonstration, [], [[user("Q"), assistant("A")]]),
        ({"conversations": [HUMAN, GPT], "system": "S"}, "ShareGPT", Shape.demonstration, [], [[SYSTEM, user("Q"), assistant("A")]]),
        ({"conversations": [HUMAN, GPT], "system": ""}, "ShareGPT", Shape.demonstration, [], [[user("Q"), assistant("A")]]),
        ({"messages": [HUMAN, GPT]}, "ShareGPT", Shape.demonstration, [], [[user("Q"), assistant("A")]]),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
         "ShareGPT", Shape.pair, [user("Q")], [[assistant("A")], [assistant("B")]]),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, "ShareGPT", Shape.unpaired, [user("Q")], [[assistant("A")]]),
        ({"instruction": "Q", "input": "", "output": "A"}, "Alpaca", Shape.demonstration, [user("Q")], [[assistant("A")]]),
        ({"instruction": "Q", "input": "I", "output": "A"}, "Alpaca", Shape.demonstration, [user("Q\nI")], [[assistant("A")]]),
        ({"instruction": "Q", "output": ["A", "B"]}, "Alpaca", Shape.pair, [user("Q")], [[assistant("A")], [assistant("B")]]),
        ({"instruction": "Q", "chosen": "A", "rejected": "B"}, "Alpaca", Shape.pair, [user("Q")], [[assistant("A")], [assistant("B")]]),
        ({"instruction": "Q", "output": "A", "kto_tag": False}, "Alpaca", Shape.unpaired, [user("Q")], [[assistant("A")]]),
        ({"instruction": "Q", "output": "A", "system": "S", "history": [["1", "2"]]},
         "Alpaca", Shape.demonstration, [SYSTEM, user("1"), assistant("2"), user("Q")], [[assistant("A")]]),
        ({"instruction": "Q"}, "Alpaca", Shape.prompts, [user("Q")], []),
        ({"chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: A",
          "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant: B"},
         "HH", Shape.pair, [user("1"), assistant("2"), user("3")], [[assistant("A")], [assistant("B")]]),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
         "HH", Shape.pair, [user("Q")], [[assistant("A")], [assistant("B")]]),
        ({"prompt": "\n\nHuman: Q\n\nAssistant:"}, "HH", Shape.prompts, [user("Q")], []),
    ],
)  # fmt: skip
def test_rows_of_other_projects(raw: dict, read_as: str, shape: Shape, prompt: Any, completions: Any) -> None:
    row = parse(raw)
    assert (row.read_as, row.shape, row.prompt, row.completions) == (read_as, shape, prompt, completions)


def test_a_function_call_of_sharegpt_becomes_tool_calls() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = parse({"conversations": [HUMAN, call, {"from": "observation", "value": "2"}, GPT]})
    assert row.completions[0][1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2"},
    ]  # fmt: skip


def test_text_that_only_mentions_a_human_is_no_transcript() -> None:
    row = parse({"prompt": "Human: hi", "chosen": "A", "rejected": "B"})
    assert (row.read_as, row.prompt) == ("", "Human: hi")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"conversations": [HUMAN, {"from": "gtp", "value": "A"}]},
         "conversations[1].from: unknown role 'gtp' (did you mean gpt?) (known: system, human, user, gpt, chatgpt, assistant, bot, "
         "model, function_call, tool, observation)"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "conversations[1].value: missing (fields: from)"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "conversations[1].value: empty"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 1}]}, "conversations[1].value: a number, must be text"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f()"}]}, "conversations[1].value: not the JSON of a function call"),
        ({"conversations": [HUMAN]}, "conversations: the last turn is of role user, must be the assistant's"),
        ({"conversations": [HUMAN], "chosen": GPT}, "rejected: missing (fields: conversations, chosen)"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": HUMAN}, "rejected: the last turn is of role user, must be the assistant's"),
        ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
         "conversations: the last turn is the assistant's, must leave the answer to it"),
        ({"conversations": [HUMAN, GPT], "kto_tag": "yes"}, "kto_tag: text, must be true or false"),
        ({"conversations": [HUMAN, GPT], "system": 3}, "system: a number, must be text"),
        ({"instruction": "", "output": "A"}, "instruction: empty"),
        ({"instruction": "Q", "output": ""}, "output: empty"),
        ({"instruction": "Q", "output": 4}, "output: a number, must be text"),
        ({"instruction": "Q", "output": ["A", "B", "C"]}, "output: a list of 3, must be text or a list of two (better one first)"),
        ({"instruction": "Q", "output": ["A", "A"]}, "output[1]: the same as chosen, a pair needs two different answers"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "input: a number, must be text"),
        ({"instruction": "Q", "output": "A", "history": [["1"]]}, "history: must be a list of [question, answer]"),
        ({"instruction": "Q\0", "output": "A"}, "instruction: contains a NUL character (at character 2)"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: "}, "rejected[1].content: empty"),
        ({"chosen": "\n\nHuman: 1\n\nAssistant: A", "rejected": "\n\nHuman: 2\n\nAssistant: A"},
         "prompt: chosen and rejected share no beginning (fields: chosen, rejected)"),
    ],
)  # fmt: skip
def test_errors_keep_the_names_of_the_users_file(raw: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(raw)
    assert str(caught.value) == f"rows.json:1: {message}"
