"""Names: of VMs and locations, and what is derived from them."""

from __future__ import annotations

import re
import secrets

from lumed.errors import InvalidField

_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOCATION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_vm_name(name: object, field: str = "name") -> str:
    """The VM name, or InvalidField. A name is also a folder's name, so the rule is strict.

    As in Lume, exactly one colon ("image:tag") becomes an underscore.
    """
    if isinstance(name, str) and name.count(":") == 1:
        name = name.replace(":", "_")
    if not isinstance(name, str) or not _VM_NAME.fullmatch(name):
        reason = (
            f"{name!r:.80} is not a VM name; use 1 to 64 letters, digits, dots, hyphens or "
            "underscores, starting with a letter or digit"
        )
        raise InvalidField(f"{field}: {reason}", fields={field: reason})
    return name


def check_location_name(name: object) -> str:
    """The location name, or InvalidField."""
    if not isinstance(name, str) or not _LOCATION_NAME.fullmatch(name):
        reason = f"{name!r:.80} is not a location name; use 1 to 64 letters, digits, _ or -"
        raise InvalidField(f"name: {reason}", fields={"name": reason})
    return name


def hostname_of(vm_name: str) -> str:
    """A host name (RFC 1123) for a VM."""
    return re.sub(r"[^a-z0-9-]", "-", vm_name.lower()).strip("-")[:63] or "lume"


def new_mac_address() -> str:
    """A random unicast MAC under QEMU's prefix 52:54:00."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def new_operation_id() -> str:
    """An id for an operation or staging folder."""
    return f"op-{secrets.token_hex(8)}"
