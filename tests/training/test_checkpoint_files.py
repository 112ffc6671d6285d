"""A file that is not as it was written is found, and the checkpoint before it is used instead."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
from etils import epath

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.errors import RunError
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.training.checkpoint_files import problems_of
from ouro_jax.training.checkpoints import Position, StageCheckpoints
from ouro_jax.training.start import find_whole
from ouro_jax.training.state import StateFactory
from tests.micro_run import micro_config

MODEL = ModelConfig(16, 8, 8, 1, 1, 1, 8, dtype="float32")
CONFIG = micro_config(Path())
POSITION = Position("stable_1a", 8, 64, 4096, MODEL, "expected", 0)
NEWEST = "stable_1a/24"
MARKS = {"SHA256SUMS", "_METADATA", "_sharding", "manifest.ocdbt", "_CHECKPOINT_METADATA"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A root with three checkpoints of a stage."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).init(0)
    root = tmp_path_factory.mktemp("saved")
    with StageCheckpoints(root / "stable_1a") as checkpoints:
        for step in (8, 16, 24):
            position = dataclasses.replace(POSITION, step=step)
            checkpoints.save(state, position, {}, permanent=True)
        checkpoints.wait()
    return root


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def whole(root):
    """What `find_whole` returns, and what it has set aside and why."""
    broken = {}
    found = find_whole(CONFIG, epath.Path(root), lambda path, why: broken.update({str(path): why}))
    return found, broken


def test_an_intact_one_has_no_problems_and_pleases_sha256sum(saved):
    before = contents(saved)
    assert problems_of(epath.Path(saved / NEWEST)) == []
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(command, cwd=saved / NEWEST, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr
    assert len(result.stdout.splitlines()) == len(contents(saved / NEWEST)) - 1
    found, broken = whole(saved)
    assert (found.step, broken) == (24, {}) and contents(saved) == before


@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink], ids=lambda damage: damage.__name__
)
def test_a_damage_to_any_file_is_found_and_the_one_before_is_used(saved, tmp_path, damage):
    names = sorted(contents(saved / NEWEST))
    assert {Path(name).name for name in names} >= MARKS and len(names) > 12
    for number, name in enumerate(names):
        root = tmp_path / str(number)
        shutil.copytree(saved, root)
        file = root / NEWEST / name
        damage(file)
        left = contents(root)

        problems = problems_of(epath.Path(root / NEWEST))
        shares = [problems_of(epath.Path(root / NEWEST), part, 3) for part in range(3)]
        assert {problem for share in shares for problem in share} == set(problems)
        where = "SHA256SUMS" if name == "SHA256SUMS" else f"{file}: "
        assert problems and all(where in problem for problem in problems), (name, problems)

        found, broken = whole(root)
        moved = f"set_aside/{NEWEST}"
        assert found == dataclasses.replace(POSITION, step=16), name
        assert broken == {f"{root}/{moved}": problems[0]}
        now = {name.replace(moved, NEWEST): content for name, content in contents(root).items()}
        assert now == left and not (root / NEWEST).exists()


@pytest.mark.parametrize("at", [0, 63, 64, 65, 66, -1])
def test_no_byte_of_the_checksums_can_change(saved, tmp_path, at):
    shutil.copytree(saved / NEWEST, tmp_path / "24")
    file = tmp_path / "24" / "SHA256SUMS"
    content = bytearray(file.read_bytes())
    for byte in (content[at] ^ 1, 0, 0xFF):
        content[at] = byte
        file.write_bytes(content)
        assert problems_of(epath.Path(tmp_path / "24"))


def test_a_file_too_many_is_a_problem(saved, tmp_path):
    shutil.copytree(saved / NEWEST, tmp_path / "24")
    (tmp_path / "24" / "rest" / "more").touch()
    (problem,) = problems_of(epath.Path(tmp_path / "24"))
    assert problem == f"{tmp_path}/24/rest/more: SHA256SUMS does not list it."
    assert problems_of(epath.Path(tmp_path / "24"), below="params/") == []


def test_what_was_set_aside_stays_when_the_same_step_breaks_again(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for times in (1, 2):
        shutil.copytree(saved / NEWEST, tmp_path / NEWEST, dirs_exist_ok=True)
        truncate(tmp_path / NEWEST / "meta" / "metadata")
        found, broken = whole(tmp_path)
        assert found.step == 16 and len(broken) == 1
        assert len(list((tmp_path / "set_aside" / "stable_1a").iterdir())) == times


def test_a_stage_without_a_whole_one_goes_back_to_the_stage_before(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (32, 40):
        shutil.copytree(saved / NEWEST, tmp_path / "stable_1b" / str(step))
        (tmp_path / "stable_1b" / str(step) / "SHA256SUMS").unlink()
    found, broken = whole(tmp_path)
    assert (found.stage, found.step) == ("stable_1a", 24)
    assert list(broken) == [f"{tmp_path}/set_aside/stable_1b/{step}" for step in (40, 32)]


def test_with_none_whole_the_run_refuses_and_moves_nothing(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "stable_1a/8/meta/metadata")
    (tmp_path / "stable_1a/16/params/_METADATA").unlink()
    (tmp_path / "stable_1a/24/SHA256SUMS").unlink()
    before = contents(tmp_path)
    with pytest.raises(RunError, match="no checkpoint is whole") as error:
        whole(tmp_path)
    for file in ("8/meta/metadata", "16/params/_METADATA", "24/SHA256SUMS"):
        assert f"{tmp_path}/stable_1a/{file}: " in str(error.value)
    assert contents(tmp_path) == before


def test_a_first_one_that_was_not_finished_does_not_keep_a_run_from_starting(saved, tmp_path):
    shutil.copytree(saved / "stable_1a" / "8", tmp_path / "stable_1a" / "8")
    (tmp_path / "stable_1a/8/SHA256SUMS").unlink()
    left = contents(tmp_path / "stable_1a")
    found, broken = whole(tmp_path)
    assert found is None and list(broken) == [f"{tmp_path}/set_aside/stable_1a/8"]
    assert contents(tmp_path / "set_aside" / "stable_1a") == left
    assert whole(tmp_path) == (None, {})
