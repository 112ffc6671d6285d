"""`ouro sweep` from the outside."""

import dataclasses
import json
import subprocess

import pytest
from fake_programs import Fakes
from micro_run import BATCH, ROOT, command, micro_config, ouro, write_config

from ouro_jax.config import DataConfig
from ouro_jax.training.run_log import read_log
from ouro_jax.training.trainer import prepare_data

# The last one fails once it is started: the tokenizer has 300 entries.
RUNS = """
from ouro_jax.experiments.sweep import Sweep, chain, one_of
def get_sweep():
    runs = chain(one_of("stages.*.learning_rate", [1e-3, 4e-3]), [{"model.vocab_size": 200}])
    return Sweep(base=BASE, runs=runs)
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep file of three short runs."""
    folder = tmp_path_factory.mktemp("sweep")
    config = micro_config(folder / "data")
    stage = dataclasses.replace(config.stages["stable_1a"], tokens=4 * BATCH, warmup_tokens=BATCH)
    evaluation = dataclasses.replace(config.evaluation, num_loops=2, ngram_baselines=False)
    config = dataclasses.replace(config, stages={"stable_1a": stage}, evaluation=evaluation)
    root = str(prepare_data(config))
    config = dataclasses.replace(config, data=DataConfig(root=root))
    base = write_config(folder / "base.py", config)
    (folder / "rates.py").write_text(f"BASE = {str(base)!r}\n{RUNS}")
    return folder / "rates.py"


def test_runs_end_are_compared_and_not_run_again(sweep, tmp_path):
    arguments = [str(sweep), f"--workdir={tmp_path}/w", "--workers=2", "--json"]
    first = ouro("sweep", *arguments)
    assert first.returncode == 1, first.stderr
    assert "vocab_size=200: code 2: error: " in first.stderr and "has 300 entries" in first.stderr
    assert "learning_rate=0.001: started   (0 of 3 ended, 1 running)" in first.stderr
    assert "3 of 3 ended, 0 running" in first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    statuses = {run["run"]: run["status"] for run in summary["runs"]}
    assert statuses == {"learning_rate=0.001": "finished", "learning_rate=0.004": "finished",
                        "vocab_size=200": "not started"}  # fmt: skip
    assert list(summary["failed"]) == ["vocab_size=200"]
    fewest = min(summary["runs"][:2], key=lambda run: run["bits_per_byte"])
    assert summary["best"] == fewest["run"]
    assert f"best: {fewest['run']}, {fewest['bits_per_byte']:.4f} bits per byte" in first.stdout
    assert json.loads((tmp_path / "w/results.json").read_text()) == summary["runs"]
    assert (tmp_path / "w/results.png").exists() and (tmp_path / "w/results.csv").exists()
    rates = [record["learning_rate"] for record in read_log(tmp_path / "w/learning_rate=0.004")
             if record["kind"] == "train"]  # fmt: skip
    assert rates[-1] == pytest.approx(4e-3)

    again = ouro("sweep", *arguments)
    assert again.returncode == 1 and "learning_rate" not in again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == summary
    shown = ouro("sweep", *arguments[:2], "--workers=0", "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout.splitlines()[-1])["runs"] == summary["runs"]

    base = sweep.with_name("base.py")
    text = base.read_text()
    base.write_text(text.replace('"seed": 0', '"seed": 1'))
    changed = ouro("sweep", *arguments)
    base.write_text(text)
    assert (
        changed.returncode == 2 and "learning_rate=0.001 was begun with another" in changed.stderr
    )


def test_one_run_of_a_sweep_is_that_run(sweep, tmp_path):
    result = ouro("sweep", str(sweep), f"--workdir={tmp_path}", "--run=2")
    assert result.returncode == 2 and "has 300 entries" in result.stderr
    assert not (tmp_path / "vocab_size=200").exists()
    result = ouro("sweep", str(sweep), f"--workdir={tmp_path}", "--run=3")
    assert result.returncode == 2 and "run = 3: expected 0 to 2" in result.stderr


def test_a_dry_run_prints_the_commands(sweep, tmp_path):
    result = ouro("sweep", str(sweep), f"--workdir={tmp_path}/w", "--dry_run", "--json")
    assert result.returncode == 0
    base = f"ouro train --config={sweep.with_name('base.py')}"
    lines = result.stdout.splitlines()
    rate, place = "learning_rate=0.001", f"--workdir={tmp_path}/w"
    assert lines[0] == f"{base} --config.stages.stable_1a.{rate} {place}/{rate}"
    assert lines[2].endswith(f"--config.model.vocab_size=200 {place}/vocab_size=200")
    assert len(lines) == 4 and json.loads(lines[3])["unfinished"][0] == rate
    assert not (tmp_path / "w").exists()


def submit(sweep, fakes, *arguments):
    """`ouro sweep` from the project's folder, with fake programs on the PATH."""
    options = command("sweep", str(sweep), f"--workdir={fakes.folder}/w", *arguments)
    options["env"] |= {key: fakes.env[key] for key in ("PATH", "FAKE", "HOME")}
    return subprocess.run(**options, cwd=ROOT, capture_output=True)


def test_submitted_runs_are_tasks_of_one_array(sweep, tmp_path):
    fakes = Fakes(tmp_path)
    (tmp_path / "w" / "learning_rate=0.001").mkdir(parents=True)
    log = {"kind": "event", "event": "finished", "stage": "stable_1a", "tokens": 1, "step": 1}
    (tmp_path / "w/learning_rate=0.001/metrics.jsonl").write_text(json.dumps(log) + "\n")
    options = f"slurm --gpus=0 --nodes=2 --logs={tmp_path}/logs"
    dry = submit(sweep, fakes, f"--submit={options}", "--dry_run")
    assert dry.returncode == 0 and not fakes.calls("sbatch") and not (tmp_path / "logs").exists()
    assert "sbatch --job-name=w --nodes=2" in dry.stdout and "--array=1,2" in dry.stdout
    result = submit(sweep, fakes, f"--submit={options}")
    assert result.returncode == 0, result.stderr
    words = f"sweep {sweep} --workdir={tmp_path}/w --run="
    ran = [call.rsplit(" ", 1)[0] for call in fakes.calls("ouro")]
    assert ran == [f"{words}{number}" for number in (1, 1, 2, 2)]


def test_submitted_runs_are_workloads_of_xpk(sweep, tmp_path):
    fakes = Fakes(tmp_path)
    result = submit(sweep, fakes, "--submit=xpk --xpk=c --type=v5p-8 --image=i")
    assert result.returncode == 0, result.stderr
    assert [call.split()[2] for call in fakes.calls("xpk")] == [
        f"--workload=w-{number}" for number in range(3)
    ]
    assert f"sweep {sweep} --workdir={tmp_path}/w --run=2" in fakes.calls("xpk")[2]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", [], ["not a readable config file", "get_sweep", "configs/sweeps/tiny_rates.py"]),
        ("def get_sweep(): return 3", [], ["get_sweep() of", "expected a Sweep(base=…, runs=…)"]),
        (None, [], ["rates.py: no such file"]),
        (RUNS, [], ["base=nowhere.py: no such file"]),
        (RUNS.replace("vocab_size", "vocab_sise"), [], [
            "run vocab_sise=200: Unknown config key 'model.vocab_sise'", "'vocab_size'?"]),
        (RUNS, ["more.py"], ["'more.py': expected flags only"]),
        (RUNS, ["--workers=-1"], ["workers = -1: expected 0 or more"]),
        (RUNS, ["--submit=slurn"], ["submit = 'slurn': expected one of slurm, xpk", "'slurm'?"]),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused_at_once(sweep, tmp_path, text, arguments, words):
    file = tmp_path / "rates.py"
    base = "nowhere.py" if "nowhere" in words[0] else str(sweep.with_name("base.py"))
    if text is not None:
        file.write_text(f"BASE = {base!r}\n{text}")
    result = ouro("sweep", str(file), f"--workdir={tmp_path}/w", *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "w").exists()


def test_the_file_is_asked_for():
    result = ouro("sweep", "--workers=2")
    assert result.returncode == 2 and "ouro sweep configs/sweeps/tiny_rates.py" in result.stderr


@pytest.mark.parametrize("name", ["tiny_rates", "ouro_1p4b_rates"])
def test_the_sweeps_of_the_project_are_whole(name, tmp_path):
    file = f"{ROOT}/configs/sweeps/{name}.py"
    result = ouro("sweep", file, f"--workdir={tmp_path}/w", "--dry_run", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout.splitlines()[-1])["unfinished"]) >= 6
