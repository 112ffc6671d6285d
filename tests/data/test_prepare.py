"""A corpus becomes the same rows whatever happens on the way; what cannot be read is named."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ouro_jax.data.corpus import Corpus
from ouro_jax.data.folder import Folder
from ouro_jax.data.mixture import open_mixture
from ouro_jax.data.prepare import (
    Progress,
    plan_preparation,
    prepare,
    prepare_tokenizer,
    preparing,
    write_part,
)
from ouro_jax.data.rows import open_rows, read_manifest, verify_rows
from ouro_jax.data.show import describe_manifest, describe_rows
from ouro_jax.errors import ConfigError, RunError

TEXTS = [f"Document {i}: " + "the quick brown fox, é. " * (i % 5) for i in range(200)]
BODY = Corpus(field="body")


@pytest.fixture
def corpus(tmp_path):
    """The texts as JSON lines in two files, with a tokenizer at `root/tokenizer.json`."""
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"body": text}) for text in TEXTS[part::2]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n\n")
    pattern = str(tmp_path / "texts" / "**" / "*.jsonl")
    prepare_tokenizer(
        pattern, corpus=BODY, vocab_size=280, output=tmp_path / "root" / "tokenizer.json"
    )
    return pattern


def plan(tmp_path, pattern, split="all", **options: Any):
    return plan_preparation(
        pattern,
        **{
            "tokenizer": tmp_path / "root" / "tokenizer.json",
            "sequence_length": 32,
            "output": tmp_path / "root" / "own" / f"{split}-32",
            "split": split,
            "corpus": BODY,
            **options,
        },
    )


def contents(directory):
    """Every file of a folder, hidden ones too, with its bytes."""
    paths = (path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_own_text_becomes_rows_that_a_mixture_reads(tmp_path, corpus):
    train, heldout = (prepare(plan(tmp_path, corpus, split)) for split in ("train", "heldout"))
    assert (train.source, train.documents + heldout.documents) == ("own", len(TEXTS))
    assert train.text_bytes + heldout.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert 0 < heldout.documents < 30
    assert verify_rows(tmp_path / "root" / "own" / "train-32") == train
    mixture = open_mixture(
        tmp_path / "root", {"own": 1.0}, sequence_length=32, seed=0, expected_vocab_size=280
    )
    assert mixture.read(0, 4).tokens_BL.shape == (4, 32)


def test_neither_workers_nor_places_change_a_byte(tmp_path, corpus):
    made = {
        workers: prepare(
            plan(tmp_path, corpus, output=tmp_path / str(workers) / "own" / "a", shard_bytes=1500),
            workers,
        )
        for workers in (1, 2, 3)
    }
    assert len(made[1].shards) > 5
    prepare(plan(tmp_path, corpus, output="memory://made/own/a", shard_bytes=1500))
    expected = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == contents(tmp_path / "3") == expected
    remote = Folder("memory://made/own/a")
    assert {f"own/a/{name}": remote.read_bytes(name) for name in remote.sizes()} == expected


def test_documents_are_all_there_once_and_whole(tmp_path, corpus):
    prepare(plan(tmp_path, corpus, shard_bytes=1500, sequence_length=64))
    shown = "".join(describe_rows(tmp_path / "root/own/all-32", tmp_path / "root/tokenizer.json",
                                  10**6))  # fmt: skip
    for text in TEXTS:  # 64 tokens hold each of them
        assert shown.count(f"] {text}<|endoftext|>") == 1


def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path, corpus):
    whole = plan(tmp_path, corpus, output=tmp_path / "whole" / "own" / "rows", shard_bytes=1500)
    killed = dataclasses.replace(whole, output=str(tmp_path / "killed" / "own" / "rows"))
    prepare(whole)
    script = tmp_path / "prepare.py"
    script.write_text(f"""
import sys, time
from pathlib import Path
from ouro_jax.data.corpus import *
from ouro_jax.data.prepare import *
def wait_for_the_kill(progress):
    if progress.done_parts == int(sys.argv[1]):
        time.sleep(60)
if __name__ == "__main__":
    prepare({killed!r}, 1, wait_for_the_kill)
""")
    folder = Folder(killed.output)
    for finished in (1, 4):
        run = subprocess.Popen(
            [sys.executable, script, str(finished)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        while sum(name.endswith(".json") for name in folder.sizes("unfinished")) < finished:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        with pytest.raises(ConfigError, match="no manifest.json: .* unfinished"):
            open_rows(killed.output)
    (first, *_) = Path(killed.output).glob("rows-*")
    written = first.stat().st_mtime_ns
    heard: list[Progress] = []
    prepare(killed, 2, lambda progress: heard.append(dataclasses.replace(progress)))
    assert contents(killed.output) == contents(whole.output)
    assert first.stat().st_mtime_ns == written
    assert heard[0].done_parts >= 4 and heard[-1].done_parts == len(whole.parts)
    assert heard[-1].done_bytes == heard[-1].total_bytes


def test_a_finished_folder_is_left_alone_unless_its_input_is_another(tmp_path, corpus):
    manifest = prepare(plan(tmp_path, corpus))
    before = contents(tmp_path / "root")
    assert prepare(plan(tmp_path, corpus)) == manifest
    changes: list[dict[str, Any]] = [{"sequence_length": 16}, {"corpus": Corpus(field="text")}]
    changes.append({"split": "train", "output": tmp_path / "root" / "own" / "all-32"})
    for change in changes:
        with pytest.raises(ConfigError, match="all-32 exists already and holds rows of other"):
            prepare(plan(tmp_path, corpus, **change))
    later = time.time() + 10
    os.utime(tmp_path / "texts" / "deep" / "1.jsonl", (later, later))
    with pytest.raises(ConfigError, match="exists already"):
        prepare(plan(tmp_path, corpus))
    assert contents(tmp_path / "root") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="mine exists already and holds no rows"):
        prepare(plan(tmp_path, corpus, output=tmp_path / "mine"))
    assert list(contents(tmp_path / "mine")) == ["thesis.tex"]


def test_shards_of_changed_input_are_made_again(tmp_path, corpus):
    old, new = plan(tmp_path, corpus, shard_bytes=1500), None
    for index in range(3):
        write_part(old, index)
    first = tmp_path / "texts" / "deep" / "0.jsonl"
    first.write_text(first.read_text().replace("fox", "cat"))
    new = plan(tmp_path, corpus, shard_bytes=1500)
    prepare(new)
    prepare(dataclasses.replace(new, output=str(tmp_path / "again" / "rows")))
    names = contents(tmp_path / "again" / "rows").keys() - {"manifest.json"}
    assert names and all(
        contents(new.output)[name] == contents(tmp_path / "again" / "rows")[name] for name in names
    )


def test_what_an_earlier_attempt_left_does_not_show(tmp_path, corpus):
    expected = plan(tmp_path, corpus, output=tmp_path / "expected" / "own" / "rows")
    prepare(expected)
    old = plan(tmp_path, corpus, shard_bytes=1500)
    for index in range(len(old.parts)):
        write_part(old, index)
    shard = Path(old.output) / "rows-00000.array_record"
    for folder in (shard.parent, shard.parent / "unfinished"):
        (folder / ".unfinished-rows-00000.array_record-1").touch()
    new = plan(tmp_path, corpus)
    write_part(new, 0)
    os.truncate(shard, 100)
    prepare(new)
    assert contents(new.output) == contents(expected.output)
    empty = plan(tmp_path, corpus, output=tmp_path / "empty" / "own" / "rows")
    Path(empty.output).mkdir(parents=True)
    (Path(empty.output) / ".unfinished-rows-00000.array_record-1").touch()  # killed in its first
    prepare(empty)
    assert contents(empty.output) == contents(expected.output)


@pytest.mark.parametrize("pattern", ["texts/**/*.jsonl", "missing_field.jsonl"])
def test_a_folder_that_holds_other_folders_is_left_as_it_is(tmp_path, corpus, pattern):
    (tmp_path / "missing_field.jsonl").write_text('{"text": "a"}')
    prepare(plan(tmp_path, corpus))
    before = contents(tmp_path / "root")
    with pytest.raises(ConfigError, match="own exists already and holds no rows"):
        prepare(plan(tmp_path, str(tmp_path / pattern), output=tmp_path / "root" / "own"))
    assert contents(tmp_path / "root") == before


def test_a_kill_between_a_shard_and_its_record_is_no_obstacle(tmp_path, corpus):
    expected = plan(tmp_path, corpus, output=tmp_path / "expected" / "own" / "rows")
    killed = plan(tmp_path, corpus)
    prepare(expected)
    folder = Folder(killed.output)
    with preparing(killed) as manifest:
        assert manifest is None
    folder.write_text("rows-00000.array_record", "no record says that this is whole")
    prepare(killed)
    assert contents(killed.output) == contents(expected.output)


def test_input_that_is_written_while_it_is_read_is_named(tmp_path, corpus):
    first = tmp_path / "texts" / "deep" / "0.jsonl"

    def write_again(progress):
        later = first.stat().st_mtime + 10
        os.utime(first, (later, later))

    with pytest.raises(ConfigError, match="0.jsonl was written while it was read"):
        prepare(plan(tmp_path, corpus, shard_bytes=1500), 1, write_again)


def test_a_repeat_that_allows_less_is_told_what_was_skipped(tmp_path, corpus):
    first = tmp_path / "texts" / "deep" / "0.jsonl"
    first.write_text('{"\\ud800": 1}\n' + first.read_text())
    lenient = plan(tmp_path, corpus, shard_bytes=1500, skip_bad=1)
    strict = dataclasses.replace(lenient, skip_bad=0)
    write_part(lenient, 0)
    with pytest.raises(ConfigError, match="allows no more; the last: .*0.jsonl, line 1"):
        prepare(strict)
    assert prepare(lenient).skipped == 1
    with pytest.raises(ConfigError, match="allows no more; the last: .*0.jsonl, line 1"):
        prepare(strict)


def test_two_writers_are_refused(tmp_path, corpus):
    preparation = plan(tmp_path, corpus)
    with Folder(preparation.output).locked():
        with pytest.raises(ConfigError, match="another process is writing there"):
            prepare(preparation)
    prepare(preparation)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: broken JSON \(Expecting value"),
        (b'{"text": ""}', "nothing to write"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, corpus, content, error):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=error):
        prepare(plan(tmp_path, str(tmp_path / "bad.jsonl"), corpus=Corpus()))
    assert list(contents(tmp_path / "root")) == ["tokenizer.json"]
    assert not (tmp_path / "root" / "own" / "all-32").exists()


def test_a_late_failure_keeps_the_finished_shards(tmp_path, corpus):
    with (tmp_path / "texts" / "deep" / "1.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ConfigError, match="1.jsonl, line 102: broken.*11 finished shards stay"):
        prepare(plan(tmp_path, corpus, shard_bytes=1500))
    folder = Folder(tmp_path / "root" / "own" / "all-32")
    assert len([name for name in folder.sizes() if name.endswith("array_record")]) == 11


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_records_are_skipped_within_a_bound_and_counted(tmp_path, corpus, workers):
    for part in range(2):
        path = tmp_path / "texts" / "deep" / f"{part}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:50], "{broken", *lines[50:], '{"text": 1}']))
    for allowed in (0, 3):
        with pytest.raises(ConfigError, match=r"[01].jsonl, line (51|103)"):
            prepare(plan(tmp_path, corpus, shard_bytes=1500, skip_bad=allowed), workers)
    manifest = prepare(plan(tmp_path, corpus, shard_bytes=1500, skip_bad=4), workers)
    assert (manifest.documents, manifest.skipped) == (len(TEXTS), 4)
    skipped = (tmp_path / "root" / "own" / "all-32" / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in skipped] == [
        f"{part}.jsonl, line {line}" for part in range(2) for line in (51, 103)
    ]
    assert "4 unreadable records skipped" in describe_manifest(manifest)


def test_conversations_keep_their_loss_mask(tmp_path, corpus):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    chat = plan(tmp_path, str(tmp_path / "chat.jsonl"), corpus=Corpus(schema="messages"))
    manifest = prepare(dataclasses.replace(chat, sequence_length=128))
    (row,) = open_rows(chat.output)
    assert manifest.has_loss_mask and row.loss_mask is not None
    assert row.loss_mask.sum() == 2  # the answer and the token that ends it


def test_rows_are_shown_as_text(tmp_path, corpus, embedded_root):
    manifest = prepare(plan(tmp_path, corpus))
    directory, tokenizer = tmp_path / "root" / "own" / "all-32", tmp_path / "root/tokenizer.json"
    text = describe_manifest(manifest)
    assert "own" in text and f"{manifest.tokens:,}" in text
    shown = list(describe_rows(directory, tokenizer, 10**6))
    assert len(shown) == manifest.rows and "Document 0: <|endoftext|>" in "".join(shown)
    assert list(describe_rows(directory, tokenizer, 3)) == shown[:3]
    with pytest.raises(ConfigError, match="another tokenizer"):
        next(describe_rows(directory, embedded_root / "tokenizer.json", 1))
    (chat,) = describe_rows(embedded_root / "sft" / "train-64", embedded_root / "tokenizer.json", 1)
    assert "<|im_start|>assistant\n‹" in chat and chat.count("‹") == chat.count("›")


def test_other_mistakes_are_named(tmp_path, corpus):
    with pytest.raises(ConfigError, match="split = 'test'"):
        plan(tmp_path, corpus, "test")
    with pytest.raises(ConfigError, match="sequence_length = 100000000000: expected 2 to"):
        plan(tmp_path, corpus, sequence_length=10**11)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file: cannot be written"):
        prepare(plan(tmp_path, corpus, output=tmp_path / "file"))
    wrong: dict[str, Any] = {"sequence_length": 1, "shard_bytes": 0, "skip_bad": -1}
    for key, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{key} = {value}"):
            plan(tmp_path, corpus, **{key: value})
    with pytest.raises(ConfigError, match="workers = 0"):
        prepare(plan(tmp_path, corpus), 0)
    with pytest.raises(ConfigError, match="tokenizer.json exists already"):
        prepare_tokenizer(
            corpus, corpus=BODY, vocab_size=280, output=tmp_path / "root" / "tokenizer.json"
        )
    other = plan(tmp_path, corpus)
    tokenizer = tmp_path / "root" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(ConfigError, match="tokenizer.json has changed since"):
        prepare(other)


def test_the_manifest_can_be_read_without_the_shards(tmp_path, corpus):
    manifest = prepare(plan(tmp_path, corpus))
    for shard in (tmp_path / "root" / "own" / "all-32").glob("*.array_record"):
        shard.unlink()
    assert read_manifest(tmp_path / "root" / "own" / "all-32") == manifest
