"""Held-out bits per byte by depth, beside models that only count.

The mean over sources is unweighted: every source counts the same, however long its held-out text.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ouro_jax.reporting.history import Record, RunHistory


@dataclass(frozen=True)
class HeldoutRow:
    """One source, or the mean over them: bits per byte after loops 1, 2, … and of the baselines.

    `trained_loops` is the depth that the model was trained at; deeper columns are extrapolation.
    """

    source: str
    bits_per_byte: tuple[float | None, ...]
    trained_loops: int
    unigram: float | None
    bigram: float | None
    is_mean: bool = False

    @property
    def at_depth(self) -> float | None:
        """Bits per byte after the last trained loop, or the last one that was measured."""
        return self.bits_per_byte[min(self.trained_loops, len(self.bits_per_byte)) - 1]


def heldout_rows(heldout: dict[str, Record], baselines: dict[str, Record]) -> list[HeldoutRow]:
    """A row per source, by name, and their mean last where there are several."""
    rows = []
    for source, record in sorted(heldout.items()):
        baseline = baselines.get(source, {})
        rows.append(
            HeldoutRow(
                source,
                tuple(record["bits_per_byte_per_loop"]),
                record["trained_loops"],
                baseline.get("unigram_bits_per_byte"),
                baseline.get("bigram_bits_per_byte"),
            )
        )
    return [*rows, _mean_row(rows)] if len(rows) > 1 else rows


def _mean_row(rows: list[HeldoutRow]) -> HeldoutRow:
    loops = min(len(row.bits_per_byte) for row in rows)
    return HeldoutRow(
        "mean",
        tuple(_mean([row.bits_per_byte[loop] for row in rows]) for loop in range(loops)),
        min(row.trained_loops for row in rows),
        _mean([row.unigram for row in rows]),
        _mean([row.bigram for row in rows]),
        is_mean=True,
    )


def _mean(values: list[float | None]) -> float | None:
    """None as soon as one value is missing: a mean over fewer sources would mislead."""
    there = [value for value in values if value is not None]
    return sum(there) / len(values) if values and len(there) == len(values) else None


def latest_rows(run: RunHistory) -> list[HeldoutRow]:
    """The rows of the last stage that was measured; empty if none was."""
    return heldout_rows(run.measured[-1].heldout, run.baselines) if run.measured else []


def verdict(rows: list[HeldoutRow]) -> list[str]:
    """Whether the model beats the baselines, and whether depth pays, as plain sentences.

    Decided by the mean over sources; says on how many of the sources the same holds.
    """
    if not rows:
        return ["No held-out text was measured yet."]
    return [_against_baselines(rows), _depth_pays(rows)]


def _against_baselines(rows: list[HeldoutRow]) -> str:
    whole, ours = rows[-1], rows[-1].at_depth
    if ours is None:
        return "The held-out loss is not a finite number."
    says = f"The model needs {ours:.3f} bits per byte"
    if whole.unigram is None or whole.bigram is None:
        return f"{says}; unigram and bigram models were not fitted for this run on every source."
    counts = f"the bigram model {whole.bigram:.3f} and the unigram model {whole.unigram:.3f}"
    beaten = "beats both" if _less(ours, whole.bigram, whole.unigram) else "does not beat both"
    where = _on_sources(rows, lambda row: _less(row.at_depth, row.bigram, row.unigram))
    return f"{says}, {counts}: it {beaten}{where}."


def _depth_pays(rows: list[HeldoutRow]) -> str:
    whole = rows[-1]
    first, last = whole.bits_per_byte[0], whole.at_depth
    depth = min(whole.trained_loops, len(whole.bits_per_byte))
    if depth == 1:
        return "The model was trained at one loop, so nothing can be said about depth."
    if first is None or last is None:
        return "Whether depth pays cannot be said: a loss is not a finite number."
    pays = "pays" if _less(last, first) else "does not pay"
    where = _on_sources(rows, lambda row: _less(row.at_depth, row.bits_per_byte[0]))
    loops = f"loop {depth} needs {last:.3f} bits per byte, loop 1 needs {first:.3f}"
    return f"Depth {pays}: {loops}{where}."


def _on_sources(rows: list[HeldoutRow], holds: Callable[[HeldoutRow], bool]) -> str:
    sources = [row for row in rows if not row.is_mean]
    if len(sources) == 1:
        return ""
    fewer = sum(map(holds, sources))
    return f" on average (fewer bits on {fewer} of {len(sources)} sources)"


def _less(ours: float | None, *others: float | None) -> bool:
    return ours is not None and all(other is not None and ours < other for other in others)
