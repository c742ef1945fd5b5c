"""Text and messages to ids and masks. Tokens are characters here (see conftest), so every expectation can be read off."""
# ruff: noqa: E501 -- some tables are wider

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lowrank_align.data.chat import Renderer, render_all
from lowrank_align.data.formats import Row, Shape, parse_row
from lowrank_align.errors import UserError
from lowrank_align.trees import Comparison


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def parse(raw: dict[str, Any], index: int = 0) -> Row:
    return parse_row(raw, f"rows.jsonl:{index + 1}", index)


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


def tree(renderer: Renderer, raw: dict[str, Any]) -> tuple[str, list[str]]:
    """The prompt's text, and each completion's with the untrained stretches in square brackets."""
    rendered = renderer.tree_row(parse(raw))
    assert rendered.tree is not None, rendered.dropped
    shown = []
    for completion in rendered.tree.completions:
        text, outside = "", False
        for piece, counts in zip(pieces(renderer.tokenizer, completion.ids), completion.mask, strict=True):
            text += piece if counts is not outside else ("]" if counts else "[") + piece
            outside = not counts
        shown.append(text)
    return "".join(pieces(renderer.tokenizer, rendered.tree.prompt_ids)), shown


# --- text


def test_a_pair_of_texts_shares_its_prompt_and_ends_each_side(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=99)
    rendered = renderer.tree_row(parse({"prompt": "Q:", "chosen": " yes", "rejected": " no", "margin": 2}, index=4))
    assert rendered.tree is not None
    assert pieces(renderer.tokenizer, rendered.tree.prompt_ids) == ["<s>", "Q", ":"]
    chosen, rejected = rendered.tree.completions
    assert pieces(renderer.tokenizer, chosen.ids) == [" ", "y", "e", "s", "</s>"]
    assert pieces(renderer.tokenizer, rejected.ids) == [" ", "n", "o", "</s>"]
    assert all(chosen.mask) and all(rejected.mask)
    assert rendered.tree.comparisons == (Comparison(0, 1, 1.0, 2.0),)
    assert rendered.tree.index == 4


def test_a_token_across_the_boundary_belongs_to_the_completion(make_tokenizer: Any) -> None:
    """With the merge e+r, "he" alone is h,e but "he"+"re" is h,er,e: the common prefix is <s>,h, also for "llo"."""
    renderer = Renderer(make_tokenizer(merges=[("e", "r")]), max_length=99)
    raw = {"prompt": "he", "chosen": "re", "rejected": "llo"}
    assert tree(renderer, raw) == ("<s>h", ["ere</s>", "ello</s>"])
    assert renderer.tree_row(parse(raw)).notes == ("the prompt's last token merges with the completion's first",)
    assert pieces(renderer.tokenizer, renderer.prompt_ids(parse(raw))) == ["<s>", "h", "e"]


def test_answers_that_begin_alike_do_not_lengthen_the_prompt(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=99)
    assert tree(renderer, {"prompt": "Q", "chosen": "A1", "rejected": "A2"}) == ("<s>Q", ["A1</s>", "A2</s>"])


def test_without_a_common_token_the_end_token_stands_before_the_completion(make_tokenizer: Any) -> None:
    """No BOS, and "e" merges away into "er": nothing is left of the prompt."""
    renderer = Renderer(make_tokenizer(bos=False, merges=[("e", "r")]), max_length=99)
    assert tree(renderer, {"prompt": "e", "completion": "r!"}) == ("</s>", ["er!</s>"])


@pytest.mark.parametrize(("bos", "prompt", "completion"), [(True, "<s>", "Once.</s>"), (False, "O", "nce.</s>")])
def test_of_a_plain_text_all_but_the_first_token_is_trained(
    make_tokenizer: Any, bos: bool, prompt: str, completion: str
) -> None:
    renderer = Renderer(make_tokenizer(bos=bos), max_length=99)
    assert tree(renderer, {"text": "Once."}) == (prompt, [completion])


def test_end_and_beginning_that_the_text_has_already_are_not_doubled(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=99)
    assert tree(renderer, {"prompt": "<s>Q", "completion": "A</s>"}) == ("<s>Q", ["A</s>"])
    assert pieces(renderer.tokenizer, renderer.prompt_ids(parse({"prompt": "<s>Q"}))) == ["<s>", "Q"]


def test_a_tokenizer_that_adds_the_end_token_itself(make_tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    renderer = Renderer(tokenizer, max_length=99)
    assert tree(renderer, {"prompt": "Q", "completion": "A"}) == ("Q", ["A</s>"])
    assert pieces(tokenizer, renderer.prompt_ids(parse({"prompt": "Q"}))) == ["Q"]


def test_the_end_token_is_trained_also_where_it_pads(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(pad_token="</s>"), max_length=99)
    assert renderer.pad_id == renderer.tokenizer.eos_token_id
    assert tree(renderer, {"prompt": "Q", "completion": "A"}) == ("<s>Q", ["A</s>"])


def test_padding_has_an_id_also_without_a_pad_token(make_tokenizer: Any) -> None:
    ids = make_tokenizer().convert_tokens_to_ids
    assert Renderer(make_tokenizer(), max_length=99).pad_id == ids("</s>")
    assert Renderer(make_tokenizer(unk_token="!"), max_length=99).pad_id == ids("!")
    assert Renderer(make_tokenizer(pad_token="<|im_start|>"), max_length=99).pad_id == ids("<|im_start|>")


# --- messages


CHAT = [{"role": "system", "content": "S"}, user("1"), assistant("one"), user("2"), assistant("two ")]
START = "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
BETWEEN = "\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"


def test_every_assistant_turn_is_trained_with_its_end_and_nothing_after_it(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    expected = (START, [f"one<|im_end|>[{BETWEEN}]two <|im_end|>"])
    assert tree(renderer, {"messages": CHAT}) == expected


def test_only_the_last_turn_is_trained_where_asked(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), train_on="last", max_length=999)
    assert tree(renderer, {"messages": CHAT}) == (f"{START}one<|im_end|>{BETWEEN}", ["two <|im_end|>"])


def test_a_pair_of_messages_trains_nothing_of_its_prompt(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    raw = {"prompt": CHAT[:-1], "chosen": "too", "rejected": [assistant("to"), user("3"), assistant("x")]}
    after = "\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n"
    expected = (f"{START}one<|im_end|>{BETWEEN}", ["too<|im_end|>", f"to<|im_end|>[{after}]x<|im_end|>"])
    assert tree(renderer, raw) == expected


def test_the_model_is_asked_with_the_generation_prompt(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    asked = f"{START}one<|im_end|>{BETWEEN}"
    for raw in ({"messages": CHAT}, {"prompt": CHAT[:-1]}, {"prompt": CHAT[:-1], "completion": "two"}):
        assert "".join(pieces(renderer.tokenizer, renderer.prompt_ids(parse(raw)))) == asked


def test_generation_stops_at_the_turns_end_and_at_the_end_of_text(make_tokenizer: Any, chatml: str) -> None:
    ids = make_tokenizer(chatml).convert_tokens_to_ids
    assert Renderer(make_tokenizer(chatml), max_length=9).end_ids == ids(["<|im_end|>", "</s>"])
    assert Renderer(make_tokenizer(), max_length=9).end_ids == ids(["</s>"])


def test_a_template_that_writes_bos_gets_no_second_one(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer("{{ bos_token }}" + chatml), max_length=999)
    assert tree(renderer, {"messages": CHAT})[0] == START


def test_a_tokenizer_without_bos_adds_none(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml, bos=False), max_length=999)
    assert tree(renderer, {"messages": CHAT})[0] == START.removeprefix("<s>")


def test_control_tokens_within_a_message_are_text(make_tokenizer: Any, chatml: str) -> None:
    """The user's `<|im_end|>` becomes ten characters; the template's own stays one token, in prompt and answer."""
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    row = parse({"messages": [user("a<|im_end|>b"), assistant("c</s>d")]})
    rendered = renderer.tree_row(row)
    assert rendered.tree is not None
    assert rendered.notes == ("control tokens within messages are taken as text",)
    answer = rendered.tree.completions[0]
    assert pieces(renderer.tokenizer, answer.ids) == ["c", "<", "/", "s", ">", "d", "<|im_end|>"]
    asked = pieces(renderer.tokenizer, rendered.tree.prompt_ids)
    assert asked == ["<s>", "<|im_start|>", *"user\na<|im_end|>b", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
    assert renderer.prompt_ids(row) == rendered.tree.prompt_ids


def test_an_answer_that_opens_the_conversation_is_context(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=999)
    raw = {"messages": [assistant("Hi"), user("1"), assistant("one")]}
    opening = "<s><|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    assert tree(renderer, raw) == (opening, ["one<|im_end|>"])
    assert renderer.tree_row(parse(raw)).notes == ("an answer that opens the conversation is context, not trained",)


def test_decode_leaves_special_tokens_out(make_tokenizer: Any, chatml: str) -> None:
    renderer = Renderer(make_tokenizer(chatml), max_length=99)
    assert renderer.decode(renderer.tokenizer("ab<|im_end|>c</s>")["input_ids"]) == "abc"


# --- too long


def test_a_completion_is_cut_and_then_has_no_end_token(make_tokenizer: Any) -> None:
    """Prompt <s>,Q; "abc" and its end are 4 tokens, "xy" and its end 3. At 5 in all the first loses its end only."""
    renderer = Renderer(make_tokenizer(), max_length=5)
    raw = {"prompt": "Q", "chosen": "abc", "rejected": "xy"}
    assert tree(renderer, raw) == ("<s>Q", ["abc", "xy</s>"])
    rendered = renderer.tree_row(parse(raw))
    assert (rendered.cut_tokens, rendered.truncated_tokens) == ((1, 0), 1)


@pytest.mark.parametrize(
    ("raw", "max_length", "reason"),
    [
        ({"prompt": "QQQ", "completion": "A"}, 4, "the prompt leaves no room"),
        ({"prompt": "Q", "chosen": "abX", "rejected": "abY"}, 4, "the answers are equal after cutting"),
        (
            {"prompt": "Q", "completions": ["abX", "abY", "c"], "ranks": [1, 2, 3]},
            4,
            "the answers are equal after cutting",
        ),
        ({"messages": [user("QQQQ"), assistant("A")]}, 20, "the prompt leaves no room"),
    ],
)
def test_rows_that_teach_nothing_any_more_are_dropped(
    make_tokenizer: Any, chatml: str, raw: dict[str, Any], max_length: int, reason: str
) -> None:
    rendered = Renderer(make_tokenizer(chatml), max_length=max_length).tree_row(parse(raw))
    assert (rendered.tree, rendered.dropped) == (None, reason)


def test_equal_answers_that_were_ranked_equal_stay(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=4)
    assert renderer.tree_row(parse({"prompt": "Q", "completions": ["abX", "abY"], "ranks": [1, 1]})).dropped is None


def test_a_cut_conversation_ends_with_its_last_trained_token(make_tokenizer: Any, chatml: str) -> None:
    """Prompt: <s>, <|im_start|>, "user\\n", 1, <|im_end|>, newline, <|im_start|>, "assistant\\n" are 1+1+5+1+1+1+1+10 =
    21 tokens, "one" and its end 4 more. At 30 five tokens of the user's second turn would be left: they teach nothing.
    """
    renderer = Renderer(make_tokenizer(chatml), max_length=30)
    assert tree(renderer, {"messages": CHAT[1:]})[1] == ["one<|im_end|>"]


# --- comparisons


def test_a_ranking_is_all_its_comparisons_better_first(make_tokenizer: Any) -> None:
    """Ranks 2, 1, 2: the second beats both others, which tie. Three comparisons of three completions."""
    row = parse({"prompt": "Q", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]})
    rendered = Renderer(make_tokenizer(), max_length=9).tree_row(row)
    assert rendered.tree is not None
    assert len(rendered.tree.comparisons) == 3
    assert set(rendered.tree.comparisons) == {Comparison(1, 0, 1.0), Comparison(1, 2, 1.0), Comparison(0, 2, 0.5)}


@pytest.mark.parametrize("preference", [0.0, 0.5, 0.7])
def test_a_pairs_preference_is_kept_as_it_is(make_tokenizer: Any, preference: float) -> None:
    row = parse({"prompt": "Q", "chosen": "a", "rejected": "b", "preference": preference})
    rendered = Renderer(make_tokenizer(), max_length=9).tree_row(row)
    assert rendered.tree is not None
    assert rendered.tree.comparisons == (Comparison(0, 1, preference, 0.0),)


# --- all rows


def test_what_was_dropped_and_cut_is_listed(make_tokenizer: Any) -> None:
    raws = [
        {"prompt": "Q", "completion": "a"},
        {"prompt": "QQQQQ", "completion": "a"},
        {"prompt": "Q", "completion": "abcdef"},
    ]
    out = render_all(Renderer(make_tokenizer(), max_length=5).tree_row, [parse(raw, i) for i, raw in enumerate(raws)])
    assert [row.index for row in out.tree_rows] == [0, 2]
    assert out.dropped == [("rows.jsonl:2", "the prompt leaves no room")]
    assert (out.truncated, out.truncated_tokens, out.skipped) == (1, 4, 0)  # "abcdef" and its end are 7, 3 fit


def test_no_row_left_says_why_and_what_to_do(make_tokenizer: Any) -> None:
    rows = [parse({"prompt": "QQQQQ", "completion": "a"}, i) for i in range(2)]
    with pytest.raises(UserError) as caught:
        render_all(Renderer(make_tokenizer(), max_length=5).tree_row, rows)
    assert str(caught.value) == (
        "no row is left of 2 (2: the prompt leaves no room); raise --max-length or shorten the prompts"
    )
    assert caught.value.exit_code == 2


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system\nturns') }}{% endif %}"


def test_a_role_that_the_template_refuses_is_told_with_its_place(
    make_tokenizer: Any, chatml: str, tmp_path: Path
) -> None:
    renderer = Renderer(make_tokenizer(REFUSING + chatml), max_length=999)
    rows = [
        parse({"messages": CHAT[1:]}, 0),
        parse({"messages": CHAT}, 1),
        parse({"prompt": CHAT[:2], "completion": "A"}, 2),
    ]
    refusal = "the chat template refuses this conversation (no system turns)"
    with pytest.raises(UserError) as caught:
        render_all(renderer.tree_row, rows)
    assert str(caught.value) == f"rows.jsonl:2: messages: {refusal} (and 1 more bad row; --skip-bad sets them aside)"
    with pytest.raises(UserError) as caught:
        renderer.prompt_ids(rows[2])
    assert str(caught.value) == f"rows.jsonl:3: prompt: {refusal}"
    aside = tmp_path / "bad.jsonl"
    aside.write_text("from reading\n")
    assert (render_all(renderer.tree_row, rows, skip_bad=aside).skipped, len(aside.read_text().splitlines())) == (2, 3)


def test_a_row_without_completions_cannot_be_trained_on(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        Renderer(make_tokenizer(), max_length=9).tree_row(parse({"prompt": "Q"}))


# --- what cannot work


def test_a_max_length_without_room_for_an_answer(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="^max_length: 1, must be at least 2"):
        Renderer(make_tokenizer(), max_length=1)


def test_a_tokenizer_without_any_end(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="^the tokenizer has no end token"):
        Renderer(make_tokenizer(eos_token=None), max_length=9)


def test_a_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="^the tokenizer Slow tells no offsets"):
        Renderer(Slow(), max_length=9)  # type: ignore[arg-type]


# --- the real model and data


def test_the_real_pairs_at_the_real_context(shared: Path) -> None:
    """A row is dropped exactly where the plain template's text of its prompt, written out here by hand, fills the
    context of 512 tokens, and the model is asked with exactly that text's tokens.
    """
    from transformers import AutoTokenizer

    from lowrank_align.data.load import load_rows

    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models" / "stories260k"))
    renderer = Renderer(tokenizer, max_length=512)
    assert (renderer.template_source, renderer.end_ids, renderer.pad_id) == ("plain", [2], 0)
    rows = load_rows(shared / "data" / "dpo_en_demo.json", expect={Shape.pair}).rows
    form = {"system": "{}\n\n", "user": "User: {}\n", "assistant": "Assistant: {}</s>\n"}
    too_long = []
    for row in rows:
        turns = [form[m["role"]].format(m["content"].strip()) for m in row.prompt]  # type: ignore[index]
        ids = tokenizer("".join(turns) + "Assistant:")["input_ids"]
        assert renderer.prompt_ids(row) == ids
        if len(ids) >= 512:
            too_long.append(row.where)
    out = render_all(renderer.tree_row, rows)
    assert [where for where, _ in out.dropped] == too_long
    assert len(out.tree_rows) + len(too_long) == 299
    for tree_row in out.tree_rows:
        for completion in tree_row.completions:
            length = len(tree_row.prompt_ids) + len(completion.ids)
            assert length <= 512
            assert (completion.ids[-1] == 2) or length == 512
            assert all(completion.mask)


def test_an_answer_that_was_cut_gets_no_end_token(make_tokenizer: Any, chatml: str) -> None:
    """`generate` writes `finished: false` where an answer only ran out of room; it did not end there."""
    renderer = Renderer(make_tokenizer(chatml), max_length=99)
    assert tree(renderer, {"prompt": "Q:", "completion": " yes"}) == ("<s>Q:", [" yes</s>"])
    assert tree(renderer, {"prompt": "Q:", "completion": " yes", "finished": False}) == ("<s>Q:", [" yes"])
    chat = {"prompt": [user("Q")], "completion": [assistant("yes")]}
    assert tree(renderer, chat)[1] == ["yes<|im_end|>"]
    assert tree(renderer, chat | {"finished": False})[1] == ["yes"]
