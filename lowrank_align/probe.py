"""What is tried once when a model is loaded, on random tokens, instead of trusting a list of model names.

- Sliding windows are longer than the probe's rows and so not tried here; the tests do that for known families.
- Do completions of a tree row stay apart, and do they get the log-probs of separate rows? Layers with a recurrent state
  (mamba, gated delta nets, convolutions) leak from one completion into the next; such models get flat rows.
- Does our head give the model's own logits? Where a family does something to them that we do not know, the scorer
  takes the model's own path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowrank_align.errors import UserError
from lowrank_align.scoring import LogitsHead, OwnLogits
from lowrank_align.trees import Completion, Layout, TreeRow, collate

if TYPE_CHECKING:
    from lowrank_align.base import Base

log = logging.getLogger(__name__)

# Random 16-bit models agree to about 1e-2; a prompt that a completion does not see costs nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
PROBE_TOKENS = 6


@torch.no_grad()
def choose_layout(base: Base) -> Layout:
    """`tree` where completions neither see each other nor differ from separate rows, else `flat` with one log line.

    Attention in pieces is tried first; a family that does not hand them down gets the mask.
    """
    if base.attention.in_pieces:
        base.attention.in_pieces = _why_not_tree(base) is None
        if base.attention.in_pieces:
            return "tree"
    reason = _why_not_tree(base)
    if reason is None:
        return "tree"
    log.warning("%s: uses flat rows: %s", base.name, reason)
    return "flat"


def _why_not_tree(base: Base) -> str | None:
    ids = _random_ids(base, 4)
    row = _row(ids[0], [ids[1], ids[2]])
    other = _row(ids[0], [ids[3], ids[2]])  # only the first completion differs
    try:
        with _each_token_rounded_alone(base.model):
            tree = _logps(base, row, "tree")
            leak = (tree[1] - _logps(base, other, "tree")[1]).abs().max().item()
            gap = (tree - _logps(base, row, "flat")).abs().max().item()
    except (AttributeError, ValueError, TypeError, RuntimeError, KeyError) as error:
        return f"the model takes no tree mask ({str(error).splitlines()[0]})"
    # The masked-out tokens do not enter an attention sum at all, so a leak shows in any precision.
    tolerance = _tolerance(base)
    if leak <= min(tolerance, 1e-4) and gap <= tolerance:
        return None
    return f"its layers carry state from one completion to the next (leak {leak:.1e}, gap {gap:.1e} nats)"


@torch.no_grad()
def hides_tokens(base: Base) -> bool:
    """Whether a token can be hidden from the later ones: another in its place makes no difference to them.

    Layers with a recurrent state remember what attention is not allowed to see.
    """
    ids = _random_ids(base, 3)
    here = len(ids[0]) // 2
    marks = [i == here for i in range(PROBE_TOKENS)]
    rows = [_row([*ids[0][:here], other, *ids[0][here + 1 :]], [ids[1]]) for other in (ids[0][here], ids[2][0])]
    try:
        said = [_logps(base, replace(row, prompt_hidden=marks), base.layout) for row in rows]
    except (AttributeError, ValueError, TypeError, RuntimeError, KeyError):
        return False
    return (said[0] - said[1]).abs().max().item() <= min(_tolerance(base), 1e-4)


@torch.no_grad()
def choose_logits(base: Base) -> LogitsHead:
    """Our head where it gives the model's own logits, else the model's own path; UserError where neither does."""
    ids = _random_ids(base, 2)
    batch = collate([_row(ids[0], [ids[1]])], "flat").to(base.device)
    hidden = base.hidden_states(batch)
    with base.autocast():
        theirs = base.model(input_ids=batch.input_ids, use_cache=False).logits.float().log_softmax(-1)
        for path in (base.logits_head, OwnLogits(base.model)):
            ours = path(hidden.flatten(0, 1)).view(theirs.shape).log_softmax(-1)
            if (ours - theirs).abs().max().item() <= _tolerance(base):
                if path is not base.logits_head:
                    log.warning(
                        "%s: changes its logits in a way of its own; scoring takes the model's own path", base.name
                    )
                return path
    raise UserError(
        f"{base.name}: its logits cannot be computed from its last hidden states; this model is not supported"
    )


@contextmanager
def _each_token_rounded_alone(model: Any) -> Iterator[None]:
    """int8 layers spare the columns in which any token of the batch has an outlier; that rounding looks like a leak."""
    states = [m.state for m in model.modules() if hasattr(m, "state") and hasattr(m.state, "threshold")]
    thresholds = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def _tolerance(base: Base) -> float:
    return TOLERANCE[base.compute_dtype]


def _random_ids(base: Base, groups: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.config.vocab_size, (groups, PROBE_TOKENS), generator=generator).tolist()


def _row(prompt: list[int], completions: list[list[int]]) -> TreeRow:
    return TreeRow(prompt, [Completion(ids, [True] * len(ids)) for ids in completions])


def _logps(base: Base, row: TreeRow, layout: Layout) -> torch.Tensor:
    return base.token_scores(collate([row], layout).to(base.device)).per_token_logps
