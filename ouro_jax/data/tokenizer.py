"""Byte-level BPE: training one, reading one, and how text becomes token documents.

Tokenizers are files in the Hugging Face format (`tokenizer.json`), held in memory as
`tokenizers.Tokenizer`. Text is always taken literally: `<|im_end|>` inside a text is ordinary
characters, and only the code of this package places special tokens.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from ouro_jax.data.folder import Folder
from ouro_jax.data.packing import Document
from ouro_jax.data.rows import DocumentCounts
from ouro_jax.errors import ConfigError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# What other tokenizers call the token after a document, tried in this order.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Texts are encoded in calls of about this many characters, over which `tokenizers` spreads its
# threads; enough for many documents a call, and little memory.
CHUNK_CHARACTERS = 1 << 21


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries; ids 0, 1, 2 are the special tokens.

    Digits stay single, so numbers are spelt alike everywhere. Raises ConfigError if
    `vocab_size` has no place for the 256 bytes and the special tokens, or if the text is too
    small to fill it.
    """
    special = [END_OF_TEXT, IM_START, IM_END]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size = {vocab_size}: expected at least {smallest} (all bytes).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"vocab_size = {vocab_size}: the text yields only {tokenizer.get_vocab_size()} "
            "entries. Choose that many or bring more text."
        )
    return _literal(tokenizer)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`; ConfigError if it is missing or unreadable."""
    content = _read(path)
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: not a readable tokenizer.json ({error}).") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Some files do not call their control tokens special: then a text could spell them.
    known = [name for name in (*END_OF_TEXT_NAMES, IM_START, IM_END) if tokenizer.token_to_id(name)
             is not None]  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in known])
    return _literal(tokenizer)


def tokenizer_hash(path: str | os.PathLike) -> str:
    """SHA-256 of the tokenizer file: what manifests name their tokenizer by."""
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str | os.PathLike) -> bytes:
    folder, _, name = os.fspath(path).rpartition("/")
    folder = Folder(folder or ".")
    if not folder.has(name):
        raise ConfigError(f"{path}: no such tokenizer file.")
    return folder.read_bytes(name)


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Special tokens spelt out inside a text become ordinary tokens, not special ones."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id; some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values()) + 1


def special_id(tokenizer: Tokenizer, *names: str) -> int:
    """The id of the first of `names` that the tokenizer has; ConfigError if it has none."""
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise ConfigError(f"The tokenizer has no token {' or '.join(names)}.")


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends every document."""
    return special_id(tokenizer, *END_OF_TEXT_NAMES)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, literally: nothing added, no special tokens recognised."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def tokenize(
    tokenizer: Tokenizer, texts: Iterable[str], counts: DocumentCounts
) -> Iterator[Document]:
    """Each text as a document that ends with the end-of-text token; empty texts are dropped."""
    end = end_of_text_id(tokenizer)
    for chunk, encodings in encode_ahead(tokenizer, (text for text in texts if text)):
        for text, encoding in zip(chunk, encodings, strict=True):
            counts.documents += 1
            counts.text_bytes += len(text.encode())
            yield Document(np.array([*encoding.ids, end], np.int32))


def encode_ahead(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[list[str], list[Encoding]]]:
    """Texts in chunks with their encodings; the next chunk is encoded while this one is used."""

    def encode_chunk(chunk: list[str]) -> tuple[list[str], list[Encoding]]:
        return chunk, tokenizer.encode_batch_fast(chunk, add_special_tokens=False)

    with ThreadPoolExecutor(1) as thread:
        current = None
        for chunk in _chunks(texts):
            following = thread.submit(encode_chunk, chunk)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for: int32 [V]; special tokens count 0.

    In a byte-level vocabulary every character of an entry stands for one byte; a word of a
    word-level one without a decoder, which puts spaces between words, stands for itself and a
    space. ConfigError for tokenizers of another kind.
    """
    if isinstance(tokenizer.model, models.WordLevel) and tokenizer.decoder is None:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        return np.array([len(word.encode()) + 1 for word, _ in vocabulary], np.int32)
    if "ByteLevel" not in str(tokenizer.decoder):
        raise ConfigError("Bits per byte need a byte-level tokenizer; this one is of another kind.")
    lengths_V = np.zeros(vocabulary_size(tokenizer), np.int32)
    for token, token_id in tokenizer.get_vocab().items():
        lengths_V[token_id] = len(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[token_id] = 0 if added.special else len(added.content.encode())
    return lengths_V
