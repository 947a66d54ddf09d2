"""The QEMU guest agent's host side: questions to a program inside the guest.

The protocol is that of qemu-ga (QEMU's "Guest Agent Protocol Reference"): JSON lines, no
greeting, no event, and answers without ids. What a former call or client left unread is skipped by
`guest-sync-delimited`, whose answer begins with a byte 0xFF that is never part of JSON. (qemu.qmp
does not know that byte, so it is not used here.)

The connection stays open, and what comes when nobody asks is read away. An agent whose answer
nobody takes any more tries to write it for ever: one that was asked and left kept its guest's
processor busy until somebody connected again. And one to which nobody is connected looks ten times
a second whether somebody is. QEMU's socket serves one client at a time and keeps others waiting in
silence.

What an agent says comes out of the guest: it is checked like any foreign input.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lumed.errors import MachineFailed, OutcomeUnknown, TimedOut

# qemu-ga keeps at most 16 MiB of each output of a command, sent as base64.
_LONGEST_ANSWER = 48 << 20
_SKIP_BYTES = 64 << 10
_DELIMITER = b"\xff"


@dataclass(frozen=True, slots=True)
class GuestInterface:
    """A network card as the guest sees it. mac is lower case, None for the loopback."""

    name: str
    mac: str | None
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OsInfo:
    """The guest's system (os-release(5)); empty where the guest does not say."""

    id: str
    version_id: str
    pretty_name: str
    kernel: str


@dataclass(frozen=True, slots=True)
class ExecResult:
    """The end of a command: its status, or the signal that ended it. Outputs may be cut off."""

    exit_status: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool


class GuestAgent:
    """The agent behind one socket of QEMU's. Calls from several tasks wait for one another.

    Only one such object can be heard at a time, until it is closed. All methods raise TimedOut if
    no agent answers within timeout_s, and MachineFailed if the socket is gone, the agent refuses,
    or its answer makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = asyncio.Lock()
        self._link: _Link | None = None
        self._discarding: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Leave the agent to others; the next call connects again."""
        if self._discarding is not None:
            self._discarding.cancel()
            self._discarding = None
        if self._link is not None:
            self._link.abort()
            self._link = None

    async def ping(self, timeout_s: float) -> None:
        """Return once the agent has answered."""
        await self._ask("guest-ping", {}, timeout_s)

    async def network_addresses(self, timeout_s: float) -> list[GuestInterface]:
        """The guest's cards, each with its addresses (IPv4 and IPv6, without prefix)."""
        answer = await self._ask("guest-network-get-interfaces", {}, timeout_s)
        return [_read_interface(item) for item in _as_list(answer)]

    async def os_info(self, timeout_s: float) -> OsInfo:
        """Which system the guest runs."""
        answer = _as_mapping(await self._ask("guest-get-osinfo", {}, timeout_s))
        return OsInfo(
            id=_text(answer, "id"),
            version_id=_text(answer, "version-id"),
            pretty_name=_text(answer, "pretty-name"),
            kernel=_text(answer, "kernel-release"),
        )

    async def shutdown(self, timeout_s: float) -> None:
        """Ask the guest to power off; returns once the agent has taken the order.

        The agent does not answer this command unless it fails. It takes commands one by one, so
        an answer to what is asked next, or the end of the connection, means that it was taken.
        Raises OutcomeUnknown if neither comes.
        """
        async with self._connection(timeout_s) as link:
            await link.sync()
            link.sent = "guest-shutdown"
            await link.send("guest-shutdown", {"mode": "powerdown"})
            try:
                await link.sync(raise_errors=True)
            except (EOFError, ConnectionError):
                return

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes | None = None, timeout_s: float
    ) -> ExecResult:
        """Run a program in the guest, as the agent's user (root), and wait for its end.

        Raises OutcomeUnknown if it may have been started and no end was seen within timeout_s:
        the agent has no command to stop it, so it may still run.
        """
        request: dict[str, object] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "capture-output": True,
        }
        if stdin is not None:
            request["input-data"] = base64.b64encode(stdin).decode()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        answer = _as_mapping(await self._ask("guest-exec", request, timeout_s, changes=True))
        pid = _whole_number(answer, "pid")
        if pid is None:
            raise _nonsense(answer)
        pause_s = 0.02
        while True:
            left_s = deadline - loop.time()
            if left_s > 0:
                try:
                    answer = _as_mapping(await self._ask("guest-exec-status", {"pid": pid}, left_s))
                except TimedOut:
                    left_s = 0
            if left_s <= 0:
                raise OutcomeUnknown(
                    f"{argv[0]} did not end in the guest within {timeout_s:g} s and may still run",
                    hint="its process id in the guest is in fields",
                    fields={"pid": pid},
                )
            if answer.get("exited") is True:
                return _read_exec_result(answer)
            await asyncio.sleep(min(pause_s, max(left_s, 0)))
            pause_s = min(pause_s * 1.5, 0.5)

    async def _ask(
        self,
        command: str,
        arguments: Mapping[str, object],
        timeout_s: float,
        *,
        changes: bool = False,
    ) -> object:
        async with self._connection(timeout_s) as link:
            await link.sync()
            # A question may simply be asked again, so only a change has an unknown outcome.
            link.sent = command if changes else None
            await link.send(command, arguments)
            return await link.receive()

    async def _connect(self) -> _Link:
        """The connection there is, or a new one."""
        task, self._discarding = self._discarding, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})  # a stream has one reader at a time
        if self._link is None or self._link.has_ended:
            self.close()
            streams = await asyncio.open_unix_connection(self._path, limit=_LONGEST_ANSWER)
            self._link = _Link(*streams)
        self._link.sent = None
        return self._link

    async def _discard(self, link: _Link) -> None:
        """Read away what comes while nobody asks; leave a guest that goes on and on."""
        with contextlib.suppress(OSError):
            await link.skip(_LONGEST_ANSWER)
        if self._link is link:
            self._link = None
        link.abort()

    @contextlib.asynccontextmanager
    async def _connection(self, timeout_s: float) -> AsyncIterator[_Link]:
        link: _Link | None = None
        try:
            async with asyncio.timeout(timeout_s), self._turn:
                link = await self._connect()
                try:
                    yield link
                finally:
                    self._discarding = asyncio.create_task(self._discard(link))
        except TimeoutError as error:
            if link is not None and link.sent:
                raise _lost(link.sent, f"no answer within {timeout_s:g} s") from error
            raise TimedOut(f"The guest agent did not answer within {timeout_s:g} s") from error
        except (OSError, EOFError) as error:
            if link is not None and link.sent:
                raise _lost(link.sent, "the connection ended") from error
            raise MachineFailed(
                f"The guest agent's socket cannot be used: {error or 'the connection ended'}",
                hint="look whether the machine still runs",
            ) from error


class _Link:
    """One connection. sent names the command whose outcome would be unknown if it broke now."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.sent: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more can come."""
        return self._reader.at_eof() or self._writer.is_closing()

    def abort(self) -> None:
        """Hang up; what is unsent to a silent agent is dropped."""
        self._writer.transport.abort()

    async def skip(self, most: int) -> None:
        """Read what comes until the end, or until it was more than that."""
        while most > 0 and (data := await self._reader.read(_SKIP_BYTES)):
            most -= len(data)

    async def send(self, command: str, arguments: Mapping[str, object], lead: bytes = b"") -> None:
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        self._writer.write(lead + json.dumps(request).encode() + b"\n")
        await self._writer.drain()

    async def sync(self, *, raise_errors: bool = False) -> None:
        """Skip everything up to the agent's answer to this very call.

        With raise_errors an error among what is skipped raises MachineFailed.
        """
        number = secrets.randbelow(1 << 31)
        # The leading 0xFF makes the agent drop a half-sent request of a former client; it would
        # also make it complain, so it is left out where complaints count.
        lead = b"" if raise_errors else _DELIMITER
        await self.send("guest-sync-delimited", {"id": number}, lead)
        while True:
            line = await self._line()
            before, delimiter, rest = line.rpartition(_DELIMITER)
            if raise_errors:
                for part in (before, rest):
                    _raise_error(_parse(part) if part.strip() else {})
            if delimiter and _parse(rest).get("return") == number:
                return

    async def receive(self) -> object:
        """The value that the agent returned. Raises MachineFailed if it returned an error."""
        answer = _parse(await self._line())
        _raise_error(answer)
        self.sent = None
        if "return" not in answer:
            raise _nonsense(answer)
        return answer["return"]

    async def _line(self) -> bytes:
        try:
            line = await self._reader.readline()
        except ValueError as error:
            raise MachineFailed("The guest agent's answer is too long") from error
        if not line.endswith(b"\n"):
            raise EOFError("the connection ended")
        return line


def _lost(command: str, why: str) -> OutcomeUnknown:
    return OutcomeUnknown(f"{command} was sent to the guest agent, and then {why}")


def _nonsense(answer: object) -> MachineFailed:
    return MachineFailed(f"The guest agent's answer makes no sense: {str(answer)[:200]}")


def _parse(line: bytes) -> Mapping[str, object]:
    try:
        return _as_mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _raise_error(answer: Mapping[str, object]) -> None:
    if "error" in answer:
        error = answer["error"]
        words = error.get("desc") if isinstance(error, dict) else error
        raise MachineFailed(f"The guest agent refused: {str(words)[:500]}")


def _as_mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _nonsense(value)
    return value


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _nonsense(value)
    return value


def _text(answer: Mapping[str, object], key: str) -> str:
    value = answer.get(key)
    return value[:200] if isinstance(value, str) else ""


def _whole_number(answer: Mapping[str, object], key: str) -> int | None:
    value = answer.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_interface(value: object) -> GuestInterface:
    item = _as_mapping(value)
    addresses: list[str] = []
    for entry in _as_list(item.get("ip-addresses", [])):
        try:
            address = ipaddress.ip_address(_text(_as_mapping(entry), "ip-address"))
        except ValueError:
            continue
        addresses.append(str(address))
    mac = _text(item, "hardware-address").lower()
    is_real = mac not in ("", "00:00:00:00:00:00")
    return GuestInterface(_text(item, "name"), mac if is_real else None, tuple(addresses))


def _read_exec_result(answer: Mapping[str, object]) -> ExecResult:
    try:
        out, err = (
            base64.b64decode(value if isinstance(value, str) else "")
            for value in (answer.get("out-data"), answer.get("err-data"))
        )
    except (binascii.Error, ValueError) as error:
        raise _nonsense("output that is no base64") from error
    return ExecResult(
        exit_status=_whole_number(answer, "exitcode"),
        signal=_whole_number(answer, "signal"),
        stdout=out,
        stderr=err,
        truncated=bool(answer.get("out-truncated") or answer.get("err-truncated")),
    )
