"""What the commands do that neither train nor manage runs: one function a command, in a file a group.

Each takes the command's resolved settings, prints what it found, and returns an exit code where it is not 0. Files are
imported only when their command is called: most need torch, `plan` and `presets` do not.
"""

from importlib import import_module

from lowrank_align.config import Settings
from lowrank_align.errors import EXIT_DONE

FILES = {
    "generate": "rows",
    "eval": "eval",
    "score": "rows",
    "logps": "rows",
    "show": "rows",
    "presets": "presets",
    "plan": "plan",
    "audit": "audit",
    "export": "export",
    "chat": "chat",
    "doctor": "doctor",
    "rounds": "rounds",
    "data import": "data",
    "data export": "data",
    "data stats": "data",
    "data convert": "data",
    "data backup": "data",
}


def run(command: str, settings: Settings) -> int:
    """Run `command`; its exit code."""
    module = import_module(f"lowrank_align.commands.{FILES[command]}")
    code: int | None = getattr(module, command.replace(" ", "_"))(settings)
    return EXIT_DONE if code is None else code
