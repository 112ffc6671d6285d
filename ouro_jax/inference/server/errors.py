"""What a client is told when something is wrong: OpenAI's error object, with a status."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An error that the client is told: HTTP status, words, the field, and a short code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON object that says it: `{"error": {message, type, param, code}}`."""
        return {
            "error": {
                "message": str(self),
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
