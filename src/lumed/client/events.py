"""What the server tells of itself, as it happens (`GET /lume/events`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumed.client.models import Json, Operation, Vm, parse_operation, parse_vm

if TYPE_CHECKING:
    from httpx2 import ServerSentEvent


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


def read_event(told: ServerSentEvent) -> Event:
    """An event of the stream. Raises ValueError, KeyError or TypeError for one that is none."""
    data = json.loads(told.data)
    vm = parse_vm(data) if told.event in ("vm", "vm-deleted") else None
    operation = parse_operation(data) if told.event == "operation" else None
    return Event(told.id, told.event, vm, operation, data)
