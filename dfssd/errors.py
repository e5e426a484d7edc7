"""Errors a user can act on. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class DfssdError(Exception):
    """A mistake or a missing thing on the user's side.

    Args:
        what: what is wrong, in one sentence.
        where: file, stage, column or setting it was found in.
        todo: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = mask(what), mask(where), mask(todo)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.todo:
            lines.append(f"  to do: {self.todo}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders in Ray; keyword-only arguments need this to survive pickling.
        return (_rebuild, (self.what, self.where, self.todo))


class StorageError(DfssdError, OSError):
    """Storage does not answer, is full or may not be written: nothing is said about what lies there."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.what, self.where, self.todo, "StorageError"))


class DamagedFile(DfssdError, ValueError):
    """A file of the project was read completely, and does not hold what it should."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.what, self.where, self.todo, "DamagedFile"))


def _rebuild(what: str, where: str, todo: str, kind: str = "DfssdError") -> DfssdError:
    made: DfssdError = {"StorageError": StorageError, "DamagedFile": DamagedFile}.get(kind, DfssdError)(
        what, where=where, todo=todo
    )
    return made


_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
_KEY = re.compile(r"(?i)([?&](?:[\w-]*(?:key|secret|token|password|signature|credential)[\w-]*)=)[^&\s'\"]+")


def mask(text: str) -> str:
    """`text` without user, password or keys in the URIs it holds: they must not reach a log, a table or MLflow."""
    return _KEY.sub(r"\1***", _USER.sub("***@", text))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def find_user_error(error: BaseException) -> DfssdError | None:
    """Return the DfssdError inside `error`, looking through causes and Ray's wrappers, or None."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, DfssdError):
            return one
        queue += [one.__cause__, one.__context__, getattr(one, "cause", None)]
        queue += list(getattr(one, "worker_failures", {}).values())
        queue.append(getattr(one, "training_failed_error", None))
    return None
