"""A storage that fails as it is told to, below everything that the project does about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dfssd.runtime import retry, storage

Rule = Callable[[str, str], OSError | None]  # (operation, path) -> what it fails with


class _Files:
    """A pyarrow filesystem whose calls pass a rule first."""

    def __init__(self, inner: Any, rule: Rule) -> None:
        self._inner, self._rule = inner, rule

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if not callable(call):
            return call

        def checked(*args: Any, **kwargs: Any) -> Any:
            error = self._rule(name, str(args[0]) if args else "")
            if error is not None:
                raise error
            return call(*args, **kwargs)

        return checked


class _Clock:
    """Seconds that pass while somebody sleeps, and not otherwise: a busy machine does not use up what a storage is given."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def install(monkeypatch: Any, rule: Rule) -> None:
    """From here on every Storage asks the rule before it does anything; ("write", path) stands for a local write. What is
    tried again is so at once."""
    init, write = storage.Storage.__init__, storage._write_local

    def faulty(self: Any, uri: str) -> None:
        init(self, uri)
        self.fs = _Files(self.fs, rule)

    def checked(path: str, data: Any) -> None:
        error = rule("write", path)
        if error is not None:
            raise error
        write(path, data)

    monkeypatch.setattr(storage.Storage, "__init__", faulty)
    monkeypatch.setattr(storage, "_write_local", checked)
    clock = _Clock()
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    monkeypatch.setattr(retry, "_failing", {})


def failing(code: int, operation: str, part: str, times: int = 10**9) -> tuple[Rule, list[str]]:
    """A rule: the first `times` calls of `operation` on a path with `part` fail; and the list of those that did."""
    met: list[str] = []

    def rule(name: str, path: str) -> OSError | None:
        if name != operation or part not in path or len(met) >= times:
            return None
        met.append(path)
        return OSError(code, os.strerror(code), path)

    return rule, met


def eio(operation: str, part: str, times: int = 10**9) -> tuple[Rule, list[str]]:
    return failing(errno.EIO, operation, part, times)
