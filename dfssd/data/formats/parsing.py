"""Text, XML, YAML and JSON of other programs: what cannot be parsed ends in one kind of error, which says the line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import yaml
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# What programs mean by these names: a superset, or the code page of Windows.
_MEANT = {
    **{"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950", "shift_jis": "cp932", "shift-jis": "cp932"},
    **{"sjis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "iso-8859-1": "cp1252", "windows-31j": "cp932"},
    **{"unicode": "utf-16", "utf8": "utf-8"},
}
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([A-Za-z0-9._:-]+)["']""")


class Unparsable(ValueError):
    """A file that cannot be parsed: one sentence, with the line where it is known."""


def decode_text(data: bytes, encoding: str = "utf-8") -> str:
    """Text with any byte order mark taken off.

    Raises:
        Unparsable: it is not in the encoding.
    """
    for mark, marked in _MARKS:
        if data.startswith(mark):
            encoding = marked
            break
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Unparsable(
            f"line {line}: the text is not encoded as {encoding.upper().replace('-SIG', '')}; save it as UTF-8"
        ) from error


def parse_xml(data: bytes) -> Element:
    """Root of an XML file, in whatever encoding it declares; entities and external references are refused.

    Raises:
        Unparsable: it is no well-formed XML, or not in the encoding it declares.
    """
    found = _DECLARED.match(data)
    declared = found.group(1).decode().lower() if found else "utf-8"
    declared = _MEANT.get(declared, declared)
    try:
        codecs.lookup(declared)
    except LookupError as error:
        raise Unparsable(f"line 1: it declares the encoding {declared!r}, which nobody knows") from error
    if declared.startswith("utf-16") and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        declared = "utf-8"  # the declaration itself was readable as bytes, so that it cannot be true
    text = decode_text(data, declared)
    try:
        return fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text, count=1))
    except ParseError as error:
        raise Unparsable(f"no well-formed XML: {error}") from error
    except DefusedXmlException as error:
        raise Unparsable(f"XML with entities or references to other files, which are refused ({error!r})") from error
    except (ValueError, RecursionError) as error:
        raise Unparsable(f"no readable XML: {error}") from error


def parse_yaml(data: bytes) -> Any:
    """Content of a YAML file with every scalar as the text it is: `off`, `1e3` and `010` are names like others.

    Raises:
        Unparsable: it is no YAML.
    """
    return _parsed(data, "YAML", lambda text: yaml.load(text, yaml.BaseLoader))  # which builds dicts, lists and strings


def parse_json(data: bytes) -> Any:
    """Content of a JSON file.

    Raises:
        Unparsable: it is no JSON.
    """
    return _parsed(data, "JSON", json.loads)


def _parsed(data: bytes, kind: str, read: Callable[[str], Any]) -> Any:
    """What `read` makes of the text; the errors of both parsers become one, with the line where there is one."""
    text = decode_text(data)
    try:
        return read(text)
    except json.JSONDecodeError as error:
        raise Unparsable(f"line {error.lineno}: no valid JSON, {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        hint = " (indent with blanks, not with tabs)" if "\\t" in str(error.problem) else ""
        if "escape character" in str(error.problem):
            hint = " (write Windows paths with '/', or without double quotes)"
        raise Unparsable(f"{where}no valid YAML, {error.problem or error.context}{hint}") from error
    except RecursionError as error:
        raise Unparsable(f"{kind} nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise Unparsable(f"no valid {kind}, {str(error).splitlines()[0]}") from error
