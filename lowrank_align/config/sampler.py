"""Who draws the rollouts of the methods that sample: this process, or a server."""

import re
from typing import Literal

from pydantic import field_validator, model_validator

from lowrank_align.config.knobs import Rate
from lowrank_align.config.training import TrainSettings
from lowrank_align.servers import check_address


class SamplerSettings(TrainSettings):
    """Where rollouts come from; without a server, from the model in memory."""

    rollout_server: str | None = None
    """Have rollouts drawn by this vLLM server (as http://127.0.0.1:8000/v1), which must see the folder OUT."""
    rollout_server_key_env: str | None = None
    """The name of the environment variable that holds the server's key; the key itself belongs nowhere else."""
    rollout_server_prompts: Literal["ids", "text"] = "ids"
    """What the server is asked with. text: for one that takes and gives no token ids; an answer's are then guessed."""
    rollout_server_seconds: Rate = 600.0
    """How long one reply of the server may take."""

    @field_validator("rollout_server")
    @classmethod
    def _address_without_key(cls, value: str | None) -> str | None:
        """The address is written down with the run, so nothing secret may stand in it; it is not repeated here."""
        if value is not None:
            check_address(value, "the environment variable that rollout_server_key_env names")
        return value

    @field_validator("rollout_server_key_env")
    @classmethod
    def _name_not_key(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError("not the name of an environment variable (capitals, digits, _), as ROLLOUT_KEY")
        return value

    @model_validator(mode="after")
    def _server_has_address(self) -> "SamplerSettings":
        if self.rollout_server_key_env is not None and self.rollout_server is None:
            raise ValueError("rollout_server_key_env: without rollout_server there is nobody to send a key to")
        return self
