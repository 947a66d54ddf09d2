"""What a shell completes: names of a server that runs, and never at the shell's cost."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from lumed.main import main
from tests.doubles.one_vm import running, serve_one_vm

SCRIPT = str(files("lumed.cli") / "shells" / "lume.bash")
ODD = ["two words", "$(touch bad)", "`touch bad`", "it's;touch bad", "a\ttouch\nbad", 'q"', "*"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose server has the running VM `web` and some images."""
    home = tmp_path / "home"
    with serve_one_vm(home, running(("127.0.0.1", 22)), ["debian:12", "debian:13", *ODD]):
        yield home


def complete(
    home: Path, *words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """What `lume __complete` tells a shell of the last of these words."""
    monkeypatch.setenv("LUME_HOME", str(home))
    monkeypatch.setenv("CYCLOPTS_COMPLETION_WORDS", "".join(f"{word}\x1f" for word in words))
    assert main(["__complete"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    lines = told.out.split("\x1fbegin\n", 1)[1].splitlines()
    return [line.split("\t")[0] for line in lines]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("get ", ["web"]),
        ("get x", []),
        ("ssh -u root w", ["web"]),
        ("clone web ", []),
        ("create web ", []),
        ("create web --image debian:1", ["debian:12", "debian:13"]),
        ("run d", ["debian:12", "debian:13"]),
        ("run w", ["web"]),
        ("image delete debian:12", ["debian:12"]),
        ("cp ./x w", ["\x1ffiles", "web:"]),
        ("logs e", ["error"]),
        ("run web --wait=", ["\x1fprefix", "ip", "ssh", "agent"]),
        ("config storage de", ["default"]),
        ("no such command ", []),
    ],
)
def test_the_word_that_is_meant_decides(
    words: str,
    told: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = complete(home, *words.split(" "), monkeypatch=monkeypatch, capfd=capfd)
    assert found == told


def test_no_server_is_started_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    assert complete(home, "get", "", monkeypatch=monkeypatch, capfd=capfd) == []
    assert not home.exists()


def bash(home: Path, words: list[str], *, breaks: str = " \t\n\"'><=;|&(:") -> list[str]:
    """The replies of the function in a real bash; words as readline splits them."""
    folder = home.parent / "bin"
    folder.mkdir(exist_ok=True)
    lume = folder / "lume"
    lume.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lumed "$@"\n')
    lume.chmod(0o755)
    script = (
        'source "$1"; shift; line=$1; shift; COMP_WORDBREAKS=$1; shift; '
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE=$line; COMP_POINT=${#line}; _lume; '
        'for reply in "${COMPREPLY[@]}"; do printf "%s\\n" "$reply"; done'
    )
    line = words[0]
    for before, word in pairwise(words):
        glued = before[-1:] in ("=", ":") or word[:1] in ("=", ":")
        line += word if glued and before != words[0] else f" {word}"
    ended = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", SCRIPT, line, breaks, *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        cwd=folder,
        env={**os.environ, "LUME_HOME": str(home), "PATH": f"{folder}:{os.environ['PATH']}"},
    )
    assert ended.stderr == ""
    assert not (folder / "bad").exists()
    return ended.stdout.splitlines()


def test_bash_completes_commands_options_and_names(home: Path) -> None:
    assert bash(home, ["lume", "sc"]) == ["screenshot"]
    assert bash(home, ["lume", "get", "web", "--form"]) == ["--format"]
    assert bash(home, ["lume", "get", "w"]) == ["web"]


def test_bash_completes_behind_the_colons_and_equal_signs_at_which_it_splits(home: Path) -> None:
    assert bash(home, ["lume", "run", "debian", ":", "1"]) == ["12", "13"]
    assert bash(home, ["lume", "run", "web", "--wait", "=", "ag"]) == ["agent"]
    assert bash(home, ["lume", "run", "debian:1"], breaks=" \t\n") == ["debian:12", "debian:13"]


def test_bash_completes_paths(home: Path) -> None:
    assert bash(home, ["lume", "cp", "lu"]) == ["lume"]
    assert bash(home, ["lume", "create", "x", "--image", "./"]) == ["./lume"]


def test_names_that_are_not_plain_are_quoted_for_bash(home: Path) -> None:
    replies = bash(home, ["lume", "image", "delete", ""])
    words = subprocess.check_output(
        ["bash", "-c", 'eval "set -- $1"; printf "%s\\0" "$@"', "bash", " ".join(replies)],
        cwd=home,
        text=True,
    )
    assert words.split("\0")[:-1] == ["debian:12", "debian:13", *(o for o in ODD if "\n" not in o)]
    assert not (home / "bad").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "__complete" in capfd.readouterr().out
