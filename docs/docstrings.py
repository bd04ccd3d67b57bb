"""Turns our docstrings into Markdown: arguments become a list, shapes and names become code, names become links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ITEM = re.compile(r"(\w+(?:, \w+)*): +(.*)")  # "obs: [B,O], the observations" or "low, high: [A], the bounds"
SHAPE = re.compile(r"(?<![\w`\]])\[[\w.,*+<>=:() -]*\](?!\()")  # [B,K,A], [...,2*O], [0,1]
ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


class Docstrings(griffe.Extension):
    """For each package that is read, once."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for obj in list(_objects(pkg)):
            if obj.docstring is not None:
                obj.docstring.value = _markdown(obj.docstring.value, _arguments(obj), obj) + _fields(obj)


def _objects(obj: Any) -> Iterator[Any]:
    """All that is defined in a module or class, and not imported into it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _arguments(obj: Any) -> set[str]:
    """The names that an item of the docstring may begin with."""
    if obj.is_class:
        init = obj.members.get("__init__")
        given = init.parameters if init is not None and init.is_function else ()
        return {*obj.members, *(p.name for p in given)}
    return {p.name for p in obj.parameters} if obj.is_function else set()


def _fields(obj: Any) -> str:
    """The fields of a class that a comment explains, as a list."""
    items = []
    for field in obj.members.values() if obj.is_class else ():
        if not field.is_attribute or field.docstring is not None or not (comment := _comment(field)):
            continue
        kind = f": {field.annotation}" if field.annotation else ""
        value = f" = {field.value}" if field.value is not None else ""
        items.append(f"\n\n`{field.name}{kind}{value}`\n:   {_inline(comment, obj)}")
    return "".join(items)


def _comment(field: Any) -> str:
    """The comment behind a field, or in the lines right above it."""
    lines = field.lines_collection[field.filepath]
    _, mark, comment = lines[field.endlineno - 1].partition("  # ")
    if mark:
        return "" if comment.startswith(("noqa", "type:")) else str(comment)
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)


def _markdown(text: str, names: set[str], obj: Any) -> str:
    out: list[str] = []
    inside, blank, args = False, True, False  # an item; after an empty line; under "Args:"
    for line in text.splitlines():
        if line.strip() == "Args:":
            args, inside = True, False
            continue
        flush = line[4:] if args and line.startswith("    ") else line
        item = ITEM.fullmatch(flush)
        if item and set(item[1].split(", ")) <= names:
            out += ["", ", ".join(f"`{name}`" for name in item[1].split(", ")), f":   {_inline(item[2], obj)}"]
            inside = True
        elif not line.strip():
            out.append("")
            inside = args = False
        elif inside and not line.startswith("Raises "):
            out.append(f"    {_inline(line.strip(), obj)}")
        elif line.startswith("    ") and (blank or out[-1].startswith("    ")):
            out.append(line)  # a block of code, or of mathematics
        else:
            out += [""] if inside else []
            out.append(_inline(line, obj))
            inside = False
        blank = not line.strip()
    return "\n".join(out)


def _inline(line: str, obj: Any) -> str:
    """One line's code, shapes and papers."""
    parts = re.split(r"``(.+?)``", line)
    parts[1::2] = [_code(part, obj) for part in parts[1::2]]
    parts[::2] = [_prose(part) for part in parts[::2]]
    return "".join(parts)


def _prose(text: str) -> str:
    pieces = re.split(rf"({SHAPE.pattern})", text)
    pieces[1::2] = [f"`{shape}`" for shape in pieces[1::2]]
    pieces[::2] = [ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", p.replace("*", r"\*")) for p in pieces[::2]]
    return "".join(pieces)


def _code(name: str, obj: Any) -> str:
    """A name as code, which is a link where the site has an entry for it."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return f"`{name}`"
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
