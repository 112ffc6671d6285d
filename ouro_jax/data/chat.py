"""Conversations in ChatML, with the loss on what the assistant says.

`<|im_start|>ROLE\\nTEXT<|im_end|>\\n` for every message, no system prompt unless given. Roles and
texts are tokenised apart from the special tokens, so no text can forge a turn.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ouro_jax.data.packing import Document
from ouro_jax.data.rows import DocumentCounts
from ouro_jax.data.tokenizer import (
    IM_END,
    IM_START,
    encode,
    encode_ahead,
    end_of_text_id,
    special_id,
)
from ouro_jax.errors import ConfigError, require_choice

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
Message = Mapping[str, str]
Turn = tuple[str, str]  # role, text


class _Template(NamedTuple):
    """The ids around a message's text: before it, by role, and after it."""

    heads: Mapping[str, list[int]]
    end: int
    newline: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "_Template":
        """The template in the ids of `tokenizer`; ConfigError if it has no chat tokens."""
        start = special_id(tokenizer, IM_START)
        heads = {role: [start, *encode(tokenizer, f"{role}\n")] for role in ROLES}
        return cls(heads, special_id(tokenizer, IM_END), encode(tokenizer, "\n"))

    def render(self, turns: Iterable[tuple[str, list[int]]]) -> tuple[list[int], list[slice]]:
        """Ids of a conversation of (role, ids of the text), and where the assistant's are."""
        ids: list[int] = []
        learnt: list[slice] = []
        for role, text in turns:
            ids += self.heads[role]
            if role == "assistant":
                learnt.append(slice(len(ids), len(ids) + len(text) + 1))
            ids += text
            ids.append(self.end)
            ids += self.newline
        return ids, learnt


def render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote.

    A message is `{"role": …, "content": …}`. The mask marks the text of assistant turns and the
    `<|im_end|>` that ends them: the tokens a model has to produce. ConfigError for a message of
    another form or a tokenizer without the two chat tokens.
    """
    turns = [(role, encode(tokenizer, text)) for role, text in _read_turns(messages)]
    ids, learnt = _Template.of(tokenizer).render(turns)
    return ids, _mask(learnt, len(ids)).tolist()


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation up to the point where the assistant's next text begins."""
    head = [special_id(tokenizer, IM_START), *encode(tokenizer, "assistant\n")]
    return render_chat(messages, tokenizer)[0] + head


def _read_turns(messages: Sequence[Message]) -> list[Turn]:
    return [_read_message(message, index) for index, message in enumerate(messages)]


def _read_message(message: Message, index: int) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ConfigError(f"message {index}: expected an object with role and content.")
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise ConfigError(f"message {index}: {key} is not a text but {message[key]!r}.")
    require_choice(message["role"], ROLES, f"message {index}: role")
    return message["role"], message["content"]


def read_messages(value: Any) -> list[Message]:
    """A conversation as data sets spell it: role and content, or ShareGPT's from and value.

    There `human` is the user and `gpt` the assistant. Other keys of a message are left out.
    ConfigError for anything else.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"expected a list of messages, got {type(value).__name__}.")
    messages = []
    for index, message in enumerate(value):
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            role = SHAREGPT_ROLES.get(str(message["from"]), message["from"])
            message = {"role": role, "content": message["value"]}
        role, text = _read_message(message, index)
        messages.append({"role": role, "content": text})
    return messages


def question_messages(question: str, answer: str, thought: str = "") -> list[Message]:
    """A question and its answer as a conversation; a thought comes before the answer.

    The thought is put as the published Thinking models put theirs, whose generation prompt ends
    in `<think>` and a newline. All texts are taken as they are.
    """
    reasoning = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": reasoning + answer},
    ]


def chat_documents(
    conversations: Iterable[Sequence[Message]],
    tokenizer: Tokenizer,
    sequence_length: int,
    counts: DocumentCounts,
) -> Iterator[Document]:
    """Conversations as documents with loss masks, each ended by the end-of-text token.

    A conversation longer than `sequence_length` is cut there: a later piece would be answers
    whose question is gone. It is dropped if no word of the assistant is in what is left. The
    bytes counted are those of whole conversations, cut ones too.
    """
    end, template = end_of_text_id(tokenizer), _Template.of(tokenizer)
    for turns, encoded in _encode(conversations, tokenizer):
        ids, learnt = template.render(encoded)
        if not learnt or learnt[0].start >= sequence_length:
            counts.dropped += 1
            continue
        counts.documents += 1
        counts.truncated += len(ids) >= sequence_length
        counts.text_bytes += sum(len(text.encode()) for _, text in turns)
        tokens = np.array([*ids, end], np.int32)[:sequence_length]
        yield Document(tokens, _mask(learnt, len(tokens)))


def _mask(learnt: Iterable[slice], length: int) -> np.ndarray:
    mask = np.zeros(length, bool)
    for span in learnt:
        mask[span] = True
    return mask


def _encode(
    conversations: Iterable[Sequence[Message]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Turn], list[tuple[str, list[int]]]]]:
    """The turns of each conversation with (role, ids) of each, encoded many at once."""
    waiting: deque[list[Turn]] = deque()

    def texts() -> Iterator[str]:
        for messages in conversations:
            turns = _read_turns(messages)
            waiting.append(turns)
            yield from (text for _, text in turns)

    encoded: list[tuple[str, list[int]]] = []
    for _, encodings in encode_ahead(tokenizer, texts()):
        for encoding in encodings:
            while len(encoded) == len(waiting[0]):
                yield waiting.popleft(), encoded
                encoded = []
            encoded.append((waiting[0][len(encoded)][0], encoding.ids))
    for turns in waiting:
        yield turns, encoded
        encoded = []
