"""`lowrank-align demo`: the whole loop on one base, with answers that a program can score exactly."""

from lowrank_align.apps.demo.demo import run_demo

__all__ = ["run_demo"]
