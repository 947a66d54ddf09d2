"""The ways in which a request can fail, as types.

Each error says what failed, with the values; `hint` says what to do about it; `fields` carries
the single reasons for machines to read. `code` is stable and part of the API. Which HTTP status
a type becomes is decided in one table, in `lumed.http.errors`.
"""

from __future__ import annotations

from collections.abc import Mapping


class LumedError(Exception):
    """Base of all expected failures. str(error) is the sentence that the user reads."""

    code = "internal"

    def __init__(
        self, message: str, *, hint: str | None = None, fields: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields: dict[str, object] = dict(fields or {})


class InvalidBody(LumedError):
    """The request body is no JSON, or no JSON object."""

    code = "invalid_body"


class InvalidField(LumedError):
    """A field is missing, of the wrong type or out of range; `fields` maps it to its reason."""

    code = "invalid_field"


class KeyReused(InvalidField):
    """An Idempotency-Key came again with another request."""

    code = "key_reused"


class Refused(LumedError):
    """The guard refused the request: foreign Host or Origin, or a form content type."""

    code = "refused"


class Unauthorized(LumedError):
    """The server asks for a token, and got none or another one."""

    code = "unauthorized"


class NotFound(LumedError):
    """What was asked for does not exist."""

    code = "not_found"


class Conflict(LumedError):
    """The name exists, the VM is in the wrong state, or another action holds it."""

    code = "conflict"


class AlreadyExists(Conflict):
    """A VM (or location) of that name exists."""

    code = "already_exists"


class WrongState(Conflict):
    """The VM's state does not allow the action; the message names both."""

    code = "wrong_state"


class Busy(Conflict):
    """Another action on the same VM is under way; `fields["action"]` names it."""

    code = "busy"


class NotPossibleHere(LumedError):
    """This host or engine can never do it as it is; the message says what would be needed."""

    code = "not_possible_here"


class NoSpace(LumedError):
    """Not enough space: the message says what is needed, what is there, and where."""

    code = "no_space"


class MissingDependency(LumedError):
    """A program, firmware or device is missing; `hint` is the command that mends it."""

    code = "missing_dependency"


class MachineFailed(LumedError):
    """QEMU or a helper of it ended, or refused a command; the message carries its last words."""

    code = "machine_failed"


class OutcomeUnknown(LumedError):
    """A command was sent and its answer lost: look before repeating it."""

    code = "outcome_unknown"


class Damaged(LumedError):
    """A file of ours (a VM's, or the settings) cannot be understood; it was left as it is."""

    code = "damaged"


class ToolFailed(LumedError):
    """A helper program (qemu-img and the like) failed; the message carries its last words."""

    code = "tool_failed"


class RegistryFailed(LumedError):
    """A registry or mirror could not be reached, refused, or sent wrong bytes."""

    code = "registry_failed"


class PullFailed(LumedError):
    """The VM is not there because the pull that should have made it failed (contract, 5)."""

    code = "pull_failed"


class TimedOut(LumedError):
    """Something did not happen before its deadline; the message says what and how long."""

    code = "timed_out"
