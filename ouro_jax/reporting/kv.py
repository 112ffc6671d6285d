"""The table of `ouro_jax.experiments.kv`, the paper's Table 14 beside it."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ouro_jax.reporting.history import Record

PAPER_TASKS = ("GSM8K", "MATH-500")


def kv_table(records: Sequence[Record]) -> Table:
    """The `kv` records for a terminal: a row for each exit rule and policy."""
    records = [record for record in records if record["kind"] == "kv"]
    table = Table(
        title="greedy answers by KV policy", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=0, caption_justify="left",
        caption="GSM8K and MATH-500: exact match of Ouro-1.4B, percent (paper, Table 14)",
    )  # fmt: skip
    matched = any(record["exact_match"] is not None for record in records)
    for name in ("exit", "kv"):
        table.add_column(name, no_wrap=True)
    names = (("exact",) if matched else ()) + ("as full", "in common", "nats/token", "depth",
                                               "memory", *PAPER_TASKS)  # fmt: skip
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        exact = (_percent(record["exact_match"]),) if matched else ()
        paper = record["paper"] if record["exit"] is None and record["paper"] else {}
        table.add_row(
            record["exit"] or "all loops", record["kv"], *exact,
            _percent(record["equal_answers"]), _number(record["tokens_in_common"], 1),
            _number(record["nats_per_token"], 3), _number(record["mean_depth"], 2),
            _number(record["memory"], 2), *(_number(paper.get(task), 2) for task in PAPER_TASKS),
        )  # fmt: skip
    return table


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
