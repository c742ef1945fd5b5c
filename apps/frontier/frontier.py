"""`lowrank-align frontier`: starts, learning rates, the trainings of the figure, the report."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from lowrank_align.apps.frontier.figures import draw_figures
from lowrank_align.apps.frontier.planning import Plan, chosen_rates, same
from lowrank_align.apps.frontier.report import gather, print_table, write_markdown
from lowrank_align.apps.frontier.schedule import Schedule
from lowrank_align.apps.frontier.tasks import TRAININGS, Task
from rich.console import Console

from lowrank_align.config import FrontierSettings
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.links import refuse_links
from lowrank_align.locks import FileLock
from lowrank_align.out_folders import check_place

MARKER = ".frontier"
REPORT_JSON, REPORT_MD = "report.json", "report.md"


def run_frontier(settings: FrontierSettings) -> int:
    """The command; 0 when the report is written. UserError for what is wrong with the settings, before any training."""
    began, console = time.monotonic(), Console(highlight=False)
    plan = Plan.of(settings)
    out = plan.out
    _take(out)
    with FileLock(out / ".lock", busy=f"{out}: in use by another process"):
        results = _work(plan, settings.workers, console)
        report = gather(plan, results)
        if report["failed"] and not report["entries"] and not report["best_of_n"]:
            first, others = report["failed"][0], len(report["failed"]) - 1
            raise UserError(
                f"{first['name']}: {first['failed']} (and {others} others failed: there is nothing to report)"
            )
        report["this_run_seconds"] = time.monotonic() - began
        pictures = draw_figures(report, out)
        write_atomic(out / REPORT_JSON, json.dumps(report, indent=1) + "\n")
        write_markdown(report, [path.name for path in pictures], out / REPORT_MD)
        print_table(report, console)
        _tell_unused(out, plan, results, console)
    console.print(f"{out / REPORT_MD}, {out / REPORT_JSON}, {', '.join(p.name for p in pictures)}", markup=False)
    return 0


def _work(plan: Plan, workers: int, console: Console) -> "Results":
    """Everything, in three rounds: what a later one trains depends on what came out of the one before."""
    if plan.missing:
        names = ", ".join(entry.label for entry in plan.missing)
        console.print(f"left out, not in this installation: {names}", markup=False)
    starts, tuning = list(plan.starts().values()), plan.tuning()
    # the figure's own trainings are counted with any learning rate: one of each is there from the tuning
    total = len(same([*starts, *tuning.values(), *plan.final({})], plan.ground))
    schedule = Schedule(plan.ground, plan.out, workers, total, console)
    at_once = f"{workers} processes" if workers > 1 else "this process"
    what = f"{total} trainings and measurements on {plan.ground.model}, seeds {', '.join(map(str, plan.seeds))}"
    console.print(f"{what}, in {at_once}", markup=False)
    results = Results(plan)
    results.add(starts, schedule)
    results.add(list(tuning.values()), schedule)
    tried = {at: results.of(task) for at, task in tuning.items()}
    results.multiples = chosen_rates({at: result for at, result in tried.items() if result is not None})
    results.tried = {f"{name} {multiple:g}": result for (name, multiple), result in tried.items() if result}
    if tuning:
        taken = ", ".join(f"{name} {multiple:g}" for name, multiple in results.multiples.items())
        console.print(f"learning rates, times an entry's own: {taken}", markup=False, soft_wrap=True)
    results.add(plan.final(results.multiples), schedule)
    if schedule.cached:
        console.print(f"{schedule.cached} of {schedule.total} were there from before")
    results.trained = schedule.done - schedule.cached
    return results


class Results:
    """What came of the tasks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.by_key: dict[str, dict] = {}
        self.multiples: dict[str, float] = {}
        self.tried: dict[str, dict] = {}
        self.trained = 0

    def add(self, tasks: Sequence[Task], schedule: Schedule) -> None:
        """Run those that are not known yet."""
        new = [task for task in same(tasks, self.plan.ground) if task.key(self.plan.ground) not in self.by_key]
        self.by_key |= schedule.run(new)

    def of(self, task: Task) -> dict | None:
        """A task's result, None where it was never run."""
        return self.by_key.get(task.key(self.plan.ground))


def _take(out: Path) -> None:
    """A folder of our own, new or from before; anything else stays, and is a UserError."""
    check_place(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError(f"{out}: holds files that no frontier wrote; choose another --out")
    refuse_links(out.rglob("*"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be made: {error.strerror}") from error
    (out / MARKER).write_text("made by lowrank-align frontier; what is finished in here is not trained again\n")


def _tell_unused(out: Path, plan: Plan, results: Results, console: Console) -> None:
    known = set(results.by_key)
    unused = [path for path in (out / TRAININGS).iterdir() if path.name.rsplit("-", 1)[-1] not in known]
    if unused:
        console.print(f"{len(unused)} older trainings in {out / TRAININGS} belong to other settings", markup=False)
