"""The process that chat templates run in: what it cannot do, and that it is lost without harm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jinja2
import markupsafe
import pytest

from lowrank_align.data import template_room
from lowrank_align.data.template_room import ROOM, RUN, WORKER
from lowrank_align.errors import EnvironmentProblem

ASKED = [{"role": "user", "content": "a"}]
TEMPLATE = "{{ messages[0]['content'] }}b"
KILLS = [signal.SIGKILL, signal.SIGTERM]


def test_no_file_can_be_opened_not_even_in_a_pipe_s_place() -> None:
    """The worker is confined, closes its input and tries."""
    pytest.importorskip("resource")
    attempt = "m['confine'](); import os; os.close(0); print(open(os.devnull))"
    run = RUN.replace("runpy.run_path", "m = runpy.run_path").replace(", run_name='__main__'", "") + f"; {attempt}"
    where = [str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)]
    found = subprocess.run([sys.executable, "-I", "-c", run, str(WORKER), *where], capture_output=True, text=True)
    assert found.returncode == 1
    assert "Too many open files" in found.stderr


@pytest.mark.parametrize("kill", KILLS)
def test_a_worker_that_somebody_kills_is_started_again(kill: signal.Signals) -> None:
    assert ROOM.render(TEMPLATE, ASKED, {})[0] == "ab"
    assert ROOM._worker is not None
    first = ROOM._worker.pid
    os.kill(first, kill)
    assert ROOM.render(TEMPLATE, ASKED, {})[0] == "ab"
    assert ROOM._worker.pid != first


@pytest.mark.parametrize("kill", KILLS)
def test_a_worker_that_is_killed_each_time_is_no_fault_of_the_template(
    kill: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_room, "RUN", f"import os; os.kill(os.getpid(), {int(kill)})")
    ROOM.close()
    with pytest.raises(EnvironmentProblem, match="process ended twice: something kills it") as caught:
        ROOM.render(TEMPLATE, ASKED, {})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert ROOM.render(TEMPLATE, ASKED, {})[0] == "ab"
