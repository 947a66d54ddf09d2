"""What the server tells of itself, as it happens (`GET /lume/events`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    """Events from a stream's bytes (WHATWG HTML, 9.2, as far as lumed's server uses it)."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Event]:
        """Take the next bytes; the events that they complete.

        Raises ValueError, KeyError or TypeError for one that is none.
        """
        *texts, self._rest = (self._rest + piece).split(b"\n\n")
        for text in texts:
            # Not splitlines: names in the data may hold what ends a line elsewhere.
            fields = dict(line.partition(": ")[::2] for line in text.decode().split("\n"))
            if "data" in fields:
                yield _make_event(fields)


def _make_event(fields: dict[str, str]) -> Event:
    data, kind = json.loads(fields["data"]), fields.get("event", "message")
    vm = parse_vm(data) if kind in ("vm", "vm-deleted") else None
    operation = parse_operation(data) if kind == "operation" else None
    return Event(fields.get("id", ""), kind, vm, operation, data)
