"""From a run's settings to its tokenised rows, with what was converted, cut, dropped or set aside told and listed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_align.config import TrainSettings
from lowrank_align.data.audit import check_rows
from lowrank_align.data.chat import Rendered, RenderedRows, Renderer, render_all
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.large import LargeFile, LargeTrees
from lowrank_align.data.load import Loaded, LoadedLarge, drawn_places, load_rows, load_rows_of_any_size, split_off
from lowrank_align.trees import TreeRow

Tell = Callable[[str], None]  # prints one line that people should read
WINDOW = 1000  # rows of a large file that are looked at before training as all rows of a small one are


@dataclass(frozen=True)
class TrainingRows:
    """What a run trains on and is evaluated on."""

    rows: Sequence[TreeRow]
    eval_rows: list[TreeRow]
    sha256: str  # of the training data's source
    dropped: list[tuple[str, str]]  # (where, reason)
    pretrain_rows: list[TreeRow] = field(default_factory=list)  # of `pretrain_data`, for methods that have it
    pretrain_sha256: str | None = None


def training_rows(
    settings: TrainSettings,
    shapes: Collection[Shape],
    renderer: Renderer,
    render: Callable[[Row], Rendered],
    bad_rows: Path,
    tell: Tell,
) -> TrainingRows:
    """Load, check, split and tokenise (with `render`, made of `renderer`) the rows that `settings` names.

    With `skip_bad`, bad rows go to `bad_rows` (held-out ones to the file beside it). Raises UserError for the first bad
    row otherwise, where no row remains, and where the rows would not train the end of an answer.
    """
    held_out_bad = bad_rows.with_name(f"eval_{bad_rows.name}")
    segments = settings.compares_segments
    loaded = load_rows_of_any_size(
        settings.rows, expect=shapes, skip_bad=bad_rows if settings.skip_bad else None, segments=segments
    )
    _tell_loaded(loaded, settings.rows, bad_rows, tell)
    train: list[Row] | LargeFile = loaded.rows
    held_out: list[Row] = []
    if settings.eval_data is not None:
        other = load_rows(
            settings.eval_data, expect=shapes, skip_bad=held_out_bad if settings.skip_bad else None, segments=segments
        )
        _tell_loaded(other, settings.eval_data, held_out_bad, tell)
        held_out = other.rows
    elif settings.eval_rows:
        if isinstance(train, LargeFile):
            train, held_out = train.split(drawn_places(len(train), settings.eval_rows, settings.seed))
        else:
            train, held_out = split_off(train, settings.eval_rows, settings.seed)
    seen = train[:WINDOW] if isinstance(train, LargeFile) else train
    rendered = render_all(render, seen, skip_bad=bad_rows if settings.skip_bad else None)
    _tell_rendered(rendered, len(seen), settings.rows, settings.max_length, bad_rows, tell)
    tree_rows: Sequence[TreeRow] = rendered.tree_rows
    if isinstance(train, LargeFile):
        tree_rows = LargeTrees(train, render, skip_bad=settings.skip_bad, tell=tell)
        tell(f"{settings.rows}: {len(train):,} rows, tokenised when their turn comes; looked at before: {len(seen):,}")
    rendered_out = RenderedRows([])
    if held_out:
        rendered_out = render_all(render, held_out, skip_bad=held_out_bad if settings.skip_bad else None)
        _tell_rendered(
            rendered_out, len(held_out), settings.eval_data or "held-out rows", settings.max_length, held_out_bad, tell
        )
    for line in check_rows(settings, renderer, seen, rendered.tree_rows, held_out):
        tell(line)
    kept = f"training on {len(tree_rows)} rows"
    tell(f"{kept}, {len(rendered_out.tree_rows)} held out" if held_out else kept)
    text, text_sha256 = _pretrain_rows(settings, renderer, bad_rows, tell)
    dropped = rendered.dropped + rendered_out.dropped + text.dropped
    return TrainingRows(tree_rows, rendered_out.tree_rows, loaded.sha256, dropped, text.tree_rows, text_sha256)


def _pretrain_rows(
    settings: TrainSettings, renderer: Renderer, bad_rows: Path, tell: Tell
) -> tuple[RenderedRows, str | None]:
    """The rows of text or demonstrations that `pretrain_data` names, cut to `max_length`, and their source's hash."""
    source = getattr(settings, "pretrain_data", None)
    if source is None:
        return RenderedRows([]), None
    bad_rows = bad_rows.with_name(f"pretrain_{bad_rows.name}")
    skip_bad = bad_rows if settings.skip_bad else None
    loaded = load_rows(source, expect={Shape.demonstration}, skip_bad=skip_bad)
    _tell_loaded(loaded, source, bad_rows, tell)
    plain = renderer.with_prefix("")  # texts are no answers
    rendered = render_all(plain.tree_row, loaded.rows, skip_bad=skip_bad)
    _tell_rendered(rendered, len(loaded.rows), source, settings.max_length, bad_rows, tell)
    tell(f"keeping up the likelihood of {len(rendered.tree_rows)} rows of {source}")
    return rendered, loaded.sha256


def _tell_loaded(loaded: Loaded | LoadedLarge, source: str, bad_rows: Path, tell: Tell) -> None:
    for name, count in loaded.conversions.items():
        tell(f"{source}: {count} rows read as {name}")
    if loaded.skipped:
        tell(f"{source}: {loaded.skipped} bad rows set aside in {bad_rows.name}")


def _tell_rendered(
    rendered: RenderedRows, count: int, source: str, max_length: int, bad_rows: Path, tell: Tell
) -> None:
    if rendered.truncated:
        cut = f"{rendered.truncated} of {count} rows cut at max_length {max_length}"
        tell(f"{source}: {cut} ({rendered.truncated_tokens} tokens)")
    if rendered.dropped:
        first = ": ".join(rendered.dropped[0])
        dropped = f"{len(rendered.dropped)} of {count} rows dropped"
        tell(f"{source}: {dropped}, listed in dropped_rows.jsonl (first: {first})")
    if rendered.skipped:
        tell(f"{source}: {rendered.skipped} rows that the chat template refuses set aside in {bad_rows.name}")
    for note, rows in rendered.notes.items():
        tell(f"{source}: {rows} rows: {note}")
