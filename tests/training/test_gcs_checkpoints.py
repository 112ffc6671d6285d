"""Checkpoints in a bucket: saved, restored, verified, set aside and pruned as on a disk."""

import dataclasses

import jax
import pytest
from etils import epath

from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.checkpoint_files import (
    all_steps,
    delete_unfinished,
    list_set_aside,
    problems_of,
    set_aside,
)
from ouro_jax.training.checkpoints import Position, StageCheckpoints, load_position
from ouro_jax.training.events import read_events
from ouro_jax.training.state import StateFactory
from tests.data.fake_gcs import FakeGcs
from tests.micro_run import BATCH, micro_config, ouro, write_config
from tests.training.test_checkpoints import assert_same_bits

MODEL = ModelConfig(32, 16, 16, 2, 4, 2, 8, dtype="float32")
POSITION = Position("stable_1a", 8, 64, 4096, MODEL, "expected", 0)
STAGE = epath.Path("gs://bucket/run/stable_1a")


@pytest.fixture
def gcs(monkeypatch):
    """A bucket, where `gs://bucket` leads in this process and in those that it starts."""
    fake = FakeGcs()
    for name, value in fake.environment().items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.shutdown()
    fake.server_close()


def factory(mesh, devices):
    mesh = make_mesh(mesh, jax.devices()[:devices])
    return StateFactory(MODEL, OptimizerConfig(), "expected", mesh)


def test_a_checkpoint_in_a_bucket_is_one_on_a_disk(gcs):
    state = factory(MeshConfig(fsdp=2), 2).init(0)
    with StageCheckpoints(STAGE, keep=2) as checkpoints:
        for step in (8, 16, 24):
            position = dataclasses.replace(POSITION, step=step)
            checkpoints.save(state, position, {}, permanent=False)
            checkpoints.wait()
    assert all_steps(STAGE) == [16, 24] and load_position(STAGE.parent).step == 24
    assert not any(name.startswith("run/stable_1a/8/") for name in gcs.objects)
    with StageCheckpoints(STAGE, read_only=True) as checkpoints:
        restored = checkpoints.restore(factory(MeshConfig(tensor=2), 2).abstract(), 24)
    assert_same_bits(restored, state)

    # The checksums list every object, also those that TensorStore wrote.
    folder = "run/stable_1a/24/"
    names = {name.removeprefix(folder) for name in gcs.objects if name.startswith(folder)}
    lines = gcs.objects[f"{folder}SHA256SUMS"].decode().splitlines()
    assert {line.split("  ")[1] for line in lines} == names - {"SHA256SUMS"}
    assert problems_of(STAGE / "24") == []
    gcs.write(f"{folder}rest/_METADATA", b"other")
    gcs.write(f"{folder}more", b"")  # by another process
    assert [problem.split(": ")[0] for problem in problems_of(STAGE / "24")] == [
        f"gs://bucket/{folder}{name}" for name in ("more", "rest/_METADATA")
    ]
    broken = {name: gcs.objects[folder + name] for name in names | {"more"}}
    verified = ouro("checkpoint", "verify", "gs://bucket/run")
    assert verified.returncode == 1 and "checkpoints that are not whole: 1 of 2" in verified.stderr
    pruned = ouro("checkpoint", "prune", "gs://bucket/run", "--keep=1")
    assert pruned.returncode == 0 and all_steps(STAGE) == [24], pruned.stderr

    aside = f"run/set_aside/{folder.removeprefix('run/')}"
    assert str(set_aside(STAGE / "24")) == f"gs://bucket/{aside.rstrip('/')}"
    assert {name.removeprefix(aside): content for name, content in gcs.objects.items()} == broken
    assert [one.step for one in list_set_aside(STAGE.parent)] == [24] and all_steps(STAGE) == []
    gcs.write("run/stable_1a/32/params/d/0", b"half")
    delete_unfinished(STAGE, [32])
    assert all_steps(STAGE) == []


def test_a_run_goes_on_from_a_bucket(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config = micro_config(
        tmp_path / "data",
        checkpoint=CheckpointConfig(every_tokens=4 * BATCH, directory="gs://bucket/run"),
    )
    stage = dataclasses.replace(config.stages["stable_1a"], tokens=12 * BATCH, batch_ramp=())
    config = dataclasses.replace(config, stages={"stable_1a": stage})
    arguments = (
        f"--config={write_config(tmp_path / 'micro.py', config)}", f"--workdir={tmp_path}/run",
    )  # fmt: skip
    first = ouro("train", *arguments)
    assert first.returncode == 0, first.stderr
    assert all_steps(STAGE) == [4, 8, 12] and not (tmp_path / "run" / "stable_1a").exists()
    before = gcs.objects["run/stable_1a/12/SHA256SUMS"]
    gcs.write("run/stable_1a/12/params/_METADATA", b"broken")
    again = ouro("train", *arguments)
    assert again.returncode == 0, again.stderr
    events = [(event["kind"], event.get("step")) for event in read_events(tmp_path / "run")]
    assert ("set_aside", None) in events and ("resume", 8) in events
    assert gcs.objects["run/set_aside/stable_1a/12/SHA256SUMS"] == before
    assert all_steps(STAGE) == [4, 8, 12] and problems_of(STAGE / "12") == []
    opened = open_checkpoint(tmp_path / "run")
    assert opened.tokenizer_file == tmp_path / "run" / "tokenizer.json"
