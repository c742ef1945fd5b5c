"""What `show` prints, in colour and without."""

import io
from typing import Any

from rich.console import Console

from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.data.show import print_rows


def printed(renderer: Renderer, raws: list[dict[str, Any]], n: int = 9, **console: Any) -> str:
    out = io.StringIO()
    rows = [parse_row(raw, f"rows.jsonl:{i + 1}", i) for i, raw in enumerate(raws)]
    print_rows(renderer, rows, n, Console(file=out, width=100, **console))
    return out.getvalue()


CHAT = {
    "messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "[two]"},
    ]
}


def test_without_colour_trained_tokens_stand_in_brackets(make_tokenizer: Any, chatml: str) -> None:
    """The completion: "one" and its end are 4 tokens, "[two]" and its end 6, the user's turn between them 21."""
    text = printed(Renderer(make_tokenizer(chatml), max_length=99), [CHAT], _environ={})
    assert "⟦one<|im_end|>⟧" in text
    assert "⟦[two]<|im_end|>⟧" in text
    assert "⟦trained⟧" in text
    assert "⟦<s>" not in text
    assert "rows.jsonl:1 · demonstration · 21 + 31 tokens" in text
    assert text.rstrip().endswith("1 of 1 rows · max_length 99 tokens · chat template: the model's own")


def test_in_colour_trained_tokens_are_green_and_the_prompt_is_dim(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer(), max_length=99)
    text = printed(
        renderer, [{"prompt": "Q", "completion": "A"}], force_terminal=True, color_system="standard", _environ={}
    )
    assert "\x1b[2m<s>Q\x1b[0m" in text
    assert "\x1b[32mA</s>\x1b[0m" in text
    assert "⟦" not in text


def test_a_pair_names_its_sides_and_shows_the_cut(make_tokenizer: Any) -> None:
    """Prompt <s>,Q; at 5 in all "abcdef" and its end lose 4 of 7 tokens."""
    pair = {"prompt": "Q", "chosen": "abcdef", "rejected": "x", "preference": 0.7, "margin": 2}
    text = printed(Renderer(make_tokenizer(), max_length=5), [pair])
    assert "chosen, preference 0.7, margin 2" in text
    assert "⟦abc⟧ [cut: 4 tokens more]" in text
    assert "⟦x</s>⟧" in text
    assert "pair · 2 + (3 + 2) tokens" in text


def test_ranks_conversions_and_dropped_rows_are_said(make_tokenizer: Any) -> None:
    ranking = {"prompt": "Q", "completions": ["a", "b"], "ranks": [2, 1]}
    alpaca = {"instruction": "Q" * 50, "output": "A"}
    text = printed(Renderer(make_tokenizer(), max_length=9), [ranking, alpaca, ranking], n=2)
    assert "rank 2" in text and "rank 1" in text
    assert "rows.jsonl:2 · demonstration · read as Alpaca" in text
    assert "dropped: the prompt leaves no room" in text
    assert "rows.jsonl:3" not in text and "2 of 3 rows" in text


def test_control_characters_are_escaped_and_nothing_is_markup(make_tokenizer: Any) -> None:
    text = printed(
        Renderer(make_tokenizer(), max_length=99), [{"prompt": "\x1b[31m\u202eQ\t", "completion": "[bold]A[/]\n1"}]
    )
    assert "\\x1b[31m\\u202eQ\\t" in text
    assert "⟦[bold]A[/]" in text
    assert "\x1b" not in text and "\u202e" not in text
