"""The page's training: at most one run, in a thread of this process, on the base that answers people meanwhile.

All state is here and in the runs' folders, none in the page: a reload, a second tab and a new start of the program see
the same run.
"""

import gc
import logging
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowrank_align.config import METHODS, TrainSettings
from lowrank_align.errors import Stopped, UserError, is_out_of_memory
from lowrank_align.memory import release_unused
from lowrank_align.methods import method_class
from lowrank_align.studio import old_runs, run_data, run_request
from lowrank_align.studio.health import Remark, health
from lowrank_align.studio.live_run import LiveRun, Sample, State, Status
from lowrank_align.studio.old_runs import Resumable
from lowrank_align.studio.run_check import Check, as_problem, check_run
from lowrank_align.studio.run_request import Knob, Request, View
from lowrank_align.studio.voices import LIVE
from lowrank_align.studio.words import duration, flags_as_settings
from lowrank_align.train import train

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

log = logging.getLogger(__name__)

TEMPORARY_ROLES = re.compile(r"policy|reference|value|start|reward(_\d+)?")  # what methods put on the base
FIRST_ROUND_PAIRS = 50
OUT_OF_MEMORY = "out of memory; lower micro_batch_size, max_length or rank under more settings, and start again"


class Trainer:
    """Starts, watches, stops and resumes runs. Every method may be called from any thread."""

    def __init__(self, studio: "Studio") -> None:
        self._studio = studio
        self._lock = threading.Lock()
        self._live: LiveRun | None = None
        self._previous: LiveRun | None = None  # the one before, should the next never begin
        self._thread: threading.Thread | None = None
        self._closing = False
        self._hint: tuple[tuple[int, int], str] | None = None
        self._ended = 0  # runs that have ended here: what is told of older runs is then looked up anew

    # ---- what can be asked for

    def methods(self) -> list[str]:
        """The methods by name."""
        return list(METHODS)

    def knobs(self, method: str) -> list[Knob]:
        """The method's few numbers that matter, with the preset's values or the defaults."""
        return run_request.knobs_of(self._studio, method)

    def starts(self) -> list[str]:
        """What a run may start from: the base, then the policies."""
        return [name for name in self._studio.voices.names() if name != LIVE]

    def fresh_name(self, method: str) -> str:
        """A name for a run that is not taken."""
        status = self.status()
        return old_runs.fresh_name(self._studio, method, besides=status.run if status.active else "")

    def files(self) -> list[str]:
        """The names of the data files that lie beside the runs."""
        return [file.name for file in run_data.files_beside(self._studio)]

    def file(self, name: str | Path, uploads: Sequence[Path] = ()) -> Path:
        """A data file that the page may name; `uploads` are the folders that uploaded files are put in."""
        return run_data.allowed(self._studio, name, uploads)

    # ---- before

    def check(self, request: Request) -> Check:
        """Everything that can be told before a start; what is wrong stands in it as a sentence."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self._check_request(request)
                left_out: dict[str, int] = {}
                if isinstance(request.data, View):
                    _, left_out = run_data.rows_of_view(self._studio, request.method, request.data)
                file, count = run_data.freeze(
                    self._studio, request.method, request.data, Path(scratch) / f"{request.name}{run_data.SUFFIX}"
                )
                settings = run_request.settings_of(self._studio, request, file, count)
                return check_run(self._studio.base, settings, old_runs.pace(self._studio, request.method), left_out)
        except UserError as error:
            return as_problem(error)

    def enough(self, pairs: int) -> str:
        """What stands under the number of pairs in Collect: how many are lacking, or how long a round would take."""
        key = (pairs, self._ended)
        with self._lock:
            if self._hint is not None and self._hint[0] == key:
                return self._hint[1]
        hint = self._enough(pairs)
        with self._lock:
            self._hint = (key, hint)
        return hint

    def _enough(self, pairs: int) -> str:
        if pairs < FIRST_ROUND_PAIRS:
            lacking = FIRST_ROUND_PAIRS - pairs
            return f"{lacking} more pair{'s' * (lacking > 1)} make a first DPO round worth while."
        which = "another" if old_runs.finished_runs(self._studio, "dpo") else "a first"
        pace = old_runs.pace(self._studio, "dpo")
        if pace is None:
            return f"Enough for {which} DPO round."
        knobs = {knob.name: knob.value for knob in self.knobs("dpo")}
        rows = (knobs["max_steps"] or 0) * (knobs["batch_size"] or 1) or (knobs["epochs"] or 1) * pairs
        return f"Enough for {which} DPO round (about {duration(rows * pace.seconds_a_row)} here)."

    # ---- running

    def start(self, request: Request) -> Status:
        """Begin a run and come back. UserError where one is under way, or the request is wrong."""
        name = self._check_request(request)
        live = self._take(name, request.method)
        try:
            self._studio.runs.mkdir(parents=True, exist_ok=True)
            into = run_data.frozen_file(self._studio, name)
            file, count = run_data.freeze(self._studio, request.method, request.data, into)
            settings = run_request.settings_of(self._studio, request, file, count)
        except BaseException:
            self._let_go(live)
            old_runs.forget_unused_rows(self._studio, name)
            raise
        return self._go(live, settings)

    def resumable(self) -> list[Resumable]:
        """Runs that were stopped, or died with the program, and can go on."""
        return old_runs.resumable_runs(self._studio)

    def resume(self, name: str) -> Status:
        """Go on with a run that did not end. UserError where it cannot."""
        settings = old_runs.settings_to_resume(self._studio, name)
        return self._go(self._take(name, settings.method), settings)

    def stop(self) -> None:
        """Save at the next step boundary and stop; nothing where no run is under way."""
        live = self._live
        if live is not None and live.status().active:
            live.stop()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until no run is under way; False where the time was over before."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Take no further run, stop the one under way and wait for its save."""
        with self._lock:
            self._closing = True
        self.stop()
        self.wait()

    # ---- what is to be seen

    def status(self) -> Status:
        """Where the newest run of this program stands."""
        live = self._live
        return live.status() if live is not None else Status()

    @property
    def figures(self) -> list[dict[str, float | None]]:
        """The newest run's figures by step."""
        live = self._live
        return live.figures if live is not None else []

    @property
    def log(self) -> list[str]:
        """The newest run's lines."""
        live = self._live
        return live.log if live is not None else []

    @property
    def samples(self) -> list[Sample]:
        """The newest run's outputs, newest last."""
        live = self._live
        return live.shown_samples if live is not None else []

    def health(self) -> list[Remark]:
        """How the newest run goes, in words."""
        live = self._live
        return health(live.method, live.figures) if live is not None and live.figures else []

    def before(self) -> str:
        """The voice that the newest run started from."""
        live = self._live
        return live.started_from if live is not None else self.starts()[0]

    def in_words(self) -> str:
        """For the header: `training dpo-1, step 3 of 20`; empty while nothing runs."""
        status = self.status()
        if not status.active:
            return ""
        doing = {"preparing": "preparing", "stopping": "stopping", "ending": "saving"}.get(status.state, "training")
        steps = f", step {status.step} of {status.total}" if status.total else ""
        return f"{doing} {status.run}{steps}"

    # ---- inside

    def _check_request(self, request: Request) -> str:
        run_request.method_settings(request.method)
        name = run_request.check_name(request.name)
        if old_runs.is_taken(self._studio, name):
            raise UserError(f"{name}: a run of that name is there already; take {self.fresh_name(request.method)}")
        return name

    def _take(self, name: str, method: str) -> LiveRun:
        """Become the one run."""
        with self._lock:
            if self._closing:
                raise UserError("the studio is closing; start it again first")
            if self._live is not None and self._live.status().active:
                raise UserError(f"{self._live.name} trains already; wait for it, or stop it first")
            speaks = method_class(method).trained[0] == "policy"
            voices = self._studio.voices

            def on_start() -> None:
                voices.live = f"training:{name}" if speaks else None

            self._previous, self._live = self._live, LiveRun(name, method, self._studio.runs / name, on_start)
            return self._live

    def _let_go(self, live: LiveRun) -> None:
        """As if the run had never been asked for."""
        with self._lock:
            if self._live is live:
                self._live = self._previous

    def _go(self, live: LiveRun, settings: TrainSettings) -> Status:
        try:
            live.started_from = self._voice_of(settings.adapter)
            self._studio.voices.live_prefix = method_class(settings.method).answer_prefix(settings)
        except BaseException:
            self._let_go(live)
            raise
        self._thread = threading.Thread(target=self._run, args=(live, settings), name="training", daemon=True)
        self._thread.start()
        return live.status()

    def _voice_of(self, adapter: str | None) -> str:
        voices = self._studio.voices
        names = (name for name in self.starts() if adapter and voices.run_of(name) == Path(adapter))
        return next(names, self.starts()[0])

    def _run(self, live: LiveRun, settings: TrainSettings) -> None:
        state, problem = self._train(live, settings)
        resumable = False
        try:
            self._tidy()
            old_runs.forget_unused_rows(self._studio, live.name)
            resumable = state != "finished" and any(one.name == live.name for one in self.resumable())
        except Exception:  # the run itself is over and saved
            log.exception("after %s: tidying up failed", live.name)
        finally:
            self._ended += 1
            live.end(state, problem, resumable)

    def _train(self, live: LiveRun, settings: TrainSettings) -> tuple[State, str]:
        """How the run ended, and in one sentence why where it failed."""
        try:
            train(settings, base=self._studio.base, progress=live, stop=live.stopping)
        except Stopped:
            return "stopped", ""
        except UserError as error:
            return "failed", flags_as_settings(str(error))
        except Exception as error:
            if is_out_of_memory(error):
                return "failed", OUT_OF_MEMORY
            log.exception("%s failed", live.name)
            return "failed", f"an error of the program's own ({type(error).__name__}), told in the terminal"
        return "finished", ""

    def _tidy(self) -> None:
        """Take the run's roles off the base and give their memory back; the new run can be asked at once."""
        studio = self._studio
        studio.voices.live = None

        def tidy() -> None:
            for role in [role for role in studio.base.roles if TEMPORARY_ROLES.fullmatch(role)]:
                studio.base.remove_role(role)
            studio.base.enable_checkpointing(False)
            gc.collect()
            release_unused()
            if studio.base.device.type == "cuda":
                torch.cuda.empty_cache()

        studio.speaker.call(tidy)
        studio.voices.refresh()
