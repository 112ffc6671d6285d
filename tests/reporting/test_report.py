"""The page is whole, self-contained, and says what the records say."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ouro_jax.errors import ConfigError
from ouro_jax.reporting import plots
from ouro_jax.reporting.history import sort_records
from ouro_jax.reporting.report import PLOTS, write_report
from ouro_jax.training.timing import LOST_PARTS, PARTS

STAGES = (("stable_1a", 8), ("stable_1b", 4), ("gate", 4))
SOURCES = ("code", "prose & <b>verse</b>")
NUM_TRAIN_PLOTS = sum(plot.needs == "train" for plot in PLOTS)
SAMPLE = {
    "prompt": "What is <script>?", "tokens": ["an ", "<script>alert(1)</script>", "&lt;"],
    "depths": [1, 4, 2], "num_loops": 4, "stage": "gate",
}  # fmt: skip


def model(num_loops: int) -> dict:
    return {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2,
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "num_loops": num_loops,
        "rope_theta": 10_000.0,
    }  # fmt: skip


def bits(source: str, stage: str, loop: int) -> float:
    return 1.5 + SOURCES.index(source) + 0.1 * len(stage) + 0.01 / (loop + 1)


def synthetic_records() -> list[dict]:
    records, step, tokens = [], 0, 0
    for stage, loops in STAGES:
        where = {"stage": stage, "step": step, "tokens": tokens, "time": 1e9 + step}
        records.append({"kind": "event", "event": "stage_start", "model": model(loops)} | where)
        for _ in range(6):
            step, tokens = step + 1, tokens + 4096
            where |= {"step": step, "tokens": tokens, "time": 1e9 + step}
            records.append({
                "kind": "train", "loss": 2.0, "expected_loss": 2.0, "entropy": 1.0,
                "loss_per_loop": [3.0 / step + 0.1 / (n + 1) for n in range(loops)],
                "exit_distribution": [1 / loops] * loops, "mean_depth": (loops + 1) / 2,
                "learning_rate": 1e-3, "batch_tokens": 4096, "grad_norm": 1.0,
                "grad_norms": {"head": 1.0}, "tokens_per_second": None if step == 1 else 1000.0,
                "tokens_per_second_per_device": None if step == 1 else 500.0,
                "mfu": None if step == 1 else 25.0, "mfu_peak": "TPU v5e data sheet",
                "step_seconds": dict.fromkeys(("p50", "p90", "p99", "max"), 4.0),
            } | where)  # fmt: skip
        records += [
            {
                "kind": "heldout", "source": source, "trained_loops": loops, "mean_depth": 2.0,
                "bits_per_byte_per_loop": [bits(source, stage, loop) for loop in range(8)],
                "loss_per_loop": [1.0] * 8, "exit_distribution": [1 / loops] * loops,
                "num_tokens": 10, "num_bytes": 30,
            } | where
            for source in SOURCES
        ]  # fmt: skip
        restart = {"kind": "event", "event": "source_restart", "source": "code", "epoch": step}
        records += [restart | where, {"kind": "event", "event": "stage_end"} | where]
    records += [
        {"kind": "baseline", "source": source, "unigram_bits_per_byte": 5.0 + place,
         "bigram_bits_per_byte": 4.0 + place, "tokens": tokens}
        for place, source in enumerate(SOURCES)
    ]  # fmt: skip
    return [*records, {"kind": "event", "event": "finished"} | where]


def write_log(workdir, records) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (workdir / "metrics.jsonl").write_text(lines)


def write_times(workdir) -> None:
    """Two attempts: 100 s of steps in each stage, half of the last stage's to be trained again."""
    seconds = dict.fromkeys(PARTS, 0.0) | {"step": 100.0, "compile": 20.0, "data": 5.0}
    lines = [{"kind": "attempt", "time": 1e9, "stage": STAGES[0][0], "step": 0}]
    for place, (stage, _) in enumerate(STAGES):
        lines += [{"kind": "window", "time": 1e9 + 125 * (place + 1), "stage": stage,
                   "step": 6 * place + 6, "steps": 6, "seconds": seconds}]  # fmt: skip
    lines += [{"kind": "attempt", "time": 1e9 + 425, "stage": STAGES[-1][0], "step": 15}]
    (workdir / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Tags, attributes, text per tag, and whether every element is closed."""

    VOID = ("meta", "path", "use", "br")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    workdir = tmp_path_factory.mktemp("run")
    write_log(workdir, synthetic_records())
    (workdir / "samples.json").write_text(json.dumps([SAMPLE]))
    write_times(workdir)
    return write_report(workdir).read_text()


def test_nothing_comes_from_outside(html):
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_what_the_run_wrote_is_text_and_no_markup(html):
    page = Page(html)
    assert not any(tag in ("script", "b") for tag, _ in page.tags)
    assert "".join([SAMPLE["prompt"], *SAMPLE["tokens"]]) in page.text
    assert SOURCES[1] in page.text


def test_every_token_has_its_depth(html):
    tokens = [a for tag, a in Page(html).tags if (a.get("class") or "").startswith("token ")]
    assert [token["class"] for token in tokens] == [f"token loop-{n}" for n in SAMPLE["depths"]]
    assert [token["title"] for token in tokens] == [
        f"left after loop {n} of 4" for n in SAMPLE["depths"]
    ]


def test_tables_hold_the_records(html):
    tables = Page(html).tables
    last, *earlier, timeline = tables
    assert len(earlier) == len(STAGES) - 1 and len(timeline) == 1 + 3 * len(STAGES) + 1
    assert timeline[2][1] == "code has run out and starts again: epoch 6"
    assert last[0] == ["source", *(f"loop {n}" for n in range(1, 9)), "unigram", "bigram"]
    for row, source, place in zip(last[1:3], SOURCES, range(2), strict=True):
        measured = [f"{bits(source, 'gate', loop):.3f}" for loop in range(8)]
        assert row == [source, *measured, f"{5 + place:.3f}", f"{4 + place:.3f}"]
    mean = sum(bits(source, "gate", 3) for source in SOURCES) / 2
    assert last[3][4] == f"{mean:.3f}" and last[3][-2:] == ["5.500", "4.500"]
    assert earlier[0][1][1] == f"{bits('code', 'stable_1a', 0):.3f}"


def test_every_plot_is_there_in_both_widths_with_its_own_ids(html):
    page = Page(html)
    drawings = [attributes["class"] for tag, attributes in page.tags if tag == "svg"]
    assert drawings == ["wide", "narrow"] * len(PLOTS)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert ids and len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', html))
    assert used <= set(ids)
    for plot in PLOTS:
        assert plot.look_for in page.text
    for stage, _ in STAGES:
        assert stage in html


def test_the_page_says_where_the_time_went(html):
    text = Page(html).text
    # 250 of 425 s: three stages of 100 s in steps, half of the last trained again, 50 s stopped.
    assert "58.8 %" in text and "of 7.08 min in steps that count" in text
    bars = html[html.index("Where the time went") :]
    for part in (*PARTS, *LOST_PARTS, "whole run", "2.08 min", "2.92 min", "share of wall time"):
        assert f">{part}</text>" in bars
    assert "100 % = TPU v5e data sheet" in html


def test_colours_follow_the_theme(html):
    assert "#0a0b0" not in html and "#0b0c0" not in html and "var(--loop-8)" in html
    assert "prefers-color-scheme: dark" in html


def test_a_run_that_just_began_says_what_is_missing(tmp_path):
    write_log(tmp_path, synthetic_records()[:1])
    text = Page(write_report(tmp_path).read_text()).text
    assert "not finished" in text and "in stable_1a, 0 of 1 stages done" in text
    assert "No held-out text was measured yet." in text and "No samples were written" in text
    assert text.count("Left out: no training steps were logged yet.") == NUM_TRAIN_PLOTS
    assert text.count("Left out: no times were logged yet.") == 2
    assert "Left out: this run wrote no events." in text and "Goodput" not in text


def test_nulls_and_a_single_step_still_draw(tmp_path):
    records = synthetic_records()[:2]
    records[1] |= {"loss_per_loop": [None] * 8, "mean_depth": None}
    write_log(tmp_path, records)
    assert write_report(tmp_path).read_text().count("<svg") == 2 * NUM_TRAIN_PLOTS


def test_steps_at_drawn_depths_draw_the_loops_that_they_ran():
    records = synthetic_records()
    first = [record for record in records if record["kind"] == "train"][:6]
    for record in first[::2]:
        record["loss_per_loop"], record["exit_distribution"] = [3.0, 2.0], [0.25, 0.75]
    run = sort_records(records)
    lines = plots.loss_per_loop(run, plots.WIDE).axes[0].lines
    drawn = {line.get_label(): len(line.get_xdata()) for line in lines[:8]}
    assert drawn["loop 2"] == 6 and drawn["loop 3"] == drawn["loop 8"] == 3
    assert np.isfinite(lines[7].get_ydata()).all()
    shares = plots.exit_distribution(run, plots.WIDE).axes[0].collections[7].get_paths()[0]
    assert shares.vertices[:, 1].min() > 0.5 and shares.vertices[:, 1].max() == pytest.approx(1)
    depth = plots.mean_depth(run, plots.WIDE).axes[0].collections[0]
    assert depth.get_segments()[0][0][1] == 8


def test_an_empty_log_and_a_broken_side_file_are_named(tmp_path):
    write_log(tmp_path, [])
    with pytest.raises(ConfigError, match="no stage has begun"):
        write_report(tmp_path)
    write_log(tmp_path, synthetic_records()[:1])
    (tmp_path / "samples.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"samples\.json: not JSON"):
        write_report(tmp_path)
