"""Answers that are kept for requests which come again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered: an HTTP status and a JSON text, which may hold secrets."""

    status: int
    body: bytes
