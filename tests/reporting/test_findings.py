"""One page of whatever lies in a folder: what is found, what is said of it, what is missing."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import studied

from ouro_jax.errors import ConfigError
from ouro_jax.experiments.depth import run_depth
from ouro_jax.experiments.exits import run_exits
from ouro_jax.experiments.kv import PAPER
from ouro_jax.reporting.depth import draw_depth
from ouro_jax.reporting.findings import find, write_findings

FINDINGS = Path(__file__).parents[2] / "docs" / "findings"
EXPERIMENT = {"name": "mano", "protocol": "small", "axis": "", "main_set": "mano",
              "published": [{"layers": 2, "exact": 1 - 0.649}],
              "differences": ["<smaller>"]}  # fmt: skip


def write(file, *records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder, bits):
    place = {"stage": "sft", "step": 3, "tokens": 30, "time": 0}
    heldout = {"kind": "heldout", **place, "source": "code", "trained_loops": 2, "mean_depth": 1.5,
               "loss_per_loop": [3.0, 2.0], "bits_per_byte_per_loop": [bits + 1, bits]}  # fmt: skip
    write(folder / "metrics.jsonl", heldout, {"kind": "event", "event": "finished", **place})


def write_experiment(folder):
    write(folder / "experiment.json", EXPERIMENT)
    (folder / "results.jsonl").write_text((FINDINGS / "mano_small.jsonl").read_text())
    (folder / "report.html").write_text("")


def write_sweep(folder):
    rows = [{"run": "a", "status": "finished", "bits_per_byte": 2.5},
            {"run": "b", "status": "finished", "bits_per_byte": 2.25},
            {"run": "c", "status": "unfinished", "bits_per_byte": 1.0}]  # fmt: skip
    for row in rows:
        write_run(folder / row["run"], row["bits_per_byte"])
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "results.csv").write_text("")


def told(findings):
    """Findings by name."""
    return {finding.name: finding for finding in findings}


def tables(page):
    """All tables of a page or sections, as rows of plain texts."""
    found = []
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        found.append([[unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in cells])
    return found


def test_whatever_lies_there_is_found_and_parts_of_it_are_not_listed(tmp_path):
    write_run(tmp_path / "tiny", 1.25)
    write_experiment(tmp_path / "more" / "mano")
    write_run(tmp_path / "more" / "mano" / "seed=0", 1.0)
    write_sweep(tmp_path / "rates")
    write(tmp_path / "a" / "b" / "c" / "depth.jsonl")  # three levels down
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text("no json\n")
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "kv.jsonl")
    found = find(tmp_path)
    assert [(f.kind, f.name) for f in found] == [
        ("experiment", "more/mano"), ("sweep", "rates"), ("training run", "bad"),
        ("training run", "tiny"),
    ]  # fmt: skip
    by_name = told(found)
    for name, state, headline in (
        ("tiny", "finished", "1.2500 bits per byte"),
        ("rates", "2 of 3 runs finished", "best: b, 2.2500"),
        ("bad", "cannot be read", "line 1: not JSON"),
    ):
        assert by_name[name].state == state and headline in by_name[name].headline
    mano = by_name["more/mano"]
    # docs/experiments.md has these numbers, from its own look at the records.
    assert mano.state == "9 runs evaluated"
    for text in ("1x4 0.897 (looped)", "1x1 0.356 (iso-parameter)", "4x1 0.854", "chance 0.280"):
        assert text in mano.headline
    # Of the sweep itself, the runs are what there is to see.
    assert [f.name for f in find(tmp_path / "rates")] == ["rates", "a", "b", "c"]


def test_the_page_leads_to_each_thing(tmp_path):
    write_experiment(tmp_path / "mano & <more>")
    write_run(tmp_path / "tiny", 1.25)
    path, found = write_findings(tmp_path)
    page = path.read_text()
    assert path == tmp_path / "report.html" and len(found) == 2
    assert [row[:2] for row in tables(page)[0][1:]] == [
        ["mano & <more>", "experiment"], ["tiny", "training run"]
    ]  # fmt: skip
    targets = re.findall(r'<a href="#([^"]*)"', page)
    assert targets == re.findall(r'<article id="([^"]*)"', page) and len(targets) == 1
    assert 'href="mano%20%26%20%3Cmore%3E/report.html"' in page
    assert "<more>" not in page and "&lt;smaller&gt;" in page and page.count("<svg") == 4
    assert ["2", "0.351"] in tables(page)[-1]  # the paper's, rounded
    # Written over itself, it is no part of what it gathers.
    assert len(write_findings(tmp_path)[1]) == 2


def test_an_experiment_that_has_begun_says_so(tmp_path):
    write(tmp_path / "mano" / "experiment.json", EXPERIMENT)
    write_run(tmp_path / "mano" / "seed=0", 1.0)
    (finding,) = find(tmp_path)
    assert finding.state == "no run evaluated, 1 begun"
    assert "No run is finished yet" in "".join(finding.sections)


def test_studies_as_they_write_them(tmp_path):
    subject, heldout = studied.subject(), studied.heldout()
    depth = run_depth(subject, heldout, tmp_path / "depth" / "depth.jsonl", num_loops=4)
    draw_depth(depth, tmp_path / "depth" / "depth.png")
    exits = run_exits([subject], heldout, tmp_path / "exit" / "exits.jsonl")
    page = write_findings(tmp_path)[0].read_text()
    overview, losses, accuracies, of_exits = tables(page)
    assert [row[0] for row in overview[1:]] == ["depth: depth", "exit: exit"]
    assert losses[1][:3] == ["random", "a", "4"]
    assert losses[1][3:] == [f"{value:.3f}" for value in depth[0]["bits_per_byte_per_loop"]]
    assert accuracies[2][3:] == [f"{value:.3f}" for value in depth[1]["accuracy_per_loop"]]
    assert of_exits[1][1:4] == ["all loops", "4", "4.00"]
    full = next(r for r in exits if r["kind"] == "exits")["points"][-1]
    for row in of_exits[2:]:
        assert float(row[4]) <= full["loss"] * 1.01 + 5e-4
    # One picture was drawn; two of the exits were not.
    assert page.count("data:image/png;base64,") == 1 and page.count("There is no ") == 2
    assert "img-src data:" in page


def test_exit_rules_are_compared_at_almost_no_loss(tmp_path):
    def curve(rule, *points):
        points = [{"value": v, "mean_depth": d, "loss": loss, "accuracy": 0.5, "flops": d / 4}
                  for v, d, loss in points]  # fmt: skip
        return {"kind": "exits", "checkpoint": "gate", "rule": rule, "points": points}

    curves = [
        curve("static", (1, 1.0, 3.0), (2, 2.0, 2.05), (4, 4.0, 2.0)),
        curve("q", (0.2, 1.5, 2.5), (0.5, 2.5, 2.02), (0.9, 3.5, 2.0)),
        curve("hidden", (7.0, 1.0, 2.5)),
    ]
    write(tmp_path / "exits.jsonl", *curves)
    assert find(tmp_path)[0].state == "not finished"
    expected = {"kind": "expected", "checkpoint": "gate", "realised": 2.02, "realised_depth": 2.5}
    write(tmp_path / "exits.jsonl", *curves, expected)
    (finding,) = find(tmp_path)
    assert finding.headline == "gate, Q-exit at 0.5: 2.020 nats at 2.50 loops; all 4: 2.000"
    assert [row[1:5] for row in tables("".join(finding.sections))[0][1:]] == [
        ["all loops", "4", "4.00", "2.000"], ["fixed depth", "4", "4.00", "2.000"],
        ["Q-exit", "0.5", "2.50", "2.020"], ["hidden difference", "–", "–", "–"],
    ]  # fmt: skip


def test_studies_beside_the_papers_numbers(tmp_path):
    matrix = [[100, 50, 40, 30], [50, 100, 70, 60], [40, 70, 100, 80], [30, 60, 80, 100]]
    old, new = (
        {"kind": "agreement", "checkpoint": "gate", "questions": "pairs", "num_prompts": count,
         "trained_loops": 4, "matrix": matrix} for count in (1000, 100)
    )  # fmt: skip
    write(tmp_path / "f" / "faithfulness.jsonl", old, new)
    write(tmp_path / "l" / "scaling_law.jsonl",
          {"kind": "scaling_law", "trained_loops": None, "r2": 0.5},
          {"kind": "scaling_law", "trained_loops": 4, "r2": 0.25},
          {"kind": "scaling_weights", "r2": 0.125})  # fmt: skip
    answers = {"kind": "kv", "checkpoint": "gate", "exit": None, "exact_match": None, "memory": 1,
               "nats_per_token": 2.0, "mean_depth": 4.0, "tokens_in_common": 3.0}  # fmt: skip
    write(tmp_path / "kv" / "kv.jsonl",
          answers | {"kv": "full", "equal_answers": 1.0, "paper": PAPER["full"]},
          answers | {"kv": "last", "equal_answers": 0.25, "paper": PAPER["last"]})  # fmt: skip
    run = {"kind": "safety_run", "model": "tiny", "mode": "base", "judges_harm": False}
    write(tmp_path / "s" / "safety.jsonl", run)
    found = told(find(tmp_path))
    faithful, law, safety = (found[n] for n in ("f: faithfulness", "l: scaling_law", "s: safety"))
    assert "agree on 60.0% of 100 (paper 36.1%)" in faithful.headline
    assert ["2 and 3", "70.0%", "55.1%"] in tables("".join(faithful.sections))[0]
    assert tables("".join(law.sections))[0][1:] == [
        ["total loss", "0.5000", "0.9596"], ["step-wise, T = 4", "0.2500", "0.8146"],
        ["total loss from the step-wise ones", "0.1250", "0.9610"],
    ]  # fmt: skip
    assert found["kv: kv"].headline == "gate, answers as with the full cache: last 25.0%"
    assert tables("".join(found["kv: kv"].sections))[0][2][-2:] == ["78.85", "80.40"]
    assert safety.state == "not finished"
    depths = [
        {"depth": depth, "mean_score": score, "harmful_rate": rate}
        for depth, score, rate in ((1, 4.0, 0.5), (2, None, None), (8, 2.0, 0.125))
    ]
    write(tmp_path / "s" / "safety.jsonl", run, {"kind": "safety_summary", "by_depth": depths})
    safety = told(find(tmp_path))["s: safety"]
    assert safety.headline == (
        "tiny (base), harmful: 50.0% after 1, 12.5% after 8; a stand-in judged, not harm"
    )
    assert ["2", "–", "–"] in tables("".join(safety.sections))[0]


def test_nothing_to_report_says_what_was_looked_for(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(ConfigError) as error:
            find(folder)
        for text in ("metrics.jsonl", "experiment.json", "depth.jsonl", "ouro train", str(folder)):
            assert text in str(error.value)
