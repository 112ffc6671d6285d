"""What is said about held-out text follows from its figures, whichever way they fall."""

import io

import pytest
from rich.console import Console

from ouro_jax.reporting.heldout import heldout_rows, verdict
from ouro_jax.reporting.history import short_count, sort_records
from ouro_jax.reporting.tables import heldout_table


def heldout(source: str, bits: list[float | None], stage: str = "gate", tokens: int = 10) -> dict:
    return {
        "kind": "heldout", "source": source, "stage": stage, "step": 1, "tokens": tokens,
        "bits_per_byte_per_loop": bits, "trained_loops": 2,
    }  # fmt: skip


def baseline(source: str, unigram: float, bigram: float) -> dict:
    return {"kind": "baseline", "source": source, "unigram_bits_per_byte": unigram,
            "bigram_bits_per_byte": bigram}  # fmt: skip


def say(heldouts: list[dict], baselines: list[dict]) -> list[str]:
    return verdict(
        heldout_rows({h["source"]: h for h in heldouts}, {b["source"]: b for b in baselines})
    )


def test_the_trained_depth_decides_not_the_best():
    against, depth = say([heldout("code", [2.0, 3.0, 1.0])], [baseline("code", 4.0, 2.5)])
    assert "3.000 bits per byte" in against and "does not beat both" in against
    assert depth.startswith("Depth does not pay: loop 2 needs 3.000 bits per byte, loop 1 needs 2")


@pytest.mark.parametrize("bigram, says", [(2.0, "does not beat both"), (2.001, "it beats both")])
def test_a_tie_is_no_win(bigram, says):
    assert says in say([heldout("code", [2.5, 2.0])], [baseline("code", 4.0, bigram)])[0]


def test_the_mean_decides_and_sources_are_counted():
    measured = [heldout("a", [2.0, 1.0]), heldout("b", [2.0, 2.4])]
    against, depth = say(measured, [baseline("a", 3.0, 3.0), baseline("b", 3.0, 2.2)])
    assert "1.700 bits per byte, the bigram model 2.600 and the unigram model 3.000" in against
    assert "it beats both on average (fewer bits on 1 of 2 sources)" in against
    assert depth.startswith("Depth pays") and "1 of 2 sources" in depth


def test_what_is_missing_is_said_and_not_guessed():
    measured = [heldout("a", [2.0, 1.0]), heldout("b", [2.0, 1.0])]
    assert "were not fitted" in say(measured, [baseline("a", 3.0, 3.0)])[0]
    assert verdict([]) == ["No held-out text was measured yet."]
    against, depth = say([heldout("a", [None, None])], [baseline("a", 3.0, 3.0)])
    assert "not a finite number" in against and "cannot be said" in depth


def test_the_terminal_table_shows_the_last_stage_and_the_verdict():
    records = [
        heldout("code", [9.0, 9.0, 9.0], stage="stable_1b", tokens=5),
        heldout("code", [8.0, 8.0, 8.0]),
        heldout("code", [2.0, 1.25, 1.5], tokens=20),
        baseline("code", 4.0, 3.0),
    ]
    console = Console(file=io.StringIO(), width=100)
    console.print(heldout_table(records))
    text = console.file.getvalue()
    (row,) = [line for line in text.splitlines() if "code" in line]
    assert row.split() == [
        "code", "2.000", "1.250", "1.500", "4.000", "3.000",
    ]  # fmt: skip
    says = " ".join(text.split())
    assert "it beats both" in says and "Depth pays" in says and "9.000" not in says


def test_the_terminal_table_of_a_run_that_measured_nothing():
    console = Console(file=io.StringIO(), width=100)
    console.print(heldout_table([]))
    assert "No held-out text was measured yet." in " ".join(console.file.getvalue().split())


def test_a_stage_spans_its_tokens_even_where_its_start_is_not_logged():
    run = sort_records([
        {"kind": "train", "stage": "anneal", "step": 8, "tokens": 120, "batch_tokens": 20},
        {"kind": "train", "stage": "anneal", "step": 9, "tokens": 140, "batch_tokens": 20},
        {"kind": "train", "stage": "gate", "step": 10, "tokens": 160, "batch_tokens": 20},
    ])  # fmt: skip
    assert [(stage.start, stage.end) for stage in run.stages] == [(100, 140), (140, 160)]


def test_short_counts():
    counts = (0, 999, 1_250, 3_990_000, 20_000_000_000, 7_720_000_000_000)
    assert [short_count(count) for count in counts] == [
        "0",
        "999",
        "1.25K",
        "3.99M",
        "20B",
        "7.72T",
    ]
