"""YAML with line numbers: every mistake of a file in one error, each with its place."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from smlt_tune.errors import InvalidInput

_MISSING = object()


class Mistake(ValueError):
    """One value is wrong; the text says what was expected."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing."""
    close = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Mistakes:
    """Collects what is wrong with one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, message: str) -> None:
        """Notes a mistake; ``line`` counts from 1."""
        self._found.append((line, message))

    def refuse(self) -> None:
        """Raises one error for all mistakes, in the order of the file.

        Raises:
            InvalidInput: There is at least one.
        """
        if self._found:
            raise InvalidInput(
                [f"{self.path}:{line}: {message}" for line, message in sorted(self._found)]
            )


class Section:
    """One mapping of the document, taken apart key by key."""

    def __init__(self, node: yaml.MappingNode, where: str, mistakes: Mistakes) -> None:
        self.line = node.start_mark.line + 1
        self.mistakes = mistakes
        self._where = where
        self._nodes: dict[Any, yaml.Node] = {}
        self._key_lines: dict[Any, int] = {}
        self._taken: set[str] = set()
        for key_node, value_node in node.value:
            key, line = construct(key_node), key_node.start_mark.line + 1
            if key in self._nodes:
                mistakes.add(line, f"{where}{key} appears twice, first in line {self.line_of(key)}")
            self._nodes[key] = value_node
            self._key_lines[key] = line

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    def names(self) -> list[str]:
        """All keys, as text, in the order of the file."""
        return [str(key) for key in self._nodes]

    def line_of(self, key: Any) -> int:
        """Where a key stands; the section's own line if it is absent."""
        return self._key_lines.get(key, self.line)

    def put(self, key: str, value: Any) -> None:
        """Replaces a value; the key keeps its place."""
        node = yaml.compose(yaml.safe_dump(value), Loader=yaml.SafeLoader)
        assert node is not None
        self._nodes[key] = node

    def plain(self) -> dict[Any, Any]:
        """Everything in it as plain values; without what cannot be understood."""
        found = {}
        for key, node in self._nodes.items():
            with suppress(Mistake):
                found[key] = construct(node)
        return found

    def wrong(self, key: str, message: str) -> None:
        """Notes a mistake at a key."""
        self.mistakes.add(self.line_of(key), f"{self._where}{key}: {message}")

    def take(self, key: str, convert: Callable[[Any], Any], default: Any = _MISSING) -> Any:
        """The value of a key.

        Args:
            key: Its name.
            convert: Checks the value and returns it in its final form; the text of its
                :class:`Mistake` is kept.
            default: For an absent key; without it the key is required.

        Returns:
            The converted value. After a mistake the default or None: the caller goes on, so that
            all mistakes are found, and :meth:`Mistakes.refuse` ends it.
        """
        self._taken.add(key)
        fallback: Any = None if default is _MISSING else default
        node = self._nodes.get(key)
        if node is None:
            if default is _MISSING:
                self.mistakes.add(self.line, f"{self._where}{key} is missing")
            return fallback
        try:
            return convert(construct(node))
        except Mistake as error:
            self.wrong(key, str(error))
            return fallback

    def section(self, key: str) -> "Section | None":
        """The mapping under a key, or None if there is none."""
        self._taken.add(key)
        node = self._nodes.get(key)
        if isinstance(node, yaml.MappingNode):
            return Section(node, f"{self._where}{key}.", self.mistakes)
        return None

    def refuse_others(self) -> None:
        """Notes every key that nobody took."""
        for key in self._nodes:
            if key not in self._taken:
                hint = did_you_mean(key, self._taken)
                self.mistakes.add(
                    self.line_of(key), f"unknown setting {self._where}{key}{hint or self._known()}"
                )

    def _known(self) -> str:
        return f"; known: {', '.join(sorted(self._taken))}"


def construct(node: yaml.Node) -> Any:
    """The plain value of a node."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise Mistake(f"not understood: {error}") from error
    finally:
        loader.dispose()


def read(path: Path, given: Mapping[str, Any] | None = None) -> Section:
    """The top of a YAML file.

    Args:
        path: The file.
        given: Settings that replace those of the file.

    Raises:
        InvalidInput: There is no such file, or it is no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InvalidInput(f"{path}: cannot be read: {reason}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or "unreadable"
        raise InvalidInput(f"{path}:{line}: not YAML: {problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise InvalidInput(f"{path}:1: expected settings such as 'trials: 20'")
    top = Section(node, "", Mistakes(path))
    for key, value in (given or {}).items():
        top.put(key, value)
    return top
