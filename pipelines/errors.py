"""Exceptions of the package, as one tree, so that a caller can catch as broadly or as narrowly as it needs.

PipelinesError               every error that this package raises on purpose
├── UsageError               a mistake of the caller, found before work starts     (exit code 2)
│   ├── SettingsError        a setting that is unknown, of the wrong type or impossible
│   │   └── UnknownArgumentError   an argument that Simple Transformers does not have (also an AttributeError)
│   ├── DataError            input that is missing, unreadable or of the wrong shape
│   ├── ModelFolderError     a model folder that is incomplete, unsafe or of the wrong kind
│   └── OutputError          an output location that is in use or cannot be written
└── JobError                 work that started and then failed                     (exit code 1)

Every message names the value, the limit that it violates and the remedy.
"""

from __future__ import annotations


class PipelinesError(Exception):
    """Base class of all exceptions in this package."""

    exit_code = 1


class UsageError(PipelinesError):
    """A mistake of the caller. No work has been done."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting that is unknown, has the wrong type, or cannot be combined with another setting."""


class UnknownArgumentError(SettingsError, AttributeError):
    """An argument that Simple Transformers does not have. It is also an AttributeError, so that hasattr works."""


class DataError(UsageError):
    """Input that is missing, unreadable, or lacks a required column or value."""


class ModelFolderError(UsageError):
    """A model folder that is incomplete, unsafe to open, or unsuitable for the command."""


class OutputError(UsageError):
    """An output location that is already in use or cannot be written."""


class JobError(PipelinesError):
    """Work that started and could not be completed."""


def first_line(error: BaseException) -> str:
    """First line of the message of another library's exception, for use in a message of our own.

    This is the name of the exception's type if the message is empty.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on this machine: this is never the fault of a row."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, which is not loaded here
        return True
    return "DefaultCPUAllocator: can't allocate" in str(error)
