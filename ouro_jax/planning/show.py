"""A plan as text for people."""

from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from ouro_jax.planning.plan import Row

RESOURCES = {"compute": "compute", "hbm": "HBM", "ici": "ICI", "dcn": "DCN"}
COLLECTIVES_SHOWN = 10


def verdict(row: Row) -> str:
    """Whether it fits, and in how much of a chip's memory; else why not."""
    name = f"{row['stage']}, {row['program']}, on {row['topology']}"
    capacity = f"{row['hbm_capacity_gib']:.2f} GiB of a {row['chip']}"
    if row["fits"]:
        return f"{name}: fits, with {row['hbm_gib']:.3g} of the {capacity}."
    if not row["hbm_gib"]:
        return f"{name}: the compiler refuses it.\n{row['reason']}"
    needed = f"It needs {row['hbm_gib']:.2f} or more."
    return f"{name}: does not fit the {capacity}. {needed}\n{row['reason']}"


def layout_text(row: Row) -> str:
    """`data 16 × fsdp 16, once, loop_and_layer, 8 × 1 rows`; axes of one are left out."""
    layout = row["layout"]
    axes = [f"{axis} {size}" for axis, size in layout["mesh"].items() if size > 1]
    return ", ".join((
        " × ".join(axes) or "one device", layout["gather"], layout["remat"],
        f"{row['microbatches']} × {layout['microbatch_rows']} rows",
    ))  # fmt: skip


def overview(rows: Sequence[Row], title: str) -> Table:
    """A line for each stage or layout."""
    table = _table(title, "stage", "layout", HBM="GiB", moved="GB", step="s", bound_by="", MFU="%",
                   days="", chip_hours="", compiled="s")  # fmt: skip
    for row in rows:
        peak = f"{row['hbm_gib']:.2f}" if row["hbm_gib"] else "?"
        cells = [row["stage"], layout_text(row), f"{peak} of {row['hbm_capacity_gib']:.2f}"]
        if row["fits"]:
            cells += [
                f"{row['collective_gb']:.1f}", f"{max(row['seconds'].values()):.3g}",
                RESOURCES[row["bound_by"]], f"{100 * row['mfu_bound']:.1f}", f"{row['days']:.3g}",
                f"{row['chip_hours']:,.0f}",
            ]  # fmt: skip
        else:
            cells += ["does not fit" if row["hbm_gib"] else "refused", *[""] * 5]
        table.add_row(*cells, f"{row['compile_seconds'] or 0:.0f}")
    return table


def details(row: Row) -> list[Any]:
    """Memory, times and transfers of one program that fits."""
    memory = _table("HBM of a chip", "kind", size="GiB")
    for kind, size in row["hbm_by_kind_gib"].items():
        memory.add_row(kind, f"{size:.3g}")
    tokens = f" of {row['tokens_per_step']:,} tokens" if "tokens_per_step" in row else ""
    times = _table(f"a step{tokens}, at least", "resource", time="s", of="")
    amounts = {
        "compute": f"{row['hardware_flops_per_step'] / row['chips']:.3g} FLOPs",
        "hbm": f"{row['hbm_gb_per_step']:,.1f} GB",
        "ici": f"{row['collective_gb']:,.2f} GB of payload",
    }
    for resource, name in RESOURCES.items():
        times.add_row(name, f"{row['seconds'][resource]:.4g}", amounts.get(resource, ""))
    moved = _table("transfers of a step: instructions × executions", "kind", "axes", times="",
                   payload="MB", total="GB")  # fmt: skip
    for part in row["collectives"][:COLLECTIVES_SHOWN]:
        moved.add_row(
            part["kind"], " ".join(part["axes"]), f"{part['count']} × {part['trips']}",
            f"{part['payload_bytes'] / 1e6:,.2f}", f"{part['total_bytes'] / 1e9:,.3f}",
        )  # fmt: skip
    rest = row["collectives"][COLLECTIVES_SHOWN:]
    if rest:
        total = sum(part["total_bytes"] for part in rest) / 1e9
        moved.add_row(f"{len(rest)} more", "", "", "", f"{total:,.3f}")
    return [memory, times, *([moved] if row["collectives"] else []), summary(row)]


def summary(row: Row) -> str:
    """What bounds the program, and what that makes of the stage."""
    bound = (
        f"Bound by {RESOURCES[row['bound_by']]}: at most {100 * row['mfu_bound']:.1f} % MFU "
        f"({row['flops_per_step']:.4g} model FLOPs a step)"
    )
    if row["program"] != "train":
        return f"{bound}, {row['tokens_per_second']:,.0f} tokens/s."
    notes = ""
    if row["rematerializations"] or row["replicated_matrices"]:
        notes = (
            f"\nThe compiler warned of {row['rematerializations']} involuntary full "
            f"rematerializations; {row['replicated_matrices']} moments are whole on every chip."
        )
    return (
        f"{bound}.\n{row['tokens']:,} tokens take at least {row['days']:.3g} days, "
        f"{row['chip_hours']:,.0f} chip-hours. {layout_text(row)}; compiled in "
        f"{row['compile_seconds']:.0f} s.{notes}"
    )


def _table(title: str, *words: str, **numbers: str) -> Table:
    right = [
        Column(f"{name.replace('_', ' ')}{', ' if unit else ''}{unit}", justify="right")
        for name, unit in numbers.items()
    ]
    return Table(*words, *right, title=title, title_justify="left")
