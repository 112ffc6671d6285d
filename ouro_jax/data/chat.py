"""Conversations in ChatML, with the loss on what the assistant says.

`<|im_start|>ROLE\\nTEXT<|im_end|>\\n` for every message, no system prompt unless given. Roles and
texts are tokenised apart from the special tokens, so no text can forge a turn.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ouro_jax.config import ConfigError, require_choice
from ouro_jax.data.packing import Document
from ouro_jax.data.rows import DocumentCounts
from ouro_jax.data.tokenizer import IM_END, IM_START, encode, end_of_text_id, special_id

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
Message = Mapping[str, str]


def render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote.

    A message is `{"role": …, "content": …}`. The mask marks the text of assistant turns and the
    `<|im_end|>` that ends them: the tokens a model has to produce. ConfigError for a message of
    another form or a tokenizer without the two chat tokens.
    """
    start, end = special_id(tokenizer, IM_START), special_id(tokenizer, IM_END)
    newline = encode(tokenizer, "\n")
    ids: list[int] = []
    mask: list[bool] = []
    for index, message in enumerate(messages):
        role, text = _read_message(message, index)
        head = [start, *encode(tokenizer, f"{role}\n")]
        body = [*encode(tokenizer, text), end]
        ids += head + body + newline
        mask += [False] * len(head) + [role == "assistant"] * len(body) + [False] * len(newline)
    return ids, mask


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a conversation up to the point where the assistant's next text begins."""
    head = [special_id(tokenizer, IM_START), *encode(tokenizer, "assistant\n")]
    return render_chat(messages, tokenizer)[0] + head


def _read_message(message: Message, index: int) -> tuple[str, str]:
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

    It is written as the published Thinking models write theirs, whose generation prompt ends with
    `<think>` and a newline.
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
    whose question is gone. Conversations without messages are dropped.
    """
    end = end_of_text_id(tokenizer)
    for messages in conversations:
        if not messages:
            continue
        ids, mask = render_chat(messages, tokenizer)
        counts.documents += 1
        counts.text_bytes += sum(len(message["content"].encode()) for message in messages)
        tokens = np.array([*ids, end], np.int32)[:sequence_length]
        yield Document(tokens, np.array([*mask, False])[:sequence_length])
