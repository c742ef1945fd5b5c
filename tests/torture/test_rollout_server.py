"""A rollout server that fails in every way of `tests.serving`, at random requests of a run: nothing is lost by it."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import EnvironmentProblem, UserError
from tests.serving import LASTING, PASSING, SLOW, SmallServer, Trouble, ready

SECTION = "Past one GPU"
PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
STEPS, REQUESTS = 3, 3 * 2  # of a run: two prompts a step
KNOBS: dict[str, Any] = {"max_steps": STEPS, "batch_size": 2, "group_size": 2, "max_new_tokens": 6}
KNOBS |= {"reward": "served_score:vowels", "learning_rate": 1e-2}
ATTEMPTS = 3


@pytest.fixture(scope="module")
def started(tiny_llama: Path) -> Iterator[SmallServer]:
    server = SmallServer(tiny_llama)
    yield server
    server.close()


@pytest.fixture
def server(started: SmallServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallServer:
    body = "[sum(c in 'aeiou' for c in text) for text in completions]"
    ready(started, tmp_path, monkeypatch, KNOBS["reward"], body, ATTEMPTS)
    return started


@pytest.fixture
def train(run: Callable[..., Path], server: SmallServer) -> Callable[..., Any]:
    """`train(name)`: a run through the server; the bytes and figures that must always be the same."""

    def train_it(name: str, **knobs: Any) -> Any:
        # long enough for a busy machine: a timeout too many would only be asked again
        seconds = 1.0 if knobs.pop("hurried", False) else 20.0
        folder = run(
            "grpo", PROMPTS, name, rollout_server=server.address, rollout_server_seconds=seconds, **KNOBS, **knobs
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert not (folder / "rollout_adapters").exists()
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        return weights, [{**line, "seconds": 0} for line in lines]

    return train_it


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole(kept: dict[str, Any], train: Callable[..., Any]) -> Any:
    """What a run comes to that nothing disturbs; the same whatever the folder, so once for all."""
    if not kept:
        kept["whole"] = train("whole")
    return kept["whole"]


def from_request(server: SmallServer, first: int, trouble: Trouble, *, for_times: int) -> None:
    """From the `first` request for answers on, `trouble` for so many requests."""
    seen = 0

    def decide(path: str, body: dict[str, Any]) -> Trouble | None:
        nonlocal seen
        if path != "/v1/completions":
            return None
        seen += 1
        return trouble if first <= seen < first + for_times else None

    server.trouble = decide


@pytest.mark.parametrize("kind", PASSING)
def test_a_fault_that_passes(
    kind: str,
    train: Callable[..., Any],
    whole: Any,
    server: SmallServer,
    times: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:
    """One request or two fail, wherever in the run; asked again, it ends as if nothing had been."""
    draw = random.Random(kind)
    held, count = 0, times(1, 20)
    for i in range(count):
        server.reset()
        from_request(server, draw.randint(1, REQUESTS), PASSING[kind], for_times=draw.randint(1, ATTEMPTS - 1))
        held += train(f"run-{i}", hurried=kind in SLOW) == whole
    tally(SECTION, "a rollout server's fault that passes", "same bytes at the end", held=held, of=count, note=kind)
    assert held == count


@pytest.mark.parametrize("kind", [*PASSING, *LASTING])
def test_a_fault_that_stays(
    kind: str,
    train: Callable[..., Any],
    whole: Any,
    server: SmallServer,
    times: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:
    """The step is not taken, what was done is saved, one line says what it is; mended and resumed, the same bytes."""
    draw = random.Random(kind + "stays")
    held, count, code = 0, times(1, 15), 2 if kind in LASTING else 3
    for i in range(count):
        server.reset()
        first = draw.randint(1, REQUESTS)
        from_request(server, first, (PASSING | LASTING)[kind], for_times=10**6)
        with pytest.raises((UserError, EnvironmentProblem)) as raised:
            train(f"run-{i}", hurried=kind in SLOW)
        error, saved = raised.value, (first - 1) // 2
        one_line = str(error).startswith(f"--rollout-server: {server.address}: ") and "\n" not in str(error)
        words = f"step {saved} of {STEPS} is saved" if saved else "with --resume begins again"
        server.reset()
        resumed = train(f"run-{i}", resume=True)
        held += error.exit_code == code and one_line and words in str(error) and resumed == whole
    tally(
        SECTION, "a rollout server's fault that stays", "one line, its exit code, and the same bytes once resumed",
        held=held, of=count, note=kind,
    )  # fmt: skip
    assert held == count


def test_a_server_that_is_started_anew(
    train: Callable[..., Any],
    whole: Any,
    server: SmallServer,
    times: Callable[[int, int], int],
    tally: Callable[..., None],
) -> None:
    """It has forgotten the adapter, at a random request: it gets it again, and the run ends as if nothing had been."""
    draw = random.Random("anew")
    held, count = 0, times(2, 40)
    for i in range(count):
        server.reset()
        first, seen = draw.randint(1, REQUESTS), 0

        def forget(path: str, body: dict[str, Any]) -> Trouble | None:
            nonlocal seen
            seen += path == "/v1/completions"
            if path == "/v1/completions" and seen == first:  # noqa: B023 - of this round
                return lambda handler, reply: (server.restart(), handler.send(server.reply(path, body)))[1]
            return None

        server.trouble = forget
        held += train(f"run-{i}") == whole
    tally(SECTION, "a rollout server started anew within a run", "same bytes at the end", held=held, of=count)
    assert held == count
