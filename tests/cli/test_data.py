"""`ouro data` from the outside: exit codes, the JSON line, messages."""

import json
import subprocess
import sys


def ouro_data(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ouro_jax.cli.data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_json(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_own_text_is_tokenised_prepared_verified_and_shown(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}. " + "Some words follow here. " * i)
    texts = f"--input={tmp_path}/*.txt", "--format=text"
    tokenizer = tmp_path / "root" / "tokenizer.json"
    directory = tmp_path / "root" / "own" / "train-64"
    made = last_json(ouro_data("tokenizer", *texts, "--vocab_size=270", f"--output={tokenizer}",
                               "--json"))  # fmt: skip
    assert made["vocab_size"] == 270
    prepared = last_json(
        ouro_data("prepare", *texts, f"--tokenizer={tokenizer}", "--sequence_length=64",
                  f"--output={directory}", "--json")
    )  # fmt: skip
    assert (prepared["documents"], prepared["vocab_size"], prepared["source"]) == (20, 270, "own")
    assert last_json(ouro_data("verify", str(directory), "--json")) == prepared
    shown = ouro_data("inspect", str(directory), "--rows=1", f"--plot={tmp_path}/plot.png")
    assert shown.returncode == 0 and "row 0" in shown.stdout and "Text" in shown.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    again = ouro_data("prepare", *texts, f"--tokenizer={tokenizer}", "--sequence_length=64",
                      f"--output={directory}", "--json")  # fmt: skip
    assert last_json(again) == prepared

    (shard,) = directory.glob("*.array_record")
    shard.unlink()
    broken = ouro_data("verify", str(directory))
    assert broken.returncode == 2 and str(shard) in broken.stderr


def test_duplicates_and_evaluation_texts_are_taken_out(tmp_path):
    question = "How many of the nine grey horses that stood in the yard ran off?"
    texts = ["a text", "another text", "a text", f"Asked: {question}"]
    lines = [json.dumps({"text": text, "number": i}) for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": question}))
    arguments = (
        "clean", f"--input={tmp_path}/in.jsonl", f"--against={tmp_path}/eval.jsonl",
        f"--output={tmp_path}/out", "--json",
    )  # fmt: skip
    cleaned = ouro_data(*arguments)
    total = last_json(cleaned)["total"]
    assert (total["kept"], total["exact_duplicates"], total["contaminated"]) == (2, 1, 1)
    assert "exact duplicates" in cleaned.stdout
    assert (tmp_path / "out/in.jsonl").read_text() == "\n".join([*lines[:2], ""])
    assert last_json(ouro_data(*arguments))["total"] == total
    wrong = ouro_data(*arguments, "--similarity=80")
    assert wrong.returncode == 2 and "similarity" in wrong.stderr


def test_what_the_next_rows_of_a_stage_are_made_of(tmp_path):
    options = ("--config=configs/tiny.py:smoke", f"--config.data.root={tmp_path}")
    counted = last_json(ouro_data("inspect", *options, "--stage=anneal", "--rows=1000", "--json"))
    shares = {share["source"]: share for share in counted["sources"]}
    assert sum(share["rows"] for share in shares.values()) == 1000
    for share in shares.values():  # never more than a row off per source before it
        assert abs(share["rows"] - 1000 * share["configured"]) < len(shares)
    wrong = ouro_data("inspect", *options, "--stage=aneal")
    assert wrong.returncode == 2 and "Did you mean 'anneal'?" in wrong.stderr


def test_wrong_use_leaves_with_2_and_says_why():
    for arguments, error in (
        (["verfy"], "Did you mean 'verify'?"),
        (["verify"], "name the folder"),
        (["prepare"], "--input is missing"),
        (["clean", f"--input={__file__}", "--shard_bytes=0", "--output=x"], "shard_bytes = 0"),
        ([], "expected one of clean, prepare, tokenizer, verify, inspect"),
    ):
        result = ouro_data(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert error in result.stderr


def test_help_shows_examples():
    result = ouro_data("--help")
    assert result.returncode == 0 and "ouro data prepare --input=" in result.stdout
