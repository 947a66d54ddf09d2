"""What is done to the words of a command line before they are parsed."""

from __future__ import annotations

from collections.abc import Sequence

# The options of `lume ssh` whose value may be a word of its own.
_TAKE_A_VALUE = frozenset(
    {"--user", "-u", "--password", "-p", "--timeout", "-t", "--storage", "--home"}
)


def keep_command_apart(tokens: Sequence[str]) -> list[str]:
    """A command line in which `--` stands before the command of `lume ssh`.

    So whatever comes after it is the guest's, also what looks like an option of ours.
    """
    rest = list(tokens)
    if rest[:1] != ["ssh"]:
        return rest
    at, has_name = 1, False
    while at < len(rest) and rest[at] != "--":
        if rest[at].startswith("-"):
            at += 2 if rest[at] in _TAKE_A_VALUE else 1
        elif has_name:
            return [*rest[:at], "--", *rest[at:]]
        else:
            at, has_name = at + 1, True
    return rest
