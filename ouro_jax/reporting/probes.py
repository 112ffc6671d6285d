"""The figures of `ouro_jax.experiments.probes`: AUC by loop and layer, agreement of the depths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from ouro_jax.reporting.figures import figure_file
from ouro_jax.reporting.history import Record

PAPER_AGREEMENT = (
    "Ouro-1.4B on 1,000 Quora pairs: depths 2 and 3 agree on 551, 2 and 4 on 361;\n"
    "from 4 on, neighbours agree on almost all (paper, Fig. 9)"
)


def draw_probes(records: Sequence[Record], path: str | Path) -> None:
    """A heat map for each step: AUC of the probe on every layer of every loop up to it.

    Cells without an AUC had too few answers of one kind. The title has the mean AUC of the probes
    on shuffled answers, which is to be 0.5.
    """
    records = [record for record in records if record["kind"] == "probe"]
    steps = sorted({record["step"] for record in records})
    deepest = max(record["loop"] for record in records)
    layers = max(record["layer"] for record in records)
    with figure_file(path, 330) as (figure, colours):
        panels = figure.subplots(1, len(steps), squeeze=False)[0]
        for axes, step in zip(panels, steps, strict=True):
            mine = [record for record in records if record["step"] == step]
            auc_TN = np.full((deepest, layers), np.nan)
            for record in mine:
                value = np.nan if record["auc"] is None else record["auc"]
                auc_TN[record["loop"] - 1, record["layer"] - 1] = value
            image = _heat_map(axes, auc_TN, colours, 0.4, 1.0, "{:.2f}" if layers <= 8 else None)
            controls = [r["control_auc"] for r in mine if r["control_auc"] is not None]
            control = f"shuffled {np.mean(controls):.2f}" if controls else "too few of one answer"
            axes.set_title(f"answer of loop {step} ({control})", loc="left", fontsize=12)
            axes.set(xlabel="layer", ylabel="loop")
            ticks = np.unique(np.linspace(1, layers, min(layers, 6)).astype(int))
            axes.set_xticks(ticks - 1, map(str, ticks))
            axes.set_yticks(range(deepest), map(str, range(1, deepest + 1)))
        figure.colorbar(image, ax=panels, label="ROC AUC of the probe")


def draw_agreement(record: Record, path: str | Path) -> None:
    """The counts of one `agreement` record; lines mark where the trained depths end."""
    counts_TT = np.array(record["matrix"], float)
    depths = len(counts_TT)
    with figure_file(path, 560, 600) as (figure, colours):
        axes = figure.subplots()
        _heat_map(axes, counts_TT, colours, 0, record["num_prompts"], "{:.0f}")
        axes.set_title(
            f"{record['questions']}: the same answer after i and j loops, of "
            f"{record['num_prompts']:,}", loc="left", fontsize=12,
        )  # fmt: skip
        axes.set_xticks(range(depths), map(str, range(1, depths + 1)))
        axes.set_yticks(range(depths), map(str, range(1, depths + 1)))
        edge = record["trained_loops"] - 0.5
        axes.axhline(edge, color=colours["paper"], linewidth=2)
        axes.axvline(edge, color=colours["paper"], linewidth=2)
        axes.set_xlabel("loops")
        axes.set_ylabel("loops")
        figure.supxlabel(PAPER_AGREEMENT, fontsize=10, color=colours["faint"])


def _heat_map(
    axes: Axes, values: np.ndarray, colours: dict[str, str], low: float, high: float,
    shown: str | None,
):  # fmt: skip
    """Cells from pale to deep, with their numbers in `shown` if given; nan is left empty."""
    palette = LinearSegmentedColormap.from_list("pale", [colours["band"], colours["loop-4"]])
    image = axes.imshow(values, cmap=palette, vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    for (row, column), value in np.ndenumerate(values):
        if shown is not None and np.isfinite(value):
            deep = value > (low + high) / 2
            axes.text(column, row, shown.format(value), ha="center", va="center", fontsize=10,
                      color=colours["card"] if deep else colours["ink"])  # fmt: skip
    return image
