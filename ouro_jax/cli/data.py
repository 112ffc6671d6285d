"""Prepares text for training, verifies and shows what was prepared.

  ouro data tokenizer --input='texts/**/*.txt' --format=text --vocab_size=8192 \\
      --output=data/tokenizer.json
  ouro data clean --input='raw/**/*.jsonl' --against='evals/*.jsonl' --output=clean
  ouro data prepare --input='texts/**/*.txt' --format=text --tokenizer=data/tokenizer.json \\
      --sequence_length=4096 --split=train --output=data/mytext/train-4096
  ouro data prepare --input='texts/**/*.txt' --format=text --tokenizer=data/tokenizer.json \\
      --sequence_length=4096 --split=heldout --output=data/mytext/heldout-4096
  ouro data prepare --input='chats/*.jsonl.zst' --schema=messages --tokenizer=data/tokenizer.json \\
      --sequence_length=4096 --output=data/mychats/train-4096
  ouro data verify data/mytext/train-4096
  ouro data inspect data/mytext/train-4096 --rows=3 --plot=lengths.png
  ouro data inspect --config=configs/tiny.py --stage=anneal --rows=1000

A config with `data.root = "data"` and a mixture with the source `mytext` trains on it. A command
that was killed is continued by repeating it. On more than one machine: `--beam='--runner=…'`.
"""

import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from rich.console import Console

from ouro_jax.cli.common import FLAGS, config_from_flags, define_config, required, run_verb
from ouro_jax.cli.data_progress import preparation_note, show_progress
from ouro_jax.errors import ConfigError, require, require_choice

flags.DEFINE_string("input", "", "Files to read: a path or a pattern, ** goes into folders.")
flags.DEFINE_string(
    "format", "jsonl",
    "jsonl (a document per line; .gz and .zst too), text (one per file), parquet, or datasets (a "
    "folder written by save_to_disk of Hugging Face datasets).",
)  # fmt: skip
flags.DEFINE_string(
    "schema", "text",
    "What a record is: text, messages (a conversation) or question_answer (question, answer and "
    "perhaps thought).",
)  # fmt: skip
flags.DEFINE_string(
    "field", "", "The field of a record that holds the text (text) or the messages (messages)."
)
flags.DEFINE_string("tokenizer", "", "A tokenizer.json in the Hugging Face format.")
flags.DEFINE_integer("sequence_length", 4096, "Tokens in a row.")
flags.DEFINE_integer("vocab_size", 8192, "Entries of the tokenizer to train.")
flags.DEFINE_string(
    "split", "all", "all documents, train (19 of 20, by a hash of the text) or heldout (the rest)."
)
flags.DEFINE_string("output", "", "What to write: a new folder, or a tokenizer.json.")
flags.DEFINE_integer("workers", 0, "Processes; 0: one for every core.")
flags.DEFINE_integer(
    "shard_bytes", 1 << 28, "Input bytes of a shard, the unit of work and of resuming."
)
flags.DEFINE_integer("skip_bad", 0, "Unreadable records to leave out before giving up.")
flags.DEFINE_string(
    "against", "", "JSONL files of evaluation sets: what shares 13 words in a row with one goes."
)
flags.DEFINE_float(
    "similarity", 0.8, "The least share of common five-word runs that makes near duplicates."
)
flags.DEFINE_string(
    "beam", "", "Prepare by Apache Beam; the value holds flags of its own, its runner for one."
)
flags.DEFINE_integer("rows", 2, "Rows to show, or of a stage's mixture to count.")
flags.DEFINE_string("plot", "", "Draw document lengths into this file (.png, .svg, .pdf).")
flags.DEFINE_string("stage", "", "With --config: the stage whose mixture to count.")
flags.DEFINE_integer("first_row", 0, "With --config: the row of the stage to count from.")
define_config()


def main(action: str = "", directory: str = "") -> Mapping[str, Any]:
    """The verb: `action`, and for verify and inspect the folder of rows that came after it."""
    require_choice(action, ACTIONS, "ouro data")
    return ACTIONS[action](directory)


# The data libraries take a second to load, and a wrong flag should not wait for them: they are
# imported where they are used.


def _tokenizer(_: str) -> Mapping[str, Any]:
    from ouro_jax.data.prepare import prepare_tokenizer

    output = required("output", "data/tokenizer.json")
    prepare_tokenizer(
        required("input", "'texts/*.txt'"),
        corpus=_corpus(),
        vocab_size=FLAGS.vocab_size,
        output=output,
    )
    print(f"{output}: {FLAGS.vocab_size:,} entries")
    return {"output": output, "vocab_size": FLAGS.vocab_size}


def _prepare(_: str) -> Mapping[str, Any]:
    from ouro_jax.data.beam import prepare_with_beam
    from ouro_jax.data.prepare import plan_preparation, prepare

    preparation = plan_preparation(
        required("input", "'texts/*.jsonl'"),
        corpus=_corpus(),
        tokenizer=required("tokenizer", "data/tokenizer.json"),
        sequence_length=FLAGS.sequence_length,
        output=required("output", "data/mytext/train-4096"),
        split=FLAGS.split,
        shard_bytes=FLAGS.shard_bytes,
        skip_bad=FLAGS.skip_bad,
    )
    if FLAGS.beam:
        try:
            arguments = shlex.split(FLAGS.beam)
        except ValueError as error:
            raise ConfigError(f"--beam={FLAGS.beam}: {error}.") from error
        return _described(prepare_with_beam(preparation, arguments))
    with show_progress() as show:
        manifest = prepare(preparation, _workers(), preparation_note(show))
    return _described(manifest)


def _clean(_: str) -> Mapping[str, Any]:
    from ouro_jax.data.clean import clean, describe_report
    from ouro_jax.data.clean_plan import plan_cleaning

    cleaning = plan_cleaning(
        required("input", "'raw/**/*.jsonl'"),
        output=required("output", "clean"),
        corpus=_corpus(),
        against=FLAGS.against,
        similarity=FLAGS.similarity,
        skip_bad=FLAGS.skip_bad,
        part_bytes=FLAGS.shard_bytes,
    )
    with show_progress() as show:
        report = clean(cleaning, _workers(), show)
    print(describe_report(report))
    return report


def _verify(directory: str) -> Mapping[str, Any]:
    from ouro_jax.data.rows import read_manifest, verify_rows

    directory, done = _named(directory, "verify"), 0
    total = sum(shard.bytes for shard in read_manifest(directory).shards)
    with show_progress() as show:

        def advance(num_bytes: int, _: int) -> None:
            nonlocal done
            done += num_bytes
            show("verifying", done, total)

        manifest = verify_rows(directory, _workers(), advance)
    described = _described(manifest)
    print("all checksums, token ids and counts are right")
    return described


def _inspect(directory: str) -> Mapping[str, Any]:
    if FLAGS.config is not None:
        return _count_mixture()
    from ouro_jax.data.rows import open_rows
    from ouro_jax.reporting.data import draw_rows, sample_rows

    rows = open_rows(_named(directory, "inspect"))
    described = _described(rows.manifest)
    _show_rows(directory)
    if not FLAGS.plot:
        return described
    sample = sample_rows(rows)
    print(f"\n{draw_rows(sample, FLAGS.plot)}: lengths of {len(sample.lengths):,} documents")
    return {**described, "plot": FLAGS.plot, "sample": sample.describe()}


def _count_mixture() -> Mapping[str, Any]:
    """What each source gives to the next rows of a stage."""
    from ouro_jax.reporting.data import mixture_shares, shares_table
    from ouro_jax.training.curriculum import StagePlan
    from ouro_jax.training.stage_rows import open_stage_mixture
    from ouro_jax.training.trainer import prepare_data

    config = config_from_flags()
    require_choice(FLAGS.stage, config.stages, "stage")
    require(FLAGS.rows >= 1, "rows", FLAGS.rows, "at least 1")
    require(FLAGS.first_row >= 0, "first_row", FLAGS.first_row, "0 or more")
    plan = StagePlan(FLAGS.stage, config.stages[FLAGS.stage])
    mixture = open_stage_mixture(config, prepare_data(config), plan)
    shares = mixture_shares(mixture, FLAGS.first_row, FLAGS.rows)
    Console().print(shares_table(shares, FLAGS.first_row))
    return {"stage": FLAGS.stage, "sources": [share._asdict() for share in shares]}


def _corpus() -> Any:
    from ouro_jax.data.corpus import Corpus

    return Corpus(FLAGS.format, FLAGS.schema, FLAGS.field)


def _workers() -> int:
    from ouro_jax.data.workers import available_cores

    require(FLAGS.workers >= 0, "workers", FLAGS.workers, "0 (one for every core) or more")
    return FLAGS.workers or available_cores()


def _named(directory: str, action: str) -> str:
    if not directory:
        raise ConfigError(f"name the folder: ouro data {action} data/mytext/train-4096")
    return directory


def _described(manifest: Any) -> Mapping[str, Any]:
    from ouro_jax.data.show import describe_manifest

    print(describe_manifest(manifest))
    return {**dataclasses.asdict(manifest), "padding_share": manifest.padding_share}


def _show_rows(directory: str) -> None:
    from ouro_jax.data.folder import Folder
    from ouro_jax.data.show import describe_rows

    require(FLAGS.rows >= 0, "rows", FLAGS.rows, "0 or more")
    place = directory if "://" in directory else os.path.abspath(directory)
    root = Folder(place.rstrip("/").rsplit("/", 2)[0])
    beside = root.path("tokenizer.json")
    tokenizer = FLAGS.tokenizer or (beside if root.has("tokenizer.json") else "")
    if not tokenizer:
        print(f"(there is no {beside}: name a --tokenizer to see the rows as text)")
        return
    for text in describe_rows(directory, tokenizer, FLAGS.rows):
        print(f"\n{text}")


ACTIONS: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    "clean": _clean,
    "prepare": _prepare,
    "tokenizer": _tokenizer,
    "verify": _verify,
    "inspect": _inspect,
}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__, max_words=2)


if __name__ == "__main__":
    run()
