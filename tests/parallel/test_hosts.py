"""Processes that join, agree, and stop together, whatever one of them does; real ones."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from micro_run import ROOT, command, free_port, micro_config, ouro, virtual_devices, write_config

from ouro_jax.config import MeshConfig
from ouro_jax.errors import ConfigError
from ouro_jax.parallel import hosts
from ouro_jax.parallel.attention import balance_order
from ouro_jax.parallel.host_rows import DataHost, divide, place
from ouro_jax.parallel.mesh import batch_sharding, make_mesh

SLEEP, SUM = {"act": "sleep"}, {"act": "sum"}
AGAIN = "Run the same command again"


class Together:
    """Two processes of four devices, each with its own task; None: it is not started."""

    def __init__(self, *tasks: dict | None):
        address = f"127.0.0.1:{free_port()}"
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "join_hosts.py"),
                 json.dumps(task | {"hosts": 2, "host": host, "address": address})],
                env=virtual_devices(4), stderr=subprocess.PIPE, text=True,
            )
            for host, task in enumerate(tasks) if task
        ]  # fmt: skip

    def end(self, number: int, timeout: float = 60) -> tuple[int, str]:
        """Exit code and stderr of a process, which has to end by itself."""
        process = self.processes[number]
        text = process.communicate(timeout=timeout)[1]
        return process.returncode, text

    def kill(self) -> None:
        """Ends what is left."""
        for process in self.processes:
            process.kill()


@pytest.fixture
def together():
    """Starts `Together`, and leaves none of its processes behind."""
    started = []

    def start(*tasks: dict | None) -> Together:
        started.append(Together(*tasks))
        return started[-1]

    yield start
    for group in started:
        group.kill()


# What a process does to itself in the midst of collectives. Process 0 is the coordinator.
DEATHS = [(1, "SIGKILL"), (0, "SIGKILL"), (1, "SIGTERM"), (1, "SIGSTOP"), (0, "SIGSTOP")]


def test_the_death_of_a_process_stops_the_others_with_a_message(together):
    """Also one that hangs, and one in the midst of a collective; all at once, as most is waiting.

    The limit of 8 s that is given here is `HEARTBEAT_SECONDS` in a run.
    """
    assert hosts.HEARTBEAT_SECONDS < 60
    groups = []
    for victim, name in DEATHS:
        tasks = [SUM, SUM]
        tasks[victim] = SUM | {"signal": name}
        groups.append(together(*tasks))
    for (victim, name), group in zip(DEATHS, groups, strict=True):
        other = 1 - victim
        code, text = group.end(other, timeout=120)
        assert code == 1, (victim, name, text)
        last = text.splitlines()[-1]
        assert last.startswith(f"error: process {other} of 2 stops") and AGAIN in last
        assert "in sum_for_ever" in text, text  # where it was


@pytest.mark.parametrize(
    ("victim", "act", "code", "words"),
    [
        (1, "config_error", 2, "process 1 of 2 failed: model.x is wrong"),
        (0, "config_error", 2, "process 0 of 2 failed: model.x is wrong"),
        (1, "error", 1, "ZeroDivisionError: of process 1"),
    ],
)
def test_an_error_of_one_process_ends_all_with_its_code_and_text(
    together, victim, act, code, words
):
    tasks = [SLEEP, SLEEP]
    tasks[victim] = {"act": act}
    group = together(*tasks)
    for number in range(2):
        found, text = group.end(number)
        assert found == code and words.rpartition(": ")[2] in text
        assert number == victim or words in text


def test_a_collective_that_breaks_says_that_another_process_may_have_died(together):
    code, text = together({"act": "collective"}, SLEEP).end(0)
    *_, cause, last = text.splitlines()
    assert code == 1 and cause.endswith("Gloo: connection closed by peer")
    assert last.startswith("error: process 0 of 2 stops.") and AGAIN in last


def test_a_barrier_says_which_one_and_how_long_it_waited(together):
    group = together({"act": "barrier"}, SLEEP)
    for number in range(2):
        code, text = group.end(number)
        assert code == 1
        assert "process 0 of 2 waited up to 2 s at the barrier 'here'" in text and AGAIN in text


@pytest.mark.parametrize(("there", "waits_for"), [(0, "the others to join"), (1, "process 0")])
def test_missing_processes_are_waited_for_with_a_limit(together, there, waits_for):
    tasks: list[dict | None] = [None, None]
    tasks[there] = SLEEP | {"join_seconds": 2}
    code, text = together(*tasks).end(0)
    assert code == 1
    assert f"error: process {there} of 2 waited 2 s at 127.0.0.1:" in text
    assert f"for {waits_for}" in text and "logs" in text


def test_a_folder_that_is_not_shared_is_named(together, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    group = together(*({"act": "share", "folder": str(folder)} for folder in folders))
    for number in range(2):
        code, text = group.end(number)
        assert code == 2
        assert f"{folders[1]}: process 1 of 2" in text and "share" in text


def test_a_folder_that_is_shared_is_left_empty(together, tmp_path):
    group = together(*({"act": "share", "folder": str(tmp_path / "new")} for _ in range(2)))
    assert [group.end(number)[0] for number in range(2)] == [0, 0]
    assert list((tmp_path / "new").iterdir()) == []


def refused(tmp_path: Path, *overrides: tuple[str, ...]) -> list[tuple[int, str]]:
    """Exit code and stderr of `ouro train` of processes of 2 devices, each with its overrides."""
    file = write_config(tmp_path / "config.py", micro_config(tmp_path / "data"))
    address = f"--coordinator=localhost:{free_port()}"
    started = [
        subprocess.Popen(stdout=subprocess.PIPE, stderr=subprocess.PIPE, **command(
            "train", f"--config={file}", f"--workdir={tmp_path / 'run'}", address,
            f"--num_processes={len(overrides)}", f"--process_id={host}", *keys, devices=2,
        ))
        for host, keys in enumerate(overrides)
    ]  # fmt: skip
    texts = [process.communicate(timeout=120)[1] for process in started]
    assert not (tmp_path / "run").exists()
    return [(process.returncode, text) for process, text in zip(started, texts, strict=True)]


def test_processes_with_different_configs_refuse_to_start(tmp_path):
    key = "stages.gate.tokens"
    for code, text in refused(tmp_path, (f"--config.{key}=1024",), (f"--config.{key}=2048",)):
        assert code == 2
        assert f"{key}: 1024 on process 0, 2048 on process 1" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mesh.fsdp=3", "but 4 are here"),
        ("mesh.tensor=4", "mesh.tensor = 4 does not divide num_heads = 2"),
        ("stages.gate.batch_tokens=64", "does not divide over 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_all(tmp_path, override, words):
    keys = (f"--config.{override}",)
    for code, text in refused(tmp_path, keys, keys):
        assert code == 2 and words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num_processes=2", "--process_id=1"), "--coordinator is missing"),
        (("--coordinator=a:1", "--num_processes=2"), "--process_id is missing"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "--process_id=2 with"),
        (("--coordinator=a", "--num_processes=2", "--process_id=0"), "expected HOST:PORT"),
        (("--distributed=on",), "--distributed=on"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, arguments, words):
    config = write_config(tmp_path / "config.py", micro_config(tmp_path / "data"))
    result = ouro("train", f"--config={config}", f"--workdir={tmp_path}/run", *arguments)
    assert result.returncode == 2 and words in result.stderr


@pytest.mark.parametrize(("tasks", "method"), [("4", "slurm"), ("1", None)])
def test_slurm_means_several_processes_only_for_several_tasks(monkeypatch, tasks, method):
    for name in hosts.SLURM:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert hosts._environment() == method


def test_alone_nothing_is_waited_for(tmp_path):
    hosts.barrier("nobody", timeout=0)
    hosts.require_same("config", {"a": 1})
    hosts.require_shared(tmp_path / "new")
    assert hosts.from_first("value", {"a": 1}) == {"a": 1}


def test_differences_are_named_key_by_key():
    first = {"a": {"b": 1, "c": [1, 2]}, "d": "x", "e": 1}
    other = {"a": {"b": 2, "c": [1, 2]}, "d": "x", "f": 1}
    assert list(hosts._differences(first, other, "")) == [
        ("a.b", "1", "2"), ("e", "1", "null"), ("f", "null", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("owners", "process", "expected"),
    [
        ([[0], [0], [1], [1]], 1, DataHost(1, 2, (2, 3))),
        ([[0], [1], [0], [1]], 1, DataHost(1, 2, (1, 3))),
        ([[0, 1], [2, 3]], 3, DataHost(1, 2, (1,))),  # tensor or context crosses processes
        ([[0, 1]], 1, DataHost(0, 1, (0,))),
        ([[0, 0], [0, 0]], 0, DataHost(0, 1, (0, 1))),
    ],
)
def test_processes_that_need_the_same_rows_are_one_host_of_data(owners, process, expected):
    assert divide(owners, process) == expected


@pytest.mark.parametrize("owners", [[[0, 0], [0, 1], [1, 1]], [[0], [0], [1]]])
def test_rows_that_are_shared_in_part_are_refused(owners):
    with pytest.raises(ConfigError, match=r"process 0: \(0, 1\); process 1"):
        divide(owners, 0)


@pytest.mark.parametrize("microbatches", [(), (2,)])
def test_rows_are_placed_in_order_and_columns_balanced(microbatches):
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2), jax.devices()[:8])
    x = np.arange(np.prod((*microbatches, 4, 16))).reshape(*microbatches, 4, 16)
    placed = place({"tokens": x}, batch_sharding(mesh, microbatched=bool(microbatches)))["tokens"]
    np.testing.assert_array_equal(placed, x[..., balance_order(16, 2)])
    assert {shard.data.shape[-2:] for shard in placed.addressable_shards} == {(2, 8)}
