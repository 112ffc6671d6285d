"""Streaming text: whole characters only, and nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_jax.data.tokenizer import encode, train_tokenizer
from ouro_jax.errors import ConfigError
from ouro_jax.inference.text import (
    TextStream,
    annotated,
    coloured,
    decode_text,
    encode_prompt,
    pieces,
    stop_ids,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat\n" * 20, "naïve café, 你好 → ∏\n" * 3], 270)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    ids = encode(tokenizer, text)
    assert "".join(pieces(tokenizer, ids)) == decode_text(tokenizer, ids) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 269), max_size=20))
def test_any_tokens_stream_to_the_text_of_all(tokenizer, ids):
    assert "".join(pieces(tokenizer, ids)) == decode_text(tokenizer, ids)


def test_a_character_comes_out_with_its_last_byte(tokenizer):
    ids = encode(tokenizer, "🐍!")
    assert len(ids) == 5  # four bytes and the exclamation mark
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "", "🐍", "!"]
    assert stream.finish() == ""


def test_a_character_cut_off_shows_as_one_replacement(tokenizer):
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in encode(tokenizer, "a🐍")[:3]]
    assert shown == ["a", "", ""]
    assert set(stream.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_special_tokens_are_spelt_out(tokenizer):
    assert decode_text(tokenizer, [0, *encode(tokenizer, "the"), 2]) == "<|endoftext|>the<|im_end|>"


def test_colours_run_from_the_first_loop_to_the_last():
    styles = [str(coloured("x", depth, 4).style) for depth in (1, 2, 3, 4)]
    assert len(set(styles)) == 4
    assert [str(coloured("x", depth, 8).style) for depth in (1, 8)] == [styles[0], styles[-1]]
    assert coloured("x", 1, 1).plain == "x"


def test_annotated_is_one_line():
    assert annotated(["a", "\n", "b"], [1, 4, 2]) == "a[1]\\n[4]b[2]"


def test_prompts_and_stop_tokens(tokenizer):
    text = "the <|im_end|>"
    assert encode_prompt(tokenizer, text, chat=False) == encode(tokenizer, text)
    chat = decode_text(tokenizer, encode_prompt(tokenizer, "the", chat=True))
    assert chat == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert stop_ids(tokenizer, None) == [0, 2]
    newline = encode(tokenizer, "\n")[0]
    assert stop_ids(tokenizer, ["<|im_end|>", "7", "\n"]) == [2, 7, newline]
    with pytest.raises(ConfigError, match="expected one"):
        stop_ids(tokenizer, ["never one token"])
