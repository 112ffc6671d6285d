"""What a run prints where there is no terminal, and that a panel shows the same facts."""

import io

import pytest
from rich.console import Console

from ouro_jax.training import progress
from ouro_jax.training.progress import Progress, clock


def train_record(step: int, **fields) -> dict:
    return {
        "kind": "train", "stage": "stable_1a", "step": step, "tokens": 4096 * step,
        "loss": 2.5, "loss_per_loop": [3.0, 2.25], "exit_distribution": [0.25, 0.75],
        "mean_depth": 1.75, "batch_tokens": 4096, "tokens_per_second": 2048.0,
        "tokens_per_second_per_device": 1024.0, "mfu": 50.0, "mfu_peak": "TPU v5e data sheet",
        "hbm_bytes_in_use": 2**30, "hbm_bytes_peak": 2**31, "hbm_bytes_limit": 2**34,
    } | fields  # fmt: skip


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test moves; the step takes two seconds, as the records' speed says."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(seconds, num_steps: int, **options) -> str:
    file = io.StringIO()
    with Progress(console=Console(file=file, width=40), **options) as shown:
        shown.start_stage("stable_1a", 4_096_000, done_tokens=0, tokens_after=40_960_000)
        for step in range(1, num_steps + 1):
            seconds[0] += 2.0
            shown.update(train_record(step))
        shown.finish_stage()
    return file.getvalue()


def test_a_line_at_most_every_ten_seconds_and_at_both_ends(seconds):
    lines = run(seconds, num_steps=20).splitlines()
    assert lines[0] == "stable_1a: 4,096,000 tokens."
    assert len(lines) == 1 + 4 + 1
    assert "step 5 " in lines[1] and "20,480/4,096,000 tokens" in lines[1]
    assert "2,048 tokens/s, 1,024 per device (50.0 % MFU)" in lines[1]
    assert "3.000 2.250" in lines[1] and "1.75" in lines[1]
    assert lines[-1].startswith("stable_1a: finished after 81,920 tokens in 0:40")


def test_time_left_counts_the_stage_and_the_later_ones(seconds):
    line = run(seconds, num_steps=5).splitlines()[1]
    # (4,096,000 - 20,480) / 2048 = 1990 s; with 40,960,000 more at this speed: 21,990 s.
    assert "33:10 left, 6:06:30 with the later stages" in line


def test_steps_without_a_speed_and_with_a_null_loss(seconds):
    file = io.StringIO()
    with Progress(console=Console(file=file)) as shown:
        shown.start_stage("gate", 8192, done_tokens=4096)
        seconds[0] += 60
        shown.update(train_record(1, tokens_per_second=None, mfu=None, loss=None))
    assert "4,096 of them done" in file.getvalue()
    assert "100.0 %" in file.getvalue() and "speed unknown yet" in file.getvalue()


def test_other_processes_print_nothing(seconds):
    assert run(seconds, num_steps=20, enabled=False) == ""


def test_on_a_terminal_a_panel_shows_and_messages_stay(seconds):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, _environ={})
    with Progress(console=console) as shown:
        shown.start_stage("stable_1a", 4_096_000)
        shown.message("a checkpoint [not markup]")
        shown.update(train_record(1))
    output = file.getvalue()
    for fact in ("a checkpoint [not markup]", "3.000 2.250", "1.75 of 2", "50.0 % MFU"):
        assert fact in output


def test_clock():
    durations = (5, 65, 3_605, 47 * 3600, 49 * 3600)
    assert list(map(clock, durations)) == ["0:05", "1:05", "1:00:05", "47:00:00", "2 d 1 h"]
