"""Pieces of work on several processes: all done once, failures and deaths reach the caller."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ouro_jax.data.workers import run_pieces
from ouro_jax.errors import ConfigError, RunError


def square(piece, advance):
    advance(piece, 1)
    return piece**2


def fail_at_two(folder, piece, advance):
    if piece == 2:
        raise ConfigError("piece 2 is bad")
    for _ in range(600):  # a minute, unless it is stopped
        time.sleep(0.1)
        advance(1, 1)
    (folder / f"{piece}").touch()


def die(piece, advance):
    os.kill(os.getpid(), signal.SIGKILL)


def write_pids(folder, piece, advance):
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def ignore(num_bytes, num_tokens):
    """For tests that do not look at progress."""


@pytest.mark.parametrize("workers", [1, 2])
def test_every_piece_is_done_once_and_all_progress_is_heard(workers):
    heard = []
    results = list(run_pieces(square, range(5), workers, lambda *amounts: heard.append(amounts)))
    assert sorted(results) == [(piece, piece**2) for piece in range(5)]
    assert [sum(amounts) for amounts in zip(*heard, strict=True)] == [10, 5]


def test_a_failure_is_raised_and_stops_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(ConfigError, match="piece 2 is bad"):
        list(run_pieces(functools.partial(fail_at_two, tmp_path), range(1, 4), 2, ignore))
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_is_said():
    with pytest.raises(RunError, match="a worker process was killed"):
        list(run_pieces(die, range(2), 2, ignore))


def test_workers_end_with_a_killed_parent(tmp_path):
    program = f"""
import functools, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import ignore, run_pieces, write_pids
if __name__ == "__main__":
    list(run_pieces(functools.partial(write_pids, pathlib.Path({str(tmp_path)!r})), range(2), 2,
                    ignore))
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    folder = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(folder)}
    )
    pids = _wait_for(lambda: [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()], 2)
    parent.kill()
    parent.wait()
    ended = _wait_for(lambda: [pid for pid in pids if not _is_running(pid)], 2)
    assert sorted(ended) == sorted(pids)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(find, count, seconds=30):
    deadline = time.monotonic() + seconds
    while len(found := find()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found
