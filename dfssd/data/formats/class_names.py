"""Class names: lists are checked, and `--names` is matched with the data's own names, never put in their place."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dfssd.data.formats.parsing import Unparsable, decode_text
from dfssd.errors import DfssdError, nearest
from dfssd.runtime.storage import read_uri

LIST_FILES = {
    "classes.txt",
    "obj.names",
    "_darknet.labels",
    "predefined_classes.txt",
    "class_names.txt",
    "classes.names",
}
NO_NAMES: tuple[Any, ...] = (None, "", "null", "~", [], {})  # what a data.yaml without names has in their place
_TODO = "write it as 'names: [scratch, pit]', or with the ids 0, 1, 2, ... as keys"


class NoClassNames(DfssdError):
    """Labels are there, but nothing says what their classes are called."""


def names_of_yaml(content: dict[str, Any], where: str) -> list[str]:
    """Class names of a parsed data.yaml by id; [] where it has none.

    Raises:
        DfssdError: keys are not 0 to n-1, a name is missing or comes twice, or `nc` is another number.
    """
    raw, count = content.get("names"), content.get("nc")
    if raw in NO_NAMES:
        # As Ultralytics does, which numbers the classes.
        return [f"class_{k}" for k in range(_whole(count, "nc", where))] if count not in (None, "", "null") else []
    if isinstance(raw, dict):
        names = _in_order(raw, where)
    elif isinstance(raw, list):
        names = raw
    else:
        raise DfssdError(f"'names: {raw}' is one word, not a list of class names", where=where, todo=_TODO)
    if any(isinstance(n, dict | list) for n in names):
        raise DfssdError("'names' holds something else than names", where=where, todo=_TODO)
    names = check_names([str(n) for n in names], where)
    if count not in (None, "", "null") and _whole(count, "nc", where) != len(names):
        raise DfssdError(
            f"'nc: {count}' and {len(names)} names ({', '.join(names[:8])}) disagree",
            where=where,
            todo="mend one of them",
        )
    return names


def _in_order(raw: dict[Any, Any], where: str) -> list[Any]:
    keys = [_whole(key, "a key of 'names'", where) for key in raw]
    if sorted(keys) != list(range(len(keys))):
        raise DfssdError(
            f"the class ids of 'names' are {sorted(keys)}, not 0 to {len(keys) - 1} without a gap",
            where=where,
            todo="give every id from 0 a name, also ids that no label has",
        )
    values = dict(zip(keys, raw.values(), strict=True))
    return [values[k] for k in range(len(keys))]


def _whole(value: Any, what: str, where: str) -> int:
    text = str(value).strip()
    if not text.isdecimal():
        raise DfssdError(f"{what} is {text!r}, not a whole number", where=where, todo=_TODO)
    return int(text)


def check_names(names: Sequence[str], where: str) -> list[str]:
    """The names without blanks around them.

    Raises:
        DfssdError: a name is empty or comes twice.
    """
    names = [n.strip() for n in names]
    for name, times in Counter(names).items():
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # control characters, half letters
            raise DfssdError(f"a class name is no line of text: {name!a}", where=where, todo="rename the class")
        if not name:
            raise DfssdError(f"class {names.index('')} has no name", where=where, todo="give every class a name")
        if times > 1:
            raise DfssdError(f"two classes are called {name!r}", where=where, todo="give every class a name of its own")
    return names


def names_of_list(path: str) -> list[str]:
    """Names of a `classes.txt` or `obj.names`, one a line.

    Raises:
        DfssdError: it is no text, a line between others is empty, or a name comes twice.
    """
    try:
        text = decode_text(read_uri(path))
    except (Unparsable, OSError) as error:
        raise DfssdError(f"a list of classes cannot be read: {error}", where=path, todo="save it as UTF-8") from error
    lines = text.rstrip().splitlines()
    if len(lines) > 1 and all(re.match(rf"\s*{k}\s*[:,\s]\s*\S", line) for k, line in enumerate(lines)):
        raise DfssdError(
            f"the list of classes has numbers before the names ({lines[0].strip()!r}, {lines[1].strip()!r}, ...)",
            where=path,
            todo="write one name a line: the first is class 0",
        )
    return check_names(lines, path)


def one_list(paths: Sequence[str]) -> list[str]:
    """Names of all class lists of a data set; LabelImg leaves one in each folder, and a later one may be longer.

    Raises:
        DfssdError: two of them disagree.
    """
    longest: list[str] = []
    source = ""
    for path in paths:
        names = names_of_list(path)
        shorter, longer = sorted((names, longest), key=len)
        if longer[: len(shorter)] != shorter:
            raise DfssdError(
                f"two lists of classes disagree: {source!r} and {path!r}",
                where=path,
                todo="the ids of labels cannot mean both: make the lists, and the labels, agree",
            )
        if len(names) > len(longest):
            longest, source = names, path
    return longest


def instead_of_numbers(given: Sequence[str], count: int, where: str) -> list[str]:
    """Names, of `--names` or a list, for classes of which a data.yaml says how many there are (`nc`), and no more.

    Raises:
        DfssdError: they are not as many.
    """
    names = check_names(given, where)
    if len(names) != count:
        raise DfssdError(
            f"{len(names)} names are given ({', '.join(names[:8])}), and the data has {count} classes (nc: {count})",
            where=where,
            todo="give every class a name, in the order of the ids",
        )
    return names


def spelt_alike(names: Sequence[str]) -> list[str]:
    """Sentences about names that differ by nothing but case and marks between words: one class, spelt in two ways?"""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"[\s_.-]+", "", name).casefold() or name, []).append(name)
    return [
        f"classes {' and '.join(map(repr, same))} differ in case and marks alone: two classes, or one in two spellings?"
        for same in alike.values()
        if len(same) > 1
    ]


def reconcile(given: Sequence[str], own: Sequence[str], declared: Sequence[str], where: str) -> list[str]:
    """Order of the classes: that of `--names`, which must be the data's own names where it has some.

    Args:
        given: `--names`.
        own: names that the data has.
        declared: further names that it lists without a box, which `--names` may contain.

    Raises:
        DfssdError: `--names` has a name that the data has not, or lacks one that it has.
    """
    given = check_names(given, "--names")
    if not given or not own:
        return given or list(own)
    known = list(dict.fromkeys([*own, *declared]))
    unknown = [n for n in given if n not in known]
    missing = [n for n in own if n not in given]
    if not unknown and not missing:
        return given
    said = [f"{n!r} is unknown{nearest(n, known)}" for n in unknown] + [f"{n!r} is missing" for n in missing]
    raise DfssdError(
        f"--names does not fit the data's own class names, and it renames none: {'; '.join(said)}",
        where=f"{where}, whose classes are {', '.join(map(repr, own))}",
        todo="leave --names out, or give exactly these names in the order you want",
    )
