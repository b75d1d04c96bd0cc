"""Write a real multi-label corpus from the package lists of Debian: what a package is, and its 30 most frequent tags.

python benchmarks/package_tags.py /tmp/tags            # needs `apt-cache`: train/, valid/ and test/ in Parquet
pipelines train --train /tmp/tags/train --valid /tmp/tags/valid --kind multilabel --label-column labels ...
"""

import argparse
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_TAGS = 30


def packages():
    """Yield the fields of each package that has tags, by name."""
    listing = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for record in listing.split("\n\n"):
        lines = record.replace("\n ", " ").splitlines()
        fields = dict(line.split(": ", 1) for line in lines if ": " in line)
        if "Tag" in fields and "Description" in fields:
            yield fields


def text_of(fields):
    """Name, description and dependencies: what a person would look at to tag the package."""
    return "\n".join([f"{fields['Package']}: {fields['Description']}", f"Depends: {fields.get('Depends', 'nothing')}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=4_000, help="packages for training; as many as half for valid")
    options = parser.parse_args()
    found = list(packages())
    tags = [fields["Tag"].replace(",", " ").split() for fields in found]
    usual = [tag for tag, _ in Counter(tag for one in tags for tag in one).most_common(NUM_TAGS)]
    table = pa.table(
        {
            "text": [text_of(fields) for fields in found],
            "labels": [[tag for tag in one if tag in usual] for one in tags],
        }
    ).take(np.random.default_rng(0).permutation(len(found)))
    edges = np.cumsum([0, options.train, options.train // 2, len(table)])
    for name, start, stop in zip(("train", "valid", "test"), edges[:-1], edges[1:], strict=True):
        (options.output / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(start, stop - start), options.output / name / "packages.parquet")
        print(name, len(table.slice(start, stop - start)))
