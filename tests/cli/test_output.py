"""Tables and text as commands show them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lumed.cli.output import Column, clean, plan_table

COLUMNS: tuple[Column[tuple[str, str]], ...] = (
    Column("NAME", lambda row: row[0]),
    Column("STATUS", lambda row: row[1]),
    Column("IMAGE", lambda row: "debian:12", 2),
    Column("VNC", lambda row: "vnc://:secret@127.0.0.1:5900", 9),
)
ROWS = [("a", "stopped"), ("a-name-that-is-long", "running")]


def test_columns_never_run_together_and_line_up() -> None:
    lines = plan_table(COLUMNS, ROWS)
    assert lines[0] == "NAME                 STATUS   IMAGE      VNC"
    starts = {line.index("debian:12") for line in lines[1:]}
    assert starts == {lines[0].index("IMAGE")}


@pytest.mark.parametrize(("width", "kept"), [(200, 4), (45, 3), (39, 3), (38, 2), (5, 2)])
def test_what_does_not_fit_is_left_out_and_never_cut(width: int, kept: int) -> None:
    lines = plan_table(COLUMNS, ROWS, width)
    assert len(lines[0].split()) == kept
    assert "a-name-that-is-long" in lines[2]
    if width >= 30:
        assert max(map(len, lines)) <= width


def test_nothing_that_drives_a_terminal_gets_through() -> None:
    evil = "\x1b]0;title\x07 \x9b2J \x7f \r \x00 \u202etxt"
    shown = clean(evil)
    assert shown.isprintable()
    assert "\\x1b" in shown
    assert clean("plain\ttext\n") == "plain\ttext\n"
    assert "\x1b" not in "".join(plan_table(COLUMNS, [("a\x1b[2J", "b\nc")]))


def test_an_empty_cell_is_a_dash() -> None:
    assert plan_table(COLUMNS[:2], [("", "stopped")])[1].split() == ["-", "stopped"]


def test_a_command_loads_neither_asyncio_nor_the_server() -> None:
    code = (
        "import sys; from lumed.main import main; import lumed.cli.vms, lumed.client.client;"
        "print(sorted({'asyncio', 'yaml', 'rich', 'fastapi', 'lumed.server'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert ended.stdout == "[]\n"
