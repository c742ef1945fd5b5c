"""Per-token log-probabilities, entropies and scalar scores from hidden states, never a [B, T, V] tensor.

Only completion positions go through the head, in chunks whose logits are recomputed in the backward pass, so the peak
is one chunk x vocabulary whatever the batch and the length.
"""

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
    chosen = batch.completion_mask.flatten().nonzero().squeeze(1)  # (M,) of N * C
    states = hidden.flatten(0, 1).index_select(0, batch.predict_from.flatten()[chosen])
    targets = batch.targets.flatten()[chosen]
    per_chunk = max(16, CHUNK_BYTES // (4 * head.vocabulary))
    parts = [
        _score_chunk(states[i : i + per_chunk], targets[i : i + per_chunk], head, temperature)
        for i in range(0, len(chosen), per_chunk)
    ]
    zeros = torch.zeros(batch.targets.numel(), device=hidden.device)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [zeros[:0]] * 3
    return TokenScores(*(zeros.index_put((chosen,), column).view(batch.targets.shape) for column in columns))


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


def _score_chunk(
    states: Tensor, targets: Tensor, head: LogitsHead, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, H), (m,) -> log-probs, entropies, is-top, each (m,); the logits are not kept for the backward pass."""

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head(states) / temperature
        normaliser = logits.logsumexp(dim=-1)
        logps = logits.gather(1, targets[:, None]).squeeze(1) - normaliser
        with torch.no_grad():
            entropy = normaliser - (logits.softmax(-1) * logits).sum(-1)
            is_top = (logits.argmax(-1) == targets).float()
        return logps, entropy, is_top

    if not (torch.is_grad_enabled() and states.requires_grad):
        return score(states, targets)
    found: tuple[Tensor, Tensor, Tensor] = checkpoint(
        score, states, targets, use_reentrant=False, preserve_rng_state=False
    )
    return found
