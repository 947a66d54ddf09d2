"""From an answer that says no to the error that the server meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumed.errors import LumedError


class ServerUnreachable(LumedError):
    """Nobody answers where the server should be, or it went away before it answered."""

    code = "server_unreachable"


def make_error(code: str, message: str, hint: str | None, fields: Any = None) -> LumedError:
    """The error of that code; a LumedError that carries the code if it is a new one."""
    kind = next((kind for kind in _all_kinds(LumedError) if kind.code == code), LumedError)
    error = kind(message, hint=hint, fields=fields if isinstance(fields, dict) else None)
    error.code = code
    return error


def read_error(status: int, reply: Any) -> LumedError:
    """The error in the body of an answer, as contract.md, section 5, shapes it."""
    if not isinstance(reply, dict) or "message" not in reply:
        return LumedError(f"The server answered {status}, without a reason that can be read")
    code, hint = reply.get("code"), reply.get("hint")
    return make_error(str(code or "internal"), str(reply["message"]), hint, reply.get("fields"))


def _all_kinds(kind: type[LumedError]) -> Iterator[type[LumedError]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _all_kinds(sub)
