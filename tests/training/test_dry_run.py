"""What the dry run prints, against hand numbers; it needs no data and is quick."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_jax.cli.train import curriculum_tables
from ouro_jax.config import Config, DataConfig, ModelConfig, Stage, from_config_dict
from ouro_jax.data.folder import Folder
from ouro_jax.data.rows import Manifest, write_manifest
from ouro_jax.training.dry_run import contributions, describe

CONFIGS = Path(__file__).parents[2] / "configs"


def paper_config(name: str) -> Config:
    return from_config_dict(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())


def test_the_description_adds_up():
    config = paper_config("ouro_2p6b")
    table = {row["stage"]: row for row in describe(config)}
    assert "stable_1a" not in table and len(table) == 6
    row = table["stable_1b"]
    assert row["tokens"] == row["steps"] * 8 * 2**20 and row["parameters"] == 2_667_974_657
    assert row["checkpoints"] == 31  # permanent ones: 3T tokens and a bit, every 100B
    # 48 layers × 4 loops and 4 heads; 6 FLOPs per multiply-add, attention over 2048.5 positions.
    layer = 2048 * (4 * 2048 + 3 * 5632) + 2 * 16 * 128 * (4096 + 1) // 2
    assert row["flops"] == row["tokens"] * 6 * (192 * layer + 4 * 2048 * 49_152)
    gate = table["gate"]
    assert gate["flops"] == gate["tokens"] * 2 * (192 * layer + 4 * 2048 * 49_152)


def test_the_paper_uses_what_its_table_3_says():
    """Shares × the tokens of the stages give the tokens used, to the 1 % of their digits."""
    used = {
        source: tokens
        for source, (_, tokens) in runpy.run_path(str(CONFIGS / "data" / "mixtures.py"))[
            "TABLE_3"
        ].items()
    }
    given = dict.fromkeys(used, 0.0)
    config = paper_config("ouro_1p4b")
    for name in ("stable_1a", "stable_1b", "anneal", "long_context"):
        for part in contributions(config, name):
            given[part.source] = given.get(part.source, 0.0) + part.tokens / 1e9
    given["instruction_mix"] = contributions(config, "mid_training")[0].tokens / 1e9
    for source, tokens in used.items():
        assert given[source] == pytest.approx(tokens, rel=0.01)
    # Section 4.2: 30B tokens of stage 1 and 180B of stage 2 again.
    again = {part.source: part.tokens / 1e9 for part in contributions(config, "mid_training")}
    stage_1 = sum(again[source] for source in config.stages["stable_1a"].mixture if source in again)
    stage_2 = sum(again[source] for source in config.stages["anneal"].mixture)
    assert (stage_1, stage_2) == pytest.approx((30, 180), rel=1e-3)
    assert not {"map_cc", "ultra_fineweb_zh"} & set(again)


def stand_in(root: Path, source: str, length: int, rows: int) -> None:
    """A stand-in: what a source says it holds, without its rows."""
    manifest = Manifest(
        source=source, sequence_length=length, vocab_size=49_152, tokenizer_hash="", dtype="uint16",
        has_loss_mask=False, documents=rows, text_bytes=0, truncated=0, dropped=0, skipped=0,
        tokens=rows * length, rows=rows, inputs="", shards=(),
    )  # fmt: skip
    write_manifest(Folder(root / source / f"train-{length}"), manifest)


MODEL = ModelConfig(64, 8, 8, 1, 1, 1, 8)
STAGE = Stage(
    tokens=4000, sequence_length=10, batch_tokens=100, num_layers=1, num_loops=1,
    mixture={"code": 0.75, "math": 0.25}, learning_rate=1.0,
)  # fmt: skip


def config_of(root: Path) -> Config:
    return Config(
        name="by_hand",
        model=MODEL,
        stages={
            "stable_1a": STAGE,
            "stable_1b": dataclasses.replace(STAGE, tokens=8000, max_epochs=1.5),
            "anneal": dataclasses.replace(STAGE, sequence_length=20, mixture={"math": 1.0}),
        },
        data=DataConfig(root=str(root), source_tokens={"code": 9000, "math": 10}),
    )


def test_contributions_and_epochs_by_hand(tmp_path):
    stand_in(tmp_path, "math", 10, rows=150)
    stages = describe(config_of(tmp_path))
    found = {
        (stage["stage"], part["source"]): tuple(part.values())[2:]
        for stage in stages for part in stage["sources"]
    }  # fmt: skip
    assert found == {
        # 400 rows: code is expected to hold 9,000 tokens, math has 150 rows of 10 tokens.
        ("stable_1a", "code"): (300, 3000, 9000, 3000 / 9000),
        ("stable_1a", "math"): (100, 1000, 1500, 1000 / 1500),
        # 800 rows more.
        ("stable_1b", "code"): (600, 6000, 9000, 1.0),
        ("stable_1b", "math"): (200, 2000, 1500, 2.0),
        # Rows of 20 tokens are others: 200 of them, and the config expects 10 tokens.
        ("anneal", "math"): (200, 4000, 10, 400.0),
    }
    unknown = dataclasses.replace(config_of(tmp_path), data=DataConfig(root=str(tmp_path)))
    (_, code) = contributions(unknown, "anneal")[0], contributions(unknown, "stable_1b")[0]
    assert (code.tokens_available, code.epochs) == (None, None)


def test_the_printed_table(tmp_path):
    stand_in(tmp_path, "math", 10, rows=150)
    config = config_of(tmp_path)
    table = curriculum_tables(config, describe(config))[-1]
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows == [
        ("stable_1a", "code", "75.0", "300", "3,000", "9,000", "0.333"),
        ("", "math", "25.0", "100", "1,000", "1,500", "0.667"),
        ("stable_1b", "code", "75.0", "600", "6,000", "9,000", "1.000"),
        ("", "math", "25.0", "200", "2,000", "1,500", "2.000 > 1.5"),
        ("anneal", "math", "100.0", "200", "4,000", "10", "400.000"),
    ]


def test_the_paper_config_against_stand_ins(tmp_path):
    """`ouro train --dry_run` on manifests without shards, in a process of its own."""
    stand_in(tmp_path, "nemotron_cc", 4096, rows=6386 * 10**9 // 4096)
    stand_in(tmp_path, "map_cc", 4096, rows=10**8)
    result = subprocess.run(
        [sys.executable, "-m", "ouro_jax.cli.train", f"--config={CONFIGS}/ouro_1p4b.py",
         "--dry_run", "--json", f"--config.data.root={tmp_path}"],
        capture_output=True, text=True, check=True, cwd=CONFIGS.parent,
    )  # fmt: skip
    stages = {
        stage["stage"]: stage for stage in json.loads(result.stdout.splitlines()[-1])["stages"]
    }
    parts = {part["source"]: part for part in stages["stable_1b"]["sources"]}
    # 73.4 % of 6T tokens in 6386B; 13 % of 6T tokens in 10^8 rows of 4,096.
    assert parts["nemotron_cc"]["epochs"] == pytest.approx(0.734 * 6000 / 6386, rel=1e-5)
    assert parts["map_cc"]["epochs"] == pytest.approx(780e9 / 409.6e9, rel=1e-5)
    assert parts["map_cc"]["tokens_available"] == 409_600_000_000
    assert "409,600,000,000 │         1.904 │" in result.stdout
    assert "?" in result.stdout  # nobody says what the high-quality part of Nemotron-CC holds


def test_the_dry_run_loads_neither_jax_nor_grain():
    code = "import sys, ouro_jax.cli.train; print(*{'jax', 'grain', 'optax'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
