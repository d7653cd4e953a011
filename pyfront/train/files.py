"""Writing without ever leaving something half-written in the place of something good."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def move_into_place(new: Path, place: Path) -> None:
    """Renames the complete folder `new` to `place`; what was there is removed afterwards."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`; it takes its place at the end of the block, or is removed if the block raises."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    move_into_place(partial, place)


@contextmanager
def replacing_file(place: Path) -> Iterator[Path]:
    """A path beside `place` to write to; the file takes its place at the end, and is removed if the block raises."""
    partial = place.with_name(f".{place.stem}.partial{place.suffix}")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(place)
