"""Fill settings dataclasses from a flat mapping, check types and ranges, and look up help texts.

The string below a field is its help text. The settings themselves are in `pipelines.settings`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pipelines.errors import SettingsError

Function = TypeVar("Function", bound=Callable[..., Any])


def parse(values: Mapping[str, object], *groups: type[Any]) -> list[Any]:
    """Split a flat mapping of settings into one instance per settings group.

    Values may have YAML types: a list is accepted for a tuple, and the string "4e-5" for a float.

    Args:
        values: Settings by name.
        *groups: Settings dataclasses. A field name occurs in only one of them.

    Returns:
        One instance per group, in the order of groups.

    Raises:
        SettingsError: A name is in none of the groups (the message suggests the closest name), a required setting is
            missing, or a value has the wrong type or is out of range.
    """
    owners = {field.name: group for group in groups for field in dataclasses.fields(group)}
    for name in values:
        if name not in owners:
            nearest = difflib.get_close_matches(str(name), owners, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(owners))}"
            raise SettingsError(f"unknown setting {str(name)!r}; {hint}")
    required = [field for group in groups for field in dataclasses.fields(group) if field.default is MISSING]
    missing = [field.name for field in required if field.name not in values]
    if missing:
        lines = [f"{name} ({field_help(owners[name])[name].rstrip('.')})" for name in missing]
        which = "a required setting is missing" if len(missing) == 1 else "required settings are missing"
        raise SettingsError(f"{which}: {'; '.join(lines)}")
    return [group(**{n: v for n, v in values.items() if owners[n] is group}) for group in groups]


def plain(value: Any) -> Any:
    """Convert numpy numbers and arrays to Python numbers and lists, also inside lists and mappings.

    A pandas series becomes a mapping from its index to its values.
    """
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict") and hasattr(value, "index"):  # a series: its index names the values
        return {plain(key): plain(element) for key, element in value.to_dict().items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(key): plain(element) for key, element in value.items()}
    return value


def field_help(group: type[Any]) -> Mapping[str, str]:
    """Return the help text below each field of a settings group, by field name."""
    return _help_texts(group.__module__)[group.__name__]


def documented(*groups: type[Any]) -> Callable[[Function], Function]:
    """Return a decorator that appends the settings of some groups to the docstring of a function.

    Args:
        *groups: Settings dataclasses.
    """

    def append(function: Function) -> Function:
        lines = [f"{function.__doc__ or ''}", "    Settings:"]
        for group in groups:
            for field in dataclasses.fields(group):
                if field.default is not MISSING:
                    lines.append(f"        {field.name} ({field.default!r}): {field_help(group)[field.name]}")
        function.__doc__ = "\n".join(lines) + "\n    "
        return function

    return append


@cache
def _help_texts(module: str) -> dict[str, dict[str, str]]:
    """Parse the source of a module, and return the strings below the fields of its classes."""
    found: dict[str, dict[str, str]] = {}
    for definition in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(definition, ast.ClassDef):
            texts = found.setdefault(definition.name, {})
            for statement, following in itertools.pairwise(definition.body):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                ):
                    texts[statement.target.id] = str(following.value.value)
    return found


def check_range(
    group: object,
    name: str,
    value: float | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Check that a value is finite and within its limits. None is always accepted.

    Args:
        group: Settings instance that contains the value.
        name: Name of the setting, for the error message.
        value: Value to check.
        low: Smallest accepted value.
        high: Largest accepted value.
        above: The value must be greater than this.

    Raises:
        SettingsError: The value is not finite or is outside the limits.
    """
    if value is None or (math.isfinite(value) and low <= value <= high and value > above):
        return
    limits = [f"at least {low:g}"] * math.isfinite(low) + [f"at most {high:g}"] * math.isfinite(high)
    limits += [f"above {above:g}"] * math.isfinite(above)
    raise SettingsError(f"{name}={value} must be {' and '.join(limits) or 'finite'}")


def parse_range(name: str, value: int | str) -> tuple[int, int]:
    """Parse N or MIN:MAX.

    Args:
        name: Name of the setting, for the error message.
        value: N as int or string, or MIN:MAX.

    Returns:
        Minimum and maximum. They are equal for N.

    Raises:
        SettingsError: The value has neither form, or MIN is greater than MAX.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", str(value))
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise SettingsError(f"{name}={value!r} is neither a number nor MIN:MAX, such as 1:8")
    return int(found[1]), int(found[2] or found[1])


def check_types(group: Any) -> None:
    """Convert the fields of a settings instance from YAML types to their annotated types, in place.

    Raises:
        SettingsError: A value does not fit its annotated type.
    """
    hints = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        value = plain(getattr(group, field.name))
        options = _options(hints[field.name])
        for option in options:
            fits, coerced = _coerce(value, option)
            if fits:
                object.__setattr__(group, field.name, coerced)
                break
        else:
            wanted = " or ".join(_type_name(option) for option in options)
            raise SettingsError(f"{field.name}={value!r} must be {wanted}")


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, exact types before conversions (an int must not become a float)."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(sorted(options, key=lambda option: (option is float, option is str)))


def _coerce(value: Any, option: Any) -> tuple[bool, Any]:
    """Return whether the value fits the option, and the value converted to the option's type."""
    if option is Any:
        return True, value
    if get_origin(option) is Literal:
        return value in get_args(option), value
    if get_origin(option) is tuple:
        return _coerce_tuple(value, get_args(option)[0])
    if get_origin(option) is dict:
        return _coerce_dict(value, get_args(option)[1])
    if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _coerce_tuple(value: Any, item: Any) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    if item is str:  # YAML reads the labels 0 and 1 as numbers; what it reads as true may have been yes, on or true
        value = [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in value]
    pairs = [_coerce(element, item) for element in value]
    return all(fits for fits, _ in pairs), tuple(coerced for _, coerced in pairs)


def _coerce_dict(value: Any, item: Any) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, value
    pairs = {str(key): _coerce(element, item) for key, element in value.items()}
    return all(fits for fits, _ in pairs.values()), {key: coerced for key, (_, coerced) in pairs.items()}


def _type_name(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(repr(value) for value in get_args(option))
    if get_origin(option) is tuple:
        return f"a list of {_type_name(get_args(option)[0])}"
    if get_origin(option) is dict:
        return "a mapping of names to values"
    return "null" if option is type(None) else str(option.__name__)
