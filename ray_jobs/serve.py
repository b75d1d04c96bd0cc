"""What `ray job submit` runs to serve: one YAML file of the command line's own settings.

    ray job submit --working-dir . -- python -m ray_jobs.serve my-serve.yaml

Progress goes to the job's log, and the exit code is `pipelines serve`'s.
"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ray_jobs.serve SETTINGS.yaml")
    sys.exit(main(["serve", "--config", sys.argv[1], "--json"]))
