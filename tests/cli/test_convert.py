"""`ouro convert` from the outside: both ways, bit for bit, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import reference
from safetensors.numpy import load_file

from ouro_jax.data.tokenizer import train_tokenizer


def ouro_convert(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ouro_jax.cli.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def convert(source: Path, target: Path) -> dict:
    result = ouro_convert(f"--from={source}", f"--to={target}", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_to_orbax_and_back_is_bit_for_bit(tmp_path):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), heads=4, kv_heads=2)
    fields |= {"torch_dtype": "bfloat16", "bos_token_id": 1}
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    released = reference.write_checkpoint(tmp_path / "released", fields, tensors)
    (released / "tokenizer.json").write_text("{}")
    parameters = sum(tensor.size for tensor in tensors.values())

    made = convert(released, tmp_path / "run" / "stable_1a")
    assert (made["format"], made["parameters"]) == ("Orbax", parameters)
    # A workdir, whose last stage is meant.
    made = convert(tmp_path / "run", tmp_path / "exports" / "back")
    assert (made["format"], made["parameters"]) == ("Hugging Face", parameters)

    back = tmp_path / "exports" / "back"
    ours = load_file(back / "model.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(ours[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert all(ours[name].dtype == tensors[name].dtype for name in tensors)
    assert json.loads((back / "config.json").read_text()) == fields
    assert (tmp_path / "run" / "stable_1a" / "tokenizer.json").read_text() == "{}"


def test_a_stage_takes_the_tokenizer_of_its_workdir(tmp_path, golden_dir):
    convert(golden_dir / "set_a", tmp_path / "run" / "anneal")
    (tmp_path / "run" / "tokenizer.json").write_text("[]")
    convert(tmp_path / "run" / "anneal", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "[]"


def test_wrong_use_leaves_with_2_and_says_why(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, error in (
        ([], "--from is missing"),
        ([f"--from={tmp_path}"], "--to is missing"),
        ([f"--from={tmp_path}", f"--to={tmp_path}/full"], "not empty"),
        ([f"--from={tmp_path}/absent", f"--to={tmp_path}/new"], "no such folder"),
        ([f"--from={tmp_path}/empty", f"--to={tmp_path}/new"], "no checkpoint here"),
    ):
        result = ouro_convert(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert error in result.stderr
    assert not (tmp_path / "new").exists()


def test_int8_by_a_text_is_smaller_and_answers(tmp_path):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), vocab=270)
    source = reference.write_checkpoint(tmp_path / "float", fields, tensors)
    text = "the cat sat on the mat\n" * 100
    train_tokenizer([text], 270).save(str(source / "tokenizer.json"))
    (tmp_path / "sample.txt").write_text(text)
    target = tmp_path / "int8"
    flags = ("--quantize=int8", f"--calibrate={tmp_path}/sample.txt", "--json")
    result = ouro_convert(f"--from={source}", f"--to={target}", *flags)
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout.splitlines()[-1])
    assert (made["format"], made["quantize"]) == ("Hugging Face", "int8")
    written = load_file(target / "model.safetensors")
    assert written["lm_head.weight"].dtype == np.int8
    for name, tensor in tensors.items():
        if f"{name}_scale" in written:
            error = np.abs(written[name] * written[f"{name}_scale"] - tensor)
            assert error.max() < 5 * written[f"{name}_scale"].max(), name
    # By the text, and not to nearest.
    scale = written["lm_head.weight_scale"]
    assert (written["lm_head.weight"] != np.round(tensors["lm_head.weight"] / scale)).any()

    command = [sys.executable, "-m", "ouro_jax.cli.generate", f"--checkpoint={target}"]
    command += ["--prompt=the cat", "--max_new_tokens=4", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert len(json.loads(answer.stdout.splitlines()[-1])["tokens"]) == 4

    again = ouro_convert(f"--from={target}", f"--to={tmp_path}/stage")
    assert again.returncode == 2 and "int8 already" in again.stderr
    assert not (tmp_path / "stage").exists()


def test_wrong_flags_of_quantisation_are_named(tmp_path, golden_dir):
    places = (f"--from={golden_dir}/set_a", f"--to={tmp_path}/new")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "fine.txt").write_text("text")
    for flags, error in (
        (["--quantize=int4"], "--quantize = 'int4': expected one of int8"),
        ([f"--calibrate={tmp_path}/fine.txt"], "expected --quantize=int8 with it"),
        (["--quantize=int8", f"--calibrate={tmp_path}/gone.txt"], "gone.txt': cannot be read: No"),
        (["--quantize=int8", f"--calibrate={tmp_path}/bytes.txt"], "bytes.txt': expected UTF-8"),
        (["--quantize=int8", f"--calibrate={tmp_path}/fine.txt"], "no tokenizer.json beside"),
    ):
        result = ouro_convert(*places, *flags)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert error in result.stderr
    assert not (tmp_path / "new").exists()


def test_help_shows_examples():
    result = ouro_convert("--help")
    assert result.returncode == 0 and "ouro convert --from=" in result.stdout
