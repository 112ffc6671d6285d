"""`ouro report` from the outside: the page, the table, and its refusals."""

import json
import subprocess
import sys

EVENT = {"kind": "event", "event": "stage_start", "time": 0, "stage": "sft", "step": 0, "tokens": 0}


def ouro_report(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ouro_jax.cli.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_writes_the_page_and_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(EVENT) + "\n")
    result = ouro_report(f"--workdir={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    assert "No held-out text was measured yet." in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["report"] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_no_workdir_and_no_log_leave_with_2(tmp_path):
    for arguments, message in (((), "--workdir"), ((f"--workdir={tmp_path}",), "metrics.jsonl")):
        result = ouro_report(*arguments)
        assert result.returncode == 2 and message in result.stderr
