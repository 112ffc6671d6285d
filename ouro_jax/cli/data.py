"""Prepares text for training, verifies and shows what was prepared.

  ouro data tokenizer --input='texts/**/*.txt' --format=text --vocab_size=8192 \\
      --output=data/tokenizer.json
  ouro data prepare --input='texts/**/*.txt' --format=text --tokenizer=data/tokenizer.json \\
      --sequence_length=4096 --split=train --output=data/mytext/train-4096
  ouro data prepare --input='texts/**/*.txt' --format=text --tokenizer=data/tokenizer.json \\
      --sequence_length=4096 --split=heldout --output=data/mytext/heldout-4096
  ouro data verify data/mytext/train-4096
  ouro data inspect data/mytext/train-4096 --rows=3

A config with `data.root = "data"` and a mixture with the source `mytext` trains on it.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.config import ConfigError, require, require_choice

ACTIONS = ("prepare", "tokenizer", "verify", "inspect")

flags.DEFINE_string("input", "", "Files to read: a path or a pattern, ** goes into folders.")
flags.DEFINE_string("format", "jsonl", "jsonl (a document per line) or text (one per file).")
flags.DEFINE_string("field", "text", "The field of a JSON line that holds the text.")
flags.DEFINE_string("tokenizer", "", "A tokenizer.json in the Hugging Face format.")
flags.DEFINE_integer("sequence_length", 4096, "Tokens in a row.")
flags.DEFINE_integer("vocab_size", 8192, "Entries of the tokenizer to train.")
flags.DEFINE_string(
    "split", "all", "all documents, train (19 of 20, by a hash of the text) or heldout (the rest)."
)
flags.DEFINE_string("output", "", "What to write: a new folder of rows, or a tokenizer.json.")
flags.DEFINE_integer("rows", 2, "Rows to show.")


def main(action: str, directory: str) -> Mapping[str, Any]:
    """The verb: `action`, and for verify and inspect the folder of rows that came after it."""
    require_choice(action, ACTIONS, "ouro data")
    # The data libraries take a second to load; a wrong action should not wait for them.
    from ouro_jax.data import prepare, rows

    if action == "tokenizer":
        output = required("output", "data/tokenizer.json")
        prepare.prepare_tokenizer(
            required("input", "'texts/*.txt'"),
            file_format=FLAGS.format,
            vocab_size=FLAGS.vocab_size,
            output=output,
            field=FLAGS.field,
        )
        print(f"{output}: {FLAGS.vocab_size:,} entries")
        return {"output": output, "vocab_size": FLAGS.vocab_size}
    if action == "prepare":
        manifest = prepare.prepare(
            required("input", "'texts/*.jsonl'"),
            file_format=FLAGS.format,
            tokenizer=required("tokenizer", "data/tokenizer.json"),
            sequence_length=FLAGS.sequence_length,
            output=required("output", "data/mytext/train-4096"),
            split=FLAGS.split,
            field=FLAGS.field,
        )
    else:
        if not directory:
            raise ConfigError(f"name the folder: ouro data {action} data/mytext/train-4096")
        manifest = (rows.verify_rows if action == "verify" else rows.read_manifest)(directory)
    print(prepare.describe_manifest(manifest))
    if action == "verify":
        print("all checksums, token ids and counts are right")
    if action == "inspect":
        _show_rows(directory)
    return {**dataclasses.asdict(manifest), "padding_share": manifest.padding_share}


def _show_rows(directory: str) -> None:
    from ouro_jax.data.prepare import describe_rows

    require(FLAGS.rows >= 0, "rows", FLAGS.rows, "0 or more")
    beside = Path(directory).absolute().parent.parent / "tokenizer.json"
    tokenizer = FLAGS.tokenizer or (str(beside) if beside.is_file() else "")
    if not tokenizer:
        print(f"(there is no {beside}: name a --tokenizer to see the rows as text)")
        return
    for text in describe_rows(directory, tokenizer, FLAGS.rows):
        print(f"\n{text}")


def run() -> None:
    """Takes the action and the folder off the command line, parses flags and runs the verb."""
    words = []
    while len(words) < 2 and len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        words.append(sys.argv.pop(1))
    action, directory = [*words, "", ""][:2]
    run_verb(lambda: main(action, directory), __name__)


if __name__ == "__main__":
    run()
