"""Who can speak and who can score: the bare base, and the runs that were trained on it, by the names people see."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.errors import UserError, nearest
from lowrank_align.listing import find_runs
from lowrank_align.provenance import check_same_base
from lowrank_align.roles import BARE

BASE, LIVE = BARE, "training now"
KEPT_LOADED = 8  # adapters that stay on the base

Kind = Literal["policy", "reward"]


@dataclass(frozen=True)
class Voice:
    """A role on the base, with the name people see and the hash that rows keep."""

    name: str
    role: str
    kind: Kind
    run: Path | None = None
    adapter_hash: str | None = None  # None: the bare base
    answer_prefix: str = ""  # what stands before its answers, as in training


class Voices:
    """The runs of a folder and those named by hand, put on the base when they are first wanted."""

    def __init__(self, base: Base, runs: Path, named: tuple[str, ...] = ()) -> None:
        """Raises UserError for a named run that is none, or was made for another base."""
        self._base, self._runs_folder = base, runs
        self._lock = threading.Lock()
        self._found: dict[str, tuple[Kind, Path]] = {}
        self._loaded: dict[str, Voice] = {BASE: Voice(BASE, BARE, "policy")}
        self._numbers = 0
        self._digests: dict[tuple[str, int, int, int], str] = {}
        self._named: dict[str, tuple[Kind, Path]] = {}
        self.live: str | None = None  # the run that trains a policy now, as its voice's hash tells
        self.live_prefix = ""  # what that run has before its answers
        for given in named:
            run = adapters.run_of(adapters.locate(given))
            check_same_base(run, base.name, base.weights_hash)
            self._named[self._free_name(run)] = (adapters.kind_of(given), run)
        self.refresh()

    def names(self) -> list[str]:
        """Whoever can speak: the base, then the runs by name; `LIVE` while a run trains a policy."""
        with self._lock:
            found = [BASE, *(name for name, (kind, _) in self._found.items() if kind == "policy")]
        return [*found, LIVE] if self.live else found

    def rewards(self) -> list[str]:
        """Whoever can score."""
        with self._lock:
            return [name for name, (kind, _) in self._found.items() if kind == "reward"]

    def refresh(self) -> None:
        """Look for runs that have come or gone. Runs of other bases, and what is damaged, are passed over."""
        found = dict(self._named)
        for run in find_runs(self._runs_folder):
            try:
                kind = adapters.kind_of(run)
                check_same_base(run, self._base.name, self._base.weights_hash)
            except UserError:
                continue
            if run.resolve() not in [known.resolve() for _, known in found.values()]:
                found[str(run.relative_to(self._runs_folder))] = (kind, run)
        with self._lock:
            self._found = found

    def run_of(self, name: str) -> Path | None:
        """The run's folder; None for the base."""
        with self._lock:
            return self._found[name][1] if name in self._found else None

    def voice(self, name: str) -> Voice:
        """The voice of that name, put on the base where it is not yet. In the speaker's thread only.

        UserError where there is none, or where its adapter cannot be loaded.
        """
        if name == LIVE:
            if self.live is None or "policy" not in self._base.roles:
                raise UserError(f"nothing trains now, so {LIVE!r} cannot speak; choose another adapter")
            return Voice(LIVE, "policy", "policy", adapter_hash=self.live, answer_prefix=self.live_prefix)
        if name == BASE:
            return self._loaded[BASE]
        with self._lock:
            found = self._found.get(name)
            known = [BASE, *self._found]
        if found is None:
            raise UserError(f"{name}: no such adapter{nearest(name, known)} (there are: {', '.join(known)})")
        kind, run = found
        digest = self._digest(run)
        voice = self._loaded.get(name)
        if voice is None or voice.adapter_hash != digest:  # new, or trained anew under the same name
            self._numbers += 1
            role = voice.role if voice else f"voice_{self._numbers}"
            prefix = adapters.answer_prefix(run)
            self._base.add_role(role, start_from=run, trainable=False)
            voice = Voice(name, role, kind, run, digest, prefix)
        self._loaded.pop(name, None)
        self._loaded[name] = voice  # the newest in use is the last
        self._forget_unused()
        return voice

    def _digest(self, run: Path) -> str:
        """The hash of a run's weights; a file is read again only when it has changed."""
        file = adapters.locate(run) / adapters.WEIGHTS
        seen = file.stat()
        key = (str(file), seen.st_mtime_ns, seen.st_size, seen.st_ino)
        if key not in self._digests:
            self._digests[key] = adapters.weights_sha256(run)
        return self._digests[key]

    def _forget_unused(self) -> None:
        """Take the adapters off the base that were not in use for longest: an evening tries many."""
        for name in [name for name in self._loaded if name != BASE][:-KEPT_LOADED]:
            self._base.remove_role(self._loaded.pop(name).role)

    def _free_name(self, run: Path) -> str:
        inside = run.resolve().is_relative_to(self._runs_folder.resolve())
        name = str(run.resolve().relative_to(self._runs_folder.resolve())) if inside else run.name
        return name if name not in (BASE, LIVE, *self._named) else str(run)
