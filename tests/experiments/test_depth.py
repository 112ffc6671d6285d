"""Loss and accuracy by depth: against whole logits in float64; what is there is not done again."""

import math

import numpy as np
import pytest
from studied import heldout, log_softmax, subject, whole_logits

from ouro_jax.errors import ConfigError
from ouro_jax.experiments.depth import run_depth
from ouro_jax.experiments.scores import prepared_heldout
from ouro_jax.experiments.study import Subject
from ouro_jax.training.lines import read_lines


def test_a_record_is_the_direct_forward_pass_of_every_depth():
    records = run_depth(subject(), heldout(), None, num_loops=6)
    assert [record["source"] for record in records] == ["a", "b"]
    for seed, record in enumerate(records):
        loss, correct, count = np.zeros(6), np.zeros(6), 0
        for index in range(2):
            logits_TNV, _, _, targets_N = whole_logits(6, seed, index)
            picked_TN = log_softmax(logits_TNV)[:, np.arange(len(targets_N)), targets_N]
            loss -= picked_TN.sum(axis=1)
            correct += (logits_TNV.argmax(axis=-1) == targets_N).sum(axis=1)
            count += len(targets_N)
        assert record["num_tokens"] == count and record["num_bytes"] == 200
        np.testing.assert_allclose(record["loss_per_loop"], loss / count, rtol=1e-5)
        np.testing.assert_allclose(record["accuracy_per_loop"], correct / count, rtol=1e-6)
        np.testing.assert_allclose(
            record["bits_per_byte_per_loop"], loss / math.log(2) / 200, rtol=1e-5
        )
        assert record["trained_loops"] == 4


def test_a_second_run_finds_what_the_first_wrote_and_a_torn_line_is_done_again(tmp_path):
    path, said = tmp_path / "new" / "depth.jsonl", []
    first = run_depth(subject(), heldout(), path, num_loops=6, progress=said.append)
    assert [line.rsplit(" ", 1)[1] for line in said] == ["done", "done"]
    whole = path.read_text()
    path.write_text(whole[:-40])
    again = run_depth(subject(), heldout(), path, num_loops=6, progress=said.append)
    assert [line.rsplit(" ", 1)[1] for line in said[2:]] == ["found", "done"]
    assert again == first and path.read_text() == whole
    # Other weights under the same name are another checkpoint.
    other = Subject("random", subject().config, {**subject().params, "more": np.zeros(1)})
    assert other.key["weights"] != subject().key["weights"]
    assert [record["source"] for record in read_lines(path)] == ["a", "b"]


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no held-out rows of one length"):
        prepared_heldout(str(tmp_path))
    with pytest.raises(ConfigError, match=r"sources \['code'\]"):
        prepared_heldout(str(tmp_path), sources=["code"])
