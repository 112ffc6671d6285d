"""Tables for the terminal."""

from rich import box
from rich.table import Table

from ouro_jax.reporting.heldout import HeldoutRow, latest_rows, verdict
from ouro_jax.reporting.history import Record, sort_records


def heldout_table(records: list[Record]) -> Table:
    """Held-out bits per byte of the last measurement, per source and loop, beside the baselines.

    The caption says whether the model beats both and whether depth pays. Depths beyond those
    that the last stage trained are dim.
    """
    rows = latest_rows(sort_records(records))
    loops = max((len(row.bits_per_byte) for row in rows), default=0)
    trained = rows[-1].trained_loops if rows else 0
    table = Table(
        title="held-out bits per byte after loop …",
        title_justify="left",
        # Eight loops and two baselines fit into 80 columns, the width of a log file.
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        min_width=78,
        caption="\n".join(verdict(rows)),
        caption_justify="left",
        caption_style="",
    )
    table.add_column("source", overflow="fold")
    for loop in range(1, loops + 1):
        style = "dim" if loop > trained else "bold" if loop == trained else ""
        table.add_column(str(loop), justify="right", style=style, header_style=style, no_wrap=True)
    table.add_column("unigram", justify="right", no_wrap=True)
    table.add_column("bigram", justify="right", no_wrap=True)
    for row in rows:
        if row.is_mean:
            table.add_section()
        table.add_row(row.source, *_cells(row, loops))
    return table


def _cells(row: HeldoutRow, loops: int) -> list[str]:
    padding = [None] * (loops - len(row.bits_per_byte))
    values = [*row.bits_per_byte, *padding, row.unigram, row.bigram]
    return ["–" if value is None else f"{value:.3f}" for value in values]
