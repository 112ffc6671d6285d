"""What a body may say, and what it asks of the engine.

The fields are OpenAI's, plus `exit`, `kv`, `loops`, `depths` and `top_k`. Fields of OpenAI's that
change an answer and are not served are known by name: only the value that changes nothing passes.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from ouro_jax.config import ModelConfig
from ouro_jax.data.chat import ROLES, render_prompt
from ouro_jax.data.tokenizer import encode
from ouro_jax.errors import ConfigError
from ouro_jax.inference.requests import MOST_ALTERNATIVES, Request, Update, check_request
from ouro_jax.inference.server.errors import ApiError
from ouro_jax.inference.server.schema import Schema, check_fields

MOST_CHOICES = 128
MOST_STOPS = 4
MOST_SEED = 2**31 - 1
# OpenAI's own: what `/v1/completions` adds if nothing is said.
COMPLETION_TOKENS = 16


class EngineLike(Protocol):
    """What the server needs of an engine; see `inference/engine.py`."""

    config: ModelConfig
    window: int
    loops: int
    num_slots: int

    @property
    def idle(self) -> bool: ...
    @property
    def live(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, request_id: int) -> None: ...
    def step(self) -> list[Update]: ...


@dataclass(frozen=True)
class Served:
    """The model behind the server: engines by KV policy, the first of which is the default.

    `exit` is the rule of requests that name none; `stop_ids` end every answer.
    """

    name: str
    tokenizer: Tokenizer
    engines: Mapping[str, EngineLike]
    exit: str | None
    stop_ids: frozenset[int]
    can_chat: bool

    @property
    def default_kv(self) -> str:
        """The KV policy of requests that name none."""
        return next(iter(self.engines))


@dataclass(frozen=True)
class Asked:
    """One HTTP request, read: `requests` has all choices of the first prompt, then the next's."""

    chat: bool
    kv: str
    exit: str | None
    loops: int
    seed: int
    requests: tuple[Request, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    logprobs: bool
    depths: bool
    stream: bool
    include_usage: bool


def completion_schema(served: Served) -> Schema:
    """The body of `POST /v1/completions`."""
    token = {"type": "integer", "minimum": 0}
    ids = {"type": "array", "items": token, "minItems": 1}
    text = {"type": "string", "minLength": 1}
    prompt = {
        "description": "Text, token ids, or a list of either.",
        "anyOf": [
            text,
            {"type": "array", "items": text, "minItems": 1, "maxItems": MOST_CHOICES},
            ids,
            {"type": "array", "items": ids, "minItems": 1, "maxItems": MOST_CHOICES},
        ],
    }
    own = {
        "prompt": prompt,
        "logprobs": {
            "type": "integer", "minimum": 0, "maximum": MOST_ALTERNATIVES,
            "description": "Report ln p of each token, and so many alternatives.",
        },
        "echo": {"type": "boolean", "enum": [False], "description": "Not served."},
        "best_of": {"type": "integer", "enum": [1], "description": "Not served: use n."},
        "suffix": {"type": "string", "enum": [""], "description": "Not served."},
    }  # fmt: skip
    return _object(own | _shared(served), ("prompt",))


def chat_schema(served: Served) -> Schema:
    """The body of `POST /v1/chat/completions`."""
    part = _object({"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
                   ("type", "text"))  # fmt: skip
    parts = {"type": "array", "items": part, "minItems": 1}
    message = _object(
        {
            "role": {"type": "string", "enum": list(ROLES)},
            "content": {"anyOf": [{"type": "string"}, parts]},
        },
        ("role", "content"),
    )
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "As max_tokens."},
        "logprobs": {"type": "boolean", "description": "Report ln p of each token."},
        "top_logprobs": {
            "type": "integer", "minimum": 0, "maximum": MOST_ALTERNATIVES,
            "description": "With logprobs: so many most probable tokens beside each.",
        },
    }  # fmt: skip
    return _object(own | _shared(served), ("messages",))


def _object(properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object", "properties": dict(properties), "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


def _shared(served: Served) -> dict[str, Schema]:
    """The fields that both kinds of request have."""
    stop = {"type": "string", "minLength": 1}
    most_loops = max(engine.loops for engine in served.engines.values())
    return {
        "model": {"type": "string", "description": f"{served.name}, the one model served."},
        "max_tokens": {"type": "integer", "minimum": 1, "description": "New tokens at most."},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
        "top_k": {"type": "integer", "minimum": 0, "maximum": MOST_SEED, "default": 0},
        "n": {"type": "integer", "minimum": 1, "maximum": MOST_CHOICES, "default": 1},
        "seed": {"type": "integer", "minimum": 0, "maximum": MOST_SEED},
        "stop": {
            "description": "The answer ends before the first of these texts.",
            "anyOf": [
                stop, {"type": "array", "items": stop, "minItems": 1, "maxItems": MOST_STOPS},
            ],
        },
        "stream": {"type": "boolean", "default": False},
        "stream_options": _object({"include_usage": {"type": "boolean"}}),
        "user": {"type": "string", "description": "Taken and not used."},
        "frequency_penalty": {"type": "number", "enum": [0], "description": "Not served."},
        "presence_penalty": {"type": "number", "enum": [0], "description": "Not served."},
        "exit": {
            "type": "string",
            "description": "static:2, q:0.8, hidden:0.05, confidence:0.9 or lookahead:0.8.",
        },
        "kv": {"type": "string", "enum": list(served.engines), "default": served.default_kv},
        "loops": {"type": "integer", "minimum": 1, "maximum": most_loops},
        "depths": {
            "type": "boolean", "default": False,
            "description": "Report the exit depth of every token and what each loop would say.",
        },
    }  # fmt: skip


def read_completion(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of `/v1/completions` asks for; ApiError if it cannot be answered."""
    fields = check_fields(body, completion_schema(served))
    prompt = fields["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = [
        encode(served.tokenizer, one) if isinstance(one, str) else one
        for one in (prompt if several else [prompt])
    ]
    fields.setdefault("max_tokens", COMPLETION_TOKENS)
    return _asked(fields, served, prompts, "prompt", fields.get("logprobs"))


def read_chat(body: Mapping[str, Any], served: Served) -> Asked:
    """What a body of `/v1/chat/completions` asks for; ApiError if it cannot be answered."""
    fields = check_fields(body, chat_schema(served))
    if not served.can_chat:
        raise ApiError(
            400, f"messages: the tokenizer of {served.name} has no ChatML tokens; expected a "
            "prompt to POST /v1/completions.", "messages", "unsupported",
        )  # fmt: skip
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            raise ApiError(
                400, f"max_tokens = {fields['max_tokens']}: expected none beside "
                "max_completion_tokens, which means the same.", "max_tokens", "invalid_value",
            )  # fmt: skip
        fields["max_tokens"] = fields["max_completion_tokens"]
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise ApiError(
            400, f"top_logprobs = {fields['top_logprobs']}: expected logprobs = true with it.",
            "top_logprobs", "invalid_value",
        )  # fmt: skip
    prompt = render_prompt([_message(message) for message in fields["messages"]], served.tokenizer)
    alternatives = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    return _asked(fields, served, [prompt], "messages", alternatives)


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": message["role"], "content": text}


def _asked(
    fields: Mapping[str, Any], served: Served, prompts: list[list[int]], source: str,
    alternatives: int | None,
) -> Asked:  # fmt: skip
    if fields.get("model", served.name) != served.name:
        raise ApiError(
            404, f"model = {fields['model'][:80]!r}: expected {served.name!r}, the one served.",
            "model", "model_not_found",
        )  # fmt: skip
    if "stream_options" in fields and not fields.get("stream"):
        raise ApiError(400, "stream_options: expected only with stream = true.", "stream_options",
                       "invalid_value")  # fmt: skip
    kv = fields.get("kv", served.default_kv)
    stops = fields.get("stop", ())
    seed = fields.get("seed", secrets.randbelow(MOST_SEED + 1))
    requests = tuple(
        _request(fields, served, prompt, seed, stream, source, alternatives)
        for prompt in prompts
        for stream in range(fields.get("n", 1))
    )
    return Asked(
        chat=source == "messages", kv=kv, exit=requests[0].exit,
        loops=fields.get("loops", served.engines[kv].loops), seed=seed, requests=requests,
        prompt_tokens=sum(map(len, prompts)),
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        logprobs=alternatives is not None, depths=fields.get("depths", False),
        stream=fields.get("stream", False),
        include_usage=fields.get("stream_options", {}).get("include_usage", False),
    )  # fmt: skip


def _request(fields, served, prompt, seed, stream, source, alternatives) -> Request:
    engine = served.engines[fields.get("kv", served.default_kv)]
    request = Request(
        prompt=tuple(prompt),
        max_new_tokens=fields.get("max_tokens", max(1, engine.window - len(prompt))),
        temperature=fields.get("temperature", 1.0), top_p=fields.get("top_p", 1.0),
        top_k=fields.get("top_k", 0), seed=seed, stream=stream,
        exit=fields.get("exit", served.exit), loops=fields.get("loops"),
        stop_ids=served.stop_ids, alternatives=alternatives or 0,
        readouts=fields.get("depths", False),
    )  # fmt: skip
    try:
        check_request(engine.config, request, engine.window, engine.loops)
    except ConfigError as error:
        raise _refusal(str(error), source) from error
    return request


def _refusal(message: str, source: str) -> ApiError:
    """The engine's refusal in the words of the API."""
    message = message.replace("max_new_tokens", "max_tokens").replace("--exit=", "exit = ")
    for field in ("temperature", "top_p", "top_k", "loops", "exit"):
        if message.startswith(f"{field} ="):
            return ApiError(400, message, field, "invalid_value")
    code = "context_length_exceeded" if "window" in message else "invalid_value"
    return ApiError(400, message, source, code)
