"""Entry point of `ray job submit` for `pipelines serve`. One YAML file holds the settings of the command line.

    ray job submit --working-dir . -- python -m ray_jobs.serve my-serve.yaml

Progress goes to the job's log. The exit code is that of `pipelines serve`.
"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ray_jobs.serve SETTINGS.yaml")
    sys.exit(main(["serve", "--config", sys.argv[1], "--json"]))
