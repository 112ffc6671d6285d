"""A part of JSON Schema, large enough for the bodies of requests, with errors in words.

One description of each field serves both the check of a body and the OpenAPI document. Read are
type, anyOf, enum, minimum, maximum, exclusiveMinimum, minLength, minItems, maxItems, items,
properties, required and additionalProperties; null stands for a field that is absent.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from ouro_jax.errors import nearest
from ouro_jax.inference.server.errors import ApiError

Schema = Mapping[str, Any]
_NAMES = {
    "string": "a text", "integer": "a whole number", "number": "a number",
    "boolean": "true or false", "array": "a list", "object": "an object",
}  # fmt: skip


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; ApiError 400 for anything else, NaN and lone surrogates too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"The body is not JSON ({error}): expected a JSON object in UTF-8.",
            code="invalid_json",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise ApiError(
            400, f"The body is {_shown(value)}: expected a JSON object.", code="invalid_json"
        )
    return value


def check(value: Any, schema: Schema, name: str) -> Any:
    """`value` as `schema` wants it, whole floats as ints and without null fields.

    Raises ApiError 400 that names the field, its value and what was expected.
    """
    if "anyOf" in schema:
        return _check_any(value, schema, name)
    kind = schema["type"]
    if not _has_type(value, kind):
        raise _wrong(value, schema, name, "invalid_type")
    if kind == "object":
        return check_fields(value, schema, f"{name}.")
    if kind == "integer":
        value = int(value)
    if not _in_range(value, kind, schema):
        raise _wrong(value, schema, name, "invalid_value")
    if kind == "array":
        items = schema["items"]
        return [check(item, items, f"{name}[{index}]") for index, item in enumerate(value)]
    return value


def check_fields(body: Mapping[str, Any], schema: Schema, prefix: str = "") -> dict[str, Any]:
    """The fields of an object, checked; null ones are left out. ApiError as in `check`."""
    fields = schema["properties"]
    for name in body:
        if name not in fields:
            shown = reprlib.repr(name)
            raise ApiError(
                400, f"{prefix}{name[:80]}: unknown field {shown}.{nearest(name[:80], fields)} "
                f"Expected only {', '.join(fields)}.", f"{prefix}{name[:80]}", "unknown_field",
            )  # fmt: skip
    for name in schema.get("required", ()):
        if body.get(name) is None:
            raise ApiError(
                400, f"{prefix}{name} is missing: expected {expected(fields[name])}.",
                prefix + name, "missing_field",
            )  # fmt: skip
    return {
        name: check(value, fields[name], prefix + name)
        for name, value in body.items()
        if value is not None
    }


def expected(schema: Schema) -> str:
    """What a value of `schema` is, in words."""
    if "anyOf" in schema:
        return ", or ".join(map(expected, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    words = _NAMES[schema["type"]]
    if schema["type"] == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        count = f"of {low} to {high}" if high else "of one or more" if low else ""
        return f"{words} {count}, each {expected(schema['items'])}".replace("  ", " ")
    if "minLength" in schema:
        words = "a text that is not empty"
    if "exclusiveMinimum" in schema:
        words += f" more than {schema['exclusiveMinimum']:g}"
    if "minimum" in schema and "maximum" in schema:
        return f"{words} from {schema['minimum']} to {schema['maximum']}"
    if "minimum" in schema:
        words += f", at least {schema['minimum']}"
    if "maximum" in schema:
        words += f" and at most {schema['maximum']}"
    return words


def _check_any(value: Any, schema: Schema, name: str) -> Any:
    errors = []
    for choice in schema["anyOf"]:
        try:
            return check(value, choice, name)
        except ApiError as error:
            errors.append(error)
    # The choice that came furthest knows best: its error is about a value inside.
    deepest = max(errors, key=lambda error: len(error.param or ""))
    if deepest.param != name and sum(e.param == deepest.param for e in errors) == 1:
        raise deepest
    raise _wrong(value, schema, name, "invalid_type")


def _has_type(value: Any, kind: str) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    if kind == "array":
        return isinstance(value, list)
    if kind == "object":
        return isinstance(value, dict)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return kind == "number" or isinstance(value, int) or value.is_integer()


def _in_range(value: Any, kind: str, schema: Schema) -> bool:
    if "enum" in schema and value not in schema["enum"]:
        return False
    if kind in ("string", "array"):
        unit = "Length" if kind == "string" else "Items"
        if not schema.get(f"min{unit}", 0) <= len(value) <= schema.get(f"max{unit}", math.inf):
            return False
        return kind == "array" or _is_text(value)
    if kind in ("integer", "number"):
        return (
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and value > schema.get("exclusiveMinimum", -math.inf)
        )  # fmt: skip
    return True


def _is_text(value: str) -> bool:
    """Whether UTF-8 can say it: JSON can spell halves of characters, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(value: Any, schema: Schema, name: str, code: str) -> ApiError:
    is_name = isinstance(value, str) and "enum" in schema and schema["type"] == "string"
    hint = nearest(value[:80], schema["enum"]) if is_name else ""
    words = f"{name} = {_shown(value)}: expected {expected(schema)}.{hint}"
    return ApiError(400, words, name, code)


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, dict | list) else reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
