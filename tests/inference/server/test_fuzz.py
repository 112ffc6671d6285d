"""Requests made up from the server's own OpenAPI: what it says of itself has to be true."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
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
        max_examples=40, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call(base_url=str(client.base_url))
        case.validate_response(response, checks=chosen())
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert set(response.json()) == {"error"}

    ask()
    assert statuses >= ({400} if mode == schemathesis.GenerationMode.NEGATIVE else {200})
