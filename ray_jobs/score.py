"""What `ray job submit` runs to score: one YAML file of the command line's own settings.

    ray job submit --working-dir . -- python -m ray_jobs.score my-score.yaml

Progress goes to the job's log, its last line is the summary as JSON, and the exit code is `pipelines score`'s.
"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ray_jobs.score SETTINGS.yaml")
    sys.exit(main(["score", "--config", sys.argv[1], "--json"]))
