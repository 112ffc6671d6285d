"""Figures of data sets say what the rows hold; the share table what a mixture gives."""

from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from ouro_jax.data.folder import Folder
from ouro_jax.data.interleave import Interleave
from ouro_jax.data.mixture import Mixture
from ouro_jax.data.rows import Manifest, Row, open_rows, write_manifest, write_shard
from ouro_jax.errors import ConfigError
from ouro_jax.reporting.data import (
    draw_rows,
    light_colours,
    mixture_shares,
    sample_rows,
    shares_table,
)

LENGTH = 16


def make_row(lengths, num_learnt=None) -> Row:
    mask = None if num_learnt is None else np.arange(LENGTH) < num_learnt
    return Row(np.ones(LENGTH, np.int32), np.array(lengths, np.uint32), mask)


def write(path, rows):
    """A folder of `rows`, opened."""
    folder = Folder(path)
    shard, tokens = write_shard(folder, "rows-00000.array_record", rows, LENGTH, 300)
    manifest = Manifest(
        source=path.parent.name, sequence_length=LENGTH, vocab_size=300, tokenizer_hash="0",
        dtype="uint16", has_loss_mask=rows[0].loss_mask is not None, documents=1, text_bytes=1,
        truncated=0, dropped=0, skipped=0, tokens=tokens, rows=len(rows), inputs="0",
        shards=(shard,),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return open_rows(path)


def test_a_sample_counts_what_is_in_the_rows(tmp_path):
    rows = [make_row([16]), make_row([1, 2, 5]), make_row([8, 8])] * 2
    sample = sample_rows(write(tmp_path / "web" / "train-16", rows))
    assert Counter(sample.lengths.tolist()) == Counter([16, 1, 2, 5, 8, 8] * 2)
    assert sample.per_row.tolist() == [1, 3, 2] * 2
    assert sample.padding_share == pytest.approx(8 / 48) and sample.learnt is None
    assert sample.describe() == {
        "rows": 6, "documents": 12, "median_length": 6.5, "longest": 16,
        "documents_per_row": 2.0, "padding_share": pytest.approx(8 / 48), "learnt_share": None,
    }  # fmt: skip


def test_a_sample_is_spread_over_all_rows(tmp_path):
    source = write(tmp_path / "web" / "train-16", [make_row([n + 1]) for n in range(12)])
    assert sample_rows(source, max_rows=4).lengths.tolist() == [1, 4, 7, 10]


def test_the_share_of_learnt_tokens_leaves_padding_out(tmp_path):
    source = write(tmp_path / "chat" / "train-16", [make_row([4, 4], 2), make_row([16], 12)])
    assert sample_rows(source).learnt.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("num_learnt", [None, 3])
def test_a_figure_says_what_it_was_drawn_from(tmp_path, num_learnt):
    rows = [make_row([4, 9], num_learnt), make_row([16], num_learnt)] * 3
    sample = sample_rows(write(tmp_path / "web" / "train-16", rows), max_rows=4)
    path = tmp_path / "figures" / "lengths.svg"
    assert draw_rows(sample, path) == path
    text = path.read_text()
    assert "web: 4, evenly spread, of 6 rows of 16 tokens" in text
    assert "padding 9.38%" in text and "a whole row" in text and light_colours()["accent"] in text
    assert ("carry loss" in text) == (num_learnt is not None)
    assert draw_rows(sample, tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"plot = .*lengths.gif.*\.png"):
        draw_rows(sample, tmp_path / "lengths.gif")


def test_shares_agree_with_the_rows_that_are_read(tmp_path):
    sources = {
        "web": write(tmp_path / "web" / "train-16", [make_row([16])] * 10),
        "code": write(tmp_path / "code" / "train-16", [make_row([4])] * 40),
    }
    mixture = Mixture(sources, Interleave({"web": 0.7, "code": 0.3}), {"web": 0, "code": 1 << 16})
    shares = {share.source: share for share in mixture_shares(mixture, 5, 100)}
    read = Counter(mixture.locate(index)[0] for index in range(5, 105))
    assert {name: share.rows for name, share in shares.items()} == dict(read)
    for name, share in shares.items():
        assert share.observed == read[name] / 100
        assert share.configured == {"web": 0.7, "code": 0.3}[name]
        assert share.tokens == read[name] * {"web": 16, "code": 4}[name]
        assert share.epochs_before == mixture.epochs(5)[name]
        assert share.epochs_after == mixture.epochs(105)[name]
    console = Console(width=80, record=True)
    console.print(shares_table(list(shares.values()), start=5))
    text = console.export_text()
    assert "rows 5 to 104" in text and "70.00" in text and "→ 7." in text
