"""The pictures of safety, from records written by hand."""

import json

import matplotlib.image
import numpy as np
import pytest

from ouro_jax.errors import ConfigError
from ouro_jax.reporting.safety import draw_prompt_states, draw_safety


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def run_records(model, first, judges_harm):
    """A run whose score falls from `first`; nothing was judged at depth 3."""
    rows = [
        {"depth": depth, "mean_score": None if depth == 3 else 1 + (first - 1) / depth,
         "harmful_rate": None if depth == 3 else (first - 1) / 8 / depth}
        for depth in range(1, 9)
    ]  # fmt: skip
    run = {"kind": "safety_run", "model": model, "mode": "base", "judges_harm": judges_harm}
    return [run, {"kind": "safety_summary", "by_depth": rows}]


def test_scores_and_rates(tmp_path):
    files = [write(tmp_path / "a", run_records("Ouro-1.4B", 4, True)),
             write(tmp_path / "b", run_records("tiny", 2.5, False))]  # fmt: skip
    drawn = draw_safety(files, tmp_path / "safety.png")
    assert matplotlib.image.imread(drawn).shape[1] == 1920
    write(tmp_path / "c", run_records("x", 2, True)[:1])
    with pytest.raises(ConfigError, match="no safety_summary record; let that run end first"):
        draw_safety([tmp_path / "c"], tmp_path / "c.png")


def test_states(tmp_path):
    rng, records = np.random.default_rng(0), []
    for depth in range(1, 9):
        records.append({"kind": "safety_separation", "depth": depth, "separation": depth / 4,
                        "explained": 0.4})  # fmt: skip
        records += [
            {"kind": "safety_state", "depth": depth, "label": label, "number": 1,
             "x": rng.normal() + side * depth / 4, "y": rng.normal()}
            for side, label in ((-1, "benign"), (1, "harmful")) for _ in range(50)
        ]  # fmt: skip
    file = write(tmp_path / "states", records)
    drawn = draw_prompt_states(file, tmp_path / "states.png")
    assert matplotlib.image.imread(drawn).shape[1] == 1920
    with pytest.raises(ConfigError, match="no safety_separation record"):
        draw_prompt_states(write(tmp_path / "x", records[1:2]), tmp_path / "x.png")
