"""Run simulated histories.

python -m tests.simulation --seeds 0:10000        # prints each seed whose history breaks a promise
python -m tests.simulation --seeds 4711 --trace   # replays one, call by call
"""

import argparse
import logging
import sys
import time
import traceback

import pyarrow as pa

from pipelines.progress import ROOT
from tests.simulation.histories import broken_promise


def main():
    """Run the seeds. Returns 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:1000", help="SEED or FIRST:AFTER_LAST")
    parser.add_argument("--trace", action="store_true", help="print every storage call of a failing history")
    parser.add_argument("--stop", action="store_true", help="stop at the first broken promise")
    options = parser.parse_args()
    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    ROOT.setLevel(logging.CRITICAL)
    pa.set_cpu_count(1)  # the files are tiny
    started, failed = time.monotonic(), []
    for seed in seeds:
        problem, trace = broken_promise(seed, trace=options.trace)
        if problem is not None:
            failed.append(seed)
            print(f"seed {seed}: {''.join(traceback.format_exception_only(problem)).strip()}", flush=True)
            if options.trace:
                print("\n".join(trace))
                traceback.print_exception(problem)
            if options.stop:
                break
    seconds = time.monotonic() - started
    rate = len(seeds) / seconds * 3600
    print(f"{len(seeds):,} histories in {seconds:.1f} s ({rate:,.0f} an hour), {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
