"""`ouro experiment` from the outside."""

import json
import shutil
from pathlib import Path

import pytest
from micro_run import ROOT, ouro

CARD = """
import dataclasses
import runpy
from ouro_jax.config import from_config_dict, to_config_dict
from ouro_jax.experiments.experiment import Experiment, looped_and_baselines

MANO = runpy.run_path({mano!r})

def get_config(protocol="small"):
    config = from_config_dict(MANO["get_config"]("smoke"))
    stage = dataclasses.replace(config.stages["stable_1a"], tokens=20 * 1024, warmup_tokens=1024)
    evaluation = dataclasses.replace(config.evaluation, num_loops=2)
    return to_config_dict(
        dataclasses.replace(config, stages={{"stable_1a": stage}}, evaluation=evaluation)
    )

def get_experiment(protocol="small"):
    runs = looped_and_baselines(1, 2)[:2]
    return Experiment("short", runs, loops=(1, 2), published=MANO["PUBLISHED"])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project's folder with one card."""
    folder = tmp_path_factory.mktemp("project")
    cards = folder / "configs" / "experiments"
    cards.mkdir(parents=True)
    card = CARD.format(mano=str(ROOT / "configs" / "experiments" / "mano.py"))
    (cards / "short.py").write_text(card)
    return folder


@pytest.fixture(scope="module")
def first(project):
    """What the command says the first time."""
    result = ouro("experiment", "short", "--workdir=w", "--json", cwd=project)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_study_of_what_was_trained(project, first):
    run = json.loads((project / "w" / "results.jsonl").read_text().splitlines()[0])["run"]
    arguments = ("depth", f"--checkpoint=w/{run}", "--workdir=d", "--json")
    result = ouro("experiment", *arguments, cwd=project)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["files"] == ["d/depth.jsonl", "d/depth.png"]
    records = [json.loads(line) for line in (project / "d/depth.jsonl").read_text().splitlines()]
    assert {record["source"] for record in records} == {"mano", "length_1", "length_3"}
    assert all(len(record["accuracy_per_loop"]) == 8 for record in records)
    scored = [json.loads(line) for line in (project / "w/results.jsonl").read_text().splitlines()]
    exact = {(r["set"], r["loops"]): r["exact"] for r in scored if r["run"] == run}
    for record in records:  # the answers are one token, so both measure the same
        assert record["accuracy_per_loop"][1] == pytest.approx(exact[record["source"], 2])


def test_models_are_trained_evaluated_and_drawn_once(project, first):
    summary = first
    models = {(entry["set"], entry["model"]): entry for entry in summary["models"]}
    assert models["mano", "1x2"]["role"] == "looped"
    assert models["mano", "1x1"]["role"] == "iso-parameter"
    assert models["mano", "1x1"]["reference_value"] == pytest.approx(0.4239, abs=1e-4)
    workdir = project / "w"
    records = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 3 * 2  # runs, sets, loops
    assert (workdir / "results.png").is_file()
    page = (workdir / "report.html").read_text()
    assert "iso-parameter" in page and "<svg" in page and "0.981" in page

    # A run whose checkpoint is gone but whose results are there is not trained again.
    shutil.rmtree(workdir / records[0]["run"])
    again = ouro("experiment", "short", "--workdir=w", "--json", cwd=project)
    assert json.loads(again.stdout.splitlines()[-1]) == summary
    assert "started" not in again.stderr and "evaluating" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shrot"], "Did you mean 'short'"),
        (["short", "--protocol=tiny"], "expected one of smoke, small, paper"),
        (["short"], "--workdir is missing"),
        (["short", "--workdir=w", "--workers=-1"], "workers"),
        (["depht"], "Did you mean 'depth'"),
        (["depth", "--workdir=d"], "needs --checkpoint"),
        (["depth", "--workdir=d", "--checkpoint=nowhere"], "no such folder"),
        (["safety", "--workdir=d", "--checkpoint=w"], "huggingface.co/datasets/LLM-Tuning-Safety"),
    ],
)
def test_bad_input(project, arguments, says):
    result = ouro("experiment", *arguments, cwd=project)
    assert result.returncode == 2 and says in result.stderr


def test_outside_a_project(tmp_path):
    result = ouro("experiment", "mano", "--workdir=w", cwd=tmp_path)
    assert result.returncode == 2 and "run it from the project's folder" in result.stderr


def test_the_cards_of_the_project_are_plans():
    for card in sorted((Path(ROOT) / "configs" / "experiments").glob("*.py")):
        arguments = ("experiment", card.stem, "--protocol=paper", "--workdir=w", "--dry_run")
        result = ouro(*arguments, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert f"configs/experiments/{card.stem}.py:paper" in result.stdout
