"""Tokens as text: pieces that can be shown at once, and the colour of a depth."""

from collections.abc import Sequence

from rich.text import Text
from tokenizers import Tokenizer

from ouro_jax.data.chat import render_prompt
from ouro_jax.data.tokenizer import END_OF_TEXT_NAMES, IM_END, encode
from ouro_jax.errors import ConfigError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# From shallow to deep; basic colours, which every terminal has.
DEPTH_COLOURS = ("green", "cyan", "blue", "magenta", "red")


def decode_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`; special tokens are spelt out."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


class TextStream:
    """Text of a growing list of tokens, given out only in whole characters.

    A character's bytes may lie in several tokens: nothing comes out until the last of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Tokens that the next ones are decoded together with, and how many are already shown.
        self._ids: list[int] = []
        self._shown = 0

    @property
    def begun(self) -> bool:
        """Whether a token has come in."""
        return bool(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith(INCOMPLETE):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def finish(self) -> str:
        """What is left at the end: bytes that make no character show as replacement characters."""
        text = self._pending()
        self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        # Decoded after the tokens before: some tokenizers drop the space of a first token.
        before = decode_text(self._tokenizer, self._ids[: self._shown])
        return decode_text(self._tokenizer, self._ids)[len(before) :]


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token completes; joined, they are the text of all."""
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in tokens]
    if shown:
        shown[-1] += stream.finish()
    return shown


def coloured(piece: str, depth: int, loops: int) -> Text:
    """`piece` in the terminal colour of `depth` of `loops` loops, for `rich` to print."""
    deepest = len(DEPTH_COLOURS) - 1
    return Text(piece, style=DEPTH_COLOURS[round((depth - 1) * deepest / max(loops - 1, 1))])


def depth_legend(loops: int) -> Text:
    """One line that says which colour is which depth."""
    return Text(" ").join(
        [Text("depth"), *(coloured(f"{t}", t, loops) for t in range(1, loops + 1))]
    )


def annotated(shown: Sequence[str], depths: Sequence[int]) -> str:
    """Every piece with its depth, `the[2] end[4]`, on one line and without colours."""
    return "".join(f"{piece}[{depth}]" for piece, depth in zip(shown, depths, strict=True)).replace(
        "\n", "\\n"
    )


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of `text`, or of a conversation with it up to where the assistant begins."""
    if chat:
        return render_prompt([{"role": "user", "content": text}], tokenizer)
    return encode(tokenizer, text)


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str] | None) -> list[int]:
    """Ids of stop tokens given as text or as numbers; if None, of the usual ones that there are.

    Raises ConfigError for a text that is not one token.
    """
    if stops is None:
        ids = map(tokenizer.token_to_id, (*END_OF_TEXT_NAMES, IM_END))
        return [token for token in ids if token is not None]
    return [_stop_id(tokenizer, stop) for stop in stops]


def _stop_id(tokenizer: Tokenizer, stop: str) -> int:
    if stop.isdecimal():
        return int(stop)
    token = tokenizer.token_to_id(stop)
    ids = encode(tokenizer, stop) if token is None else [token]
    if len(ids) != 1:
        raise ConfigError(f"--stop={stop!r} is {len(ids)} tokens {ids}: expected one, or its id.")
    return ids[0]
