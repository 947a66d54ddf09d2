"""The composition root of `lume serve` and `lume doctor`: the only file that knows everybody."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lumed import __version__
from lumed.claim import RunLock, find_holder, take_lock
from lumed.cli.app import ServeOptions
from lumed.cli.doctor import print_checks
from lumed.client.discover import find_home, find_record
from lumed.errors import Conflict, InvalidField
from lumed.files import write_json
from lumed.log import EventLog, start_logging
from lumed.model.host import Check
from lumed.model.vm import Architecture
from lumed.osproc import find_process, get_program
from lumed.settings import Settings, read_settings, settings_path
from lumed.store.layout import Home
from lumed.units import GIB, describe_size

if TYPE_CHECKING:
    import ssl

    from lumed.http.listen import Address
    from lumed.model.host import Accelerator

_log = EventLog("server")

# Program, and the packages it needs.
_QEMU = {
    Architecture.AMD64: ("qemu-system-x86_64", "qemu-system-x86 qemu-utils"),
    Architecture.ARM64: ("qemu-system-aarch64", "qemu-system-arm qemu-efi-aarch64"),
}
_LOCK_PATIENCE_S = 2.0
_ENOUGH_SPACE_BYTES = 2 * GIB


def get_qemu(architecture: Architecture) -> Path:
    """The QEMU binary that runs guests of an architecture. Raises MissingDependency."""
    program, packages = _QEMU[architecture]
    return get_program(program, package=packages)


def _finder(home: Home, settings: Settings) -> Callable[[Architecture], Awaitable[Accelerator]]:
    from lumed.machine.qemu.accel import find_accelerator

    override = os.environ.get("LUME_ACCEL") or settings.accelerator

    async def find(architecture: Architecture) -> Accelerator:
        return await find_accelerator(home.cache, get_qemu(architecture), override=override)

    return find


def run_serve(options: ServeOptions) -> int:
    _start_faster()
    home, named = find_home(options.home)
    settings = read_settings(settings_path(home.root, named=named))
    home.prepare()
    lock = _take_server_lock(home)
    try:
        access = _find_access(home, options)
        with start_logging(home.logs, os.environ.get("LUME_LOG_LEVEL", "info")):
            asyncio.run(_run_server(home, settings, options, access))
    finally:
        lock.close()
    return 0


@dataclass(frozen=True, slots=True)
class _Access:
    """Who can reach the TCP ports, and what they are asked for there."""

    address: Address
    token: str | None
    tls: ssl.SSLContext | None


def _find_access(home: Home, options: ServeOptions) -> _Access:
    """All that can be wrong with it, before anything is bound. Raises InvalidField."""
    from lumed.http.listen import find_address
    from lumed.http.tls import read_tls
    from lumed.http.token import find_token, make_token, read_token

    address = find_address(options.host)
    tls = None
    if options.tls_cert is not None and options.tls_key is not None:
        tls = read_tls(options.tls_cert.expanduser(), options.tls_key.expanduser())
    if options.new_token:
        token: str | None = make_token(home.token)
        said = f"lume: the new token is {token}\n  it is kept in {home.token}, for later starts too"
        print(said, file=sys.stderr, flush=True)  # noqa: T201
    elif options.token_file is not None:
        token = read_token(options.token_file.expanduser())
    else:
        token = find_token(home.token)
    if token is None and not address.is_loopback:
        raise InvalidField(
            f"--host {options.host} can be reached from other machines: it needs a token",
            hint="make one with --new-token, or name one's file with --token-file",
            fields={"host": "needs a token"},
        )
    return _Access(address, token, tls)


def _start_faster() -> None:
    """Leave out what a start has no use for: a fifth of its half second of work."""
    # Hardly anything that is imported becomes garbage; http/serve.py switches it on again.
    gc.disable()
    # FastAPI imports pydantic's old models only to refuse them, and takes their absence well.
    sys.modules["pydantic.v1"] = None  # type: ignore[assignment]


def _take_server_lock(home: Home) -> RunLock:
    """The lock of the home's only server. Raises Conflict that says where that one listens."""
    give_up_at = time.monotonic() + _LOCK_PATIENCE_S
    while (lock := take_lock(home.server_lock)) is None:
        # A server that was just killed holds it for a moment longer: see claim.wait_unlocked.
        if find_holder(home.server_lock) is not None or time.monotonic() > give_up_at:
            raise _somebody_serves(home)
        time.sleep(0.005)
    return lock


def _somebody_serves(home: Home) -> Conflict:
    record = find_record(home)
    if record is None:
        return Conflict(f"A server for {home.root} is just starting")
    return Conflict(
        f"A server for {home.root} is running already: it listens on {record.url} "
        f"(process {record.pid})",
        hint="use that one, or give this one another --home",
    )


async def _run_server(
    home: Home, settings: Settings, options: ServeOptions, access: _Access
) -> None:
    # Imported here: `lume doctor` and --help have no use for a web framework.
    from lumed.http.app import build_app
    from lumed.http.guard import Guard, Rules
    from lumed.http.listen import bind_listeners, url_of
    from lumed.http.serve import Listener, serve
    from lumed.images.local import ImageCache
    from lumed.images.tiny import builtin_tiny
    from lumed.machine.qemu.driver import QemuDriver
    from lumed.service.local import start_engine

    socket_path = home.socket if options.socket is None else options.socket.expanduser().absolute()
    find = _finder(home, settings)
    cache = Path(settings.cache_directory) if settings.cache_directory else home.cache
    images = ImageCache(cache / "images", {"tiny": builtin_tiny()})
    async with start_engine(home, settings, QemuDriver(get_qemu, find), images, find) as engine:
        bound = bind_listeners(access.address, options.port, options.compat_port, socket_path)
        try:
            ending = asyncio.Event()
            app = build_app(engine, ending)
            rules = Rules(frozenset({options.host, access.address.ip}), access.token)
            url = url_of(bound.tcp, tls=access.tls is not None)
            listeners = [
                Listener(bound.tcp, Guard(app, rules), access.tls),
                Listener(bound.unix, Guard(app)),
            ]
            compat_url = None
            if bound.compat is not None:
                compat_url = url_of(bound.compat, tls=access.tls is not None)
                guard = Guard(app, replace(rules, compat=True))
                listeners.append(Listener(bound.compat, guard, access.tls))
            if not access.address.is_loopback and access.tls is None:
                _log.warning("no TLS: the token travels in clear", url=url)
            announce = partial(_announce, home, url, compat_url, socket_path)
            await serve(listeners, announce, ending)
        finally:
            home.server_json.unlink(missing_ok=True)
            bound.close()
    _log.info("server ended", pid=os.getpid())


def _announce(home: Home, url: str, compat_url: str | None, socket_path: Path) -> None:
    me = find_process(os.getpid())
    where = {"url": url, "socket": str(socket_path)}
    said = url
    if compat_url is not None:
        where["compatUrl"] = compat_url
        said = f"{url} and for Lume's own clients on {compat_url}"
    write_json(
        home.server_json,
        {
            **where,
            "pid": os.getpid(),
            "startTicks": me.start_ticks if me else 0,
            "version": __version__,
        },
        durable=False,
    )
    _log.info("server ready", home=home.root, **where)
    print(f"lumed {__version__} listens on {said} (home {home.root})", flush=True)  # noqa: T201


def run_doctor(given_home: Path | None) -> int:
    home, named = find_home(given_home)
    settings = read_settings(settings_path(home.root, named=named))
    return print_checks(asyncio.run(_collect_checks(home, settings)))


async def _collect_checks(home: Home, settings: Settings) -> list[Check]:
    from lumed.machine.qemu.checks import check_machine
    from lumed.network.checks import check_network_tools

    home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    override = os.environ.get("LUME_ACCEL") or settings.accelerator
    checks = await check_machine(home.cache, accel=override)
    checks += await check_network_tools()
    free = shutil.disk_usage(home.root).free
    enough = free >= _ENOUGH_SPACE_BYTES
    checks.append(
        Check(
            "free space",
            enough,
            f"{describe_size(free)} in {home.root}",
            hint=None if enough else "free some space, or choose another home with --home",
        )
    )
    return checks
