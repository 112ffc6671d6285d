"""`config.json` of the released Ouro models to ModelConfig and back.

Values that would change the computation and are not implemented are refused; all other fields
change nothing here and are carried along.
"""

from collections.abc import Mapping
from typing import Any

from ouro_jax.config import DTYPES, ModelConfig
from ouro_jax.errors import ConfigError

# ModelConfig's name to Hugging Face's, for the fields that every checkpoint states. The class
# defaults of the released code are Qwen2 leftovers and fit no checkpoint, so none is assumed.
_REQUIRED = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "num_loops": ("total_ut_steps", int),
    "norm_eps": ("rms_norm_eps", float),
}
# Null or absent: as many KV heads as heads; head_dim = hidden / heads; ModelConfig's defaults.
_OPTIONAL = {
    "num_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "initializer_range": ("initializer_range", float),
    "max_position_embeddings": ("max_position_embeddings", int),
}
# Fields with one implemented value, which is also the meaning of their absence.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "attention_bias": (False, None),
    "tie_word_embeddings": (False,),
    "use_sliding_window": (False, None),
}
QUANTIZATION_KEY = "quantization_config"
# What the int8 checkpoints of `ouro_jax.inference.quantize` say of themselves.
QUANTIZATION = {"quant_method": "int8", "bits": 8, "symmetric": True, "per_channel": True}
_DEFAULT_ROPE = ("default", None)
_DEFAULTS: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "model_type": "ouro",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "early_exit_threshold": 1.0,
    "hidden_act": "silu",
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def config_from_json(
    fields: Mapping[str, Any], tensor_dtype: str | None, source: str
) -> ModelConfig:
    """The ModelConfig of the fields of a `config.json`; `carried` keeps them all as they were.

    The compute dtype is `torch_dtype` (`dtype` in newer files), else `tensor_dtype`, else
    float32. Raises ConfigError, naming `source` and the key, for a missing field, a value of the
    wrong type and a value that is not implemented.
    """
    try:
        _require_implemented(fields)
        values = _values(fields)
        _require_full_attention(fields, values["num_layers"])
        dtype = _dtype(fields) or tensor_dtype or "float32"
        return ModelConfig(**values, dtype=dtype, carried=dict(fields))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def config_to_json(config: ModelConfig, quantised: bool = False) -> dict[str, Any]:
    """The fields of a `config.json` that the released code and vLLM accept.

    A config that was loaded gives back its own fields; only what has changed since (loops,
    layers, RoPE base, dtype) is written anew. `torch_dtype` is the compute dtype, so a model
    computes the same when it is loaded again, whatever dtype its tensors have. `quantised` says
    whether the matrices beside it are int8.
    """
    loaded = bool(config.carried)
    fields = dict(config.carried) if loaded else dict(_DEFAULTS)
    if fields.get("num_hidden_layers") != config.num_layers:
        fields["layer_types"] = ["full_attention"] * config.num_layers
        fields["max_window_layers"] = config.num_layers
    for name, (key, _) in _REQUIRED.items():
        if fields.get(key) != getattr(config, name):
            fields[key] = getattr(config, name)
    if _rope_theta(fields) != config.rope_theta:
        _set_rope_theta(fields, config.rope_theta)
    seen = _values(fields)
    for name, (key, _) in _OPTIONAL.items():
        value = getattr(config, name)
        if not loaded or seen.get(name, getattr(ModelConfig, name, None)) != value:
            fields[key] = value
    if (_dtype(fields) or (loaded and config.dtype)) != config.dtype:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = config.dtype
    if quantised:
        fields[QUANTIZATION_KEY] = dict(QUANTIZATION)
    elif fields.get(QUANTIZATION_KEY) is not None:
        del fields[QUANTIZATION_KEY]
    return fields


def _values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields, but the dtype, as a `config.json` states them."""
    missing = [key for key, _ in _REQUIRED.values() if fields.get(key) is None]
    if _rope_theta(fields) is None:
        missing.append("rope_theta")
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}.")
    values = {
        name: _number(fields, key, kind)
        for name, (key, kind) in {**_REQUIRED, **_OPTIONAL}.items()
        if fields.get(key) is not None
    }
    values["rope_theta"] = _rope_theta(fields)
    hidden, heads = values["hidden_size"], values["num_heads"]
    values.setdefault("num_kv_heads", heads)
    if "head_dim" not in values:
        _require(
            heads > 0 and hidden % heads == 0, fields, "num_attention_heads",
            f"a divisor of hidden_size = {hidden}, as head_dim is absent",
        )  # fmt: skip
        values["head_dim"] = hidden // heads
    return values


def _require_implemented(fields: Mapping[str, Any]) -> None:
    """Refuses, by key, every value that would change the computation in a way we do not have."""
    _require(fields.get("model_type") == "ouro", fields, "model_type", "'ouro'")
    for key, supported in _ONLY.items():
        _require(
            fields.get(key, supported[0]) in supported, fields, key,
            f"{supported[0]!r}, the only value implemented",
        )  # fmt: skip
    _require(
        fields.get(QUANTIZATION_KEY) in (None, QUANTIZATION), fields, QUANTIZATION_KEY,
        f"null or {QUANTIZATION}, the only quantisation implemented",
    )  # fmt: skip
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key)
        rope = value if isinstance(value, Mapping) else {}
        changed = set(rope) - {"rope_type", "type", "rope_theta"}
        plain = all(rope.get(name) in _DEFAULT_ROPE for name in ("rope_type", "type"))
        _require(
            plain and not changed and (value is None or isinstance(value, Mapping)), fields, key,
            "null or the type 'default': RoPE scaling is not implemented",
        )  # fmt: skip


def _require_full_attention(fields: Mapping[str, Any], num_layers: int) -> None:
    _require(
        fields.get("layer_types") in (None, ["full_attention"] * num_layers),
        fields, "layer_types", f"{num_layers} times 'full_attention', the only kind implemented",
    )  # fmt: skip


def _rope_theta(fields: Mapping[str, Any]) -> float | None:
    """From `rope_theta` or, in newer files, `rope_parameters`; a ConfigError if they differ."""
    places = [fields, fields.get("rope_parameters") or {}]
    thetas = {_number(place, "rope_theta", float) for place in places if place.get("rope_theta")}
    if len(thetas) > 1:
        raise ConfigError(
            f"rope_theta = {fields['rope_theta']!r}, but rope_parameters = "
            f"{fields['rope_parameters']!r}: expected the same base."
        )
    return thetas.pop() if thetas else None


def _set_rope_theta(fields: dict[str, Any], theta: float) -> None:
    """Writes the base where the file keeps it: `rope_parameters`, `rope_theta` or both."""
    rope = fields.get("rope_parameters")
    if rope and "rope_theta" in rope:
        fields["rope_parameters"] = {**rope, "rope_theta": theta}
    if "rope_theta" in fields or not (rope and "rope_theta" in rope):
        fields["rope_theta"] = theta


def _dtype(fields: Mapping[str, Any]) -> str | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.get(key)
    _require(dtype is None or dtype in DTYPES, fields, key, f"one of {', '.join(DTYPES)}")
    return dtype


def _number(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if type(value) is int or (kind is float and type(value) is float):
        return kind(value)
    expected = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{key} = {value!r}: expected {expected}.")


def _require(condition: bool, fields: Mapping[str, Any], key: str, expected: str) -> None:
    if not condition:
        seen = repr(fields[key]) if key in fields else "absent"
        raise ConfigError(f"{key} = {seen}: expected {expected}.")
