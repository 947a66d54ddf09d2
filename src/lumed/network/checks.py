"""What `lume doctor` says about networking."""

from __future__ import annotations

from lumed.errors import MissingDependency
from lumed.model.host import Check
from lumed.network.host import find_default_interface, read_lowest_port
from lumed.osproc import get_program


async def check_network_tools() -> list[Check]:
    """Look at passt, the default route and low ports."""
    checks: list[Check] = []
    try:
        path = get_program("passt", package="passt")
        checks.append(Check("passt", True, "found", str(path)))
    except MissingDependency as error:
        detail = "guests can be reached, but cannot reach the outside"
        checks.append(Check("passt", False, "missing", detail, error.hint))
    interface = find_default_interface()
    detail = "" if interface else "guests cannot reach the outside"
    checks.append(Check("default route", interface is not None, interface or "none", detail))
    lowest = read_lowest_port()
    if lowest > 22:
        detail = f"guest ports below {lowest} are forwarded from higher ones, such as 10022 for 22"
        hint = "sudo sysctl net.ipv4.ip_unprivileged_port_start=22"
        checks.append(Check("low ports", True, f"from {lowest}", detail, hint))
    else:
        checks.append(Check("low ports", True, "all"))
    return checks
