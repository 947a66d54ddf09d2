"""`lume completion`: what makes a shell complete the words of `lume`."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands, options, and names of machines and images.

    bash, at the end of ~/.bashrc: source <(lume completion bash)

    zsh, in ~/.zshrc behind compinit: source <(lume completion zsh)

    fish, once: lume completion fish > ~/.config/fish/completions/lume.fish

    Example: lume completion fish
    """
    sys.stdout.write((files("lumed.cli") / "shells" / f"lume.{shell}").read_text())
