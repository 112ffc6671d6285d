"""`ouro chat` from the outside: lines in, answers out; commands, Ctrl-C, refusals."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import reference

from ouro_jax.data.chat import render_prompt
from ouro_jax.data.tokenizer import load_tokenizer, train_tokenizer
from ouro_jax.inference.text import decode_text

COMMAND = [sys.executable, "-m", "ouro_jax.cli.chat"]


def weights():
    """Fields and tensors of a model that never ends an answer by itself at temperature 0."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), vocab=270)
    tensors["lm_head.weight"][[0, 2]] = 0
    return fields, tensors


def greedy(ids: list[int], depth: int) -> list[int]:
    """Eight most probable tokens after `depth` loops, by the reference."""
    new = []
    while len(new) < 8:
        out = reference.forward(*weights(), np.array([ids + new]), num_loops=depth)
        new.append(int(out.logits_TBLV[-1, 0, -1].argmax()))
    return new


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer."""
    fields, tensors = weights()
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    train_tokenizer(["the cat sat on the mat\n" * 20], 270).save(str(folder / "tokenizer.json"))
    return folder


def talk(checkpoint, lines: str, *arguments: str, **environment: str):
    return subprocess.run(
        [*COMMAND, f"--checkpoint={checkpoint}", "--window=128", *arguments], input=lines,
        capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def test_a_conversation_remembers_what_was_said(checkpoint):
    arguments = ("--kv=full", "--temperature=0", "--max_new_tokens=8", "--system=on", "--json")
    long = "x" * 50
    result = talk(checkpoint, f"the cat\n\n/exit static:2\nmat\n{long}\n", *arguments)
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    messages, depths = [{"role": "system", "content": "on"}], []
    for text, depth in (("the cat", 4), ("mat", 2), (long, 2)):
        messages.append({"role": "user", "content": text})
        while len(render_prompt(messages, tokenizer)) + 8 > 128:
            del messages[1:3]  # the oldest question and its answer, and not the system prompt
        tokens = greedy(render_prompt(messages, tokenizer), depth)
        answer = decode_text(tokenizer, tokens)
        assert answer.rstrip() in result.stdout
        messages.append({"role": "assistant", "content": answer})
        depths += [depth] * len(tokens)
    assert len(messages) < 7
    assert len(set(depths)) == 2 and "exit: static:2" in result.stdout
    told = json.loads(result.stdout.splitlines()[-1])
    assert told == {"answers": 3, "mean_depth": pytest.approx(np.mean(depths))}
    assert "\x1b[" not in result.stdout


def test_ctrl_c_stops_the_answer_and_not_the_conversation(checkpoint):
    process = subprocess.Popen(
        [*COMMAND, f"--checkpoint={checkpoint}", "--max_new_tokens=4000", "--temperature=0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"the cat\n")
        process.stdin.flush()
        # The legend ends with the commands; what comes after them is the answer.
        seen = b""
        while b"/quit)" not in seen or len(seen.partition(b"/quit)")[2]) < 60:
            seen += process.stdout.read1(64)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(b"/quit\nnever asked\n", timeout=60)
        assert process.returncode == 0, errors
        assert b"(stopped)" in output and b"never" not in output
        assert (seen + output).count(b"\x1b[") < 1500  # the whole has 3212
        assert b"\x1b[" in seen and b"mean depth" in output
    finally:
        process.kill()


def test_wrong_use_leaves_with_2_and_says_why(checkpoint):
    for lines, arguments, error in (
        ("x\n", ["--exit=often"], "unknown exit rule"),
        ("/exit q:7\n", [], "q takes a probability"),
        ("x\n", ["--max_new_tokens=500"], "window of 128"),
    ):
        result = talk(checkpoint, lines, *arguments)
        assert (result.returncode, error in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr
