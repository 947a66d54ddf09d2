"""From an error to an HTTP answer: one table, one shape.

The shape is `{"message","error","code","hint"?,"fields"?}`; message and error hold the same
sentence, since one client knows failure only by the key `error` (contract, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lumed import errors
from lumed.log import EventLog

_log = EventLog("http")

# The first class that an error is an instance of decides.
STATUS: tuple[tuple[type[errors.LumedError], int], ...] = (
    (errors.InvalidBody, 400),
    (errors.InvalidField, 422),
    (errors.Unauthorized, 401),
    (errors.Refused, 403),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.Damaged, 409),
    (errors.NotPossibleHere, 501),
    (errors.NoSpace, 507),
    (errors.PullFailed, 400),
    (errors.RegistryFailed, 502),
    (errors.MissingDependency, 503),
    (errors.TimedOut, 504),
)


def status_of(error: errors.LumedError) -> int:
    """The HTTP status of an error; 500 where no other fits."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def error_body(
    message: str,
    code: str,
    hint: str | None = None,
    fields: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """The one shape of a failure."""
    body: dict[str, object] = {"message": message, "error": message, "code": code}
    if hint is not None:
        body["hint"] = hint
    if fields:
        body["fields"] = dict(fields)
    return body


def error_response(error: errors.LumedError) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(
        error_body(error.message, error.code, error.hint, error.fields), status_of(error)
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure an answer of the one shape."""

    @app.exception_handler(errors.LumedError)
    async def lumed_error(request: Request, error: errors.LumedError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_explain(error.errors()))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> JSONResponse:
        return error_response(errors.InvalidBody("Invalid request body: it is nested too deeply"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        if error.status_code == 404:
            body = error_body(f"No such route: {path}", "unknown_route")
        elif error.status_code == 405:
            body = error_body(f"{request.method} is not possible on {path}", "wrong_method")
        elif error.status_code == 413:
            body = error_body(error.detail, "too_large")
        else:
            body = error_body(f"Invalid request body: {error.detail}", "invalid_body")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        _log.exception("request failed", error, method=request.method, path=request.url.path)
        return JSONResponse(
            error_body(
                f"Internal error: {type(error).__name__}",
                "internal",
                "the reason is in the log: GET /lume/logs?type=error",
            ),
            500,
        )


def _explain(problems: Sequence[Any]) -> errors.LumedError:
    """pydantic's findings as InvalidBody (no JSON object at all) or InvalidField."""
    fields: dict[str, object] = {}
    for problem in problems:
        place, kind = problem["loc"], problem["type"]
        if kind == "json_invalid":
            reason = problem.get("ctx", {}).get("error", "no JSON")
            return errors.InvalidBody(f"Invalid request body: {reason}")
        if place == ("body",):
            if kind == "missing":
                return errors.InvalidBody("Invalid request body: it is missing")
            return errors.InvalidBody("Invalid request body: it must be a JSON object")
        name = ".".join(str(part) for part in place[1:]) or str(place[0])
        # A size or a name was refused by our own parser, whose sentence is better.
        cause = problem.get("ctx", {}).get("error")
        reason = str(cause) if cause is not None else str(problem["msg"])
        fields.setdefault(name, "it is missing" if kind == "missing" else reason)
    sentence = "; ".join(f"{name}: {reason}" for name, reason in fields.items())
    return errors.InvalidField(sentence, fields=fields)
