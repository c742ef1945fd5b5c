"""A file that is read row by row trains what the same file in memory does, and holds nothing but places."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.data import large
from lowrank_align.data.bad_rows import BadRows
from lowrank_align.data.formats import Shape, parse_row
from lowrank_align.data.load import drawn_places, load_rows, load_rows_of_any_size, split_off
from lowrank_align.errors import EnvironmentProblem, UserError

PAIRS = [
    {"prompt": f"{i}. Say: ", "chosen": f"a good word{' and more' * (i % 4)}", "rejected": f"bad {i}"}
    for i in range(24)
]
EXPECT = {Shape.pair}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE_BYTES", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(pair, ensure_ascii=i % 2 == 0) for i, pair in enumerate(PAIRS)]
    path.write_bytes(
        ("\r\n".join([*lines[:9], "  ", *lines[9:]]) + " ").encode()
    )  # a blank line, no newline at the end
    return path


def without_index(row: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name != "index"}


def test_the_same_rows_hash_and_halves(file: Path, everything_is_large: None) -> None:
    whole, rows = load_rows(file, expect=EXPECT), load_rows_of_any_size(file, expect=EXPECT)
    assert isinstance(rows.rows, large.LargeFile)
    assert [without_index(row) for row in rows.rows] == [without_index(row) for row in whole.rows]
    assert (rows.sha256, rows.skipped, rows.conversions) == (whole.sha256, 0, whole.conversions)
    assert rows.rows[3:5] == [rows.rows[3], rows.rows[4]]
    halves = rows.rows.split(drawn_places(len(PAIRS), 5, seed=3))
    for one, other in zip(halves, split_off(whole.rows, 5, seed=3), strict=True):
        assert [row.where for row in one] == [row.where for row in other]


def test_bad_rows_are_told_with_their_lines(file: Path, everything_is_large: None, tmp_path: Path) -> None:
    lines = file.read_text().splitlines()
    lines[4], lines[11] = lines[4][:-5], json.dumps({"prompt": "x", "chosen": "a"})
    file.write_text("\n".join(lines))
    errors = []
    for load in (load_rows, load_rows_of_any_size):
        with pytest.raises(UserError) as error:
            load(file, expect=EXPECT)
        errors.append(str(error.value))
    assert errors[0] == errors[1] and "pairs.jsonl:5: not JSON" in errors[0] and "1 more bad row" in errors[0]
    rows = load_rows_of_any_size(file, expect=EXPECT, skip_bad=tmp_path / "bad.jsonl")
    assert (len(rows.rows), rows.skipped) == (22, 2)
    assert [json.loads(line)["where"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [
        "pairs.jsonl:5", "pairs.jsonl:12",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"prompt": "a"}\n', True), (b'[{"prompt": "a"}]', False), (b'{\n"prompt": 1}', False), (b"\x1f\x8b..", False),
     (b"PAR1", False), (b'{\0"\0', False), (b"", False)],
)  # fmt: skip
def test_what_is_read_this_way(content: bytes, expected: bool, tmp_path: Path, everything_is_large: None) -> None:
    (tmp_path / "rows").write_bytes(content)
    assert large.is_large(tmp_path / "rows") == expected
    assert not large.is_large(tmp_path)


def test_a_small_file_is_held(file: Path) -> None:
    assert isinstance(load_rows_of_any_size(file, expect=EXPECT).rows, list)


def test_a_run_ends_with_the_same_adapter(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out rows, several rounds, a checkpoint on the way."""
    knobs = {"max_steps": 8, "eval_rows": 4, "eval_steps": 4, "learning_rate": 5e-3}
    held = run("dpo", PAIRS, "held", **knobs)
    monkeypatch.setattr(large, "LARGE_BYTES", 1)
    read = run("dpo", PAIRS, "read", **knobs)
    one, other = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (held, read))
    assert one == other
    assert (held / "metrics.jsonl").read_text().count("eval_loss") == 2


def test_a_row_that_does_not_fit_gives_way(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """Told once, with the first one's line; the run is resumed bit for bit all the same."""
    from lowrank_align.progress import Progress

    monkeypatch.setattr(large, "LARGE_BYTES", 1)
    monkeypatch.setattr("lowrank_align.data.training.WINDOW", 4)
    rows = [{**pair, "prompt": pair["prompt"] * 20} if i % 5 == 4 else pair for i, pair in enumerate(PAIRS)]
    folder = run("dpo", rows, "fits", max_length=60, max_steps=6, progress=Progress())
    out = capsys.readouterr().out
    assert out.count("in the place of such rows stands the next one (told once)") == 1
    assert "24 rows, tokenised when their turn comes; looked at before: 4" in out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_the_longest_are_known_without_tokens(file: Path, everything_is_large: None, tiny_base: Any) -> None:
    from lowrank_align.data.chat import Renderer
    from lowrank_align.trees import longest_rows

    renderer = Renderer(tiny_base.tokenizer, max_length=256)
    rows = load_rows_of_any_size(file, expect=EXPECT).rows
    assert isinstance(rows, large.LargeFile)
    trees = large.LargeTrees(rows, renderer.tree_row, skip_bad=False, tell=print)
    every = [renderer.tree_row(row).tree for row in rows]
    assert [row.tokens for row in longest_rows(trees, 4)] == sorted((t.tokens for t in every if t), reverse=True)[:4]


def test_a_file_that_changes_while_it_is_checked_is_noticed(file: Path, everything_is_large: None) -> None:
    """The first line changes while the last is parsed: what was hashed is not what would be trained."""
    lines = file.read_bytes()

    def parse(raw: Any, place: int) -> Any:
        file.write_bytes(lines.replace(b"0. Say", b"9. Say"))
        return parse_row(raw.value, raw.where, place, expect=EXPECT)

    with pytest.raises(EnvironmentProblem, match="pairs.jsonl: was changed while it was read"):
        large.check_file(file, parse, BadRows())


def test_a_file_that_changes_meanwhile_is_noticed(file: Path, everything_is_large: None) -> None:
    rows = load_rows_of_any_size(file, expect=EXPECT).rows
    with file.open("a") as more:
        more.write("\n")
    with pytest.raises(EnvironmentProblem, match="pairs.jsonl: was changed while it is trained on"):
        rows[0]
