"""The `lume` command: names, options and help. What a command does is given by `main.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter, validators

from lumed import __version__
from lumed.cli.link import DEFAULT_PORT

_MACHINES = Group.create_ordered("Machines")
_IMAGES = Group.create_ordered("Images")
_HOST = Group.create_ordered("This host")
_APPLE = Group.create_ordered("Of Apple hosts only")

# By module of this package; imported when one is called, since `lume ls` has no use for the rest.
_COMMANDS = {
    "vms": (_MACHINES, "create ls get set clone stop shutdown restart delete"),
    "run": (_MACHINES, "run"),
    "look": (_MACHINES, "attach screenshot logs"),
    "ssh": (_MACHINES, "ssh cp"),
    "images": (_IMAGES, "pull push convert images prune image"),
    "config": (_HOST, "config"),
    "service": (_HOST, "service"),
    "completion": (_HOST, "completion"),
    "apple": (_APPLE, "setup ipsw sip"),
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


def build_cli(commands: Commands, words: Sequence[str]) -> App:
    """The command line over some work, for these words."""
    app = App(
        name="lume",
        help="Local virtual machines for programs: the Lume API on Linux.",
        version=__version__,
        result_action="return_value",
    )

    @app.command(group=_HOST)
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

    @app.command(group=_HOST)
    def doctor(
        *,
        home: Annotated[Path | None, Parameter(help="home directory (or LUME_HOME)")] = None,
    ) -> int:
        """Say what this host has and lacks for virtual machines, with the lines that mend it.

        Example: lume doctor
        """
        return commands.doctor(home)

    for module, (group, names) in _COMMANDS.items():
        for name in names.split():
            place = f"lumed.cli.{module}:{_FUNCTIONS.get(name, name)}"
            app.command(place, name=name, group=group)
    if not words or words[0] in ("--help", "-h"):
        # The list of all commands shows their texts only if they are there.
        for name in app:
            _ = app[name]
    return app
