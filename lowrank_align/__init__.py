"""One frozen base, every role: SFT, a reward model, DPO and PPO as LoRA adapters on one shared 4-bit language model.

`Base` and `train` load torch, so they are looked up on first use: `import lowrank_align` itself takes no time.
"""

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_align.base import Base
    from lowrank_align.train import train

# On CPU, torch and bitsandbytes bring an OpenMP runtime each, whose waiting threads spin and steal each other's cores:
# on busy cores NF4 training was ten times slower. Threads that sleep at once are slow too, as a step has thousands of
# short parallel regions: they spin for some microseconds (docs/log.md). Read once, when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__version__ = "0.1.0"
__all__ = ["Base", "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "Base":
        from lowrank_align.base import Base

        return Base
    if name == "train":
        from lowrank_align.train import train

        return train
    raise AttributeError(f"module 'lowrank_align' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `lowrank_align.train` the function: importing the submodule of that name binds the submodule here."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "train" and isinstance(value, ModuleType):
            value = value.train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
