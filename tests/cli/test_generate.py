"""`ouro generate` from the outside: text, depths, colours, refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import reference

from ouro_jax.data.tokenizer import encode, load_tokenizer, train_tokenizer
from ouro_jax.inference.generate import generate
from ouro_jax.interop.huggingface import load_huggingface


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    train_tokenizer(["the cat sat on the mat\n" * 20], 270).save(str(folder / "tokenizer.json"))
    return folder


def ouro_generate(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ouro_jax.cli.generate", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_one_prompt_streams_and_ends_in_json(checkpoint):
    arguments = [f"--checkpoint={checkpoint}", "--prompt=the cat", "--max_new_tokens=8"]
    result = ouro_generate(*arguments, "--exit=q:0.6", "--stop=0", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])

    config, params = load_huggingface(checkpoint)
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    out = generate(config, params, [encode(tokenizer, "the cat")], 8, exit="q:0.6", stop_ids=[0])
    assert answer["tokens"] == out.tokens[0] and answer["depths"] == out.depths[0]
    assert answer["mean_depth"] == pytest.approx(np.mean(out.depths[0]))
    assert answer["text"] == tokenizer.decode(out.tokens[0], skip_special_tokens=False)
    assert result.stdout.startswith("the cat" + answer["text"])
    assert f"depths (mean {np.mean(out.depths[0]):.2f} of 4)" in result.stdout
    assert "\x1b[" not in result.stdout


def test_several_prompts_sampled_in_chat_form_in_colour(checkpoint):
    result = ouro_generate(
        f"--checkpoint={checkpoint}", "--prompt=the", "--prompt=mat", "--chat", "--loops=5",
        "--max_new_tokens=4", "--temperature=1", "--top_p=0.9", "--top_k=20", "--json",
        FORCE_COLOR="1", TERM="xterm-256color",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])["answers"]
    assert [answer["prompt"] for answer in answers] == ["the", "mat"]
    assert all(set(answer["depths"]) <= {5} for answer in answers)
    assert "\x1b[31m" in result.stdout


def test_drafts_are_counted_in_the_summary(checkpoint):
    arguments = [f"--checkpoint={checkpoint}", "--prompt=the cat", "--max_new_tokens=8"]
    result = ouro_generate(*arguments, "--speculate=2x3", "--stop=0", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    config, params = load_huggingface(checkpoint)
    prompt = encode(load_tokenizer(checkpoint / "tokenizer.json"), "the cat")
    out = generate(config, params, [prompt], 8, stop_ids=[0], speculate="2x3")
    assert answer["tokens"] == out.tokens[0] and answer["rounds"] == out.acceptance.rounds
    assert answer["acceptance"] == out.acceptance.rate
    assert answer["tokens_per_round"] == out.acceptance.tokens_per_round
    assert f"drafts (2x3): {out.acceptance.rate:.0%} accepted" in result.stdout
    assert f"{out.acceptance.tokens_per_round:.2f} tokens a round" in result.stdout


def test_wrong_use_leaves_with_2_and_says_why(checkpoint, tmp_path):
    checkpoint = f"--checkpoint={checkpoint}"
    for arguments, error in (
        (["--prompt=x"], "--checkpoint is missing"),
        ([checkpoint], "--prompt is missing or empty"),
        ([checkpoint, "--prompt="], "--prompt is missing or empty"),
        ([f"--checkpoint={tmp_path}/none", "--prompt=x"], "no such folder"),
        ([checkpoint, "--prompt=x", "--max_new_tokens=5000"], "window of 4,096"),
        ([checkpoint, "--prompt=x", "--exit=often"], "unknown exit rule"),
        ([checkpoint, "--prompt=x", "--speculate=2,3"], "Did you mean 2x3?"),
    ):
        result = ouro_generate(*arguments)
        assert (result.returncode, error in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
