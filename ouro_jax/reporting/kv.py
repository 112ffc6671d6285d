"""The table of `ouro_jax.experiments.kv`, the paper's Table 14 beside it."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ouro_jax.reporting.history import Record

PAPER_TASKS = ("GSM8K", "MATH-500")
PAPER_CAPTION = "GSM8K and MATH-500: exact match of Ouro-1.4B, percent (paper, Table 14)"


def kv_table(records: Sequence[Record]) -> Table:
    """The `kv` records for a terminal: a row for each exit rule and policy."""
    table = Table(
        title="greedy answers by KV policy", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=0, caption_justify="left", caption=PAPER_CAPTION,
    )  # fmt: skip
    columns, rows = kv_cells(records)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def kv_cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the rows of the `kv` records, as texts."""
    records = [record for record in records if record["kind"] == "kv"]
    matched = any(record["exact_match"] is not None for record in records)
    columns = ["exit", "kv", *(["exact"] if matched else []), "as full", "in common",
               "nats/token", "depth", "memory", *PAPER_TASKS]  # fmt: skip
    rows = []
    for record in records:
        exact = [_percent(record["exact_match"])] if matched else []
        paper = record["paper"] if record["exit"] is None and record["paper"] else {}
        rows.append([
            record["exit"] or "all loops", record["kv"], *exact,
            _percent(record["equal_answers"]), _number(record["tokens_in_common"], 1),
            _number(record["nats_per_token"], 3), _number(record["mean_depth"], 2),
            _number(record["memory"], 2), *(_number(paper.get(task), 2) for task in PAPER_TASKS),
        ])  # fmt: skip
    return columns, rows


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
