"""`ouro report` from the outside: the page, the table, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

from ouro_jax.cli.studies import STUDIES
from ouro_jax.reporting import studies

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


def test_a_folder_of_runs_gets_a_page_of_all(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(EVENT) + "\n")
    result = ouro_report(f"--workdir={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert [(f["kind"], f["name"]) for f in summary["found"]] == [
        ("training run", "a"), ("training run", "b")
    ]  # fmt: skip
    assert summary["report"] == str(tmp_path / "report.html")
    assert "training run" in (tmp_path / "report.html").read_text()


def test_the_folder_of_an_experiment_keeps_its_own_page(tmp_path):
    described = {"name": "mano", "protocol": "small", "axis": "", "main_set": "",
                 "published": [], "differences": []}  # fmt: skip
    (tmp_path / "experiment.json").write_text(json.dumps(described))
    result = ouro_report(f"--workdir={tmp_path}")
    assert result.returncode == 2 and "ouro experiment" in result.stderr
    records = Path(__file__).parents[2] / "docs" / "findings" / "mano_small.jsonl"
    (tmp_path / "results.jsonl").write_text(records.read_text())
    result = ouro_report(f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "mano, small protocol · experiment" in (tmp_path / "report.html").read_text()


def test_every_study_of_the_command_line_is_gathered():
    assert set(studies.STUDIES) == set(STUDIES)
