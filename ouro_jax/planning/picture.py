"""Time bars of a plan: what each resource takes of a step, for every stage or layout."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ouro_jax.planning.plan import Row
from ouro_jax.planning.show import RESOURCES

COLOURS = {"compute": "#2f5fb3", "hbm": "#1a929b", "ici": "#dd6b39", "dcn": "#8f3f97"}
BAR = 0.19


def draw_bars(rows: Sequence[Row], labels: Sequence[str], title: str, path: Path) -> None:
    """Writes the bars of `rows` that fit, the bounding one in full colour, others paler."""
    figure = Figure(figsize=(9, 1.3 + 0.75 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        if not row["fits"]:
            axes.text(0, number, " does not fit", va="center", color="#8a8f98")
            continue
        for place, (resource, colour) in enumerate(COLOURS.items()):
            seconds, bounds = row["seconds"][resource], resource == row["bound_by"]
            y = number + (place - 1.5) * BAR
            axes.barh(y, seconds, BAR * 0.9, color=colour, alpha=1 if bounds else 0.55)
            if bounds:
                note = f" {seconds:.3g} s, at most {100 * row['mfu_bound']:.0f} % MFU"
                axes.text(seconds, y, note, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [label.replace(", ", "\n", 1) for label in labels])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    # Room for the note beside the longest bar.
    longest = max((max(row["seconds"].values()) for row in rows if row["fits"]), default=1.0)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_xlabel("seconds of a step, at least")
    axes.set_title(title, loc="left", fontsize=12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="#dddbd4", linewidth=0.6)
    axes.set_axisbelow(True)
    for resource, name in RESOURCES.items():
        axes.barh(0, 0, color=COLOURS[resource], label=name)
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=150)
