"""Per-token log-probabilities, entropies and scalar scores from hidden states, never a [B, T, V] tensor.

Only completion positions go through the head, in chunks whose logits are gone before the next one's are made, so the
peak is one chunk x vocabulary whatever the batch and the length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowrank_align.trees import TreeBatch

# One chunk's fp32 logits. Large enough that the head's GEMM is efficient, small beside the weights of any real model.
CHUNK_BYTES = 64 * 2**20


class TokenScores(NamedTuple):
    """What a policy says about N completions of at most C tokens; 0 where `completion_mask` is 0."""

    per_token_logps: Tensor  # (N, C)
    entropy: Tensor  # (N, C) nats, without gradient
    is_top: Tensor  # (N, C) 1.0 where the token was the likeliest one, without gradient

    @property
    def logps(self) -> Tensor:
        """(N,) summed over the tokens that count."""
        return self.per_token_logps.sum(dim=1)


class LogitsHead:
    """The step from a model's last hidden state to its logits, with what the family does to them afterwards.

    Gemma caps them (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides (`logits_scaling`).
    The load-time probe compares the result with the model's own logits.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.model = model
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale: float = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.vocabulary: int = config.vocab_size

    @property
    def trains(self) -> bool:
        """Whether an adapter on the head itself is trained."""
        return any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters())

    def __call__(self, hidden: Tensor) -> Tensor:
        """(M, H) -> (M, V), fp32."""
        projection: nn.Module = self.model.get_output_embeddings()  # looked up: an adapter may have wrapped it
        weight = getattr(projection, "weight", None)
        if weight is not None and weight.is_floating_point():
            hidden = hidden.to(weight.dtype)
        logits = projection(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class OwnLogits(LogitsHead):
    """The model's own path for a family whose logits `LogitsHead` does not reproduce.

    Its forward runs with the backbone stood in for by the hidden states, so whatever it does to logits is done.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.backbone = model.get_decoder()

    def __call__(self, hidden: Tensor) -> Tensor:
        output = BaseModelOutputWithPast(last_hidden_state=hidden[None])
        self.backbone.forward = lambda *_args, **_kwargs: output  # shadows the class's method on this instance
        try:
            placeholder = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=placeholder, use_cache=False).logits[0].float()
        finally:
            del self.backbone.forward


def token_scores(hidden: Tensor, batch: TreeBatch, head: LogitsHead, *, temperature: float = 1.0) -> TokenScores:
    """Log-probabilities of the tokens that count, from hidden states (R, T, H) of `batch`.

    `temperature` divides the logits, as it does when sampling, so that old, new and reference log-probs agree.
    """
    return TokenScores(*_of_tokens(hidden, batch, head, temperature, _score_chunk, 3))


def token_logps(hidden: Tensor, batch: TreeBatch, head: LogitsHead, *, temperature: float = 1.0) -> Tensor:
    """(N, C) the log-probabilities alone, without gradient: all that is asked of a reference."""

    def score(states: Tensor, targets: Tensor, head: LogitsHead, temperature: float) -> tuple[Tensor]:
        return (_measure(_logits(head, states, temperature), targets, thoroughly=False)[0],)

    with torch.no_grad():
        return _of_tokens(hidden, batch, head, temperature, score, 1)[0]


def token_kl(
    hidden: Tensor,
    batch: TreeBatch,
    reference_hidden: Tensor,
    reference_batch: TreeBatch,
    head: LogitsHead,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """(N, C) KL(reference || policy) in nats, exact over the vocabulary, before each token that counts; else 0.

    The two batches hold the same completions behind prompts that may differ. Gradients reach `hidden` alone; the head
    is one and the same for both.
    """
    chosen = batch.completion_mask.flatten().nonzero().squeeze(1)  # (M,) of N * C
    states, reference = (
        states.flatten(0, 1).index_select(0, where.predict_from.flatten()[chosen])
        for states, where in ((hidden, batch), (reference_hidden.detach(), reference_batch))
    )

    def divergence(states: Tensor, reference: Tensor) -> Tensor:
        logps = (head(states) / temperature).log_softmax(-1)
        ref_logps = (head(reference) / temperature).log_softmax(-1)
        return (ref_logps.exp() * (ref_logps - logps)).sum(-1)

    size = max(16, CHUNK_BYTES // (8 * head.vocabulary))
    parts = []
    for i in range(0, len(chosen), size):
        piece = (states[i : i + size], reference[i : i + size])
        if torch.is_grad_enabled() and states.requires_grad:
            parts.append(checkpoint(divergence, *piece, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(divergence(*piece))
    zeros = torch.zeros(batch.targets.numel(), device=hidden.device)
    return zeros.index_put((chosen,), torch.cat(parts) if parts else zeros[:0]).view(batch.targets.shape)


def scalar_scores(hidden: Tensor, batch: TreeBatch, head: nn.Linear) -> Tensor:
    """(N,) the scalar head at each completion's last real token: a reward model's raw score."""
    return head(hidden.flatten(0, 1).index_select(0, batch.last_token_at).to(head.weight.dtype)).squeeze(-1)


def scalar_values(hidden: Tensor, batch: TreeBatch, head: nn.Linear) -> Tensor:
    """(N, C) the scalar head at the state *before* each token: a value model's V(s_t); 0 on padding."""
    states = hidden.flatten(0, 1).index_select(0, batch.predict_from.flatten())
    values = head(states.to(head.weight.dtype)).view(batch.targets.shape)
    return values * batch.token_mask


Score = Callable[[Tensor, Tensor, LogitsHead, float], tuple[Tensor, ...]]


def _of_tokens(
    hidden: Tensor, batch: TreeBatch, head: LogitsHead, temperature: float, score: Score, columns: int
) -> list[Tensor]:
    """`score` of the tokens that count, chunk by chunk: so many columns, each (N, C) and 0 elsewhere."""
    chosen = batch.completion_mask.flatten().nonzero().squeeze(1)  # (M,) of N * C
    states = hidden.flatten(0, 1).index_select(0, batch.predict_from.flatten()[chosen])
    targets = batch.targets.flatten()[chosen]
    size = max(16, CHUNK_BYTES // (4 * head.vocabulary))
    parts = [score(states[i : i + size], targets[i : i + size], head, temperature) for i in range(0, len(chosen), size)]
    zeros = torch.zeros(batch.targets.numel(), device=hidden.device)
    found = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [zeros[:0]] * columns
    return [zeros.index_put((chosen,), column).view(batch.targets.shape) for column in found]


def _score_chunk(
    states: Tensor, targets: Tensor, head: LogitsHead, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, H), (m,) -> log-probs, entropies, is-top, each (m,); the logits are not kept for the backward pass."""
    if not (torch.is_grad_enabled() and (states.requires_grad or head.trains)):
        logps, entropy, is_top, _ = _measure(_logits(head, states, temperature), targets)
        return logps, entropy, is_top
    if not head.trains:
        found: tuple[Tensor, Tensor, Tensor] = _LogProbs.apply(states, targets, head, temperature)
        return found

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(head, states, temperature)
        logps = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(-1)
        _, entropy, is_top, _ = _measure(logits.detach(), targets)
        return logps, entropy, is_top

    recomputed: tuple[Tensor, Tensor, Tensor] = checkpoint(
        score, states, targets, use_reentrant=False, preserve_rng_state=False
    )
    return recomputed


class _LogProbs(torch.autograd.Function):
    """Log-probabilities under a frozen head, whose gradient is found while the logits are there.

    A token's log-probability depends on its own state alone, so its gradient is one vector times what comes from above:
    nothing is recomputed in the backward pass, and nothing of the vocabulary's size waits for it.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, head: LogitsHead, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = _logits(head, states, temperature)
        logps, entropy, is_top, probs = _measure(logits.detach(), targets)
        # d log p(target) / d logits = onehot(target) - probs
        slope = probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(logps)[:, None])
        ctx.save_for_backward(*torch.autograd.grad(logits, states, slope))
        ctx.mark_non_differentiable(entropy, is_top)
        return logps, entropy, is_top

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (above[0][:, None] * slope).to(slope.dtype), None, None, None


def _logits(head: LogitsHead, states: Tensor, temperature: float) -> Tensor:
    logits = head(states)
    return logits if temperature == 1.0 else logits / temperature


@torch.no_grad()
def _measure(logits: Tensor, targets: Tensor, thoroughly: bool = True) -> tuple[Tensor, ...]:
    """(m, V), (m,) -> log-probs and, if thoroughly, entropies and is-top, each (m,), and probabilities (m, V)."""
    highest, top = logits.max(-1)
    probs = (logits - highest[:, None]).exp_()
    total = probs.sum(-1)
    normaliser = highest + total.log()
    logps = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
    if not thoroughly:
        return (logps,)
    probs /= total[:, None]
    return logps, normaliser - torch.linalg.vecdot(probs, logits), (top == targets).float(), probs
