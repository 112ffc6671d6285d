"""How far the answers of each KV policy are from those of `full`, which the published code gives.

    python -m benchmarks.kv_policies --checkpoint=runs/tiny [--exit=,q:0.5,static:2] [--prompts=64]

Greedy answers of 32 tokens to 64 held-out tokens (of modules of Python's library that the demo does
not train on), under each exit rule (empty: all loops) and each policy: the share of
answers equal to those of `full` under the same rule, how many tokens they have in common from the
start, the mean depth, and what the whole model (all loops, its own cache) makes of the text in
nats a token: a policy that harms makes text that the model finds unlikely.
"""

import json
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import library_rows, shown
from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.data.tokenizer import load_tokenizer
from ouro_jax.inference.generate import generate
from ouro_jax.model.cache import KV_POLICIES
from ouro_jax.model.loop_lm import LoopLM

PROMPT, NEW_TOKENS = 64, 32

_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/tiny", "A trained model and its tokenizer.")
_EXIT = flags.DEFINE_list("exit", ["", "q:0.5", "static:2"], "Exit rules; empty: all loops.")
_PROMPTS = flags.DEFINE_integer("prompts", 64, "Held-out prompts.", 1)


def main(_) -> None:
    """Prints a table, and the same as one JSON line last."""
    checkpoint = open_checkpoint(_CHECKPOINT.value)
    config, params = checkpoint.config, checkpoint.params
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_file))
    prompts = library_rows(tokenizer, "heldout", _PROMPTS.value, PROMPT).tolist()

    @jax.jit
    def nats(text_BL):
        model = LoopLM(config)
        out = cast(Any, model.apply({"params": params}, text_BL))
        logits = model.apply({"params": params}, out.states_TBLD[-1], method="logits")
        logp_BLV = jax.nn.log_softmax(cast(jax.Array, logits))[:, PROMPT - 1 : -1]
        return -jnp.take_along_axis(logp_BLV, text_BL[:, PROMPT:, None], axis=-1).mean()

    rows = []
    for exit in _EXIT.value:
        full: list[list[int]] = []
        for kv in KV_POLICIES:
            answer = generate(config, params, prompts, NEW_TOKENS, exit=exit or None, kv=kv)
            full = full or answer.tokens
            common = [
                next((i for i, pair in enumerate(zip(*both, strict=True)) if len(set(pair)) > 1),
                     NEW_TOKENS)
                for both in zip(answer.tokens, full, strict=True)
            ]  # fmt: skip
            text_BL = np.concatenate([np.array(prompts), np.array(answer.tokens)], axis=1)
            rows.append({
                "exit": exit or "all loops", "kv": kv,
                "mean_depth": float(np.mean(answer.depths)),
                "equal_answers": float(np.mean(np.array(common) == NEW_TOKENS)),
                "tokens_in_common": float(np.mean(common)),
                "nats_per_token": float(nats(jnp.asarray(text_BL))),
            })  # fmt: skip
    for name in rows[0]:
        print(f"{name:18s}" + "".join(f"{shown(row[name]):>11s}" for row in rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(main)
