"""Tokenizers whose tokens can be read off the text: one a character, but for special tokens and merges."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from lowrank_align.data.audit import Audit

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """`make_tokenizer(template, bos=True, special=..., merges=...)`; `</s>` ends a text, `<s>` is added if `bos`."""

    def make(
        template: str | dict[str, str] | None = None,
        *,
        bos: bool = True,
        special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
        merges: Sequence[tuple[str, str]] = (),
        **kwargs: str,
    ) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = [*letters, *("".join(merge) for merge in merges)]
        core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<s>", "</s>", *special])
        if bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
            )
            kwargs = {"bos_token": "<s>", **kwargs}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>", **kwargs})
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml() -> str:
    """The template of Qwen2 and many others, without a default system text."""
    return CHATML


@pytest.fixture
def audit(tmp_path: Path, make_tokenizer: MakeTokenizer) -> Callable[..., "Audit"]:
    """`audit(rows, held_out, ...)` of `rows.jsonl` and `held.jsonl`; a row may be a raw line. Pad is `<pad>`."""
    from lowrank_align.data.audit import UNCUT, audit_rows, read_rows, special_tokens
    from lowrank_align.data.chat import Renderer

    def read(name: str, rows: list[Any]) -> Any:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_rows(str(tmp_path / name))

    def run(
        rows: list[Any],
        held_out: list[Any] | None = None,
        *,
        template: str | None = None,
        max_length: int = 99,
        context: int = 1000,
        train_on: Any = "all",
        chat_template: str | None = None,
        **tokenizer: Any,
    ) -> "Audit":
        special = ("<|im_start|>", "<|im_end|>", "<|extra|>", "<pad>")
        made = make_tokenizer(template, **{"pad_token": "<pad>", "special": special, **tokenizer})
        whole, cut = (
            Renderer(made, max_length=length, train_on=train_on, chat_template=chat_template)
            for length in (UNCUT, max_length)
        )
        return audit_rows(
            read("rows.jsonl", rows),
            read("held.jsonl", held_out) if held_out is not None else None,
            special_tokens(cut, chat_template),
            whole=whole,
            cut=cut,
            context_tokens=context,
            plain_asked_for=chat_template == "plain",
        )

    return run
