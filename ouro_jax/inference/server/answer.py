"""The text of one answer: whole characters, cut at stop strings, each piece with its token."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from ouro_jax.inference.requests import NewToken
from ouro_jax.inference.text import TextStream


class Piece(NamedTuple):
    """The text that a token completes, and the token. Joined, the pieces are the answer."""

    text: str
    token: NewToken


class Answer:
    """Tokens in, pieces out. A piece is held back while a stop string may have begun in it.

    `tokens` counts what was generated, also what a stop string cuts away; `stopped` says that one
    was met: no piece comes after that.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._held: deque[Piece] = deque()
        self.tokens = 0
        self.depths = 0
        self.stopped = False

    def push(self, token: NewToken) -> list[Piece]:
        """The pieces that can be shown now that `token` has come."""
        self.tokens += 1
        self.depths += token.depth
        self._held.append(Piece(self._stream.push(token.token), token))
        return self._release(final=False)

    def finish(self) -> list[Piece]:
        """What is left when the answer has ended."""
        rest = self._stream.finish()
        if rest:
            text, token = self._held.pop()
            self._held.append(Piece(text + rest, token))
        return self._release(final=True)

    def _release(self, final: bool) -> list[Piece]:
        text = "".join(piece.text for piece in self._held)
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            shown = self._take(min(found), whole=False)
            self._held.clear()
            return shown
        free = len(text) if final else len(text) - self._begun(text)
        shown = self._take(free, whole=True)
        if final:
            shown += self._held
            self._held.clear()
        return shown

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that may be the start of a stop string."""
        most = max(map(len, self._stops), default=1) - 1
        for length in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _take(self, free: int, whole: bool) -> list[Piece]:
        """Pieces in the first `free` characters; the last one cut if it need not be `whole`.

        Tokens without text wait for the one that completes their character.
        """
        shown: list[Piece] = []
        silent: list[Piece] = []
        while self._held and (whole or free > 0):
            text, token = self._held[0]
            if whole and len(text) > free:
                break
            self._held.popleft()
            silent.append(Piece(text[:free], token))
            free -= len(text)
            if text:
                shown += silent
                silent = []
        self._held.extendleft(reversed(silent))
        return shown
