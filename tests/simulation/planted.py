# ruff: noqa: E501  # lines of code, as they are
"""Plant faults in a copy of the code, one at a time, and count the histories until the simulation finds each.

python -m tests.simulation.planted            # all of them
python -m tests.simulation.planted no-fsync   # those whose name contains this
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN_FOLDER, SCORE = "pipelines/bulk/run_folder.py", "pipelines/bulk/score.py"
MANIFEST, FINISHED = "pipelines/bulk/manifest.py", "pipelines/bulk/finished.py"
LOCATIONS, CHECKPOINTS = "pipelines/storage/locations.py", "pipelines/training/checkpoints.py"
FAULTS = {
    "no-fsync-of-the-content": (LOCATIONS, "            os.fsync(file.fileno())\n", ""),
    "no-fsync-of-the-name": (LOCATIONS, "    _sync_names(folder)\n\n", "\n"),
    "written-in-place": (LOCATIONS, 'partial = posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")', "partial = target"),
    "manifest-not-exclusive": (RUN_FOLDER, "commit_json if overwrite else commit_new_json", "commit_json"),
    "names-repeat": ("pipelines/storage/shards.py", 'f"part-{self.number:06d}-', 'f"part-{self.number % 2:06d}-{0:012d}" or f"'),
    "listing-after-the-manifest": (SCORE, "            names = list_names(run.location)\n            check_same_run(run)\n", "            check_same_run(run)\n            names = list_names(run.location)\n"),
    "strays-stay": (SCORE, "        remove_strays(run, names)\n        summary = ", "        summary = "),
    "strays-stay-when-nothing-is-left": (SCORE, "if strays_of(run, names):", "if False:"),
    "loser-leaves-its-files": (SCORE, "            leave(run)\n", ""),
    "summary-from-memory": (SCORE, "total = replace(_count_files(run, here, checked.decision), seconds=totals.total.seconds)", "total = totals.total"),
    "run-not-checked-before-the-summary": (SCORE, "            names = list_names(run.location)\n            check_same_run(run)\n", "            names = list_names(run.location)\n"),
    "run-not-checked-after-the-summary": (FINISHED, "        check_same_run(run)\n", "        pass\n"),
    "summary-of-another-state-stays": (FINISHED, "                remove(run.location, SUMMARY)\n", "                pass\n"),
    "summary-believed": (FINISHED, "return summary if same and _is_of(run, content) else None", "return summary"),
    "summary-of-another-state-believed": (FINISHED, "return summary if same and _is_of(run, content) else None", "return summary if same else None"),
    "summary-stays-with-new-files": (RUN_FOLDER, "    remove(location, SUMMARY)\n    commit_table(location, name, table)\n", "    commit_table(location, name, table)\n"),
    "append-not-exclusive": (RUN_FOLDER, "        commit_new_json(location, name, manifest.to_json())\n", "        commit_json(location, name, manifest.to_json())\n"),
    "append-into-the-manifest": (RUN_FOLDER, "        commit_new_json(location, name, manifest.to_json())\n", "        commit_new_json(location, name, manifest.to_json())\n        commit_json(location, MANIFEST, manifest.to_json())\n"),
    "retry-without-a-trace": (RUN_FOLDER, "        commit_new_json(run.location, next_name(run.manifest), changed.to_json())\n    run = replace(run, manifest=changed)\n", "        pass\n"),
    "changes-not-read": (MANIFEST, "while exists(location,", "while False and exists(location,"),
    "replaced-rows-stay": (SCORE, "    totals.add_finished(remove_replaced_rows(run, checked.decision, prefix=job.score.prefix))\n", ""),
    "retry-keeps-the-summary": (RUN_FOLDER, "    remove(run.location, SUMMARY)  # it does not fit the files any more\n", ""),
    "table-forgotten-after-a-kill": (SCORE, "    if job.score.table is not None:\n        summary = ", "    if False:\n        summary = "),
    "nobody-else-is-there": ("pipelines/storage/marks.py", "    return found\n", "    return []\n"),
    "mark-of-another-host-is-dead": ("pipelines/storage/marks.py", '    if content["host"] != socket.gethostname():\n        return False\n', ""),
    "any-file-is-ours": (RUN_FOLDER, 'is_of_run = existing.get(RUN_METADATA, b"") == run and COUNTS', "is_of_run = COUNTS"),
    "replaced-run-writes": (RUN_FOLDER, "        check_run(location, run.decode())\n        with", "        with"),
    "replaced-run-replaces": (RUN_FOLDER, "    check_run(location, run.decode())  # at the last", "    # at the last"),
    "late-retry-replaces": (RUN_FOLDER, "        check_unchanged(location, change)\n", "        pass\n"),
    "last-retry-wins": (RUN_FOLDER, "if is_of_run and int(existing.get(CHANGE_METADATA, 0)) >= change:", "if is_of_run and not change:"),
    "last-writer-wins": (RUN_FOLDER, "    existing = _metadata_of_part(location, name)  #", "    existing = {}  #"),
    "overwrite-removes-everything": (RUN_FOLDER, 'return [name for name in names if OUTPUT_NAME.fullmatch(name) or name.startswith((".part-", "._"))] + lists', "return [name for name in names if name not in (MANIFEST, mark)]"),
    "overwrite-removes-first": (RUN_FOLDER, "            manifest = _with_generation(location, manifest, files, unit_bytes, snapshot=snapshot)\n", "            manifest = _with_generation(location, manifest, files, unit_bytes, snapshot=snapshot)\n            for name in set(earlier) - {manifest.generations[0].listing}:\n                remove(location, name)\n"),
    "names-of-all-runs": (RUN_FOLDER, 'run = manifest.run if manifest.names_of_run else ""', 'run = ""'),
    "gone-files-not-checked": (RUN_FOLDER, "    check_gone(location, change.gone, units, finished)\n", ""),
    "error-swallowed": (LOCATIONS, "            if attempt == ATTEMPTS:\n                raise\n", "            if attempt == ATTEMPTS:\n                return None\n"),
    "state-not-last": (CHECKPOINTS, "key=lambda file: file.name == last", "key=lambda file: file.name != last"),
    "no-sync-before-the-last-file": (CHECKPOINTS, "                sync_folder(written)\n", "                pass\n"),
    "checksums-not-read": (CHECKPOINTS, '    return f"{wrong[0]} does not have its checksum" if wrong else ""\n', '    return ""\n'),
    "run-file-by-listing": (CHECKPOINTS, "exists(output, RUN_FILE), exists(output, PIPELINE_FILE)", "RUN_FILE in list_names(output), PIPELINE_FILE in list_names(output)"),
    "training-begun-twice": (CHECKPOINTS, "commit_new_json if is_new else commit_json", "commit_json"),
    "finished-training-not-seen": (CHECKPOINTS, "        _check_unfinished(output)\n        return True\n", "        return True\n"),
    "checkpoints-removed-first": ("tests/simulation/train.py", "            publish(folder, output, last=PIPELINE_FILE)\n            remove_all(output)\n", "            remove_all(output)\n            publish(folder, output, last=PIPELINE_FILE)\n"),
    "unfinished-files-count": (LOCATIONS, "name.startswith((besides, UNFINISHED))", "name.startswith(besides)"),
}  # fmt: skip
"""By name: file, what is there, and what is there instead."""


def seeds_until_found(fault, most):
    """Return the first seed whose history breaks a promise with the fault, and the promise. None if there is none."""
    file, old, new = fault
    with tempfile.TemporaryDirectory() as copy:
        for name in ("pipelines", "tests"):
            shutil.copytree(ROOT / name, Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
        place = Path(copy, file)
        content = place.read_text()
        assert content.count(old) == 1, f"{file} has {content.count(old)} times: {old}"
        place.write_text(content.replace(old, new))
        command = [sys.executable, "-m", "tests.simulation", "--stop", "--seeds", f"0:{most}"]
        output = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False).stdout
    found = re.search(r"seed (\d+): (.*)", output)
    return None if found is None else (int(found[1]), found[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--after", default="", help="only those that come later in the list")
    parser.add_argument("--most", type=int, default=4_000, help="histories after which a fault counts as not found")
    options = parser.parse_args()
    first = list(FAULTS).index(options.after) + 1 if options.after else 0
    chosen = {name: fault for name, fault in list(FAULTS.items())[first:] if options.name in name}
    num_found = 0
    for name, fault in chosen.items():
        found = seeds_until_found(fault, options.most)
        num_found += found is not None
        result = f"not found in {options.most:,}" if found is None else f"seed {found[0]}: {found[1]}"
        print(f"{name}: {result}", flush=True)
    print(f"{num_found} of {len(chosen)} found")
