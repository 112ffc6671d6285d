"""What happened to a run is written down by any thread, and survives kills and full disks."""

import errno
import json
import threading

import pytest

from ouro_jax.errors import ConfigError, RunError, Stopped
from ouro_jax.training.events import EventLog, read_events, skipped_rows
from ouro_jax.training.lines import Lines


def test_events_of_many_threads_are_whole_lines(tmp_path):
    log = EventLog(tmp_path)
    threads = [
        threading.Thread(target=lambda: [log.write("alarm", text="x" * 500) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read_events(tmp_path)) == 400


def test_processes_but_the_first_write_nothing(tmp_path):
    EventLog(tmp_path / "run", enabled=False).write("alarm", text="x")
    assert not (tmp_path / "run").exists() and read_events(tmp_path / "run") == []


@pytest.mark.parametrize(("error", "code"), [
    (Stopped("as asked"), 75), (ConfigError("wrong"), 2), (RunError("disk"), 1),
    (ValueError("bug"), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_an_attempt_notes_how_it_ends_if_it_had_begun(tmp_path, error, code):
    for started in (False, True):
        log = EventLog(tmp_path)
        with pytest.raises(type(error)), log.attempt():
            if started:
                log.write("start")
            raise error
        log.close()
    start, stop = read_events(tmp_path)
    assert (start["kind"], stop["kind"], stop["code"]) == ("start", "stop", code)
    assert str(error) in stop["reason"]


def test_the_rows_that_a_stage_has_skipped(tmp_path):
    log = EventLog(tmp_path)
    log.write("skip", stage="stable_1a", skip_rows=[(8, 16)], loss=float("nan"))
    log.write("skip", stage="stable_1b", skip_rows=[(0, 4)])
    log.write("rollback", stage="stable_1a", skip_rows=[(0, 8)])
    log.write("rollback", stage="stable_1a", skip_rows=[])
    log.close()
    assert skipped_rows(tmp_path, "stable_1a") == ((8, 16), (0, 8))
    assert skipped_rows(tmp_path, "stable_1b") == ((0, 4),)
    assert skipped_rows(tmp_path, "gate") == skipped_rows(tmp_path / "none", "gate") == ()
    assert read_events(tmp_path)[0]["loss"] is None


class FullDisk:
    """A file that takes `room` bytes more and then none until there is room again."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_loses_no_line_and_tears_none(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    records = [{"kind": "window", "number": number} for number in range(6)]
    lines.append(records[0])
    disk = lines._file = FullDisk(lines._file, 10)  # type: ignore[reportAttributeAccessIssue]
    for record in records[1:3]:
        lines.append(record)
    assert path.read_text().splitlines() == [json.dumps(records[0])]
    disk.room = 10**6
    for record in records[3:]:
        lines.append(record)
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_lines_that_were_never_written_are_an_error_at_the_end(tmp_path):
    lines = Lines(tmp_path / "lines.jsonl")
    lines._file = FullDisk(lines._file, 0)  # type: ignore[reportAttributeAccessIssue]
    lines.append({"kind": "window"})
    lines.append({"kind": "window"})
    with pytest.raises(RunError, match="its last 38 bytes are lost: .*No space left"):
        lines.close()
