"""Makes `tiny`: a word tokenizer over the grammar's vocabulary and a Llama pretrained on its texts."""

import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lowrank_align.tiny.grammar import pretraining_text, vocabulary
from lowrank_align.tiny.recipe import Recipe

Progress = Callable[[int, int, float], None]  # (step from 1, steps, loss in nats a token)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
IGNORED = -100
BATCHES_SORTED = 8


def build_model(recipe: Recipe, progress: Progress | None = None) -> LlamaForCausalLM:
    """The pretrained model. Same recipe, versions and kind of CPU: same bytes; the caller's RNG stays as it was."""
    tokenizer = build_tokenizer(recipe)
    model = _new_model(recipe, vocabulary_size=len(tokenizer))
    with _threads(recipe.threads), torch.enable_grad():
        _train(model, tokenizer, recipe, progress)
    return model.eval()


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """One token a grammar word, one a byte for all other text: nothing is unknown, and decoding gives the text back.

    `<bos>` is put in front; `<eos>` is left to whoever renders the text.
    """
    pieces = [piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in vocabulary()]  # ByteLevel's own spelling
    bytes_left = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces))
    # a unigram model takes the segmentation of highest score: a word beats the bytes that spell it
    scores = [(token, 0.0) for token in SPECIAL_TOKENS] + [(p, -1.0) for p in pieces] + [(b, -10.0) for b in bytes_left]
    backend = Tokenizer(models.Unigram(scores, unk_id=UNK_ID))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=recipe.context_tokens,
        clean_up_tokenization_spaces=False,
    )


def save(model: LlamaForCausalLM, recipe: Recipe, folder: Path) -> None:
    """A plain transformers folder, as any other base model has."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    build_tokenizer(recipe).save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets nobody else read it


def _new_model(recipe: Recipe, vocabulary_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context_tokens,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # transformers initialises from the global generator
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


def _train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, progress: Progress | None
) -> None:
    """AdamW with a short warm-up and a cosine to zero; every batch is new text."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    model.train()
    for step, texts in enumerate(_batches(recipe), start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        loss = _loss(model, tokenizer, texts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step, recipe.steps, loss.item())


def _batches(recipe: Recipe) -> Iterator[list[tuple[str, str]]]:
    """`recipe.steps` batches of new texts, each of texts about as long, which spares a third of the padding."""
    rng = random.Random(recipe.seed)
    pool: list[list[tuple[str, str]]] = []
    for _ in range(recipe.steps):
        if not pool:
            texts = [pretraining_text(rng, recipe.chat_share) for _ in range(BATCHES_SORTED * recipe.batch_size)]
            texts.sort(key=lambda pair: " ".join(pair).count(" "))
            pool = [texts[i : i + recipe.batch_size] for i in range(0, len(texts), recipe.batch_size)]
            rng.shuffle(pool)
        yield pool.pop()


def _loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross-entropy in nats a learnt token, `<eos>` included."""
    ids, targets = collate(tokenizer, batch)
    logits = model(ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def collate(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, text) pairs to ids (B, T), padded on the right where causality hides it, and targets (B, T).

    Only the text and its `<eos>` are targets: what a user types is no more to be learnt than padding.
    """
    contexts = tokenizer([context for context, _ in batch])["input_ids"]
    texts = tokenizer([text for _, text in batch], add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([*context, *text, EOS_ID]) for context, text in zip(contexts, texts, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    targets = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    for row, context in enumerate(contexts):
        targets[row, : len(context)] = IGNORED
    return ids, targets


def _schedule(step: int, recipe: Recipe) -> float:
    if step <= recipe.warmup_steps:
        return step / recipe.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
