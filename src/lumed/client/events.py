"""What the server tells of itself, as it happens (`GET /lume/events`)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lumed.client.models import Json, Operation, Vm, parse_operation, parse_vm


@dataclass(frozen=True, slots=True)
class Event:
    """Something has changed; `id` is what to resume from.

    kind is "vm", "vm-deleted", "operation", or "reset": what was known may be out of date, list
    anew (it is also the first event of a stream that does not resume). A newer server may have
    more kinds.
    """

    id: str
    kind: str
    vm: Vm | None
    operation: Operation | None
    raw: Json


class EventReader:
    """Events from the lines of a stream (WHATWG HTML, 9.2, as far as lumed's server uses it)."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def feed(self, line: bytes) -> Event | None:
        """Take a line; the event that it completes.

        Raises ValueError, KeyError or TypeError for one that is none.
        """
        text = line.decode(errors="replace").rstrip("\r\n")
        if text:
            name, _, value = text.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        return _make_event(fields) if "data" in fields else None


def _make_event(fields: dict[str, str]) -> Event:
    data, kind = json.loads(fields["data"]), fields.get("event", "message")
    vm = parse_vm(data) if kind in ("vm", "vm-deleted") else None
    operation = parse_operation(data) if kind == "operation" else None
    return Event(fields.get("id", ""), kind, vm, operation, data)
