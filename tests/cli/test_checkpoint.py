"""`ouro checkpoint` from the outside: what lies there, what is broken, what may go."""

import json
import shutil
import time

import pytest
from etils import epath

from ouro_jax.training.checkpoint_files import set_aside, write_sums
from tests.micro_run import ouro

STEPS = {"stable_1a": {8: True}, "stable_1b": {16: False, 24: True, 32: False, 40: False}}


def make_checkpoint(stage, step, permanent, finished=True):
    """A folder with the files of a checkpoint that this verb reads, arrays being any bytes."""
    folder = stage / str(step)
    (folder / "meta").mkdir(parents=True)
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(bytes(range(256)) * 8 * step)
    meta = {"permanent": permanent, "tokens_seen": 512 * step}
    (folder / "meta" / "metadata").write_text(json.dumps(meta))
    if finished:
        write_sums(epath.Path(folder))


@pytest.fixture(params=["workdir", "elsewhere"])
def run(request, tmp_path):
    """(workdir, where its checkpoints lie): two stages, one set aside, one not finished."""
    workdir, root = tmp_path / "run", tmp_path / request.param
    workdir.mkdir()
    if request.param == "workdir":
        root = workdir
    else:
        (workdir / "config.json").write_text(json.dumps({"checkpoint": {"directory": str(root)}}))
    for stage, steps in STEPS.items():
        for step, permanent in steps.items():
            make_checkpoint(root / stage, step, permanent)
    make_checkpoint(root / "stable_1b", 48, False)
    set_aside(epath.Path(root / "stable_1b" / "48"))
    make_checkpoint(root / "stable_1b", 56, False, finished=False)
    return workdir, root


def last_json(result):
    return json.loads(result.stdout.splitlines()[-1])


def steps_left(root):
    return sorted(int(path.name) for path in (root / "stable_1b").iterdir())


def test_a_list_of_what_lies_there(run):
    workdir, root = run
    result = ouro("checkpoint", "list", str(workdir), "--json")
    assert result.returncode == 0, result.stderr
    listed = last_json(result)
    assert [(one["stage"], one["step"], one["tokens"], one["permanent"], one["finished"])
            for one in listed["checkpoints"]] == [
        *((stage, step, 512 * step, permanent, True)
          for stage, steps in STEPS.items() for step, permanent in steps.items()),
        ("stable_1b", 56, 512 * 56, False, False),
    ]  # fmt: skip
    (aside,) = listed["set_aside"]
    assert (aside["step"], aside["path"]) == (48, f"{root}/set_aside/stable_1b/48")
    for one in listed["checkpoints"]:
        assert one["bytes"] > 2048 * one["step"] and abs(one["saved_at"] - time.time()) < 60
    rows = [line.split() for line in result.stdout.splitlines()]
    for row in (
        ["stable_1a", "8", "4,096", "0.000", "permanent", "finished"],
        ["stable_1b", "40", "20,480", "0.000", "temporary", "finished"],
        ["stable_1b", "56", "28,672", "0.000", "temporary", "not", "finished"],
        ["stable_1b", "48", "24,576", "0.000", "temporary", "set", "aside"],
    ):
        assert row in [[*cells[:4], *cells[6:]] for cells in rows], result.stdout


def test_every_broken_file_is_named(run):
    workdir, root = run
    shutil.rmtree(root / "stable_1b" / "56")
    whole = ouro("checkpoint", "verify", str(workdir), "--json")
    assert whole.returncode == 0, whole.stderr
    assert "checkpoints: 5," in whole.stdout and "verifying" in whole.stderr
    summary = last_json(whole)
    assert len(summary["checkpoints"]) == 5 and summary["problems"] == {}

    flipped, missing = root / "stable_1a/8/params/d/0", root / "stable_1b/40/meta/metadata"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    (root / "stable_1b/40/params/more").touch()
    broken = ouro("checkpoint", "verify", str(workdir), "--json")
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert "checkpoints that are not whole: 2 of 5; what is wrong:\n" in broken.stderr
    for file, words in (
        (flipped, ": its SHA-256 is"),
        (missing, ": missing"),
        (root / "stable_1b/40/params/more", ": SHA256SUMS does not list it"),
    ):
        assert f"{file}{words}" in broken.stderr
    counts = {path: len(problems) for path, problems in last_json(broken)["problems"].items()}
    assert counts == {f"{root}/stable_1a/8": 1, f"{root}/stable_1b/40": 2}

    for place, code in (("stable_1a", 1), ("stable_1b/32", 0), ("stable_1b/40", 1)):
        assert ouro("checkpoint", "verify", f"{root}/{place}").returncode == code


def test_only_temporary_checkpoints_that_are_not_the_newest_go(run):
    workdir, root = run
    before = steps_left(root)
    for keep, dry_run, gone in (("2", True, [16]), ("1", False, [16, 32]), ("1", False, [])):
        flags = [f"--keep={keep}", "--json", *["--dry_run"] * dry_run]
        result = ouro("checkpoint", "prune", str(workdir), *flags)
        assert result.returncode == 0, result.stderr
        pruned = last_json(result)
        assert pruned["deleted"] == [f"{root}/stable_1b/{step}" for step in gone]
        assert (pruned["bytes"] > 2048 * sum(gone)) == bool(gone)
        assert f"deleted: {len(gone)}, 0.000 GB" in result.stdout
        before = before if dry_run else [step for step in before if step not in gone]
        assert steps_left(root) == before
    assert steps_left(root) == [24, 40, 56] and (root / "stable_1a" / "8").exists()


def test_wrong_use_leaves_with_2_and_says_why(tmp_path):
    make_checkpoint(tmp_path / "stable_1a", 8, False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{")
    for arguments, error in (
        (["lst", str(tmp_path)], "Did you mean 'list'?"),
        (["list"], "name the workdir"),
        (["list", f"{tmp_path}/nowhere"], f"{tmp_path}/nowhere: no such folder"),
        (["verify", f"{tmp_path}/stable_1a/8/params"], "no checkpoint here"),
        (["verify", f"{tmp_path}/empty"], f"{tmp_path}/empty/config.json: not readable"),
        (["prune", str(tmp_path)], "--keep is missing"),
        (["prune", str(tmp_path), "--keep=0"], "--keep=0: expected at least 1"),
    ):
        result = ouro("checkpoint", *arguments)
        assert (result.returncode, result.stdout) == (2, ""), result
        assert error in result.stderr and "Traceback" not in result.stderr
