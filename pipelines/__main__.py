"""`python -m pipelines` is the `pipelines` command."""

from pipelines.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
