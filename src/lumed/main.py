"""The `lume` command: from its arguments to an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lumed.cli.app import Commands, ServeOptions, build_cli
from lumed.cli.output import complain
from lumed.cli.words import keep_command_apart
from lumed.errors import LumedError

_USAGE_ERROR = 64  # EX_USAGE, as Lume's own command


def main(argv: Sequence[str] | None = None) -> int:
    """The `lume` command. Failures are a sentence on stderr and an exit status."""
    from cyclopts import CycloptsError

    words = keep_command_apart(sys.argv[1:] if argv is None else argv)
    app = build_cli(Commands(serve=_serve, doctor=_doctor), words)
    try:
        result = app(words, exit_on_error=False, print_error=True)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_stdout()
        return 1
    except CycloptsError:
        return _USAGE_ERROR
    except LumedError as error:
        complain(error)
        return 1
    except OSError as error:
        # A home that cannot be made, written or locked.
        complain(
            LumedError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def _leave_stdout() -> None:
    """Whoever read it has gone; Python must not complain of that at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Imported when it is called: most commands only talk to a server.


def _serve(options: ServeOptions) -> int:
    from lumed.server import run_serve

    return run_serve(options)


def _doctor(home: Path | None) -> int:
    from lumed.server import run_doctor

    return run_doctor(home)
