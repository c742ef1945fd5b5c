"""Go templates made of Jinja ones, rendered again by a small evaluator of the part of Go's language that they use."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowrank_align.data.encoder import Encoder
from lowrank_align.data.template import PLAIN_TEMPLATE, ChatTemplate
from lowrank_align.export.gotemplate import GoTemplate, go_template

TRL = find_spec("trl")
FOLDER = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL and TRL.submodule_search_locations else None
REAL = ("llama3", "llama3_2", "qwen2_5", "qwen3", "gemma3", "phi3", "deepseek_r1_distill", "gptoss", "cohere")
# The system text goes before the last question: what stands between two contents depends on what comes after.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}"
    "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
QUOTING = (
    "{% for m in messages %}{{ '{{\"' + m['role'] + '\"}}: ' + m['content'] + '\\\\ \"\"\"\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\u200b> {' }}{% endif %}"
)
TALKS = [
    [("user", "Hello.")],
    [("system", "Be brief."), ("user", "A {{ brace }}?")],
    [("user", "one"), ("assistant", "two"), ("user", "three\nlines\nhere")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
]


def messages(talk: list[tuple[str, str]]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="session")
def made(tiny_llama: Path) -> Callable[[str], tuple[ChatTemplate, GoTemplate]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)

    def make(jinja: str) -> tuple[ChatTemplate, GoTemplate]:
        tokenizer.chat_template = jinja
        template = ChatTemplate(tokenizer, None, Encoder(tokenizer).added)
        return template, go_template(template, tokenizer.bos_token)

    return make


@pytest.mark.parametrize("name", ["plain", "quoting", *REAL])
def test_the_text_is_that_of_the_jinja_template(name: str, made: Callable[..., Any]) -> None:
    """Less the BOS token, which the reader adds."""
    if name in REAL and FOLDER is None:
        pytest.skip("trl is not installed, from which the templates of real models are taken")
    own = {"plain": PLAIN_TEMPLATE, "quoting": QUOTING}
    template, found = made(own.get(name) or (FOLDER / f"{name}.jinja").read_text())  # type: ignore[operator]
    assert found.departures == []
    for talk in TALKS:
        wanted = template.render(messages(talk), {}, open_turn=True).removeprefix("<s>")
        assert evaluate(found.text, messages(talk)) == wanted


def test_an_answer_that_is_begun_gets_no_new_turn(made: Callable[..., Any]) -> None:
    """The plain template without its opening of the assistant's turn."""
    _, found = made(PLAIN_TEMPLATE)
    assert evaluate(found.text, messages([("user", "Hi"), ("assistant", "Hel")])) == "User: Hi\nAssistant: Hel"


def test_a_template_that_looks_ahead_is_told(made: Callable[..., Any]) -> None:
    """Without a system turn it is exact all the same."""
    template, found = made(MISTRAL)
    assert found.departures
    wanted = template.render(messages(TALKS[2]), {}, open_turn=True).removeprefix("<s>")
    assert evaluate(found.text, messages(TALKS[2])) == wanted


def test_a_template_without_system_turns_is_told(made: Callable[..., Any]) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + PLAIN_TEMPLATE
    _, found = made(refusing)
    assert found.departures == ["the chat template takes no system turn: a system text is left out"]
    assert evaluate(found.text, messages(TALKS[1])) == "User: A {{ brace }}?\nAssistant:"


# --- the evaluator: text, strings, .Content, `$last := ""`, `$last = .Role`, range .Messages, and if, else if, else
# with eq and ne, as Go's text/template has them

ACTION = re.compile(r"{{ (.*?) }}", re.DOTALL)


def evaluate(template: str, talk: list[Any]) -> str:
    pieces = ACTION.split(template)  # text, action, text, ...
    tree, rest = block(list(enumerate(pieces)))
    assert not rest
    return run(tree, {"talk": talk, "last": "", "message": None})


def block(pieces: list[tuple[int, str]]) -> tuple[list[Any], list[tuple[int, str]]]:
    """Nodes up to the `end` or `else` that closes this block; the rest begins with it."""
    nodes: list[Any] = []
    while pieces:
        (number, text), *pieces = pieces
        if number % 2 == 0:
            nodes.append(text)
        elif text == "end" or text.startswith("else"):
            return nodes, [(number, text), *pieces]
        elif text.startswith(("if ", "range ")):
            branches = []
            while text != "end":
                body, [(_, closing), *pieces] = block(pieces)
                branches.append((text.removeprefix("else "), body))
                text = closing
            nodes.append(branches)
        else:
            nodes.append((text,))
    return nodes, []


def run(nodes: list[Any], state: dict[str, Any]) -> str:
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += node
        elif isinstance(node, tuple):
            out += act(node[0], state)
        elif node[0][0] == "range .Messages":
            for message in state["talk"]:
                state["message"] = message
                out += run(node[0][1], state)
        else:
            out += next((run(body, state) for condition, body in node if holds(condition, state)), "")
    return out


def act(action: str, state: dict[str, Any]) -> str:
    if action == '$last := ""':
        state["last"] = ""
    elif action == "$last = .Role":
        state["last"] = state["message"]["role"]
    elif action == ".Content":
        return str(state["message"]["content"])
    else:
        return str(json.loads(action))
    return ""


def holds(condition: str, state: dict[str, Any]) -> bool:
    if condition == "else":
        return True
    word, operator, left, right = condition.split(" ")
    assert word == "if"
    value = state["last"] if left == "$last" else state["message"]["role"]
    assert left in ("$last", ".Role")
    return bool((value == json.loads(right)) == (operator == "eq"))
