"""Settings from YAML: files of settings by name, and single values as the command line gives them."""

from __future__ import annotations

import re
from typing import Any

import yaml

from pipelines.errors import SettingsError, first_line


def read_config(path: str) -> dict[str, object]:
    """The settings in a YAML file, by name.

    Raises:
        SettingsError: The file cannot be read, or does not hold a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(), path)
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path} contains no mapping of settings, such as `epochs: 3`")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """A YAML value. Raises SettingsError that names `where` it stands."""
    try:
        return yaml.load(text, Loader=_Loader)  # a safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise SettingsError(f"{where}{place}: no valid YAML: {problem}") from error


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2: off and no are words, 1:8 is no number of base 60, and 1e-4 is a number.

    A name that occurs twice in a mapping is an error, as in YAML 1.2.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises a YAML error if a name occurs twice."""
        names: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Patterns of the scalars, and the characters with which they begin."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
