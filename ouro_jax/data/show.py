"""What a folder of rows holds, as text for people."""

import os
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from ouro_jax.data.rows import Manifest, open_rows
from ouro_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from ouro_jax.errors import ConfigError


def describe_manifest(manifest: Manifest) -> str:
    """What a directory of rows holds, a line each."""
    fields = {
        "source": manifest.source,
        "rows": f"{manifest.rows:,} of {manifest.sequence_length:,} tokens ({manifest.dtype})",
        "tokens": f"{manifest.tokens:,}, padding {manifest.padding_share:.2%}",
        "documents": f"{manifest.documents:,}" + _exceptions(manifest),
        "text": f"{manifest.text_bytes:,} bytes, "
        f"{manifest.text_bytes / manifest.tokens:.2f} a token",
        "vocabulary": f"{manifest.vocab_size:,} entries, tokenizer {manifest.tokenizer_hash[:12]}…",
        "loss mask": "stored" if manifest.has_loss_mask else "none: all tokens are learnt",
        "shards": f"{len(manifest.shards):,}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in fields.items())


def _exceptions(manifest: Manifest) -> str:
    counts = {
        "cut at the end of a row": manifest.truncated,
        "dropped with nothing to learn": manifest.dropped,
        "unreadable records skipped": manifest.skipped,
    }
    return "".join(f", {count:,} {what}" for what, count in counts.items() if count)


def describe_rows(
    directory: str | os.PathLike, tokenizer: str | os.PathLike, num_rows: int
) -> Iterator[str]:
    """The first rows as text, a string each: documents numbered, tokens to learn in ‹ ›."""
    rows = open_rows(directory)
    if rows.manifest.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ConfigError(f"{directory} was made with another tokenizer than {tokenizer}.")
    loaded = load_tokenizer(tokenizer)
    for index in range(min(num_rows, len(rows))):
        row = rows[index]
        parts, end = [], 0
        for number, length in enumerate(row.segment_lengths.tolist(), 1):
            document = slice(end, end + length)
            mask = None if row.loss_mask is None else row.loss_mask[document]
            parts.append(
                f"[{number}: {length}] {_decode_marked(loaded, row.tokens[document], mask)}"
            )
            end += length
        padding = rows.manifest.sequence_length - end
        yield "\n".join([f"row {index} ({padding} tokens of padding)", *parts])


def _decode_marked(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray | None) -> str:
    """The text of `tokens`, runs of masked ones in ‹ ›."""
    if mask is None:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    text = ""
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        part = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        text += f"‹{part}›" if mask[start] else part
    return text
