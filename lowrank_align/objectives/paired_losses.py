"""All losses on pairs by name. A loss's keyword arguments are named as the settings that set them."""

from collections.abc import Callable

from torch import Tensor

from lowrank_align.objectives.paired import hinge, ipo, robust, sigmoid
from lowrank_align.objectives.reference_free import cpo, nll, orpo, simpo, token_unlikelihood, unlikelihood
from lowrank_align.objectives.segments import cpl, cpl_kl

PAIRED_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "nll": nll,
    "unlikelihood": unlikelihood,
    "token_unlikelihood": token_unlikelihood,
    "cpl": cpl,
    "cpl_kl": cpl_kl,
}


def paired_loss(name: str) -> Callable[..., Tensor]:
    """The loss of that name: `loss(chosen: Side, rejected: Side, *, knobs) -> (P,)`. ValueError for an unknown one."""
    if name not in PAIRED_LOSSES:
        raise ValueError(f"loss: {name!r} is no loss on pairs (known: {', '.join(PAIRED_LOSSES)})")
    return PAIRED_LOSSES[name]
