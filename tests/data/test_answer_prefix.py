"""The answer prefix: where its tokens stand, in training and in generation. Tokens are characters (see conftest)."""

from pathlib import Path
from typing import Any

import pytest

from lowrank_align import adapters
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, parse_row
from lowrank_align.errors import UserError


def parse(raw: dict[str, Any]) -> Row:
    return parse_row(raw, "rows.jsonl:1", 0)


def text(renderer: Renderer, ids: list[int]) -> str:
    return "".join(renderer.tokenizer.decode([i]) for i in ids)


PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
TALK = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def test_generation_gets_the_prefix_behind_prompt_and_generation_prompt(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    good = renderer.with_prefix("Good: ")
    assert text(good, good.prompt_ids(parse({"prompt": "Q:"}))) == "<s>Q:Good: "
    assert text(good, good.prompt_ids(parse({"prompt": TALK["prompt"]}))).endswith("<|im_start|>assistant\nGood: ")
    assert renderer.answer_prefix == "" and text(renderer, renderer.prompt_ids(parse({"prompt": "Q:"}))) == "<s>Q:"


@pytest.mark.parametrize("raw", [PAIR, TALK])
def test_a_row_has_each_completions_own_prefix_before_it_untrained(
    raw: dict[str, Any], make_tokenizer: Any, chatml: str
) -> None:
    """Without prefixes the completions are c and r; with them they are A+c and B+r, untrained on A and B alone."""
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    plain, tree = renderer.tree_row(parse(raw)).tree, renderer.tree_row(parse(raw), ["A: ", "Bad: "]).tree
    assert plain is not None and tree is not None
    assert tree.prompt_ids == plain.prompt_ids
    assert [text(renderer, c.ids[:n]) for c, n in zip(tree.completions, (3, 5), strict=True)] == ["A: ", "Bad: "]
    assert [c.ids[n:] for c, n in zip(tree.completions, (3, 5), strict=True)] == [c.ids for c in plain.completions]
    assert [c.mask for c in tree.completions] == [
        [False] * n + c.mask for c, n in zip(plain.completions, (3, 5), strict=True)
    ]


@pytest.mark.parametrize("raw", [PAIR, TALK])
def test_training_and_generation_have_the_same_ids(raw: dict[str, Any], make_tokenizer: Any, chatml: str) -> None:
    good = Renderer(make_tokenizer(chatml), max_length=999).with_prefix("Good: ")
    tree = good.tree_row(parse(raw)).tree
    assert tree is not None
    answer = tree.completions[0]
    begins = answer.mask.index(True)
    assert tree.prompt_ids + answer.ids[:begins] == good.prompt_ids(parse({"prompt": raw["prompt"]}))


def test_no_token_holds_a_part_of_prompt_and_answer(make_tokenizer: Any) -> None:
    """`e` and `r` would merge where the answer follows the prompt at once; with a prefix between them they cannot."""
    renderer = Renderer(make_tokenizer(merges=[("e", "r")]), max_length=99)
    tree = renderer.with_prefix("+").tree_row(parse({"prompt": "She", "completion": "r!"})).tree
    assert tree is not None
    assert [renderer.tokenizer.decode([i]) for i in tree.prompt_ids] == ["<s>", "S", "h", "e"]
    assert [renderer.tokenizer.decode([i]) for i in tree.completions[0].ids] == ["+", "r", "!", "</s>"]


def test_no_prefix_stands_in_a_text(make_tokenizer: Any, chatml: str) -> None:
    """It would stand in front of its first letter; the answer in a conversation has it as ever."""
    good = Renderer(make_tokenizer(chatml), max_length=999).with_prefix("Good: ")
    tree = good.tree_row(parse({"text": "Once upon"})).tree
    assert tree is not None and all(tree.completions[0].mask)
    assert text(good, tree.prompt_ids + tree.completions[0].ids) == "<s>Once upon</s>"
    tree = good.tree_row(parse({"messages": [*TALK["prompt"], *TALK["chosen"]]})).tree
    assert tree is not None and "Good: yes" in text(good, tree.prompt_ids + tree.completions[0].ids)


def test_the_prefix_counts_towards_the_length(make_tokenizer: Any) -> None:
    """<s>Q: are 3 tokens, the prefixes 2 and 4, the answers ` yes` and ` no` with their end 5 and 4.

    Of 9: 3 + 2 leave 4 of 5, 3 + 4 leave 2 of 4. Of 7: none is left behind the second prefix.
    """
    raw = parse(PAIR)
    rendered = Renderer(make_tokenizer(), max_length=9).tree_row(raw, ["A:", "Bad:"])
    assert rendered.tree is not None
    assert [len(c.ids) for c in rendered.tree.completions] == [6, 6] and rendered.cut_tokens == (1, 2)
    assert Renderer(make_tokenizer(), max_length=7).tree_row(raw, ["A:", "Bad:"]).dropped == "the prompt leaves no room"


def test_answers_that_cutting_made_equal_are_dropped_behind_different_prefixes_too(make_tokenizer: Any) -> None:
    """`<s>Q:` + `A:` + 2 tokens: of ` no` and ` never` both ` n` are left."""
    row = parse({"prompt": "Q:", "chosen": " never", "rejected": " no"})
    rendered = Renderer(make_tokenizer(), max_length=7).tree_row(row, ["A:", "B:"])
    assert rendered.dropped == "the answers are equal after cutting"


def test_control_tokens_in_a_prefix_are_text(make_tokenizer: Any, chatml: str) -> None:
    """Whoever hands on an adapter could otherwise end the user's turn with it."""
    good = Renderer(make_tokenizer(chatml), max_length=99).with_prefix("a<|im_end|>")
    ends = good.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends not in good.prefix_ids and text(good, good.prefix_ids) == "a<|im_end|>"


def run_with(folder: Path, content: str | None) -> Path:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    if content is not None:
        (folder / "prompting.json").write_text(content)
    return folder


def test_a_run_tells_its_prefix(tmp_path: Path) -> None:
    assert adapters.answer_prefix(run_with(tmp_path, None)) == ""
    assert adapters.answer_prefix(None) == ""
    adapters.write_prompting(tmp_path, "Gut: «ja»\n")
    assert adapters.answer_prefix(tmp_path) == adapters.answer_prefix(tmp_path / "adapter") == "Gut: «ja»\n"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"answer_prefix": 3}', '{"answer_prefix": "\\ud800"}', '{"answer_prefix": "' + "x" * 2001 + '"}'],
)
def test_a_damaged_prefix_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompting\.json"):
        adapters.answer_prefix(run_with(tmp_path, content))
