"""Rollouts from a server that holds the same base, by vLLM's protocol, which loads LoRA adapters while it runs.

`/v1/completions` is asked with token ids for token ids. Left out: sampling ahead while the policy trains.
"""

from lowrank_align.rollout_server.client import RolloutServer
from lowrank_align.rollout_server.served import ServedRollouts

__all__ = ["RolloutServer", "ServedRollouts"]
