"""The line and the bar of a sweep: how much is done, how long it will take."""

import io
import json

import pytest
from rich.console import Console

from ouro_jax.cli import sweep_progress
from ouro_jax.cli.sweep_progress import SweepProgress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_by_the_tokens_of_this_call(tmp_path, clock, monkeypatch):
    def train(name, tokens):
        records = [{"kind": "train", "tokens": seen} for seen in range(1, tokens + 1)]
        (tmp_path / name).mkdir(exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(text + '{"kind": "tr')

    output = io.StringIO()
    monkeypatch.setattr(sweep_progress, "Console", lambda **_: Console(file=output, width=200))
    train("b", 40)
    progress = SweepProgress(dict.fromkeys("abc", 100), ["b", "c"], tmp_path)
    progress.changed("b", "started")
    assert "b: started   (1 of 3 ended, 1 running)\n" in output.getvalue()
    clock[0] = 10.0
    train("b", 60)
    progress.tick()
    # 20 tokens in ten seconds: 40 of b and 100 of c are left.
    assert progress.tasks[0].description == "1 of 3 ended, 1 running, about 1:10 left"
    assert (progress.tasks[0].completed, progress.tasks[0].total) == (160, 300)
    progress.changed("b", "failed: code 1: no")
    assert "b: failed: code 1: no   (2 of 3 ended, 0 running, about 0:16 left)" in output.getvalue()
