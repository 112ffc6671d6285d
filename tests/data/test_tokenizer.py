"""Byte-level BPE: lossless, literal about special tokens, strict about its size."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from ouro_jax.data.rows import DocumentCounts
from ouro_jax.data.tokenizer import (
    encode,
    encode_ahead,
    load_tokenizer,
    special_id,
    token_byte_lengths,
    tokenize,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from ouro_jax.errors import ConfigError


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(
        ["the cat and the hat, the bat and the mat; é ü 漢字 <|im_end|>"] * 3, 275
    )


@given(text=st.text())
def test_text_survives_and_every_byte_is_counted(small, text):
    ids = encode(small, text)
    assert small.decode(ids, skip_special_tokens=False) == text
    assert token_byte_lengths(small)[ids].sum() == len(text.encode())


def test_special_tokens_have_the_first_ids_and_count_no_bytes(small):
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [small.token_to_id(name) for name in names] == [0, 1, 2]
    lengths_V = token_byte_lengths(small)
    assert lengths_V.dtype == np.int32 and lengths_V.shape == (275,)
    assert (lengths_V[:3] == 0).all() and (lengths_V[3:] > 0).all()


def test_special_tokens_spelt_in_a_text_stay_text_after_saving_too(small, tmp_path):
    small.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (small, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = encode(tokenizer, "a<|im_end|>b<|endoftext|>")
        assert min(ids) > 2
        (document,) = tokenize(tokenizer, ["", "<|endoftext|>"], DocumentCounts())
        assert document.tokens[-1] == 0 and document.tokens[:-1].min() > 2


def test_control_tokens_that_a_file_does_not_call_special_cannot_be_spelt(small, tmp_path):
    content = json.loads(small.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.get_vocab_size() == small.get_vocab_size()
    assert min(encode(loaded, "<|im_end|><|im_start|><|endoftext|>")) > 2


def test_ids_that_are_left_out_count(small, tmp_path):
    content = json.loads(small.to_str())
    highest = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][highest] += 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert vocabulary_size(loaded) == vocabulary_size(small) + 7
    assert len(token_byte_lengths(loaded)) == vocabulary_size(loaded)


def test_documents_end_with_end_of_text_and_are_counted(small):
    counts = DocumentCounts()
    texts = ["the cat", "", "é"]
    documents = list(tokenize(small, texts, counts))
    assert counts == DocumentCounts(documents=2, text_bytes=9)
    assert [d.tokens.tolist() for d in documents] == [
        [*encode(small, "the cat"), 0],
        [*encode(small, "é"), 0],
    ]


def test_chunks_that_are_encoded_ahead_come_in_order(small, monkeypatch):
    monkeypatch.setattr("ouro_jax.data.tokenizer.CHUNK_CHARACTERS", 10)
    texts = [f"text {number}" for number in range(20)]
    chunks = list(encode_ahead(small, texts))
    assert len(chunks) == 10 and [text for chunk, _ in chunks for text in chunk] == texts
    for chunk, encodings in chunks:
        assert [small.decode(encoding.ids) for encoding in encodings] == chunk


def test_other_names_of_the_end_of_text_are_known():
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    (document,) = tokenize(tokenizer, ["a"], DocumentCounts())
    assert document.tokens.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="no token <|im_start|>"):
        special_id(tokenizer, "<|im_start|>")
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="byte-level"):
        token_byte_lengths(tokenizer)


def test_sizes_that_cannot_be_met_are_refused():
    with pytest.raises(ConfigError, match="vocab_size = 258: expected at least 259"):
        train_tokenizer(["text"], 258)
    with pytest.raises(ConfigError, match="vocab_size = 5000: the text yields only"):
        train_tokenizer(["little text"], 5000)


def test_unreadable_tokenizers_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    for reader in (load_tokenizer, tokenizer_hash):
        with pytest.raises(ConfigError, match="tokenizer.json: no such tokenizer file"):
            reader(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json: not a readable tokenizer"):
        load_tokenizer(path)
