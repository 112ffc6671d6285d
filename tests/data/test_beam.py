"""A Beam pipeline makes the folder that local workers make, byte for byte."""

import json
import sys

import pytest

from ouro_jax.data.beam import FAILED, prepare_with_beam
from ouro_jax.data.corpus import Corpus
from ouro_jax.data.prepare import plan_preparation, prepare, write_part
from ouro_jax.data.tokenizer import train_tokenizer
from ouro_jax.errors import ConfigError, RunError

TEXTS = [f"Document {i}: " + "the quick brown fox, é. " * (i % 7) for i in range(300)]
TWO_PROCESSES = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch):
    """A worker sets this for its own process, which here is the one of all tests."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture
def plan(tmp_path):
    """Plans the preparation of all texts into a folder of this name, in about ten parts."""
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(TEXTS, 280).save(str(tmp_path / "tokenizer.json"))

    def make(name, **settings):
        return plan_preparation(
            str(tmp_path / "texts.jsonl"),
            tokenizer=tmp_path / "tokenizer.json",
            sequence_length=32,
            output=tmp_path / name / "all-32",
            corpus=Corpus(),
            shard_bytes=3000,
            **settings,
        )

    return make


def contents(preparation, tmp_path):
    """Every file of the output folder but what its own name decides."""
    folder = tmp_path / preparation.output
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    return files, manifest | {"source": ""}


@pytest.mark.parametrize("flags", [[], TWO_PROCESSES], ids=["one process", "two processes"])
def test_beam_makes_what_local_workers_make(tmp_path, plan, flags):
    local, remote = plan("local"), plan("beam")
    assert len(remote.parts) > 5
    prepare(local)
    # What another attempt has finished is kept, and what it has noted is forgotten.
    write_part(remote, 2)
    (tmp_path / "beam" / "all-32" / FAILED).mkdir()
    (tmp_path / "beam" / "all-32" / FAILED / "00000003").write_text("of an earlier attempt")
    manifest = prepare_with_beam(remote, flags)
    assert contents(remote, tmp_path) == contents(local, tmp_path)
    assert prepare_with_beam(remote, flags) == manifest


@pytest.mark.parametrize("flags", [[], TWO_PROCESSES], ids=["one process", "two processes"])
def test_bad_input_on_a_worker_keeps_its_own_message(tmp_path, plan, flags):
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    lines[200] = '{"text": '
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"^\S*texts.jsonl, line 201: broken JSON") as caught:
        prepare_with_beam(plan("bad"), flags)
    assert "Traceback" not in str(caught.value) and "while running" not in str(caught.value)
    assert not (tmp_path / "bad" / "all-32" / FAILED).exists()
    assert prepare_with_beam(plan("bad", skip_bad=1), flags).skipped == 1


def test_wrong_flags_and_a_missing_beam_are_named(plan, monkeypatch):
    with pytest.raises(ConfigError, match="beam = '--runner=Sprak': Unexpected pipeline runner"):
        prepare_with_beam(plan("a"), ["--runner=Sprak"])
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'ouro_jax\[data\]'"):
        prepare_with_beam(plan("b"), [])


def test_a_pipeline_that_ends_early_is_no_success(tmp_path, plan, monkeypatch):
    monkeypatch.setattr("ouro_jax.data.beam.write_part", lambda *_: None)
    preparation = plan("early")
    with pytest.raises(RunError, match=r"ended \(DONE\) with 0 of \d+ shards"):
        prepare_with_beam(preparation, [])
    assert not (tmp_path / "early" / "all-32").exists()
