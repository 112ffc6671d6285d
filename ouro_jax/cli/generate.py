"""Continues prompts with a checkpoint and shows the exit depth of every token.

  ouro generate --checkpoint=runs/tiny --prompt='def main():'
  ouro generate --checkpoint=downloads/Ouro-1.4B-Thinking --chat --prompt='What is RoPE?' \\
      --exit=q:0.8 --temperature=1.0 --top_p=0.7 --max_new_tokens=512
  ouro generate --checkpoint=runs/tiny/sft --prompt='one' --prompt='two' --loops=8 --json
  ouro generate --checkpoint=runs/tiny --prompt='def main():' --speculate=2x3

--checkpoint takes a workdir, one of its stages, or a folder in the Hugging Face format. A single
prompt streams; on a terminal the colour of a token is its exit depth. With --kv=full all loops run
and --exit says which is read, as in the published code; with the other policies a token that
leaves early is computed no further. --json prints prompt, text, tokens, depths and mean_depth of
the answer, or the list `answers` of these for several prompts; with --speculate also acceptance,
tokens_per_round and rounds.
"""

import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.errors import ConfigError

flags.DEFINE_string("checkpoint", "", "Workdir, stage folder or Hugging Face folder.")
flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
flags.DEFINE_bool("chat", False, "The prompt is a user's message (ChatML), not text to continue.")
flags.DEFINE_integer("max_new_tokens", 64, "Tokens to add at most.")
flags.DEFINE_string(
    "exit", None, "static:2, q:0.8, hidden:0.05, confidence:0.9 or lookahead:0.8; unset: all loops."
)
flags.DEFINE_string("kv", "full", "KV policy: full, exited, last, first or mean.")
flags.DEFINE_integer("loops", None, "Loops to run; unset: as trained.")
flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token.")
flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens that reach this probability.")
flags.DEFINE_integer("top_k", 0, "Draw from so many tokens; 0: from all.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.")
flags.DEFINE_string("speculate", None, "2x3: drafts of 2 loops, 3 verified at once; unset: none.")
flags.DEFINE_multi_string(
    "stop", None, "Token, or its id, that ends an answer. Unset: <|endoftext|> and <|im_end|>."
)


def main() -> Mapping[str, Any]:
    """The verb."""
    path = required("checkpoint", "runs/tiny")
    prompts = FLAGS.prompt
    if not all(prompts) or not prompts:
        raise ConfigError("--prompt is missing or empty: e.g. --prompt='def main():'")
    # Loading jax and Orbax takes seconds; a wrong flag should not wait for them.
    from ouro_jax.cli.open_checkpoint import open_checkpoint
    from ouro_jax.data.tokenizer import load_tokenizer
    from ouro_jax.inference.generate import generate
    from ouro_jax.inference.requests import beyond_training
    from ouro_jax.inference.text import TextStream, coloured, decode_text, encode_prompt, stop_ids

    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer_file is None:
        raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json beside it.")
    tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    loops = checkpoint.config.num_loops if FLAGS.loops is None else FLAGS.loops
    if warning := beyond_training(checkpoint.config, loops):
        print(warning, file=sys.stderr)
    console = Console(highlight=False)
    stream = TextStream(tokenizer)

    def show(_, token, depth):
        if not stream.begun and not FLAGS.chat:
            console.print(Text(prompts[0], style="dim"), end="", soft_wrap=True)
        piece = stream.push(token)
        console.print(coloured(piece, depth, loops), end="", soft_wrap=True)

    single = len(prompts) == 1
    result = generate(
        checkpoint.config, checkpoint.params,
        [encode_prompt(tokenizer, prompt, FLAGS.chat) for prompt in prompts],
        FLAGS.max_new_tokens, temperature=FLAGS.temperature, exit=FLAGS.exit, kv=FLAGS.kv,
        loops=FLAGS.loops, stop_ids=stop_ids(tokenizer, FLAGS.stop), seed=FLAGS.seed,
        top_p=FLAGS.top_p, top_k=FLAGS.top_k, on_token=show if single else None,
        speculate=FLAGS.speculate,
    )  # fmt: skip
    if single:
        console.print(Text(stream.finish()), soft_wrap=True)
    answers = []
    for prompt, tokens, depths in zip(prompts, result.tokens, result.depths, strict=True):
        mean = sum(depths) / len(depths) if depths else None
        answers.append({
            "prompt": prompt, "text": decode_text(tokenizer, tokens), "tokens": tokens,
            "depths": depths, "mean_depth": mean,
        })  # fmt: skip
        _show_depths(console, tokenizer, answers[-1], loops, with_text=not single)
    summary = answers[0] if single else {"answers": answers}
    return summary | _show_acceptance(console, result.acceptance)


def _show_acceptance(console, acceptance) -> dict[str, Any]:
    """How the drafts fared, printed and for the JSON line; nothing if there were none."""
    if acceptance is None:
        return {}
    if acceptance.rounds:
        console.print(
            f"drafts ({FLAGS.speculate}): {acceptance.rate:.0%} accepted, "
            f"{acceptance.tokens_per_round:.2f} tokens a round"
        )
    return {
        "acceptance": acceptance.rate,
        "tokens_per_round": acceptance.tokens_per_round,
        "rounds": acceptance.rounds,
    }


def _show_depths(console, tokenizer, answer: Mapping[str, Any], loops: int, with_text: bool):
    """The answer with its depths: as colours and a legend, or as numbers where nobody sees them."""
    from ouro_jax.inference.text import annotated, coloured, depth_legend, pieces

    shown, depths = pieces(tokenizer, answer["tokens"]), answer["depths"]
    if with_text:
        console.print(Text(answer["prompt"], style="dim"), end="", soft_wrap=True)
        for piece, depth in zip(shown, depths, strict=True):
            console.print(coloured(piece, depth, loops), end="", soft_wrap=True)
        console.print()
    if not depths:
        console.print("(no new token: the answer ends at once)")
        return
    mean = f"mean {answer['mean_depth']:.2f} of {loops}"
    if console.color_system and not console.no_color:
        console.print(depth_legend(loops), f"({mean})")
    else:
        console.print(f"depths ({mean}): {annotated(shown, depths)}", markup=False, soft_wrap=True)


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
