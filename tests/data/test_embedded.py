"""The embedded build: whole, the same every time, splits apart, safe beside another builder."""

import concurrent.futures
import hashlib
import multiprocessing
from pathlib import Path

import pytest

from ouro_jax.data.embedded import build_embedded
from ouro_jax.data.mixture import list_sources
from ouro_jax.data.rows import open_rows, verify_rows
from ouro_jax.errors import ConfigError


def contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def documents(directory: Path, tokenizer) -> set[str]:
    """The texts of the documents that lie whole in a row."""
    texts = set()
    for row in open_rows(directory):
        end = 0
        for length in row.segment_lengths.tolist():
            tokens = row.tokens[end : end + length].tolist()
            end += length
            texts.add(tokenizer.decode(tokens, skip_special_tokens=False))
    return texts


def test_every_folder_is_whole_and_within_the_limit(embedded_root, embedded_settings):
    for source, entries in list_sources(embedded_root).items():
        for split, length in entries:
            manifest = verify_rows(embedded_root / source / f"{split}-{length}")
            limit = embedded_settings["max_bytes_per_source"] // (1 if split == "train" else 8)
            assert 0.5 * limit < manifest.text_bytes <= limit
            assert (manifest.source, manifest.sequence_length) == (source, length)
            assert manifest.vocab_size == embedded_settings["vocab_size"]
            assert manifest.has_loss_mask == (source == "sft")
    # The same documents in rows of both lengths.
    both = [open_rows(embedded_root / "code" / f"train-{n}").manifest.tokens for n in (32, 64)]
    assert both[0] == both[1]


@pytest.mark.parametrize("source", ["code", "prose", "math", "sft"])
def test_no_heldout_document_is_in_the_training_split(embedded_root, tokenizer, source):
    train, heldout = (
        documents(embedded_root / source / f"{split}-64", tokenizer)
        for split in ("train", "heldout")
    )
    # Rests of cut documents may agree by chance; what is long or begins like a problem may not.
    begins = ("(", "Compute", "Question", "Work", "Find", "What")
    heldout = {text for text in heldout if len(text) > 40 or text.startswith(begins)}
    assert heldout and not heldout & train


def test_two_builders_at_once_give_the_same_rows_as_one(embedded_root, tmp_path, embedded_settings):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(build_embedded, tmp_path, **embedded_settings) for _ in range(2)]
        first, second = (future.result() for future in futures)
    assert first == second and first.name == embedded_root.name
    assert [path.name for path in tmp_path.iterdir()] == [first.name]  # nothing left lying about
    assert contents(first) == contents(embedded_root)


def test_a_build_is_reused_unless_settings_change(embedded_root, embedded_settings):
    changed = contents(embedded_root)
    assert build_embedded(embedded_root.parent, **embedded_settings) == embedded_root
    assert contents(embedded_root) == changed
    lengths = {"math": [32]}
    other = build_embedded(
        embedded_root.parent, **{**embedded_settings, "sequence_lengths": lengths}
    )
    assert other != embedded_root
    assert list_sources(other) == {"math": [("heldout", 32), ("train", 32)]}


def test_wrong_settings_are_named_and_leave_nothing(tmp_path, embedded_settings):
    with pytest.raises(ConfigError, match="source = 'maths'.*Did you mean 'math'"):
        build_embedded(tmp_path, **{**embedded_settings, "sequence_lengths": {"maths": [64]}})
    with pytest.raises(ConfigError, match="100 bytes per source leave no .* text for 'code'"):
        build_embedded(tmp_path, **{**embedded_settings, "max_bytes_per_source": 100})
    assert list(tmp_path.iterdir()) == []
