"""What a client is told when something is refused or fails, in OpenAI's form, so that its client raises the right class:
{"error": {"message", "type", "param", "code"}}.
"""

from typing import Any

from starlette.responses import JSONResponse

from retro_engine.errors import MissingExtraError, OutOfResourceError, RetroError, UnavailableError, UsageError
from retro_engine.generate.engine import BusyError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer with a status of 400 and more."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def response(self, path: str = "") -> JSONResponse:
        """`path`: of the request; Anthropic's client looks for a type beside the error."""
        kind = {"type": "error"} if path.startswith("/v1/messages") else {}
        return JSONResponse({**kind, **self.body()}, self.status, self.headers)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientLeft(Exception):
    """There is nobody to answer."""


def api_error(error: RetroError) -> ApiError:
    """What the engine, the library and the tokenizer raise, with its status."""
    message = ": ".join(part for part in (error.what, error.why) if part)
    if isinstance(error, BusyError):
        return ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, OutOfResourceError):
        return ApiError(503, message, code="no_space", headers={"retry-after": "30"})
    if isinstance(error, UnavailableError):
        return ApiError(503, message, code="unavailable", headers={"retry-after": "2"})
    if isinstance(error, UsageError):
        return ApiError(400, message)
    if isinstance(error, MissingExtraError):
        return ApiError(501, f"{message} (on the server: {error.do})", code="missing_extra")
    return ApiError(500, message, code=type(error).__name__)
