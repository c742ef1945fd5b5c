"""Every training method by its name; a new one is added with `register`."""

from lowrank_align.config.offline import OFFLINE
from lowrank_align.config.online import ONLINE
from lowrank_align.config.training import TrainSettings

METHODS: dict[str, type[TrainSettings]] = {kind.method: kind for kind in (*OFFLINE, *ONLINE)}
