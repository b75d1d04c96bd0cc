"""One tree of exceptions, so that a caller can catch as much or as little as it wants.

PipelinesError               anything that this package raises on purpose
├── UsageError               the caller's mistake, found before work starts      (exit code 2)
│   ├── SettingsError        an unknown, ill-typed or impossible setting
│   │   └── UnknownArgumentError   of the facades' Args, as attribute (also an AttributeError)
│   ├── DataError            input that is missing, unreadable or of the wrong shape
│   ├── ModelFolderError     a model folder that is incomplete, unsafe or of another kind
│   └── OutputError          an output location that is in use or cannot be written
└── JobError                 work that started and could not be finished          (exit code 1)

Every message names the value, the limit it broke and what to do about it.
"""

from __future__ import annotations


class PipelinesError(Exception):
    """Root of the tree."""

    exit_code = 1


class UsageError(PipelinesError):
    """The caller's mistake; nothing was done."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


class UnknownArgumentError(SettingsError, AttributeError):
    """An argument that Simple Transformers does not have; an AttributeError too, so that hasattr answers."""


class DataError(UsageError):
    """Input that is missing, unreadable, or lacks what was asked of it."""


class ModelFolderError(UsageError):
    """A model folder that is incomplete, unsafe to open, or not what the command needs."""


class OutputError(UsageError):
    """An output location that is already used or cannot be written."""


class JobError(PipelinesError):
    """Work that began and could not be completed."""
