"""Who we are to a registry: challenges, tokens' answers, and where logins are kept.

RFC 9110, section 11 (challenges); the distribution project's "Token Authentication
Specification"; docker's config.json and credential helpers (docker-login(1)), and
containers-auth.json(5), which has the same shape.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumed.errors import LumedError, RegistryFailed
from lumed.files import read_json_object
from lumed.log import EventLog
from lumed.osproc import run_tool_blocking

_log = EventLog("images")

_HELPER_S = 10.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What a helper gives as the user's name with an identity token (docker-credential-helpers).
_TOKEN_USER = "<token>"  # noqa: S105 - a name
_SHORTEST_LIFE_S = 60  # of a token that does not say, by the specification
# A token this near to its end is not used to begin anything.
_TOKEN_MARGIN_S = 10.0
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A login. With an identity token (OAuth 2 refresh token), password is empty."""

    username: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The Authorization header of HTTP's basic scheme."""
        login = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(login).decode()}"


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a server offers; scheme and parameters' names in small letters."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token; good_until is a little before its end (time.monotonic)."""

    value: str = field(repr=False)
    good_until: float


_CHALLENGE_PART = re.compile(
    r"""[\s,]*(?:
    (?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*
        (?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^\s,"]*))
    |(?P<scheme>[!#$%&'*+.^_`|~0-9A-Za-z-]+)
        (?:[ \t]+[A-Za-z0-9._~+/-]+=*(?=\s*(?:,|$)))?
    )""",
    re.VERBOSE,
)


def parse_challenges(headers: Sequence[str]) -> tuple[Challenge, ...]:
    """The challenges of all WWW-Authenticate headers of a reply; what makes no sense ends one."""
    found: list[Challenge] = []
    for header in headers:
        parameters: dict[str, str] | None = None
        at = 0
        while match := _CHALLENGE_PART.match(header, at):
            at = match.end()
            if match["scheme"]:
                parameters = {}
                found.append(Challenge(match["scheme"].lower(), parameters))
            elif parameters is not None:
                quoted = match["quoted"]
                value = match["bare"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters.setdefault(match["name"].lower(), value or "")
    return tuple(found)


def parse_token(body: bytes, server: str, began: float) -> Token:
    """The token in a token server's reply to a request of the moment `began` (time.monotonic).

    Raises RegistryFailed, without the reply's content.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        reply = None
    value = (reply.get("token") or reply.get("access_token")) if isinstance(reply, dict) else None
    if not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise RegistryFailed(f"The token server {server} sent no token")
    life = reply.get("expires_in")
    if not isinstance(life, (int, float)) or isinstance(life, bool) or not 0 < life < 1e9:
        life = _SHORTEST_LIFE_S
    return Token(value, began + life - min(_TOKEN_MARGIN_S, life / 4))


def find_credentials(
    host: str, environ: Mapping[str, str] | None = None, home: Path | None = None
) -> Credentials | None:
    """The login for a registry's host from the environment (ghcr.io only) or docker's files.

    Files that cannot be read and helpers that fail count as empty and are told to the log: the
    image may well be public. Blocks for up to 10 s if a helper hangs.
    """
    environ = os.environ if environ is None else environ
    home = home or Path.home()
    if host == "ghcr.io":
        token = environ.get("GITHUB_TOKEN") or environ.get("GHCR_TOKEN")
        user = environ.get("GITHUB_USERNAME") or environ.get("GHCR_USERNAME")
        if token:
            # GitHub looks at the token only.
            return Credentials(user or "token", token)
    for path in _config_files(environ, home):
        try:
            config = read_json_object(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            _log.warning("login file not read", path=path, reason=type(error).__name__)
            continue
        if found := _find_in_config(config, host, path):
            return found
    return None


def _config_files(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    docker = environ.get("DOCKER_CONFIG")
    yield (Path(docker) if docker else home / ".docker") / "config.json"
    if path := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(path)
    if path := environ.get("XDG_RUNTIME_DIR"):
        yield Path(path, "containers", "auth.json")


def _find_in_config(config: Mapping[str, Any], host: str, path: Path) -> Credentials | None:
    hosts = _DOCKER_HUB if host in _DOCKER_HUB else (host,)
    helpers = _mapping(config.get("credHelpers"))
    helper = next((helpers[name] for name in hosts if name in helpers), config.get("credsStore"))
    if isinstance(helper, str) and helper:
        server = "https://index.docker.io/v1/" if host in _DOCKER_HUB else host
        if found := _ask_helper(helper, server):
            return found
    for key, entry in _mapping(config.get("auths")).items():
        # Keys are hosts, or URLs of old: https://index.docker.io/v1/.
        name, _, rest = re.sub(r"^https?://", "", key).partition("/")
        if name in hosts and rest.strip("/") in ("", "v1", "v2"):
            if found := _parse_entry(_mapping(entry)):
                return found
            _log.warning("login not understood", path=path, registry=host)
    return None


def _parse_entry(entry: Mapping[str, Any]) -> Credentials | None:
    username, password = entry.get("username"), entry.get("password")
    if isinstance(auth := entry.get("auth"), str) and auth:
        try:
            username, colon, password = (
                base64.b64decode(auth, validate=True).decode().partition(":")
            )
        except (binascii.Error, UnicodeDecodeError):
            return None
        # docker pads some with NUL.
        username, password = username, password.rstrip("\0")
        if not colon:
            return None
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials(username if isinstance(username, str) else "", "", token)
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credentials(username, password)
    return None


def _ask_helper(name: str, server: str) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(name):
        _log.warning("credential helper has no proper name", helper=f"{name:.60}")
        return None
    program = f"docker-credential-{name}"
    try:
        reply = json.loads(
            run_tool_blocking([program, "get"], timeout_s=_HELPER_S, stdin=server.encode())
        )
    except (LumedError, OSError, ValueError) as error:
        # "Not found" is a failure too; what it printed may be anything.
        _log.info("credential helper gave nothing", helper=program, reason=type(error).__name__)
        return None
    entry = _mapping(reply)
    username, secret = entry.get("Username"), entry.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        return None
    if username == _TOKEN_USER:
        return Credentials("", "", secret)
    return Credentials(username, secret)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
