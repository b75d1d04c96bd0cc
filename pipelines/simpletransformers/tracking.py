"""Track a training run with wandb, if the script asks for it with wandb_project and the package is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pipelines.errors import SettingsError
from pipelines.simpletransformers.arguments import ClassificationArgs


@contextmanager
def tracked(args: ClassificationArgs) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that logs numbers by name. It does nothing without wandb_project, or without wandb.

    Args:
        args: wandb_project, wandb_kwargs, and all other arguments, which become the config of the run.
    """
    if not args.wandb_project:
        yield _ignore
        return
    try:
        import wandb
    except ImportError:
        warnings.warn("wandb_project has no effect: pip install wandb", UserWarning, stacklevel=5)
        yield _ignore
        return
    active = wandb.run
    if active is not None:  # the caller's own run, such as one of a sweep, is used and stays open
        active.config.update(args.get_args_for_saving(), allow_val_change=True)
        yield lambda numbers: active.log(dict(numbers))
        return
    try:
        run = wandb.init(**{"project": args.wandb_project, "config": args.get_args_for_saving(), **args.wandb_kwargs})
    except TypeError as error:
        raise SettingsError(f"wandb_kwargs={dict(args.wandb_kwargs)} does not fit: {error}") from error
    try:
        yield lambda numbers: run.log(dict(numbers))
    finally:
        run.finish()


def _ignore(_numbers: Mapping[str, float]) -> None:
    """Log nothing."""
