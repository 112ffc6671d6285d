"""Figures of the studies of a checkpoint: they are drawn from records as they are written."""

import matplotlib.image
import pytest

from ouro_jax.reporting.depth import draw_depth
from ouro_jax.reporting.exits import RULES, draw_calibration, draw_exits
from ouro_jax.reporting.probes import draw_agreement, draw_probes


def test_depth_is_drawn_beyond_training_and_without_bytes(tmp_path):
    records = [
        {"kind": "depth", "checkpoint": "gate", "source": source, "trained_loops": 2,
         "loss_per_loop": [3.0, 2.0, None], "accuracy_per_loop": [0.1, 0.2, 0.15],
         "bits_per_byte_per_loop": bits}
        for source, bits in (("code", [1.0, 0.9, 1.1]), ("mano", None))
    ]  # fmt: skip
    draw_depth(records, tmp_path / "depth.png")
    assert drawn(tmp_path / "depth.png")


@pytest.mark.parametrize("names", [["gate"], ["sft", "gate"]])
def test_exits_and_calibration_are_drawn_for_each_checkpoint(tmp_path, names):
    point = {"value": 0.5, "mean_depth": 1.5, "loss": 2.0, "accuracy": 0.3, "flops": 0.5}
    bins = [{"gate": gate, "predicted": 0.5, "observed": 0.4, "target": 0.5, "tokens": 9}
            for gate in (1, 2)]  # fmt: skip
    records = []
    for name in names:
        records += [{"kind": "exits", "checkpoint": name, "rule": rule, "points": [point]}
                    for rule in RULES]  # fmt: skip
        records += [{"kind": "calibration", "checkpoint": name, "loop": loop, "bins": bins}
                    for loop in ("own", "next")]  # fmt: skip
        records.append({"kind": "expected", "checkpoint": name, "expected": 2.0, "realised": 2.1,
                        "bins": [{"expected": 1.0, "realised": 1.1}]})  # fmt: skip
    draw_exits(records, tmp_path / "exits.png")
    draw_calibration(records, tmp_path / "calibration.png")
    assert drawn(tmp_path / "exits.png") and drawn(tmp_path / "calibration.png")


def test_probes_and_agreement_are_drawn_with_gaps(tmp_path):
    records = [
        {"kind": "probe", "step": step, "loop": loop, "layer": layer, "rarer": 20,
         "auc": None if step == 3 else 0.8, "control_auc": None if step == 3 else 0.5}
        for step in (2, 3) for loop in range(1, step + 1) for layer in (1, 2)
    ]  # fmt: skip
    draw_probes(records, tmp_path / "probes.png")
    agreement = {"kind": "agreement", "questions": "pairs", "num_prompts": 9, "trained_loops": 2,
                 "matrix": [[9, 4, 3], [4, 9, 5], [3, 5, 9]]}  # fmt: skip
    draw_agreement(agreement, tmp_path / "agreement.png")
    assert drawn(tmp_path / "probes.png") and drawn(tmp_path / "agreement.png")


def drawn(path):
    """Whether the picture has more than its background."""
    return matplotlib.image.imread(path)[..., :3].std() > 0.01
