"""Prompts -> sampled completions, with generators of our own so that a resumed run draws what it would have drawn."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from lowrank_align.base import Base
from lowrank_align.cache import cache_for
from lowrank_align.errors import NoNumbers

STREAM_ROOM = 512  # new tokens for which a streamed answer's cache has room at once; it grows where there are more
SLICE_SECONDS = 0.25  # a run's rollouts give way to people so often, not at every token


@dataclass(frozen=True)
class Rollout:
    """One sampled completion; `ids` end with the end token where it `finished` by itself."""

    prompt_ids: list[int]
    ids: list[int]
    finished: bool


@torch.no_grad()
def sample(
    base: Base,
    prompts: Sequence[list[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    completions_per_prompt: int = 1,
    batch_size: int = 32,
    only: Sequence[int] | None = None,
) -> list[list[Rollout]]:
    """Completions of every prompt under the active role, in the order of the prompts.

    `temperature` 0 takes the likeliest token. Nothing but it and `top_p` changes the distribution: no top-k, no
    repetition penalty, whatever the model's own generation settings say. `generator` lives on the base's device; every
    completion has a noise of its own from it, so `batch_size` changes none, nor does `only`: the places of the prompts
    to answer, where others answer the rest. Raises NoNumbers where the model gives no finite probabilities: an arg-max
    would make an answer all the same.
    """
    found: dict[int, list[Rollout]] = {}
    seeds = _seeds(generator, len(prompts) * completions_per_prompt)
    places = range(len(prompts)) if only is None else only
    between = partial(base.turns.give_way, SLICE_SECONDS)
    with inference(base), base.dense_copies():
        for chunk in _chunks(base, prompts, places, max(1, batch_size // completions_per_prompt)):
            for first, copies in _shares(completions_per_prompt, batch_size):
                rows = [i * completions_per_prompt + first + k for i in chunk for k in range(copies)]
                sampler = _Sampler(temperature, top_p, base.device, [seeds[row] for row in rows], between)
                ids = _generate(base, [prompts[i] for i in chunk], sampler, end_ids, max_new_tokens, copies)
                if sampler.finite is not None and not sampler.finite:
                    raise NoNumbers("the model's probabilities for the next token are not finite")
                for place, i in enumerate(chunk):
                    mine = ids[place * copies : (place + 1) * copies]
                    found.setdefault(i, []).extend(_until_end(prompts[i], row.tolist(), set(end_ids)) for row in mine)
    return [found[i] for i in places]


def stream(
    base: Base,
    prompt_ids: Sequence[int],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Iterator[int]:
    """One completion of one prompt, token by token, the end token among them: what `sample` draws of that prompt alone.

    It speaks under the role that is active when it is called, and enters it for each token anew: between two tokens,
    and where the rest is not wanted, the base is as it was.
    """
    return _stream(
        base,
        base.active_role.name,
        list(prompt_ids),
        set(end_ids),
        max_new_tokens,
        _Sampler(temperature, top_p, base.device, _seeds(generator, 1)),
    )


@torch.no_grad()
def fill_cache(base: Base, prompts: Sequence[list[int]], new_tokens: int) -> None:
    """Hold, for a moment, what sampling answers of `new_tokens` to these prompts together holds at its end.

    What stands for the answers goes through in pieces no longer than the prompts, so that the cache alone grows.
    """
    width = max(map(len, prompts))
    cache = _cache(base, width + new_tokens)
    with inference(base), base.autocast():
        for start in range(0, width + new_tokens, width):
            piece = torch.zeros(len(prompts), min(width, width + new_tokens - start), dtype=torch.long)
            out = base.model(
                input_ids=piece.to(base.device), past_key_values=cache, use_cache=True, **_last_logits(base)
            )
            cache = out.past_key_values


@contextmanager
def inference(base: Base) -> Iterator[None]:
    """Evaluation mode (a cache, no checkpointing, no dropout) without the model's own generation settings, and back.

    `generate` would fill what a call leaves open from those: penalties, forced and forbidden tokens, beams.
    """
    training, own_settings = base.model.training, base.model.generation_config
    base.model.eval()
    base.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.model.generation_config = own_settings
        base.model.train(training)


def generator_for(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator of one purpose, seeded by what it is for (seed, step, name): nothing to save, nothing shared."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def seed_of(*parts: int | str) -> int:
    """A seed that belongs to one purpose."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Sampler(LogitsProcessor):
    """Draws from softmax(logits / temperature) as an arg-max over logits + Gumbel noise (arXiv 1611.01144, eq. 1).

    `generate` takes no generator; under its greedy search, this makes the draw, and the draw alone, ours. Each row has
    a generator of its own, so that its noise is the same whatever rows stand beside it.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        device: torch.device,
        seeds: Sequence[int],
        between_tokens: Callable[[], None] | None = None,
    ) -> None:
        self.temperature, self.between_tokens = temperature, between_tokens
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1.0 else None
        self.finite: Tensor | None = None  # () bool: so were the highest logits of all tokens; the device keeps it

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.between_tokens is not None:
            self.between_tokens()
        finite = scores.amax(-1).isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite
        if self.temperature == 0:
            return scores
        logits = scores.float() / self.temperature
        if self.nucleus is not None:
            logits = self.nucleus(input_ids, logits)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return logits - noise.log_()


def _stream(
    base: Base, role: str, ids: list[int], end_ids: set[int], max_new_tokens: int, sampler: _Sampler
) -> Iterator[int]:
    """`stream`'s generator: the prompt, then each new token alone, with a cache of the model's own kind."""
    options = _last_logits(base)
    cache = _cache(base, len(ids) + min(max_new_tokens, STREAM_ROOM))
    for _ in range(max_new_tokens):
        mode = inference(base) if base.model.training else nullcontext()  # it visits every module: not for nothing
        with base.role(role), mode, torch.no_grad(), base.autocast():
            step = torch.tensor([ids], device=base.device)
            out = base.model(input_ids=step, past_key_values=cache, use_cache=True, **options)
            token, cache = int(sampler(step, out.logits[:, -1].float()).argmax(-1)), out.past_key_values
        ids = [token]
        yield token
        if token in end_ids:
            return


def _last_logits(base: Base) -> dict[str, int]:
    """The argument with which a model computes the logits of the last token alone, where it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.model.forward).parameters else {}


def _generate(
    base: Base, prompts: list[list[int]], sampler: _Sampler, end_ids: Sequence[int], max_new_tokens: int, copies: int
) -> Tensor:
    """(prompts x copies, new tokens); what follows an end token is padding."""
    width = max(map(len, prompts))
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else end_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(end_ids), pad_token_id=pad, use_cache=True
    )
    cache = _cache(base, width + max_new_tokens)
    with base.autocast():
        if copies > 1:
            if cache is not None and width > 1:  # one prefill serves all completions of a prompt
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
                base.model(
                    input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, use_cache=True,
                    past_key_values=cache, logits_to_keep=1,
                )  # fmt: skip
                cache.batch_repeat_interleave(copies)
            ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        tokens = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )
    return tokens[:, width:]


def _cache(base: Base, tokens: int) -> DynamicCache | None:
    """A cache with room for so many tokens; None where layers keep a state instead, which the model makes by itself."""
    return cache_for(base.model, tokens) if base.layout == "tree" else None


def _seeds(generator: torch.Generator, count: int) -> list[int]:
    """A seed for each completion's own noise."""
    return torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()


def _shares(copies: int, size: int) -> list[tuple[int, int]]:
    """A prompt's completions in as many parts as it takes to draw no more than `size` at once: (first, how many)."""
    return [(start, min(size, copies - start)) for start in range(0, copies, size)]


def _chunks(base: Base, prompts: Sequence[list[int]], places: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of prompts that run together. A recurrent state would run over left padding, so there equal lengths."""
    order = list(places)
    groups = [order]
    if base.layout == "flat":
        order.sort(key=lambda i: len(prompts[i]))
        groups = [list(g) for _, g in groupby(order, key=lambda i: len(prompts[i]))]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _until_end(prompt: list[int], ids: list[int], end_ids: set[int]) -> Rollout:
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    return Rollout(prompt, ids if end is None else ids[: end + 1], end is not None)
