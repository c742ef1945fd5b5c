"""Attention over tree rows: under a mask, or without the blocks that a mask would throw away.

A dense mask over T = P + C1 + ... + CK tokens computes T^2 scores, where P^2 + sum(Ck (P + Ck)) are enough. On a CPU
SDPA takes no mask with holes, so the prompt is attended for by itself, and each completion behind it with a mask of its
own. Both are in one autograd function, which keeps queries, keys, values and what was attended for once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from lowrank_align.trees import TreeBatch, attention_mask

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TreeAttention:
    """Who sees whom in a batch, as one model takes it."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.window: int | None = getattr(config, "sliding_window", None)
        self.masks_by_kind = bool(getattr(config, "layer_types", None))  # a dict of masks, by the kind of a layer
        # Piece by piece instead of under a mask; the probe takes it back where a family does not pass it on.
        self.in_pieces = device.type == "cpu" and config._attn_implementation == "sdpa"

    def inputs(self, batch: TreeBatch) -> dict[str, Any]:
        """What the backbone is given beside the ids (R, T)."""
        if self.takes_pieces(batch):
            pieces = pieces_of(batch, self.dtype)
            return {"attention_mask": self._no_mask(), "position_ids": batch.position_ids, "tree_pieces": pieces}
        if batch.layout == "tree" or batch.hidden is not None:
            return {"attention_mask": self._mask(batch), "position_ids": batch.position_ids}
        return {"attention_mask": (batch.segment_ids >= 0).long()}

    def takes_pieces(self, batch: TreeBatch) -> bool:
        """Whether no mask is needed: no window is shorter than the rows, and no token is hidden from later ones."""
        short = self.window is None or int(batch.position_ids.max()) < self.window
        return self.in_pieces and batch.layout == "tree" and batch.hidden is None and short

    def _no_mask(self) -> Tensor | dict[str, Tensor]:
        """A mask that hides nothing: with it a model makes none of its own."""
        nothing = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        return dict.fromkeys(("full_attention", "sliding_attention"), nothing) if self.masks_by_kind else nothing

    def _mask(self, batch: TreeBatch) -> Tensor | dict[str, Tensor]:
        if not self.masks_by_kind:
            return self._added(attention_mask(batch, self.window))
        masks = {"full_attention": self._added(attention_mask(batch))}
        if self.window is not None:
            masks["sliding_attention"] = self._added(attention_mask(batch, self.window))
        return masks

    def _added(self, mask: Tensor) -> Tensor:
        """As what is added to attention's scores; made of a bool mask, SDPA would keep such a copy for every layer."""
        blocked = torch.finfo(self.dtype).min
        return torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, blocked)


class Pieces(NamedTuple):
    """One row: the tokens of its prompt, and of each completion with its mask."""

    prompt: int
    completions: list[tuple[int, Tensor]]  # length C, mask (1, 1, C, P + C) that is added to the scores


def pieces_of(batch: TreeBatch, dtype: torch.dtype) -> list[Pieces]:
    """What `tree_attention` has to know of every row."""
    device = batch.segment_ids.device

    def not_later(prompt: int, length: int) -> Tensor:
        later = torch.full((length, prompt + length), torch.finfo(dtype).min, dtype=dtype, device=device)
        return later.triu_(prompt + 1)[None, None]

    return [Pieces(prompt, [(n, not_later(prompt, n)) for n in lengths]) for prompt, *lengths in batch.lengths]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_pieces: list[Pieces] | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' SDPA, (R, heads, T, D) -> (R, T, heads, D); with `tree_pieces` by those, not by its mask."""
    if tree_pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    groups = query.shape[1] // key.shape[1]
    found: Tensor = _InPieces.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), tree_pieces, scaling)
    return found, None


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: list[Pieces], scale: float | None) -> Tensor:
        rows_, heads, tokens, width = query.shape
        found = value.new_zeros(rows_, tokens, heads, value.shape[-1])  # as the next layer takes it
        normalisers = []
        for r, row in enumerate(rows):
            for start, end, mask in _spans(row):
                q, out = query[r : r + 1, :, start:end], found[r : r + 1, start:end].transpose(1, 2)
                k, v = (_behind_prompt(t[r : r + 1], row.prompt, start, end) for t in (key, value))
                attended, normaliser = attend(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
                out.copy_(attended)
                normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, found, *normalisers)
        ctx.rows, ctx.scale = rows, scale
        return found

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, found, *normalisers = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (query, key, value)]
        place = iter(normalisers)
        for r, row in enumerate(ctx.rows):
            for start, end, mask in _spans(row):
                here = slice(r, r + 1), slice(None), slice(start, end)
                k, v = (_behind_prompt(t[r : r + 1], row.prompt, start, end) for t in (key, value))
                g, out = (t[r : r + 1, start:end].transpose(1, 2) for t in (above, found))
                parts = attend_backward(
                    g, query[here], k, v, out, next(place), 0.0, mask is None, attn_mask=mask, scale=ctx.scale
                )
                grads[0][here] = parts[0]
                for grad, part in zip(grads[1:], parts[1:], strict=True):
                    if mask is not None:
                        grad[r : r + 1, :, : row.prompt] += part[:, :, : row.prompt]
                    grad[here] += part[:, :, -(end - start) :]
        return *grads, None, None


def _spans(row: Pieces) -> list[tuple[int, int, Tensor | None]]:
    """First and last column and mask of the prompt (none: causal) and of each completion."""
    spans: list[tuple[int, int, Tensor | None]] = [(0, row.prompt, None)]
    for length, mask in row.completions:
        spans.append((spans[-1][1], spans[-1][1] + length, mask))
    return spans


def _behind_prompt(states: Tensor, prompt: int, start: int, end: int) -> Tensor:
    """Keys or values (1, heads, T, D) of the prompt, and of the completion in these columns behind them."""
    if start <= prompt:  # the prompt itself, or the completion that stands next to it
        return states[:, :, :end]
    return torch.cat([states[:, :, :prompt], states[:, :, start:end]], dim=2)


AttentionInterface.register("sdpa", tree_attention)  # without `tree_pieces` it is transformers' own
