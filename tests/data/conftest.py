"""Tokenizers whose tokens can be read off the text: one a character, but for special tokens and merges."""

from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
