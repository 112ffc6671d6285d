"""Tells whether a run fits a pod, what it costs and what bounds it; the pod need not be there.

  ouro plan --config=configs/ouro_1p4b.py --topology=v5p:4x4x4 --stage=stable_1b
  ouro plan --config=configs/ouro_1p4b.py --topology=v5e-256 --picture=stages.png
  ouro plan --config=configs/ouro_2p6b.py --topology=v6e:16x16 --stage=long_context --search
  ouro plan --config=configs/ouro_1p4b.py --topology=h100:4x8 --config.layout.gather=once
  ouro plan --config=configs/ouro_1p4b.py --topology=v5e:1x1 --program=decode --rows=8
  ouro plan --fit_table=docs/fit.md

Compiles the real train step of a stage at its full batch, or of every stage, for the topology; no
device is used. A program that does not fit is an answer, not a failure: the exit code is 0.
`prefill` and `decode` run on one chip. What was compiled is kept in --cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ouro_jax.cli.common import FLAGS, config_from_flags, define_config, required, run_verb
from ouro_jax.config import Config
from ouro_jax.errors import ConfigError, require, require_choice
from ouro_jax.planning.topologies import Topology, parse_topology

define_config()
flags.DEFINE_string("topology", "", "Chips: v5e:16x16, v5p:4x4x4, v6e-256, h100:8, h200:4x8.")
flags.DEFINE_integer("num_slices", 1, "Slices of that topology, joined by the data-center network.")
flags.DEFINE_string("stage", "", "One stage; every stage if not given.")
flags.DEFINE_string("program", "train", "train, prefill or decode.")
flags.DEFINE_integer("rows", 1, "Rows of prefill and decode, each as long as the stage's.")
flags.DEFINE_bool("search", False, "Compile several layouts and rank them; needs --stage.")
flags.DEFINE_integer("compile_limit", 6, "Layouts that --search compiles at most.")
flags.DEFINE_string("dump_hlo", "", "File for the text of the compiled program.")
flags.DEFINE_string("picture", "", "File for a picture of what bounds each row, .png or .svg.")
flags.DEFINE_string("fit_table", "", "File for the table of both models' stages on four pods.")
flags.DEFINE_string("cache", "~/.cache/ouro_jax/plan", "Folder that keeps what was compiled.")


def main() -> Mapping[str, Any]:
    """The verb."""
    cache = Path(FLAGS.cache).expanduser()
    if FLAGS.fit_table:
        from ouro_jax.planning.fit_table import write_fit_table

        with _progress() as on_result:
            rows = write_fit_table(Path(FLAGS.fit_table), cache, on_result)
        return {"fit_table": FLAGS.fit_table, "rows": rows}
    config = config_from_flags()
    named = required("topology", "v5p:4x4x4")
    topology = parse_topology(named, FLAGS.num_slices)
    _check_flags(config)
    if ":" not in named:
        Console().print(f"{named} is {topology.name}: {topology.num_chips} chips.")
    # Loading jax takes seconds; a wrong flag should not wait for it.
    with _progress() as on_result:
        rows = _rows(config, topology, cache, on_result)
    _show(config, topology, rows)
    if FLAGS.dump_hlo:
        _dump(rows[0], cache)
    public = [{key: value for key, value in row.items() if key != "request"} for row in rows]
    if FLAGS.search:
        return public[0] | {"layouts": public}
    return public[0] if len(public) == 1 else {"topology": topology.name, "stages": public}


def _check_flags(config: Config) -> None:
    require_choice(FLAGS.program, ("train", "prefill", "decode"), "--program")
    if FLAGS.stage:
        require_choice(FLAGS.stage, config.stages, "--stage")
    require(FLAGS.rows >= 1, "--rows", FLAGS.rows, "at least 1")
    require(FLAGS.compile_limit >= 1, "--compile_limit", FLAGS.compile_limit, "at least 1")
    for flag in ("search", "dump_hlo"):
        if FLAGS[flag].value and not FLAGS.stage:
            raise ConfigError(f"--{flag} is for one stage: name it, e.g. --stage=stable_1b")
    if FLAGS.search and FLAGS.program != "train":
        raise ConfigError(f"--search is for training: --program={FLAGS.program} has no layouts.")


def _rows(config: Config, topology: Topology, cache: Path, on_result: Any) -> list[dict[str, Any]]:
    from ouro_jax.planning.search import Job, plan_answer, plan_jobs, search

    names = [FLAGS.stage] if FLAGS.stage else [name for name, _ in config.stream()]
    if FLAGS.program != "train":
        job = Job(config, names[-1], topology)
        return [plan_answer(job, FLAGS.program, FLAGS.rows, cache, on_result)]
    if FLAGS.search:
        return search(Job(config, FLAGS.stage, topology), cache, FLAGS.compile_limit, on_result)
    jobs = [Job(config, name, topology) for name in names]
    return plan_jobs(jobs, cache, 1, on_result)


def _show(config: Config, topology: Topology, rows: list[dict[str, Any]]) -> None:
    from ouro_jax.planning.picture import draw_bars
    from ouro_jax.planning.search import Job, flags_of, suggestions
    from ouro_jax.planning.show import details, layout_text, overview, verdict

    # Wide enough for a layout in one line; a narrower terminal wraps, nothing is cut.
    console = Console(width=160, soft_wrap=True, highlight=False)
    title = f"{config.name} on {topology.name} ({topology.num_chips} chips)"
    if len(rows) > 1:
        console.print(overview(rows, title))
    for row in rows if len(rows) == 1 or not FLAGS.search else rows[:1]:
        if len(rows) == 1 or not row["fits"]:
            console.print(verdict(row))
        if len(rows) == 1 and row["fits"]:
            console.print(*details(row), sep="\n")
        if row["program"] == "train" and not row["fits"]:
            refused = row["request"].layout
            proposed = suggestions(Job(config, row["stage"], topology), refused)
            for layout in proposed:
                console.print(f"By estimate this fits: {flags_of(layout)}")
            if not proposed:
                console.print("By estimate no layout fits: it takes more chips, or larger ones.")
    if FLAGS.search and rows[0]["fits"]:
        console.print(f"Best: {flags_of(rows[0]['request'].layout)}")
    if FLAGS.picture:
        labels = [layout_text(row) if FLAGS.search else row["stage"] for row in rows]
        draw_bars(rows, labels, title, Path(FLAGS.picture))


def _dump(row: Mapping[str, Any], cache: Path) -> None:
    from ouro_jax.planning.compile import program_text

    if row["fits"]:
        Path(FLAGS.dump_hlo).write_text(program_text(row["request"], cache))
    else:
        print(f"{FLAGS.dump_hlo} is not written: there is no program.")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yields `show(done, total)`: programs compiled, on stderr."""
    columns = (
        TextColumn("compiling"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
