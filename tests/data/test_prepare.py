"""A user's own files become rows a mixture can read; every bad file is named with its line."""

import json

import pytest

from ouro_jax.config import ConfigError
from ouro_jax.data.mixture import open_mixture
from ouro_jax.data.prepare import (
    describe_manifest,
    describe_rows,
    find_files,
    prepare,
    prepare_tokenizer,
    read_texts,
)
from ouro_jax.data.rows import verify_rows

TEXTS = [f"Document {i}: " + "the quick brown fox, é. " * (i % 5) for i in range(200)]


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
        pattern,
        file_format="jsonl",
        vocab_size=280,
        output=tmp_path / "root" / "tokenizer.json",
        field="body",
    )
    return pattern


def prepare_split(tmp_path, corpus, split, **options):
    return prepare(
        corpus,
        file_format="jsonl",
        tokenizer=tmp_path / "root" / "tokenizer.json",
        sequence_length=32,
        output=tmp_path / "root" / "own" / f"{split}-32",
        split=split,
        **{"field": "body", **options},
    )


def test_own_text_becomes_rows_that_a_mixture_reads(tmp_path, corpus):
    train, heldout = (prepare_split(tmp_path, corpus, split) for split in ("train", "heldout"))
    assert (train.source, train.documents + heldout.documents) == ("own", len(TEXTS))
    assert train.text_bytes + heldout.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert 0 < heldout.documents < 30
    assert verify_rows(tmp_path / "root" / "own" / "train-32") == train
    mixture = open_mixture(
        tmp_path / "root", {"own": 1.0}, sequence_length=32, seed=0, expected_vocab_size=280
    )
    assert mixture.read(0, 4).tokens_BL.shape == (4, 32)


def test_rows_are_shown_as_text(tmp_path, corpus, embedded_root):
    manifest = prepare_split(tmp_path, corpus, "all")
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


def test_text_files_are_a_document_each(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo")
    (tmp_path / "b.txt").write_text("three")
    assert list(read_texts(find_files(str(tmp_path / "*.txt")), "text")) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: broken JSON \(Expecting value"),
        (b'{"text": "a"}\n\n{"tekst": "b"}', r"line 3: no field 'text'.*Did you mean 'tekst'\?"),
        (b'{"text": 7}', "line 1: field 'text' is no text but int"),
        (b'["text"]', "line 1: expected an object with the field 'text'"),
        (b'{"text": "a"}\n{"text": "\xff"}', "bad.jsonl, line 2: not UTF-8"),
        (b'{"text": "\\ud800"}', "line 1: field 'text' is no valid Unicode"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, corpus, content, error):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=error):
        prepare_split(tmp_path, str(tmp_path / "bad.jsonl"), "all", field="text")
    assert [path.name for path in (tmp_path / "root").rglob("*")] in (
        ["tokenizer.json"], ["own", "tokenizer.json"], ["tokenizer.json", "own"],
    )  # fmt: skip


def test_other_mistakes_are_named(tmp_path, corpus):
    with pytest.raises(ConfigError, match="bad.txt, line 2: not UTF-8"):
        (tmp_path / "bad.txt").write_bytes(b"fine\n\xe9")
        list(read_texts([tmp_path / "bad.txt"], "text"))
    with pytest.raises(ConfigError, match="input = .*matches at least one file"):
        find_files(str(tmp_path / "*.parquet"))
    with pytest.raises(ConfigError, match="format = 'json'.*Did you mean 'jsonl'"):
        list(read_texts([], "json"))
    with pytest.raises(ConfigError, match="split = 'test'"):
        prepare_split(tmp_path, corpus, "test")
    with pytest.raises(ConfigError, match="missing.txt: cannot be read"):
        list(read_texts([tmp_path / "missing.txt"], "text"))
    with pytest.raises(ConfigError, match="tokenizer.json exists already"):
        prepare_tokenizer(
            corpus,
            file_format="jsonl",
            vocab_size=280,
            output=tmp_path / "root" / "tokenizer.json",
        )
