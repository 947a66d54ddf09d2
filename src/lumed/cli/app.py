"""The `lume` command: names, options and help. What a command does is given by `main.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter, validators

from lumed import __version__
from lumed.cli.link import DEFAULT_PORT

_LAZY = {
    "vms": ("create", "ls", "get", "set", "clone", "stop", "shutdown", "restart", "delete"),
    "run": ("run",),
    "look": ("attach", "screenshot", "logs"),
    "ssh": ("ssh", "cp"),
    "completion": ("completion",),
    "service": ("service",),
    "images": ("pull", "push", "convert", "images", "prune", "image"),
    "config": ("config",),
    "apple": ("setup", "ipsw", "sip"),
}
_FUNCTIONS = {"set": "set_", "image": "image_app", "config": "config_app", "service": "service_app"}


_PORT = validators.Number(gte=0, lte=65535)
_TOKEN = Group("Token", validator=validators.mutually_exclusive)
_TLS = Group("TLS", validator=validators.all_or_none)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `lume serve` was told."""

    host: str
    port: int
    compat_port: int | None
    socket: Path | None
    home: Path | None
    token_file: Path | None
    new_token: bool
    tls_cert: Path | None
    tls_key: Path | None


@dataclass(frozen=True, slots=True)
class Commands:
    """The commands' work; each returns the exit status."""

    serve: Callable[[ServeOptions], int]
    doctor: Callable[[Path | None], int]


def build_cli(commands: Commands) -> App:
    """The command line over some work."""
    app = App(
        name="lume",
        help="Local virtual machines for programs: the Lume API on Linux.",
        version=__version__,
        result_action="return_value",
    )

    @app.command
    def serve(
        *,
        port: Annotated[
            int, Parameter(help="TCP port; 0 picks a free one", validator=_PORT)
        ] = DEFAULT_PORT,
        compat_port: Annotated[
            int | None,
            Parameter(
                help="a second port, for Lume's own clients: diskSize in bytes", validator=_PORT
            ),
        ] = None,
        host: Annotated[
            str, Parameter(help="address to listen on; others than loopback need a token")
        ] = "127.0.0.1",
        socket: Annotated[Path | None, Parameter(help="unix socket, beside the ports")] = None,
        home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None,
        token_file: Annotated[
            Path | None,
            Parameter(
                group=_TOKEN, help="file of mode 0600 with the ports' token (else HOME/token)"
            ),
        ] = None,
        new_token: Annotated[
            bool, Parameter(group=_TOKEN, negative=(), help="make a token and keep it in the home")
        ] = False,
        tls_cert: Annotated[
            Path | None, Parameter(group=_TLS, help="certificate of the ports (PEM)")
        ] = None,
        tls_key: Annotated[Path | None, Parameter(group=_TLS, help="its key (PEM)")] = None,
    ) -> int:
        """Serve the API until Ctrl-C; machines keep running when it ends.

        A token, once there, is asked for on every TCP port, as `Authorization: Bearer TOKEN`; the
        unix socket is for the server's own user and root, and asks for none.

        Example: lume serve --port 7777
        """
        return commands.serve(
            ServeOptions(
                host=host,
                port=port,
                compat_port=compat_port,
                socket=socket,
                home=home,
                token_file=token_file,
                new_token=new_token,
                tls_cert=tls_cert,
                tls_key=tls_key,
            )
        )

    @app.command
    def doctor(
        *,
        home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None,
    ) -> int:
        """Say what this host has and lacks for virtual machines, with the lines that mend it.

        Example: lume doctor
        """
        return commands.doctor(home)

    for place, names in _LAZY.items():
        for name in names:
            # Imported when it is called: `lume ls` has no use for the rest.
            app.command(f"lumed.cli.{place}:{_FUNCTIONS.get(name, name)}", name=name)
    return app
