"""Look at the processes of this machine: parents, descendants, and whether one has ended."""

from __future__ import annotations

from pathlib import Path


def parent_of(pid: int) -> int:
    """Return the process that the kernel calls the parent."""
    return _live()[pid]


def descendants_of(pid: int) -> set[int]:
    """Return the live processes of which this one is the parent, or the parent's parent, …"""
    parents, found = _live(), {pid}
    while more := {each for each, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, even if nobody has asked how."""
    return pid not in _live()


def _live() -> dict[int, int]:
    """Return the parent of each live process."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if state != "Z":
            parents[int(file.parent.name)] = int(parent)
    return parents
