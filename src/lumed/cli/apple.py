"""The commands that mean something on Apple hosts only: each says so."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lumed.errors import NotPossibleHere

_Rest = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def setup(*arguments: _Rest) -> None:
    """Not on this host: macOS's setup assistant.

    Example: lume create web --image debian:12 --user-data cloud-config.yaml
    """
    raise NotPossibleHere(
        "The setup assistant is macOS's, which needs Apple hardware and Apple's framework",
        hint="Linux guests are set up by cloud-init: lume create --user-data FILE",
    )


def ipsw(*arguments: _Rest) -> None:
    """Not on this host: the address of macOS's restore image.

    Example: lume images
    """
    raise NotPossibleHere(
        "An IPSW installs macOS, which needs Apple hardware and Apple's framework",
        hint="Linux images: lume create NAME --image debian:12",
    )


def sip(*arguments: _Rest) -> None:
    """Not on this host: macOS's System Integrity Protection.

    Example: lume doctor
    """
    raise NotPossibleHere("SIP is macOS's, which needs Apple hardware and Apple's framework")
