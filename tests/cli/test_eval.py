"""`ouro eval` from the outside: the table, the records, refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import reference

from ouro_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), layers=1, vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    train_tokenizer(["the cat sat on the mat\n" * 20], 270).save(str(folder / "tokenizer.json"))
    return folder


def ouro_eval(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ouro_jax.cli.eval", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_a_local_task_at_two_depths(checkpoint, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    output = tmp_path / "eval.jsonl"
    output.write_text('{"kind": "earlier"}\n')
    result = ouro_eval(
        f"--checkpoint={checkpoint}", "--tasks=local_docs", "--loops=1,2", "--limit=2",
        "--exit=q:0.6", f"--output={output}", "--json", COLUMNS="100",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [{"kind": "earlier"}, *summary["results"]]
    found = [(record["metric"], record["loops"]) for record in summary["results"]]
    assert found == [("acc", 1), ("acc_norm", 1), ("acc", 2), ("acc_norm", 2)]
    for record in summary["results"]:
        assert record["kind"] == "eval" and record["n"] == 2 and record["exit"] == "q:0.6"
        assert record["checkpoint"] == str(checkpoint)
        assert record["stderr"] >= 0 and 1 <= record["mean_depth"] <= record["loops"]
    rows = [line.split() for line in result.stdout.splitlines()]
    depths = [f"{record['mean_depth']:.2f}" for record in summary["results"][::2]]
    assert ["task", "metric", "examples", "1", "2"] in rows
    assert ["local_docs", "mean", "depth", "2", *depths] in rows


def test_a_generative_task_under_two_policies(checkpoint):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    result = ouro_eval(
        f"--checkpoint={checkpoint}", "--tasks=local_arithmetic", "--kv=full,last", "--limit=1",
        "--json", COLUMNS="100",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["results"]
    assert [record["kv"] for record in found] == ["full", "last"]
    for record in found:
        assert any(f"{record['metric']}, kv {record['kv']}" in line
                   for line in result.stdout.splitlines())  # fmt: skip


def test_wrong_use_leaves_with_2_and_says_why(checkpoint, tmp_path):
    checkpoint = f"--checkpoint={checkpoint}"
    for arguments, error in (
        (["--tasks=local"], "--checkpoint is missing"),
        ([checkpoint], "--tasks is missing"),
        ([checkpoint, "--tasks=local", "--loops=0"], "loops = '0'"),
        ([checkpoint, "--tasks=local", "--limit=0"], "limit = 0"),
        ([checkpoint, "--tasks=local", "--kv=full,lost"], "'lost'"),
        ([checkpoint, "--tasks=local", f"--output={tmp_path}/no/x.jsonl"], "there is no folder"),
    ):
        result = ouro_eval(*arguments)
        assert (result.returncode, error in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
