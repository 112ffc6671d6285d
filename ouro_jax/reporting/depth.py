"""The figure of `ouro_jax.experiments.depth`: loss and accuracy after each loop, by source."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ouro_jax.reporting.figures import figure_file, spread_colours
from ouro_jax.reporting.history import Record


def draw_depth(records: Sequence[Record], path: str | Path) -> None:
    """Draws the `depth` records; what lies beyond the trained depth is shaded and dashed.

    Bits per byte where all sources have them, else nats per token. Lines are sources, of every
    checkpoint that the records hold.
    """
    records = [record for record in records if record["kind"] == "depth"]
    several = len({record["checkpoint"] for record in records}) > 1
    has_bits = all(record["bits_per_byte_per_loop"] for record in records)
    field = "bits_per_byte_per_loop" if has_bits else "loss_per_loop"
    loss = "bits per byte" if has_bits else "nats per token"
    with figure_file(path, 400) as (figure, colours):
        panels = figure.subplots(1, 2)
        for axes, name, title in zip(
            panels, (field, "accuracy_per_loop"), (f"held-out {loss}", "next-token accuracy"),
            strict=True,
        ):  # fmt: skip
            axes.set_title(title, loc="left", fontsize=13)
            lines = zip(records, spread_colours(len(records), colours), strict=True)
            for record, colour in lines:
                who = f"{record['checkpoint']}: " if several else ""
                _line(axes, record[name], record["trained_loops"], colour, who + record["source"])
            _mark_trained(axes, records, colours)
        handles, texts = panels[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=min(len(texts), 6))


def _line(axes: Axes, values: Sequence[float], trained: int, colour: str, label: str) -> None:
    depths, y_T = np.arange(1, len(values) + 1), np.array(values, float)
    axes.plot(depths[:trained], y_T[:trained], "o-", color=colour, label=label)
    axes.plot(depths[trained - 1 :], y_T[trained - 1 :], "--", color=colour)
    axes.plot(depths[trained:], y_T[trained:], "o", color=colour, mfc="white")


def _mark_trained(axes: Axes, records: Sequence[Record], colours: dict[str, str]) -> None:
    deepest = max(len(record["loss_per_loop"]) for record in records)
    trained = min(record["trained_loops"] for record in records)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_xlabel(f"loops (trained with {trained})")
    if trained < deepest:
        axes.axvspan(trained, deepest + 0.3, color=colours["band"], zorder=0)
