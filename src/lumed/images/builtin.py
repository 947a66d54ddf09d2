"""The images that lumed makes by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from lumed.images.local import BuiltImage, Builtin
from lumed.images.tiny import build_tiny, tiny_version
from lumed.threads import run_to_end


def builtin_images() -> Mapping[str, Builtin]:
    """Every built-in image by name."""
    return {"tiny": Builtin(tiny_version(), _build_tiny)}


async def _build_tiny(directory: Path, report: Callable[[str], None]) -> BuiltImage:
    tiny = await run_to_end(partial(build_tiny, directory, report))
    return BuiltImage(tiny.disk, tiny.kernel, tiny.initramfs)
