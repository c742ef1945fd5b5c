"""Rows and files mutated at random, through every pipeline that reads them."""
# ruff: noqa: E501 -- messages are long lines

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.torture.mutants import as_bytes, damaged, mutants

SECTION = "Rows and settings"


@pytest.fixture(scope="module")
def pipelines(tiny_llama: Path) -> Iterator[dict[str, Callable[[Path], int]]]:
    """By the rows wanted: from a file to token ids, as every command goes; how many rows came out or were accounted for."""
    from transformers import AutoTokenizer

    from lowrank_align.config import METHODS, resolve
    from lowrank_align.data.chat import Renderer, render_all
    from lowrank_align.data.formats import Shape
    from lowrank_align.data.load import load_rows
    from lowrank_align.data.show import print_rows
    from lowrank_align.methods import method_class
    from lowrank_align.terminal import make_console

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    renderers = [Renderer(tokenizer, chat_template=template, max_length=256) for template in (None, "plain")]

    def of(method: str, **knobs: Any) -> Callable[[Path], int]:
        kind = method_class(method)
        rows_field = METHODS[method].rows_field
        given = {"model": "m", rows_field: "rows.jsonl", "out": "o", **knobs}
        chosen = resolve(METHODS[method], given)

        def go(file: Path) -> int:
            loaded = load_rows(file, expect=kind.shapes, segments=chosen.compares_segments)
            for renderer in renderers:
                renderer = renderer.with_prefix(kind.answer_prefix(chosen))
                rendered = render_all(lambda row, to=renderer: kind.render(row, to, chosen), loaded.rows)
                assert len(rendered.tree_rows) + len(rendered.dropped) == len(loaded.rows)
                for tree in rendered.tree_rows:
                    assert all(len(tree.prompt_ids) + len(c.ids) <= 256 for c in tree.completions)
            return len(loaded.rows)

        return go

    def prompts(file: Path) -> int:
        loaded = load_rows(file, expect={Shape.prompts})
        for renderer in renderers:
            for row in loaded.rows:
                assert renderer.prompt_ids(row)
        return len(loaded.rows)

    def shown(file: Path) -> int:
        loaded = load_rows(file, expect=set(Shape) - {Shape.prompts})
        into = io.StringIO()
        print_rows(renderers[0], loaded.rows, 9, make_console(file=into))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", into.getvalue())
        return len(loaded.rows)

    yield {
        "sft": of("sft"),
        "dpo": of("dpo"),
        "cpl": of("dpo", loss="cpl"),
        "reward": of("reward"),
        "kto": of("kto"),
        "condition": of("condition"),
        "coh": of("coh"),
        "prompts": prompts,
        "show": shown,
    }


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "rows.jsonl"


def outcome_of(go: Callable[[Path], int], file: Path) -> str:
    """ "rows", or the one line of a UserError; anything else is raised."""
    from lowrank_align.errors import UserError

    try:
        assert go(file) > 0
        return "rows"
    except UserError as error:
        assert "\n" not in str(error) and "Traceback" not in str(error)
        return str(error)


def explore(strategy: Any, check: Callable[[Any], None], count: int, seeded: int) -> None:
    """`count` examples; the failing one as small as can be."""
    phases = (Phase.generate, Phase.shrink)
    quiet = list(HealthCheck)

    @seed(seeded)
    @settings(
        max_examples=count, phases=phases, suppress_health_check=quiet, deadline=None, database=None, derandomize=False
    )
    @given(strategy)
    def every(example: Any) -> None:
        check(example)

    every()


def test_rows_mutated_at_random(pipelines: dict[str, Any], tally: Any, times: Any, file: Path) -> None:
    """Every mutant either gives rows, all of them, or one line with its place; no other exception."""
    count, seen = times(150, 10_000), dict.fromkeys(["rows", "refused", "none"], 0)

    def check(drawn: tuple[str, Any]) -> None:
        name, row = drawn
        file.write_bytes(as_bytes(row))
        came = outcome_of(pipelines[name], file)
        none_left = came == f"{file}: no rows"
        assert came == "rows" or none_left or re.match(r"rows\.jsonl:\d+: ", came), came
        seen["rows" if came == "rows" else "none" if none_left else "refused"] += 1

    try:
        explore(mutants(), check, count, seeded=7)
    finally:
        tally(SECTION, "rows mutated at random", "rows, or one line with file and line",
              held=seen["rows"] + seen["refused"], of=count - seen["none"],
              note=f"{seen['rows']:,} still rows, {seen['refused']:,} refused")  # fmt: skip
        tally(SECTION, "rows mutated into an empty array", "one line that says there are no rows",
              held=seen["none"], of=seen["none"])  # fmt: skip
    assert min(seen["rows"], seen["refused"]) > count / 20  # the mutants are neither all harmless nor all hopeless


def test_files_damaged_at_random(pipelines: dict[str, Any], tally: Any, times: Any, file: Path) -> None:
    """The same of the bytes of a whole file: JSON Lines, arrays, gzip and Parquet."""
    count, done = times(60, 2_000), 0

    def check(content: bytes) -> None:
        nonlocal done
        file.write_bytes(content)
        came = outcome_of(pipelines["prompts"], file)
        assert came == "rows" or came.startswith(("rows.jsonl:", str(file))), came
        done += 1

    try:
        explore(damaged(), check, count, seeded=8)
    finally:
        tally(SECTION, "files of rows damaged at random", "rows, or one line with the file", held=done, of=count)
