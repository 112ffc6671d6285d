"""`ouro train` from the outside: what it refuses, with code 2, and before anything is compiled."""

import dataclasses
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from micro_run import ROOT, micro_config, ouro, write_config

from ouro_jax.config import DataConfig, LayoutConfig, MeshConfig
from ouro_jax.errors import ConfigError
from ouro_jax.interop.huggingface import save_huggingface
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.training import stage_run, trainer
from ouro_jax.training.checkpoints import save_params
from ouro_jax.training.state import StateFactory

TINY = f"--config={ROOT}/configs/tiny.py"


def broken(folder: Path) -> dict[str, Path]:
    """Config files that cannot be read, by what is wrong with them."""
    files = {
        "syntax": "def get_config(:\n",
        "nothing": "CONFIG = 3\n",
        "import": "import nowhere_at_all\n",
        "binary": b"\x00\xff\x1c",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return {name: folder / name for name in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config is missing", "--config=configs/tiny.py"]),
        ([TINY], ["--workdir is missing", "--workdir=runs/tiny"]),
        (["--config=nowhere.py"], ["--config=nowhere.py: no such file"]),
        ([f"{TINY}:smok"], ["'smok'", "Did you mean 'smoke'?"]),
        ([TINY, "--wrkdir=x"], ["wrkdir", "Did you mean: workdir"]),
        ([TINY, "x"], ["'x': expected flags only"]),
        ([TINY, "--config.stages.stable_1a.token=5"],
         ["Unknown config key 'stages.stable_1a.token'", "'stages.stable_1a.tokens'?"]),
        ([*TINY.split("="), "--config.modle.hidden_size", "5"],
         ["Unknown config key 'modle.hidden_size'", "'model.hidden_size'?"]),
        ([TINY, "--config.stages.anneal.tokens=1e6"],
         ["--config.stages.anneal.tokens=1e6", "Write whole numbers as 1000000 or 1_000_000"]),
        ([TINY, "--config.stages.anneal.mixture.code=0.9"],
         ["stages.anneal.mixture", "'code': 0.9", "these sum to 1.5"]),
        ([TINY, "--config.stages.stable_1b.num_layers=3"],
         ["stages.stable_1b.num_layers = 3: expected 2", "upcycle_stacked"]),
        ([TINY, "--config.stages.stable_1a.transition=upcycle_stacked"],
         ["stages.stable_1a.transition", "init_from is not set"]),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_at_once(arguments, words):
    result = ouro("train", *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["syntax", "nothing", "import", "binary"])
def test_a_config_file_that_cannot_be_read_is_refused(tmp_path, kind):
    file = broken(tmp_path)[kind]
    result = ouro("train", f"--config={file}", "--dry_run")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--config={file}: not a readable config file" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_examples():
    result = ouro("train", "--help")
    assert result.returncode == 0
    assert "ouro train --config=configs/tiny.py" in result.stdout
    assert "--workdir" in result.stdout and "--dry_run" in result.stdout


def test_the_dry_run_needs_nothing_and_ends_with_json(tmp_path):
    arguments = f"--config={ROOT}/configs/ouro_2p6b.py", "--dry_run", "--json"
    override = f"--config.data.root={tmp_path}/nowhere"
    result = ouro("train", *arguments, override, "--config.stages.sft.tokens=2_000_000_000")
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    stages = {row["stage"]: row for row in json.loads(last)["stages"]}
    assert list(stages) == ["stable_1b", "anneal", "long_context", "mid_training", "sft", "gate"]
    assert stages["anneal"]["parameters"] == 2_667_974_657
    assert 0 <= stages["sft"]["tokens"] - 2 * 10**9 < 2**20
    text = "\n".join(table)
    for number in ("2,667,974,657", "48 × 4", "8,388,608", "0.0003 → 3e-05", "1,000,000"):
        assert number in text
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The micro run over data that is there, in batches for 8 devices."""
    config = micro_config(tmp_path_factory.mktemp("data"))
    data = DataConfig(root=str(trainer.prepare_data(config)))
    return dataclasses.replace(changed(config, "stable_1a", batch_ramp=()), data=data)


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """The message that a config is refused with; the workdir stays as it was."""

    def compiles(*_):
        raise AssertionError("something would have been compiled")

    monkeypatch.setattr(stage_run, "compiled_train_step", compiles)
    monkeypatch.setattr(StateFactory, "init", compiles)

    def message(config, workdir=tmp_path / "run"):
        before = sorted(workdir.rglob("*")) if workdir.is_dir() else workdir.exists()
        with pytest.raises(ConfigError) as error:
            trainer.train(config, workdir)
        assert (sorted(workdir.rglob("*")) if workdir.is_dir() else workdir.exists()) == before
        return str(error.value)

    return message


def changed(config, name, **changes):
    """`config` with one stage changed."""
    stage = dataclasses.replace(config.stages[name], **changes)
    return dataclasses.replace(config, stages={**config.stages, name: stage})


def test_batches_and_sizes_that_do_not_divide_over_the_devices(config, refusal):
    text = refusal(changed(config, "gate", batch_tokens=12 * 64))
    assert "stages.gate.batch_tokens: a batch of 12 rows of 64 tokens" in text
    assert "over 8 devices (mesh" in text and "it a multiple of 512 tokens" in text
    text = refusal(dataclasses.replace(config, layout=LayoutConfig(microbatch_rows=3)))
    assert "layout.microbatch_rows = 3" in text
    text = refusal(dataclasses.replace(config, mesh=MeshConfig(fsdp=3)))
    assert "mesh.fsdp=3" in text and "8 are here" in text
    text = refusal(dataclasses.replace(config, mesh=MeshConfig(tensor=8)))
    assert "mesh.tensor = 8 does not divide num_heads = 2" in text


def test_data_that_do_not_fit(config, refusal, tmp_path):
    text = refusal(changed(config, "gate", sequence_length=128, batch_tokens=1024))
    assert "sequence_length = 128" in text and "have 64" in text
    assert "The sequence is longer than the data rows" in text
    text = refusal(changed(config, "stable_1b", mixture={"code": 0.5, "prosa": 0.5}))
    assert "no source 'prosa'" in text and "Did you mean 'prose'?" in text
    model = dataclasses.replace(config.model, vocab_size=512)
    text = refusal(dataclasses.replace(config, model=model))
    assert "tokenizer.json has 300" in text and "model.vocab_size = 512" in text
    text = refusal(changed(config, "stable_1b", max_epochs=0.25))
    assert "stages.stable_1b.max_epochs = 0.25" in text and "'code' holds" in text
    assert "rows and would give 384 (" in text and "Prepare more" in text
    text = refusal(dataclasses.replace(config, data=DataConfig(root=str(tmp_path))))
    assert f"{tmp_path}: no prepared data there" in text and "ouro data prepare" in text

    copy = tmp_path / "copy"
    shutil.copytree(config.data.root, copy)
    moved = dataclasses.replace(config, data=DataConfig(root=str(copy)))
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "another tokenizer" in refusal(moved)
    tokenizer.unlink()
    assert f"{tokenizer}: no such tokenizer file" in refusal(moved)
    shutil.copy(Path(config.data.root) / "tokenizer.json", tokenizer)
    manifest = copy / "code" / "train-64" / "manifest.json"
    manifest.write_text("{")
    assert f"{manifest}: not a readable manifest" in refusal(moved)


@pytest.fixture(scope="module")
def other(config):
    """A model of another width."""
    model = dataclasses.replace(config.model, hidden_size=16, num_layers=1)
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model, nn.unbox(jax.jit(LoopLM(model).init)(jax.random.key(0), tokens))["params"]


def test_checkpoints_of_another_model(config, refusal, other, tmp_path):
    model, params = other
    save_params(tmp_path / "theirs" / "stable_1a", params, model)
    text = refusal(config, tmp_path / "theirs")
    assert "model.hidden_size = 32" in text and "stable_1a has 16" in text
    assert "another workdir" in text

    fork = dataclasses.replace(
        config, first_stage="stable_1b", init_from=str(tmp_path / "theirs")
    )  # fmt: skip
    text = refusal(fork)
    assert "model.hidden_size = 32" in text and f"init_from = '{tmp_path}/theirs' has 16" in text
    (tmp_path / "released").mkdir()
    save_huggingface(model, params, tmp_path / "released")
    released = dataclasses.replace(fork, init_from=str(tmp_path / "released"))
    assert f"init_from = '{tmp_path}/released' has 16" in refusal(released)
    (tmp_path / "released" / "config.json").write_text("{")
    assert f"{tmp_path}/released/config.json" in refusal(released)
    text = refusal(dataclasses.replace(fork, init_from=str(tmp_path / "nowhere")))
    assert f"{tmp_path}/nowhere: no such folder" in text


def test_a_source_that_the_transition_does_not_fit(config, refusal, tmp_path):
    model = dataclasses.replace(config.model, num_layers=3)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(LoopLM(model).init)(jax.random.key(0), tokens))["params"]
    save_params(tmp_path / "three" / "stable_1a", params, model)
    fork = dataclasses.replace(config, first_stage="stable_1b", init_from=str(tmp_path / "three"))
    text = refusal(fork)
    assert "stages.stable_1b.num_layers = 2" in text and "multiple of the 3 layers" in text


def test_a_workdir_that_is_a_file(config, refusal, tmp_path):
    (tmp_path / "file").touch()
    assert f"--workdir={tmp_path}/file: this is a file" in refusal(config, tmp_path / "file")


def test_what_is_found_wrong_with_data_and_devices_leaves_with_2_too(config, tmp_path):
    file = write_config(tmp_path / "micro.py", config)
    workdir = f"--workdir={tmp_path}/run"
    for override, words in (
        ("--config.stages.gate.batch_tokens=768", "does not divide over 8 devices"),
        ("--config.model.vocab_size=512", "The vocabularies of tokenizer and model differ"),
    ):
        result = ouro("train", f"--config={file}", workdir, override, devices=8)
        assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
        assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
