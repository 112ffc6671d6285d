"""What a page of findings says of the studies of trained models, from the records they wrote.

Figures are the PNG files that a study drew; tables have the paper's numbers beside, where it prints
any. Of records on one thing (a checkpoint that was trained on, say) the last one counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ouro_jax.reporting import page
from ouro_jax.reporting.exits import RULES
from ouro_jax.reporting.history import Record
from ouro_jax.reporting.kv import PAPER_CAPTION, kv_cells
from ouro_jax.training.lines import read_lines

AT_MOST_MORE = 0.01  # loss of an exit rule over that of all loops
# Shares of 1,000 Quora pairs on which two depths of Ouro-1.4B agree (paper, Fig. 9).
PAPER_AGREEMENT = {(2, 3): 0.551, (2, 4): 0.361}
# R² of the total loss and, by trained loops, of the step-wise one (paper, Appendix D).
PAPER_R2 = {None: 0.9596, 2: 0.8898, 4: 0.8146, 8: 0.795}
PAPER_WEIGHTS_R2 = 0.961


class Table(NamedTuple):
    """A title, texts, and a sentence between."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Outcome(NamedTuple):
    """How far a study is, what came of it in a few words, and its tables."""

    state: str
    headline: str
    tables: Sequence[Table] = ()


FINISHED = "finished"
UNFINISHED = Outcome("not finished", "repeat the command to go on")


class Drawing(NamedTuple):
    """A PNG file of a study, its title and what to look for."""

    file: str
    title: str
    look_for: str


@dataclass(frozen=True)
class Study:
    """The file that a study writes, how to read it, and how it differs from the paper's."""

    records: str
    read: Callable[[Sequence[Record]], Outcome]
    differs: str
    drawings: Sequence[Drawing] = ()


def read_study(name: str, folder: Path) -> tuple[Outcome, list[str]]:
    """The outcome of the study `name` in `folder`, and the sections of a page about it.

    ConfigError for a line that is no record.
    """
    study = STUDIES[name]
    outcome = study.read(read_lines(folder / study.records))
    tables = [
        page.section(table.title, table.note, page.table(table.columns, table.rows))
        for table in outcome.tables
    ]
    drawings = [_drawing(drawing, folder) for drawing in study.drawings]
    differs = page.section("How the paper's differs", study.differs, "")
    return outcome, [*tables, *drawings, differs]


def _drawing(drawing: Drawing, folder: Path) -> str:
    file = folder / drawing.file
    if not file.is_file():
        text = f"There is no {drawing.file} yet; the study draws it at its end."
        return page.section(drawing.title, "", page.missing(text))
    return page.picture(drawing.title, file.read_bytes(), drawing.look_for)


def _latest(records: Sequence[Record], kind: str, *names: str) -> list[Record]:
    """The last record of that kind for each combination of the named fields."""
    found = {tuple(r[name] for name in names): r for r in records if r["kind"] == kind}
    return list(found.values())


def _read_depth(records: Sequence[Record]) -> Outcome:
    mine = _latest(records, "depth", "checkpoint", "source")
    if not mine:
        return UNFINISHED
    has_bits = all(record["bits_per_byte_per_loop"] for record in mine)
    field = "bits_per_byte_per_loop" if has_bits else "loss_per_loop"
    unit = "bits per byte" if has_bits else "nats per token"
    first = mine[0]
    best = min(
        (place for place, value in enumerate(first[field]) if value is not None),
        key=first[field].__getitem__, default=None,
    )  # fmt: skip
    trained = first["trained_loops"]
    headline = f"{first['checkpoint']}, {first['source']}: {_number(first[field][trained - 1])} "
    headline += f"{unit} at the {trained} loops trained"
    if best is not None:
        headline += f", {_number(first[field][best])} at the best, {best + 1}"
    return Outcome(
        FINISHED, headline,
        [_by_loop(f"Held-out {unit}", mine, field),
         _by_loop("Next-token accuracy", mine, "accuracy_per_loop")],
    )  # fmt: skip


def _by_loop(title: str, records: Sequence[Record], field: str) -> Table:
    deepest = max(len(record[field]) for record in records)
    rows = [
        [record["checkpoint"], record["source"], str(record["trained_loops"]),
         *map(_number, [*record[field], *[None] * (deepest - len(record[field]))])]
        for record in records
    ]  # fmt: skip
    return Table(title, ["checkpoint", "source", "trained", *_loops(deepest)], rows)


def _loops(count: int) -> list[str]:
    return [f"loop {loop}" for loop in range(1, count + 1)]


def _read_exits(records: Sequence[Record]) -> Outcome:
    curves = _latest(records, "exits", "checkpoint", "rule")
    expected = {
        record["checkpoint"]: record for record in _latest(records, "expected", "checkpoint")
    }
    names = list(dict.fromkeys(record["checkpoint"] for record in curves))
    if not names or any(name not in expected for name in names):
        return UNFINISHED
    rows, full = [], {}
    for name in names:
        rules = {
            record["rule"]: record["points"] for record in curves if record["checkpoint"] == name
        }
        full[name] = max(rules["static"], key=lambda point: point["mean_depth"])
        rows.append(_exit_row(name, "all loops", full[name]))
        for rule, points in rules.items():
            near = [p for p in points if p["loss"] <= full[name]["loss"] * (1 + AT_MOST_MORE)]
            point = min(near, key=lambda p: p["mean_depth"], default=None)
            rows.append(_exit_row(name, RULES[rule][1], point))
    last = expected[names[-1]]
    return Outcome(
        FINISHED,
        f"{names[-1]}, Q-exit at 0.5: {last['realised']:.3f} nats at "
        f"{last['realised_depth']:.2f} loops; all {full[names[-1]]['mean_depth']:.0f}: "
        f"{full[names[-1]]['loss']:.3f}",
        [Table(f"How shallow a rule gets for at most {AT_MOST_MORE:.0%} more loss",
               ["checkpoint", "rule", "at", "mean depth", "nats per token", "accuracy", "FLOPs"],
               rows)],
    )  # fmt: skip


def _exit_row(name: str, rule: str, point: Record | None) -> list[str]:
    if point is None:
        return [name, rule, *["–"] * 5]
    return [
        name, rule, f"{point['value']:g}", f"{point['mean_depth']:.2f}", _number(point["loss"]),
        f"{point['accuracy']:.1%}", f"{point['flops']:.1%}",
    ]  # fmt: skip


def _read_kv(records: Sequence[Record]) -> Outcome:
    mine = _latest(records, "kv", "checkpoint", "exit", "kv")
    if not mine:
        return UNFINISHED
    # Beside the answers of `full`, which are their own measure.
    told = [
        f"{r['kv']} {r['equal_answers']:.1%}"
        for r in mine
        if r["exit"] is None and r["kv"] != "full"
    ]
    columns, rows = kv_cells(mine)
    return Outcome(
        FINISHED,
        f"{mine[0]['checkpoint']}, answers as with the full cache: {', '.join(told) or '–'}",
        [Table("Greedy answers by policy", columns, rows, f"{PAPER_CAPTION}.")],
    )  # fmt: skip


def _read_faithfulness(records: Sequence[Record]) -> Outcome:
    agreements = _latest(records, "agreement", "checkpoint", "questions")
    if not agreements:
        return UNFINISHED
    last = agreements[-1]
    matrix, total = last["matrix"], last["num_prompts"]
    neighbours = [(depth, depth + 1) for depth in range(1, len(matrix))]
    pairs = sorted({*neighbours, *(pair for pair in PAPER_AGREEMENT if pair[1] <= len(matrix))})
    shares = {(a, b): matrix[a - 1][b - 1] / total for a, b in pairs}
    rows = [
        [f"{a} and {b}", f"{share:.1%}", _percent(PAPER_AGREEMENT.get((a, b)))]
        for (a, b), share in shares.items()
    ]
    key = (2, 4) if (2, 4) in shares else pairs[-1]
    paper = f" (paper {PAPER_AGREEMENT[key]:.1%})" if key in PAPER_AGREEMENT else ""
    headline = f"{last['checkpoint']}, depths {key[0]} and {key[1]} agree on {shares[key]:.1%} of "
    headline += f"{total:,}{paper}"
    return Outcome(
        FINISHED, headline,
        [Table(f"Same answer at two depths, {last['questions']}", ["depths", "here", "paper"],
               rows)],
    )  # fmt: skip


def _read_safety(records: Sequence[Record]) -> Outcome:
    summaries = [record for record in records if record["kind"] == "safety_summary"]
    if not summaries:
        return UNFINISHED
    depths, run = summaries[-1]["by_depth"], records[0]
    rows = [
        [str(row["depth"]), _number(row["mean_score"], 2), _percent(row["harmful_rate"])]
        for row in depths
    ]
    judged = [row for row in depths if row["harmful_rate"] is not None]
    told = ", ".join(
        f"{row['harmful_rate']:.1%} after {row['depth']}" for row in (*judged[:1], *judged[1:][-1:])
    )
    stand_in = "" if run["judges_harm"] else "; a stand-in judged, not harm"
    return Outcome(
        FINISHED,
        f"{run['model']} ({run['mode']}), harmful: {told or 'nothing could be judged'}{stand_in}",
        [Table("Judged answers by depth", ["loops", "mean score", "harmful"], rows)],
    )  # fmt: skip


def _read_scaling_law(records: Sequence[Record]) -> Outcome:
    laws = _latest(records, "scaling_law", "trained_loops")
    weights = _latest(records, "scaling_weights")
    if not laws or not weights:
        return UNFINISHED
    fits = [
        ("total loss" if law["trained_loops"] is None else f"step-wise, T = {law['trained_loops']}",
         law["r2"], PAPER_R2.get(law["trained_loops"]))
        for law in laws
    ]  # fmt: skip
    fits.append(("total loss from the step-wise ones", weights[0]["r2"], PAPER_WEIGHTS_R2))
    name, r2, paper = fits[0]
    rows = [[name, f"{r2:.4f}", _number(paper, 4)] for name, r2, paper in fits]
    return Outcome(
        FINISHED, f"{name}: R² {r2:.4f} (paper {_number(paper, 4)})",
        [Table("How well the laws fit, R²", ["law", "here", "paper"], rows)],
    )  # fmt: skip


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


STUDIES = {
    "depth": Study(
        "depth.jsonl", _read_depth,
        "The paper's Tables 10 and 11 give scores of benchmarks by depth for models trained with "
        "four loops; here it is the loss and accuracy of the next token on held-out rows.",
        [Drawing("depth.png", "Loss and accuracy by depth",
                 "Look for a fall of the loss up to the loops trained, and for what becomes of it "
                 "beyond, where lines are dashed.")],
    ),
    "exit": Study(
        "exits.jsonl", _read_exits,
        "The paper's compares exit rules by MMLU accuracy; here it is the next token on held-out "
        "rows, and what a token that left early would have fed later tokens is not simulated.",
        [Drawing("exits.png", "Loss and accuracy by mean depth",
                 "A line is a rule. Look for the gate's to lie on the better side of fixed "
                 "depths."),
         Drawing("calibration.png", "Does the gate know what a loop brings?",
                 "Look for points along the dotted target: the gate then says how likely a "
                 "further loop is to improve the token. Right: losses expected and taken.")],
    ),
    "kv": Study(
        "kv.jsonl", _read_kv,
        "The paper's is exact match of the answers to GSM8K and MATH-500 by Ouro-1.4B; here "
        "answers to held-out prompts are compared with those of the full cache.",
    ),
    "faithfulness": Study(
        "faithfulness.jsonl", _read_faithfulness,
        "The paper's is Ouro-1.4B on 1,000 Quora question pairs; the questions here are named "
        "above.",
        [Drawing("probes.png", "Can the answer be read before it is given?",
                 "AUC of a linear probe on the states of earlier loops; 0.5 is guessing. Look for "
                 "pale cells before the loop that answers: the answer was not there yet."),
         Drawing("agreement.png", "Which depths give the same answer",
                 "Look for how far from the diagonal the cells stay deep: there, further loops "
                 "change nothing.")],
    ),
    "safety": Study(
        "safety.jsonl", _read_safety,
        "The paper's is HEx-PHI judged by GPT-4o for the released models, at one to eight loops.",
        [Drawing("safety.png", "Score and harmful rate by depth",
                 "Look for both to fall as loops are added, beyond those trained too.")],
    ),
    "scaling_law": Study(
        "scaling_law.jsonl", _read_scaling_law,
        "The paper's has sizes of 53M to 1.36B parameters, 1, 2, 4 and 8 loops, and 20B tokens; it "
        "prints no coefficients. The sizes and tokens here are those of the points.",
        [Drawing("scaling_law.png", "Predicted against measured",
                 "Look for points along the diagonal, and for lines of more loops to lie lower.")],
    ),
}  # fmt: skip
