"""Figures of experiments as PNG files, in the report's colours and type."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ouro_jax.reporting.data import light_colours
from ouro_jax.reporting.plots import MAX_LOOP_COLOURS, STAND_INS, STYLE, Canvas

PNG_DPI = 144


@contextmanager
def figure_file(
    path: str | Path, height: int, width: int = 960
) -> Iterator[tuple[Figure, dict[str, str]]]:
    """An empty figure and the light theme's colours by name; written to `path` at the end."""
    colours = light_colours()
    real = {STAND_INS[name]: colour for name, colour in colours.items() if name in STAND_INS}
    style: dict[Any, Any] = {key: real.get(value, value) for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Canvas("file", width, 0).figure(height)
        figure.set_facecolor(colours["paper"])
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
        yield figure, colours
        figure.savefig(path, dpi=PNG_DPI)


def spread_colours(count: int, colours: dict[str, str]) -> list[str]:
    """`count` colours of loops, far from each other; they repeat after the eighth."""
    return [colours[f"loop-{index * 3 % MAX_LOOP_COLOURS + 1}"] for index in range(count)]
