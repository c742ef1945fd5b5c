"""The proof that an export is what was trained: the stages of the comparison, one model in memory at a time."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_align.base import Base
from lowrank_align.evaluate import parity, parties
from lowrank_align.evaluate.parity import Distance, Probe, Reading
from lowrank_align.evaluate.precision import fp32_arithmetic
from lowrank_align.export.companions import classifier_pad
from lowrank_align.export.merge import quantised_layers
from lowrank_align.export.source import NAMES, Job
from lowrank_align.export.verify import WeightCheck
from lowrank_align.roles import BARE
from lowrank_align.runs import SAMPLES, read_metrics

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The prompts, answered by base + adapter; what that says of them; how far the adapter moved it from the base."""

    probes: list[Probe]
    truth: Reading
    effect: Distance | None


def read_reference(job: Job) -> Reference:
    """Base + adapter before anything is exported. Sets `job.layers` where the weights as trained are wanted."""
    source = job.source
    with parties.reference(source, job.device, job.nf4) as base:
        if job.nf4:
            job.layers = quantised_layers(base.model)
        if job.is_reward:
            probes = parity.answered(source.renderer, source.context)
            return Reference(probes, _read_base(job, base, probes, parties.ROLE), None)
        own = list(dict.fromkeys(str(line.get("prompt", "")) for line in read_metrics(source.run / SAMPLES)))
        asked = parity.questions(source.renderer, own[-parity.RUN_PROMPTS :], source.context)
        probes = parity.continued(base, parties.ROLE, asked, source.renderer.end_ids)
        truth = _read_base(job, base, probes, parties.ROLE)
        return Reference(probes, truth, _distance(job, truth, _read_base(job, base, probes, BARE), probes))


def prove(
    job: Job, folder: Path, reference: Reference, weights: WeightCheck | None, facts: dict[str, Any], say: Say
) -> tuple[bool, dict[str, Any]]:
    """Whether the model in `folder` is what was trained, and `parity.json` with a summary in words.

    `weights` is what reading its files back gave, `facts` what the GGUF file gave.
    """
    probes = reference.probes
    say("reading the export")
    found, moved = _read_exported(job, folder, probes)
    near, floor = _distance(job, reference.truth, found, probes), _distance(job, found, moved, probes)
    trained = None
    if job.source.trained_with in ("nf4", "int8"):
        say("reading the policy as trained")
        trained = _distance(job, _read_trained(job, probes), found, probes)
    spread = torch.cat(reference.truth).std().item() if job.is_reward else 0.0
    wrong = facts.get("gguf", {}).get("wrong")
    passed = near.within(floor) and (weights is None or weights.passed) and not wrong
    measured = {"export": near, "another_rounding": floor, "adapter_effect": reference.effect, "as_trained": trained}
    return passed, {
        "passed": passed,
        "summary": _summary(job, measured, weights, facts.get("gguf"), near.within(floor), spread),
        "precision": f"weights in {NAMES[job.dtype]}, arithmetic in fp32",
        "base_weights": "dequantised NF4" if job.nf4 else "the base's own",
        "prompts": len(probes),
        "tokens": sum(len(probe.ids) - probe.start for probe in probes),
        **{name: _known(distance) for name, distance in measured.items() if distance is not None},
        **({"weights": asdict(weights)} if weights is not None else {}),
        **facts,
        "answers": [_answer(job, probe) for probe in probes if probe.text],
    }


def _read_exported(job: Job, folder: Path, probes: list[Probe]) -> tuple[Reading, Reading]:
    """What the export says, and what it would say rounded otherwise."""
    rounding = torch.float32 if job.is_adapter else job.dtype
    with parties.exported(job.source, folder, job.device, adapter=job.is_adapter) as model:
        with fp32_arithmetic(model):
            found = _read_plain(job, model, probes)
        with fp32_arithmetic(model, rounding):
            return found, _read_plain(job, model, probes)


def _read_trained(job: Job, probes: list[Probe]) -> Reading:
    with parties.as_trained(job.source, job.device) as base:
        return _read_base(job, base, probes, parties.ROLE)


def _read_base(job: Job, base: Base, probes: list[Probe], role: str) -> Reading:
    if job.is_reward:
        return parity.read_reward(base, role, probes)
    with base.role(role), base.autocast():
        return parity.read_policy(base.model, probes, job.source.renderer.pad_id)


def _read_plain(job: Job, model: Any, probes: list[Probe]) -> Reading:
    if job.is_reward:
        return parity.read_classifier(model, probes, classifier_pad(job.source))
    return parity.read_policy(model, probes, job.source.renderer.pad_id)


def _distance(job: Job, truth: Reading, other: Reading, probes: list[Probe]) -> Distance:
    return parity.score_distance(truth, other) if job.is_reward else parity.policy_distance(truth, other, probes)


def _summary(
    job: Job, measured: dict[str, Distance | None], weights: WeightCheck | None, gguf: Any, near: bool, spread: float
) -> list[str]:
    """What came of it, a sentence a line."""
    found, floor, effect = measured["export"], measured["another_rounding"], measured["adapter_effect"]
    assert found is not None and floor is not None
    what = f"base + adapter, {'unmerged in fp32' if job.is_adapter else f'rounded to {NAMES[job.dtype]}'}"
    lines = [f"{'parity' if near else 'NO PARITY'} with {what}: {found.words()}"]
    lines.append(f"another rounding of the same weights is off by: {floor.words()}")
    if weights is not None and weights.wrong:
        lines.append(f"weights: {len(weights.wrong)} tensors are not base + adapter (first: {weights.wrong[0]})")
    elif weights is not None:
        rest = f" ({weights.note})" if weights.note else ""
        lines.append(f"weights: {weights.compared} of {weights.tensors} tensors are base + adapter, rounded once{rest}")
    if gguf is not None:
        lines.append(_gguf_in_words(gguf))
    if job.is_reward:
        lines.append(f"the scores themselves are spread by {spread:.2g} (standard deviation)")
    if effect is not None:
        lines.append(f"what the adapter changes, for comparison: {effect.words()}")
    return [*lines, _training_in_words(job, measured["as_trained"]), *_rounding_outweighs(job, measured)]


def _gguf_in_words(gguf: dict[str, Any]) -> str:
    if "note" in gguf:
        return f"GGUF: {gguf['note']}"
    if gguf["wrong"]:
        return f"GGUF: {len(gguf['wrong'])} tensors differ from the merged ones (first: {gguf['wrong'][0]})"
    return f"GGUF: the {gguf['compared']} matrices of {gguf['tensors']} tensors have the merged weights' rows"


def _training_in_words(job: Job, trained: Distance | None) -> str:
    """How far it is from the policy as trained, and why."""
    name = {"nf4": "4-bit", "int8": "8-bit"}.get(job.source.trained_with or "", "")
    if trained is not None and job.nf4:
        reason = "it was merged into the weights that the adapter was trained on, so this is rounding"
    elif trained is not None:
        more = "" if job.is_adapter or name != "4-bit" else "; --as-trained merges into those"
        reason = f"the adapter was trained on {name} weights, these are the {NAMES[job.dtype]} ones{more}"
    elif job.source.trained_with == "none":
        return "as trained: the adapter was trained on the same, unquantised weights"
    else:
        return "how the adapter was trained is not on record, so the distance to that is not known"
    what = "reward model" if job.is_reward else "policy"
    return f"from the {name} {what} as trained: {trained.words()} ({reason})"


def _rounding_outweighs(job: Job, measured: dict[str, Distance | None]) -> list[str]:
    """One sentence where leaving the 4-bit weights moved the policy farther than the adapter did (in KL)."""
    trained, effect = measured["as_trained"], measured["adapter_effect"]
    if job.nf4 or job.source.trained_with != "nf4" or trained is None or effect is None:
        return []
    if not (trained.kl_nats or 0.0) > (effect.kl_nats or 0.0):
        return []
    flags = "--to merged --as-trained" if job.is_adapter else "--as-trained"
    what = "the 4-bit rounding of the base changes more than the training did"
    return [f"{what}; {flags} exports exactly what was trained"]


def _known(distance: Distance) -> dict[str, Any]:
    return {name: value for name, value in asdict(distance).items() if value is not None}


def _answer(job: Job, probe: Probe) -> dict[str, str]:
    return {"prompt": probe.text, "answer": job.source.renderer.decode(probe.ids[probe.start :])}
