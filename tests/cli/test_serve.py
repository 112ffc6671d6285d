"""`ouro serve` from the outside: up, asked, stopped; and what it refuses to start with."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
import reference

from ouro_jax.data.tokenizer import train_tokenizer

COMMAND = [sys.executable, "-m", "ouro_jax.cli.serve"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    train_tokenizer(["the cat sat on the mat\n" * 20], 270).save(str(folder / "tokenizer.json"))
    return folder


def test_up_asked_and_stopped(checkpoint):
    process = subprocess.Popen(
        [*COMMAND, f"--checkpoint={checkpoint}", "--port=0", "--slots=1", "--window=64",
         "--loops=5", "--exit=q:0.7", "--name=small"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OURO_API_KEY": "secret"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"serving small at (http://127\.0\.0\.1:\d+)", line)
        assert found, process.communicate()[1]
        assert httpx.get(f"{found[1]}/v1/models").status_code == 401
        headers = {"authorization": "Bearer secret"}
        body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 8}
        answer = httpx.post(
            f"{found[1]}/v1/chat/completions", json=body, headers=headers, timeout=60
        ).json()
        assert answer["usage"]["completion_tokens"] <= 8 and answer["model"] == "small"
        assert (answer["ouro"]["exit"], answer["ouro"]["loops"]) == ("q:0.7", 5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        # More loops than trained run, with a warning; a key is no reason for one.
        assert "loops = 5, and the model was trained with 4" in errors and "64.49" in errors
        assert "--host" not in errors
    finally:
        process.kill()


def test_wrong_use_leaves_with_2_and_says_why(checkpoint, tmp_path):
    (tmp_path / "empty").write_text("\n")
    taken = socket.create_server(("127.0.0.1", 0))
    checkpoint = f"--checkpoint={checkpoint}"
    with taken:
        for arguments, error in (
            ([], "--checkpoint is missing"),
            (["--checkpoint=none", "--host=0.0.0.0", "--port=0"], "there is no key: set OURO_"),
            ([checkpoint, f"--port={taken.getsockname()[1]}"], "cannot listen there (Address alr"),
            ([checkpoint, "--port=0", f"--api_key_file={tmp_path}/empty"], "is empty: expected"),
            ([checkpoint, "--port=0", "--kv=full,ful"], "Did you mean 'full'?"),
            ([checkpoint, "--port=0", "--exit=often"], "unknown exit rule"),
        ):
            result = subprocess.run(
                [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=60
            )
            assert (result.returncode, error in result.stderr) == (2, True), result.stderr
            assert "Traceback" not in result.stderr
