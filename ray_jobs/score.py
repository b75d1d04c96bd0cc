"""Entry point of `ray job submit` for `pipelines score`. One YAML file holds the settings of the command line.

    ray job submit --working-dir . -- python -m ray_jobs.score my-score.yaml

Progress goes to the job's log. The last line of the log is the summary as JSON. The exit code is that of `pipelines
score`.
"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ray_jobs.score SETTINGS.yaml")
    sys.exit(main(["score", "--config", sys.argv[1], "--json"]))
