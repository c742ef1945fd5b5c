"""Whether this machine can do what the toolkit does: each check tells what it found and, where something is amiss, what
to do. What is missing or broken is a finding, never a traceback, so everything heavy is imported within its check."""

from lowrank_align.doctor.finding import Finding, can_train, imports
from lowrank_align.doctor.gpu import gpus, training_device
from lowrank_align.doctor.quantisation import self_test
from lowrank_align.doctor.software import packages, system
from lowrank_align.doctor.surroundings import disks, hub, memory, threads

__all__ = ["Finding", "can_train", "examine"]


def examine() -> list[Finding]:
    """Everything, in the order in which one thing needs the other."""
    found = [*system(), *packages()]
    gpu = gpus() if imports("torch") else []
    found += gpu
    device = training_device(gpu)
    if device is not None and imports("bitsandbytes"):
        found += self_test(device)
    return [*found, *memory(), *disks(), *hub(), *threads()]
