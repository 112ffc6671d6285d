"""Measures a checkpoint on tasks, at as many depths as asked for.

  ouro eval --checkpoint=runs/tiny --tasks=local --loops=1,2,4
  ouro eval --checkpoint=downloads/Ouro-1.4B --tasks=arc_easy,gsm8k --num_fewshot=5 --limit=100
  ouro eval --checkpoint=downloads/Ouro-1.4B --tasks=paper_depth --loops=1,2,3,4,5,6,7,8 \\
      --output=runs/ouro_1p4b/eval.jsonl
  ouro eval --checkpoint=runs/tiny --tasks=local_arithmetic --exit=q:0.8 --kv=last --json
  ouro eval --checkpoint=downloads/Ouro-1.4B --tasks=gsm8k --num_fewshot=3 --kv=full,first,last,mean

--tasks names tasks of lm-evaluation-harness (its data comes from the Hugging Face hub), or suites:
`local` needs no download; `paper` has the settings of the paper's Table 16, `paper_depth` those of
its Tables 10 and 11, by depth. All of it takes pip install 'ouro_jax[eval]'. Likelihoods come from
a full forward that reads each token where --exit says; --kv is for generated tokens. --output gets
a line of JSON for each number, as soon as it is known, after those that are there.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.errors import ConfigError, require

flags.DEFINE_string("checkpoint", "", "Workdir, stage folder or Hugging Face folder.")
flags.DEFINE_string("tasks", "", "Tasks and suites, with commas: local, paper, arc_easy, …")
flags.DEFINE_string("loops", None, "Depths to measure, with commas: 1,2,4; unset: as trained.")
flags.DEFINE_string(
    "exit", None, "static:2, q:0.8, hidden:0.05, confidence:0.9 or lookahead:0.8; unset: all loops."
)
flags.DEFINE_string(
    "kv", "full", "KV policies of generation, with commas: full, exited, last, first, mean."
)
flags.DEFINE_integer("limit", None, "Examples of each task at most; unset: all.")
flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt; unset: what the task says, or 0.")
flags.DEFINE_string("output", None, "JSONL file that gets the results too.")

Record = dict[str, Any]


def main() -> Mapping[str, Any]:
    """The verb."""
    path = required("checkpoint", "runs/tiny")
    names = _words(required("tasks", "local"))
    depths = _depths()
    require(FLAGS.limit is None or FLAGS.limit >= 1, "limit", FLAGS.limit, "at least 1")
    shots = FLAGS.num_fewshot
    require(shots is None or shots >= 0, "num_fewshot", shots, "0 or more")
    if FLAGS.output and not Path(FLAGS.output).absolute().parent.is_dir():
        raise ConfigError(f"--output={FLAGS.output}: there is no folder to write it into.")
    records = []
    for record in _harness_records(path, names, depths):
        records.append(record | {"checkpoint": path})
        if FLAGS.output:
            with open(FLAGS.output, "a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    Console().print(results_table(records))
    return {"checkpoint": path, "results": records}


def _harness_records(
    path: str, names: Sequence[str], depths: Sequence[int] | None
) -> Iterator[Record]:
    """What lm-evaluation-harness measures, depth by depth and task by task."""
    # Loading jax, Orbax and the harness takes seconds; a wrong flag should not wait for them.
    from ouro_jax.experiments.benchmarks import find_benchmarks, run_benchmark
    from ouro_jax.experiments.harness import HarnessLM

    checkpoint, tokenizer = _open(path)
    depths = [checkpoint.config.num_loops] if depths is None else depths
    models = [
        HarnessLM(
            checkpoint.config, checkpoint.params, tokenizer, loops=loops, exit=FLAGS.exit,
            kv=kv,
        )
        for kv in _words(FLAGS.kv) or [""]
        for loops in depths
    ]  # fmt: skip
    _warn_beyond_training(checkpoint.config, max(depths))
    benchmarks = find_benchmarks(names, FLAGS.num_fewshot)
    for model in models:
        for benchmark in benchmarks:
            shots = benchmark.num_fewshot
            setting = "" if shots is None else f", {shots} examples in the prompt"
            doing = f"{benchmark.task}: loops {model.loops}, KV {model.kv}{setting}"
            print(doing, file=sys.stderr)
            yield from run_benchmark(model, benchmark, FLAGS.limit)


def _open(path: str) -> tuple[Any, Any]:
    """The checkpoint and its tokenizer."""
    from ouro_jax.cli.open_checkpoint import open_checkpoint
    from ouro_jax.data.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer_file is None:
        raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json beside it.")
    return checkpoint, load_tokenizer(checkpoint.tokenizer_file)


def _warn_beyond_training(config: Any, loops: int) -> None:
    from ouro_jax.inference.requests import beyond_training

    if warning := beyond_training(config, loops):
        print(warning, file=sys.stderr)


def _words(text: str) -> list[str]:
    """What stands between commas, each once, in its order."""
    return list(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def _depths() -> list[int] | None:
    """The numbers of --loops; None if it is unset."""
    if FLAGS.loops is None:
        return None
    words = _words(FLAGS.loops)
    valid = bool(words) and all(word.isdecimal() and int(word) >= 1 for word in words)
    require(valid, "loops", FLAGS.loops, "whole numbers from 1 on with commas, as in 1,2,4")
    return [int(word) for word in words]


def results_table(records: Sequence[Record]) -> Table:
    """A row for each task, metric and, of several, KV policy; a column for each number of loops."""
    several = len({record["kv"] for record in records}) > 1
    cells: dict[tuple[str, str, str], dict[int, str]] = {}

    def fill(record: Record, metric: str, text: str) -> None:
        metric += f", kv {record['kv']}" if several else ""
        cells.setdefault((record["task"], metric, f"{record['n']:,}"), {})[record["loops"]] = text

    for record in records:
        error = "" if record["stderr"] is None else f" ±{record['stderr']:.3f}"
        fill(record, record["metric"], f"{record['value']:.4g}{error}")
        if record["exit"] is not None:
            fill(record, "mean depth", f"{record['mean_depth']:.2f}")
    table = Table(title="by number of loops", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    depths = sorted({record["loops"] for record in records})
    for name in ("examples", *map(str, depths)):
        table.add_column(f" {name}", justify="right", no_wrap=True)
    for row, values in cells.items():
        table.add_row(*row, *(values.get(depth, "–") for depth in depths))
    return table


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
