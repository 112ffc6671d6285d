"""Requests made up from the server's own OpenAPI: what it says of itself has to be true."""

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def schema(client):
    """The document that the live server gives."""
    return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


def chosen():
    """The checks of that name."""
    named = {check.__name__: check for check in schemathesis.checks.CHECKS.get_all()}
    return [named[check] for check in CHECKS]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_bodies_made_up_from_the_schema(client, schema, path, mode):
    statuses = set()

    @settings(
        max_examples=100, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call(base_url=str(client.base_url))
        case.validate_response(response, checks=chosen())
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}
        else:
            assert mode == schemathesis.GenerationMode.POSITIVE, f"answered {case.body}"

    ask()
    assert statuses >= ({400} if mode == schemathesis.GenerationMode.NEGATIVE else {200})


MESSAGES = [{"role": "user", "content": "x"}]
VALUES = (
    True, False, 0, 1, 2, 4, 5, -1, 1.5, 1.0, 1e9, 2**31, 300, "", "x", "full", "user", "q:0.5",
    [], {}, ["x"], [1], [[1]], ["x", 1], [""] , ["a"] * 5, [{}], {"include_usage": True},
    {"include_usage": 1}, MESSAGES, [{"role": "usr", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}], None,
)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_field_takes_what_the_document_says(client, path):
    document = client.get("/openapi.json").json()
    content = document["paths"][path]["post"]["requestBody"]["content"]
    validator = jsonschema.Draft202012Validator(content["application/json"]["schema"])
    whole = {"prompt": "x"} if "chat" not in path else {"messages": MESSAGES}
    fields = [*validator.schema["properties"], "unknown"]
    valid = 0
    for field in fields:
        for value in VALUES:
            # Fields that others need are there; a long answer would only take time.
            body = {"max_tokens": 1, "stream": field == "stream_options"} | whole | {field: value}
            if field == "max_completion_tokens":
                del body["max_tokens"]
            response = client.post(path, json=body)
            if not validator.is_valid(body):
                error = response.json()["error"]
                assert response.status_code == 400, (field, value)
                assert str(error["param"]).startswith(field), (field, value, error)
            else:
                valid += 1
                assert response.status_code in (200, 400, 404), (field, value, response.text)
    assert valid > 4 * len(fields)
