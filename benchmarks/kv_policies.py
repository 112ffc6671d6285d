"""How far the answers of each KV policy are from those of `full`, which the published code gives.

    python -m benchmarks.kv_policies --checkpoint=runs/tiny [--exit=,q:0.5,static:2] [--prompts=64]

Greedy answers of 32 tokens to 64 held-out tokens (of modules of Python's library that the demo does
not train on), under each exit rule (empty: all loops) and each policy, compared as
`ouro_jax/experiments/kv.py` says: a policy that harms makes text that the model finds unlikely.
"""

import json

from absl import app, flags

from benchmarks.measure import library_rows, shown
from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.data.tokenizer import load_tokenizer
from ouro_jax.experiments.kv import run_kv
from ouro_jax.experiments.study import Subject

PROMPT, NEW_TOKENS = 64, 32
SHOWN = (
    "exit", "kv", "mean_depth", "equal_answers", "tokens_in_common", "nats_per_token",
)  # fmt: skip

_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/tiny", "A trained model and its tokenizer.")
_EXIT = flags.DEFINE_list("exit", ["", "q:0.5", "static:2"], "Exit rules; empty: all loops.")
_PROMPTS = flags.DEFINE_integer("prompts", 64, "Held-out prompts.", 1)


def main(_) -> None:
    """Prints a table, and the same as one JSON line last."""
    checkpoint = open_checkpoint(_CHECKPOINT.value)
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_file))
    prompts = library_rows(tokenizer, "heldout", _PROMPTS.value, PROMPT).tolist()
    subject = Subject(checkpoint.name, checkpoint.config, checkpoint.params)
    exits = [exit or None for exit in _EXIT.value]
    records = run_kv(subject, prompts, None, NEW_TOKENS, exits)
    rows = [
        {name: record[name] for name in SHOWN} | {"exit": record["exit"] or "all loops"}
        for record in records
    ]
    for name in SHOWN:
        print(f"{name:18s}" + "".join(f"{shown(row[name]):>11s}" for row in rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
