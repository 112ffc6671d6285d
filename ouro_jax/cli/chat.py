"""A conversation in the terminal; the colour of a token is its exit depth.

  ouro chat --checkpoint=Ouro-1.4B-Thinking --exit=q:0.8
  ouro chat --checkpoint=runs/tiny/sft --system='Answer in one word.' --temperature=0
  echo 'What is 3 + 4?' | ouro chat --checkpoint=runs/tiny/sft

A line is a message. /exit RULE changes the exit rule (/exit alone: all loops), /quit or Ctrl-D ends
the conversation, Ctrl-C stops the answer that is being written. When the conversation no longer
fits the window, its oldest messages are left out.
"""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.errors import ConfigError

flags.DEFINE_string("checkpoint", "", "Workdir, stage folder or Hugging Face folder.")
flags.DEFINE_string("system", "", "The system prompt; unset: none.")
flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer at most.", 1)
flags.DEFINE_string(
    "exit", None, "static:2, q:0.8, hidden:0.05, confidence:0.9 or lookahead:0.8; unset: all loops."
)
flags.DEFINE_string("kv", "exited", "KV policy.")
flags.DEFINE_integer("loops", None, "Loops to run; unset: as trained.", 1)
flags.DEFINE_integer("window", None, "Positions of a conversation; unset: the model's, ≤ 4096.", 2)
flags.DEFINE_float("temperature", 1.0, "0 takes the most probable token.")
flags.DEFINE_float("top_p", 0.7, "Draw from the fewest tokens that reach this probability.")
flags.DEFINE_integer("top_k", 0, "Draw from so many tokens; 0: from all.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.")

DEFAULT_WINDOW = 4096


class _Talk:
    """The conversation so far, and how the next answer is made."""

    def __init__(self, tokenizer, engine, console: Console):
        from ouro_jax.inference.text import stop_ids

        self._tokenizer, self._engine, self._console = tokenizer, engine, console
        self._stop_ids = frozenset(stop_ids(tokenizer, None))
        self._system = [{"role": "system", "content": FLAGS.system}] if FLAGS.system else []
        self._turns: list[dict[str, str]] = []
        self._answers = 0
        self.set_exit(FLAGS.exit)

    def set_exit(self, rule: str | None) -> None:
        """Uses `rule` from now on; ConfigError, and the old one stays, if it is none."""
        from ouro_jax.inference.requests import check_request

        check_request(
            self._engine.config, self._request((0,), rule, 1), self._engine.window,
            self._engine.loops,
        )  # fmt: skip
        self.exit = rule

    def answer(self, text: str) -> list[int]:
        """Shows the answer to `text` as it comes; returns its depths. ConfigError if too long."""
        from ouro_jax.inference.text import TextStream, coloured

        self._turns.append({"role": "user", "content": text})
        try:
            number = self._engine.submit(self._request(self._prompt(), self.exit))
        except ConfigError:
            self._turns.pop()
            raise
        self._answers += 1
        stream, words, depths = TextStream(self._tokenizer), [], []

        def show(piece: str, depth: int) -> None:
            words.append(piece)
            self._console.print(coloured(piece, depth, self._engine.loops), end="", soft_wrap=True)

        with _stop_asked() as asked:
            for token in self._tokens(number, asked):
                depths.append(token.depth)
                show(stream.push(token.token), token.depth)
        show(stream.finish(), depths[-1] if depths else 1)
        self._console.print(Text(" (stopped)" if asked else "", style="dim"))
        self._turns.append({"role": "assistant", "content": "".join(words)})
        return depths

    def _tokens(self, number: int, stop_asked: list):
        finish = None
        while finish is None:
            if stop_asked:
                self._engine.cancel(number)
                return
            for update in self._engine.step():
                if update.request_id == number:
                    finish = update.finish
                    if update.token is not None:
                        yield update.token

    def _prompt(self) -> list[int]:
        """The conversation, without its oldest turns if they no longer fit."""
        from ouro_jax.data.chat import render_prompt

        while True:
            ids = render_prompt([*self._system, *self._turns], self._tokenizer)
            fits = len(ids) + FLAGS.max_new_tokens <= self._engine.window
            if fits or len(self._turns) < 3:
                return ids
            del self._turns[:2]

    def _request(self, prompt, rule: str | None, most: int | None = None):
        from ouro_jax.inference.requests import Request

        return Request(
            prompt=tuple(prompt), max_new_tokens=most or FLAGS.max_new_tokens,
            temperature=FLAGS.temperature, top_p=FLAGS.top_p, top_k=FLAGS.top_k, seed=FLAGS.seed,
            # Another stream for each answer: the same question need not get the same one.
            stream=self._answers, exit=rule, stop_ids=self._stop_ids,
        )  # fmt: skip


def main() -> Mapping[str, Any]:
    """The verb; returns the number of answers and the mean depth of all tokens."""
    talk, console, loops = _open(required("checkpoint", "runs/tiny/sft"))
    from ouro_jax.inference.text import depth_legend

    if console.color_system and not console.no_color:
        console.print(depth_legend(loops), Text("(/exit RULE, /quit)", style="dim"))
    answers, depths = 0, []
    while (line := _read_line(console)) is not None:
        words = line.split()
        if not words:
            continue
        if words[0] == "/quit":
            break
        try:
            if words[0] == "/exit":
                talk.set_exit(words[1] if len(words) > 1 else None)
                console.print(Text(f"exit: {talk.exit or 'all loops'}", style="dim"))
                continue
            if words[0].startswith("/"):
                raise ConfigError(f"{words[0]}: expected /exit RULE, /quit, or a message.")
            depths += (new := talk.answer(line))
        except ConfigError as error:
            # In a terminal the next line can be right; a script should not go on unnoticed.
            if not sys.stdin.isatty():
                raise
            console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
            continue
        answers += 1
        if new:
            mean = f"mean depth {sum(new) / len(new):.2f} of {loops}"
            console.print(Text(mean, style="dim"))
    return {"answers": answers, "mean_depth": sum(depths) / len(depths) if depths else None}


@contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """A list that Ctrl-C fills. An exception in the middle of a step would cost the engine its
    cache, which is given up to the step while that runs.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _open(path: str) -> tuple[_Talk, Console, int]:
    # Loading jax and Orbax takes seconds; a wrong flag should not wait for them.
    from ouro_jax.cli.open_checkpoint import open_checkpoint
    from ouro_jax.data.tokenizer import IM_END, IM_START, load_tokenizer, special_id
    from ouro_jax.inference.engine import Engine
    from ouro_jax.inference.requests import beyond_training

    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer_file is None:
        raise ConfigError(f"--checkpoint={path}: there is no tokenizer.json beside it.")
    tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    for name in (IM_START, IM_END):
        special_id(tokenizer, name)
    config = checkpoint.config
    window = FLAGS.window or min(DEFAULT_WINDOW, config.max_position_embeddings)
    engine = Engine(config, checkpoint.params, FLAGS.kv, 1, window, FLAGS.loops)
    if warning := beyond_training(config, engine.loops):
        print(warning, file=sys.stderr)
    console = Console(highlight=False)
    return _Talk(tokenizer, engine, console), console, engine.loops


def _read_line(console: Console) -> str | None:
    """The next message; None at the end. Ctrl-C while nothing is being written asks anew."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                console.print()
            return None
        except KeyboardInterrupt:
            console.print()


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
