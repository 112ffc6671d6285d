"""Writes one self-contained page of plots, tables and samples: of a run, or of all in a folder.

  ouro report --workdir=runs/tiny
  ouro report --workdir=runs/mine --prompt='Once upon' --exit=q:0.5 --max_new_tokens=100
  ouro report --workdir=runs

Writes WORKDIR/report.html from metrics.jsonl, config.json and the newest checkpoint, which
continues the prompts; a run that is still going may be reported on. Prints the held-out table too.

Of a folder that is no run itself, WORKDIR/report.html gathers what lies in it, up to two levels
down: a table of all experiments, studies, sweeps and runs, then the experiments and studies one by
one, beside the paper's numbers. An experiment's own folder gets its own page again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.errors import ConfigError

flags.DEFINE_string("workdir", "", "Folder of the run, or of several.")
flags.DEFINE_multi_string(
    "prompt", ["def main(", "The function returns", "import "], "Text for the samples to continue."
)
flags.DEFINE_string("exit", "q:0.5", "Exit rule of the samples.")
flags.DEFINE_integer("max_new_tokens", 64, "Tokens of each sample.")


def main() -> Mapping[str, Any]:
    """The verb."""
    workdir = required("workdir", "runs/tiny")
    # Loading matplotlib and jax takes seconds; a missing flag should not wait for them.
    from ouro_jax.reporting.report import write_report
    from ouro_jax.reporting.tables import heldout_table
    from ouro_jax.training.run_log import FILE_NAME, read_log

    if not (Path(workdir) / FILE_NAME).is_file():
        return gather(workdir)
    records = read_log(workdir)
    path = write_report(workdir, make_samples(workdir))
    Console().print(heldout_table(records))
    print(f"{path}: open it in a browser.")
    return {"workdir": workdir, "report": str(path)}


def gather(workdir: str) -> Mapping[str, Any]:
    """Writes the page of a folder that is no run: of the experiment that it is, or of all in it."""
    from ouro_jax.reporting import experiment
    from ouro_jax.reporting.findings import findings_table, write_findings

    if (Path(workdir) / experiment.DESCRIBED).is_file():
        written = experiment.write_report(Path(workdir))
        if not written:
            raise ConfigError(
                f"--workdir={workdir}: no run of this experiment is evaluated yet; go on with "
                "`ouro experiment`."
            )
        path, found = written[-1], []
    else:
        path, found = write_findings(workdir)
        Console().print(findings_table(found))
    print(f"{path}: open it in a browser.")
    return {
        "workdir": workdir, "report": str(path),
        "found": [{"kind": f.kind, "name": f.name, "state": f.state, "headline": f.headline}
                  for f in found],
    }  # fmt: skip


def make_samples(workdir: str) -> list[Any]:
    """What the run's newest checkpoint makes of the prompts; none before the first checkpoint."""
    from ouro_jax.cli.open_checkpoint import has_checkpoint, open_checkpoint
    from ouro_jax.data.tokenizer import encode, load_tokenizer
    from ouro_jax.inference.generate import generate
    from ouro_jax.inference.text import pieces, stop_ids

    if not has_checkpoint(workdir):
        return []
    checkpoint = open_checkpoint(workdir)
    tokenizer = load_tokenizer(Path(workdir) / "tokenizer.json")
    answer = generate(
        checkpoint.config, checkpoint.params, [encode(tokenizer, text) for text in FLAGS.prompt],
        FLAGS.max_new_tokens, temperature=0.7, top_p=0.9, exit=FLAGS.exit,
        stop_ids=stop_ids(tokenizer, None),
    )  # fmt: skip
    return [
        {
            "prompt": prompt,
            "tokens": pieces(tokenizer, tokens),
            "depths": depths,
            "num_loops": checkpoint.config.num_loops,
            "stage": checkpoint.name,
        }
        for prompt, tokens, depths in zip(FLAGS.prompt, answer.tokens, answer.depths, strict=True)
    ]


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
