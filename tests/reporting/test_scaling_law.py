"""The picture of a scaling law, from records written by hand."""

import json

import matplotlib.image
import pytest

from ouro_jax.errors import ConfigError
from ouro_jax.reporting.scaling_law import draw_scaling_law


def write_records(file, sizes):
    """A total law, a step-wise one, and points of `sizes` sizes."""
    lines = []
    for law, trained in (("total", None), ("stepwise", 2)):
        place = {"law": law, "trained_loops": trained}
        lines.append({"kind": "scaling_law", **place, "r2": 0.9})
        lines += [
            {"kind": "scaling_point", **place, "run": f"{size}-{loops}", "loops": loops,
             "parameters": 1000 * (size + 1), "tokens": tokens, "loss": 3.0 - size,
             "predicted": 3.1 - size}
            for size in range(sizes) for loops in (1, 12) for tokens in (1000.0, 2000.0)
        ]  # fmt: skip
    lines.append({"kind": "scaling_weights", "r2": 0.9})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("sizes", [1, 5])
def test_any_number_of_sizes_can_be_drawn(tmp_path, sizes):
    records = write_records(tmp_path / "laws.jsonl", sizes)
    drawn = draw_scaling_law(records, tmp_path / "laws.png")
    height, width, _ = matplotlib.image.imread(drawn).shape
    assert width == 1920 and height > 1000


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(ConfigError, match="no scaling_law record"):
        draw_scaling_law(tmp_path / "metrics.jsonl", tmp_path / "laws.png")
