"""Times of early exit: what does not depend on the machine."""

import pytest
from studied import LENGTH, heldout, subject

from ouro_jax.errors import ConfigError
from ouro_jax.experiments.exit_times import run_exit_times
from ouro_jax.experiments.scores import heldout_prompts


def test_rows_are_measured_on_all_prompts_and_found_again(tmp_path):
    prompts = heldout_prompts(heldout(), 8, 1)
    said = []
    for _ in range(2):
        (record,) = run_exit_times(
            subject(1), prompts, tmp_path / "times.jsonl", ("static:2",), tokens=4, repeats=1,
            progress=said.append,
        )  # fmt: skip
    assert said[0].endswith("done") and said[1].endswith("found")
    whole, half = record["rows"]
    assert (whole["rule"], whole["mean_depth"], whole["saved"]) == ("static:4", 4, 0)
    assert whole["realised"] is None
    assert (half["rule"], half["mean_depth"]) == ("static:2", 2)
    assert 0.4 < half["flops_saved"] < 0.5  # the head is read all the same
    assert half["ms_per_token"] > 0
    assert half["realised"] == pytest.approx(half["saved"] / half["flops_saved"])


def test_prompts_open_documents_of_all_sources_in_turns():
    prompts = heldout_prompts(heldout(), 12, 4)
    assert [len(prompt) for prompt in prompts] == [12] * 4
    first = next(iter(heldout().sources["b"]())).batch
    # The second document of a row is the long one: it follows 9 tokens of the first.
    assert prompts[1] == first.tokens_BL[0, 9:21].tolist()
    with pytest.raises(ConfigError, match="prompts = 3: expected at most 0"):
        heldout_prompts(heldout(), LENGTH, 3)
