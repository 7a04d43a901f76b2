"""A kill in the middle of a write: the end of a process that runs no handler, as a power cut would be."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Kill:
    """Ends this process at the n-th write, in the middle of what can be half done; None: counts them."""

    at: int | None
    seen: list[str] = field(default_factory=list)

    def __call__(self, what: str, half: Callable[[], Any] | None = None) -> None:
        self.seen.append(what)
        if len(self.seen) - 1 == self.at:
            if half is not None:
                half()
            os._exit(9)


def watched(kill: Kill, monkeypatch: pytest.MonkeyPatch, *more: tuple) -> None:
    """What is written, moved and taken away goes by the kill; `more` are (owner, name, how it is half done or None)."""

    def before(owner: Any, name: str, half: Callable | None = None) -> None:
        whole = getattr(owner, name)

        def write(*args, **rest):
            kill(name, half and (lambda: half(whole, *args, **rest)))
            return whole(*args, **rest)

        monkeypatch.setattr(owner, name, write)

    before(Path, "write_text", lambda whole, path, text, **rest: whole(path, text[: len(text) // 2], **rest))
    # a row was written and is pushed to the disk: its last bytes are not there
    before(os, "fsync", lambda whole, fd: os.ftruncate(fd, os.fstat(fd).st_size - 5))
    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
        before(owner, name)
    for owner, name, half in more:
        before(owner, name, half)


def killed(kill: Kill, work: Callable[[], Any], *more: tuple) -> int:
    """The exit status of a child that works until it is killed; 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            try:
                watched(kill, patch, *more)
                work()
                os._exit(0)
            finally:
                os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def writes(work: Callable[[], Any], *more: tuple) -> list[str]:
    """The names of the writes of some work, in their order."""
    kill = Kill(None)
    with pytest.MonkeyPatch.context() as patch:
        watched(kill, patch, *more)
        work()
    return kill.seen


def goes_on(work: Callable[[], Any], where: str) -> Any:
    """What the same work gives after a kill; an error of it is a failure that says where the kill fell."""
    try:
        return work()
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
