"""Errors a user can act on. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DfssdError(Exception):
    """A mistake or a missing thing on the user's side.

    Args:
        what: what is wrong, in one sentence.
        where: file, stage, column or setting it was found in.
        todo: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
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


def _rebuild(what: str, where: str, todo: str) -> DfssdError:
    return DfssdError(what, where=where, todo=todo)


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
