"""`lowrank-align rounds`: the loop, and a table of its rounds."""

from rich.table import Table

from lowrank_align.config import RoundsSettings
from lowrank_align.rounds import RoundResult, Rounds
from lowrank_align.terminal import make_console


def rounds(settings: RoundsSettings) -> None:
    """All rounds, then what each of them brought."""
    console = make_console()
    loop = Rounds(settings, lambda line: console.print(line, markup=False, soft_wrap=True))
    results = loop.run()
    console.print(table_of(results))
    if judge := results[-1].judge:
        console.print(f"score, by {judge}, and wins: on held-out prompts, beside the policy before", markup=False)
    console.print(f"{loop.out / 'rounds.json'}; the last policy: {loop.out / f'round-{len(results)}' / 'policy'}",
                  markup=False, soft_wrap=True)  # fmt: skip


def table_of(results: list[RoundResult]) -> Table:
    """A row a round; what was not measured stays empty."""
    table = Table("round", "new pairs", "as scored", "before", "score", "wins", "KL (nats)", box=None)
    for column in table.columns:
        column.justify = "right"
    for one in results:
        figures = [(one.score_before, "+.2f"), (one.score, "+.2f"), (one.wins, ".2f"), (one.kl, ".1f")]
        table.add_row(
            str(one.number),
            str(one.pairs),
            "" if one.as_scored is None else f"{one.as_scored:.0%}",
            *("" if value is None else format(value, shape) for value, shape in figures),
        )
    return table
