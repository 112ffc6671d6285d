"""Figures of experiments: PNG files of their own, in the light theme of the report."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ouro_jax.reporting.data import light_colours
from ouro_jax.reporting.plots import MAX_LOOP_COLOURS, STAND_INS, STYLE, WIDE


@contextlib.contextmanager
def light_figure(height: int, path: str | Path) -> Iterator[tuple[Figure, dict[str, str]]]:
    """A figure as wide as the page and the theme's colours by name; written to `path` last."""
    colours = light_colours()
    real = {STAND_INS[name]: colour for name, colour in colours.items() if name in STAND_INS}
    with matplotlib.rc_context({key: real.get(value, value) for key, value in STYLE.items()}):
        figure = WIDE.figure(height)
        figure.set_facecolor(colours["paper"])
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
        yield figure, colours
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=144)


def light_loop(loop: int, colours: dict[str, str]) -> str:
    """The colour of a loop, the same in every figure; those beyond the last one repeat it."""
    return colours[f"loop-{min(loop, MAX_LOOP_COLOURS)}"]
