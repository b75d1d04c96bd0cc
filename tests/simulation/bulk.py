"""Histories of scoring jobs: starts, deaths, resumes, changed inputs, other settings, two jobs at once."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.job import CheckedJob, ScoreJob
from pipelines.bulk.manifest import MANIFEST, read_listing, read_manifest
from pipelines.bulk.run_folder import SUMMARY, commit_unit, units_of
from pipelines.bulk.score import run_job
from pipelines.bulk.summary import ScoreSummary, count_table
from pipelines.decisions.columns import result_columns
from pipelines.decisions.labels import decide
from pipelines.errors import JobError, PipelinesError, UsageError
from pipelines.model_folder import ModelFolder
from pipelines.settings import DecisionSettings, ScoreSettings, WindowSettings
from pipelines.storage.shards import InputFile
from tests.simulation.world import Moment

DECISION = DecisionSettings(kind="binary", labels=("ham", "spam"))
CARRIED = pa.schema([pa.field("version", pa.int64()), pa.field("model", pa.string())])
ATTEMPTS = 8
"""Starts without faults after which a run must have ended."""
CALLS = ("ls ", "_manifest", "_inputs-", "_summary", "score", "put part", "link part", "rm", "unlink", "table", "fsync",
         "_running-")  # fmt: skip
"""Parts of the names of calls at which jobs sleep and die."""
FOREIGN = ("notes.txt", "data.parquet", "part-mine.csv")


class VirtualTable:
    """A table that adds files in one commit, and remembers the runs whose files it has."""

    def __init__(self, room):
        self._room, self.commits = room, []

    def check(self, output, schema):
        pass

    def find(self, run, generation):
        def effect():
            has = sum(1 for commit in self.commits if commit[0] == run and commit[1] >= generation)
            return f"version {len(self.commits)}" if has else None

        return self._room.world.call("find in table", effect)

    def add(self, output, schema, files):
        def effect():
            done = max((commit[1] for commit in self.commits if commit[0] == files.run), default=0)
            if done < files.generation:
                names = [name for generation in files.names[done : files.generation] for name in generation]
                self.commits.append((files.run, files.generation, {name: files.sizes[name] for name in names}))
            return f"version {len(self.commits)}"

        try:
            return self._room.world.call("add to table", effect)
        except OSError as error:
            raise JobError(f"the files could not be added: {error}") from error


class BulkHistory:
    """One history. `run` raises AssertionError where a promise is broken."""

    def __init__(self, room):
        self.room, self.dice = room, room.world.random
        self.files, self.num_versions = {}, 0
        for _ in range(self.dice.randint(1, 3)):
            self._change_file(f"f{len(self.files)}")
        self.model = "m0"
        self.table = VirtualTable(room)
        self.uses_table = self.dice.random() < 0.25
        self.is_flaky = self.dice.random() < 0.3
        self.last_good = None
        self.good_state = None
        """The run, and the number of its changes, when a job last reported success."""
        self.foreign = {}
        self.has_late_worker = self.may_have_strays = False
        """Of the last act: whether a worker has outlived its job; whether it or a job that died may have left files."""

    def run(self):
        """Draw a history and check it."""
        with self.room.entered(self.table):
            for _ in range(self.dice.choice([1, 1, 2, 3])):
                self._act()
                self._check_foreign()
                self._check_success_lasts()
            self.room.calm()
            self._finish()
            self._check_foreign()

    def _change_file(self, url):
        self.num_versions += 1  # a store gives no version twice, also not to a new file with an old name
        version = self.num_versions
        groups = tuple(self.dice.randint(1, 4) for _ in range(self.dice.randint(1, 2)))
        if url in self.files and self.dice.random() < 0.5:  # other texts in as many rows
            groups = self.files[url].row_group_rows
        self.files[url] = InputFile(
            url, url, 100 + version, str(version), CARRIED, groups, tuple(100 * n for n in groups)
        )

    def _act(self):
        """Start a job that may die, or two at once: the same one twice, or another one beside it."""
        flags = self._wish()
        self.has_late_worker, deaths = False, self.room.world.counts["deaths"]
        has_sleeper = self.dice.random() < 0.4  # beside it, another one works
        for number in range(2 if has_sleeper else self.dice.choice([1, 1, 2])):
            process = self.room.process(f"job{number}")
            if has_sleeper and number == 0:
                process.sleeps_at = Moment.drawn(self.dice, CALLS, 60)
            elif self.dice.random() < (0.3 if has_sleeper else 0.7):
                process.dies_at = Moment.drawn(self.dice, CALLS, 80)
            flags = self._wish() if number and self.dice.random() < 0.6 else flags
            self._launch(process, dict(flags), delay=100 * number if has_sleeper else 0)
        self.room.world.run()
        self.may_have_strays = self.has_late_worker or self.room.world.counts["deaths"] > deaths
        if self.last_good is not None and self.dice.random() < 0.3:
            name = self.dice.choice(FOREIGN)
            self.foreign[name] = self.dice.randbytes(9)
            self.room.put(name, self.foreign[name])

    def _wish(self):
        """What somebody wants next: change files or the model, and return the flags of the job for it."""
        deed = self.dice.random()
        if self.last_good is None or deed < 0.4:
            return {}
        if deed < 0.55:
            self._change_file(f"f{len(self.files)}")
            return {"append": True}
        if deed < 0.7:
            url = self.dice.choice(sorted(self.files))
            if self.dice.random() < 0.3 and len(self.files) > 1:
                del self.files[url]
            else:
                self._change_file(url)
            return {"replace_changed": True}
        if deed < 0.87:
            self.model = f"m{self.dice.randint(1, 9)}"
            if self.dice.random() < 0.3:
                self._change_file(self.dice.choice(sorted(self.files)))
            return {"overwrite": True}
        return {"retry_errors": True}

    def _finish(self):
        """Without faults, the last wish must come true in a few starts."""
        flags = {"append": True} if self.last_good is None else {"replace_changed": True}
        for _ in range(ATTEMPTS):
            self.room.world.now += 300  # marks of dead jobs grow old, and listings are complete
            before = self.last_good
            self._launch(self.room.process("last"), dict(flags))
            self.room.world.run()
            if self.last_good is not before:
                self._check_state(self.last_good)
                return
            if "overwrite" in flags and self.uses_table and self.table.commits:
                return  # refused for good: the files are part of a table
            is_refused = self.reason.startswith("--output")
            flags = {"overwrite": True} if is_refused else {}
        raise AssertionError(f"no end without faults: {self.reason}")

    def _launch(self, process, flags, *, delay=0):
        checked = self._checked(flags)

        def work():
            try:
                summary = run_job(checked, self._score)
            except (UsageError, JobError, OSError) as error:  # any other error is a finding
                self.reason = str(error)
                self.room.world.log(f"{process.name} ends with: {error}")
                return
            self.room.world.log(f"{process.name} has finished")
            if process.seen is not None and process.seen < self.room.world.counts["changes"]:
                return  # it had finished and looked at the run, and then another job changed the run
            self.last_good = (checked, summary)
            self.good_state = self._state()
            self._check_state(self.last_good)

        self.reason = "it died"
        self.room.world.start(process, work, delay=delay)

    def _checked(self, flags):
        settings = ScoreSettings(unit_bytes=300, table="delta:/t" if self.uses_table else None, **flags)
        folder = ModelFolder(Path("/model"), WindowSettings(), DECISION, weights_hash=self.model)
        job = ScoreJob("/model", "/in", self.room.output, score=settings)
        return CheckedJob(job, folder, list(self.files.values()), CARRIED, CARRIED)

    def _score(self, checked, units):
        """Score units in any order, as workers do. A worker may survive its driver and commit what it had begun."""
        left = list(units)
        self.dice.shuffle(left)
        for unit in left:
            world = self.room.world
            world.call("score", lambda: None)
            if self.dice.random() < 0.05:
                late, self.has_late_worker = self.room.process("zombie"), True
                world.start(late, lambda unit=unit: self._commit_late(checked, unit))
            yield self._commit(checked, unit)

    def _commit_late(self, checked, unit):
        self.room.world.wait(self.dice.choice([0, 1, 10, 200, 500]))
        try:
            self._commit(checked, unit)
        except (OSError, PipelinesError):
            return

    def _commit(self, checked, unit):
        rows = [(span.file, span.first_row + row) for span in unit.spans for row in range(span.start, span.stop)]
        model = checked.folder.weights_hash
        errors = [self._error(file, row) for file, row in rows]
        scores_DL = np.array([[1 - value, value] for value in (score_of(model, *row) for row in rows)], np.float32)
        count_D = np.full(len(rows), 1)
        table = pa.table(
            {
                "version": [int(file.version) for file, _ in rows],
                "model": [model] * len(rows),
                "source_file": [file.url for file, _ in rows],
                "source_row": [row for _, row in rows],
            }
        )
        results = result_columns(
            decide(scores_DL, DECISION), scores_DL, decision=DECISION, num_tokens_D=count_D, num_windows_D=count_D,
            truncated_D=count_D == 0, errors=errors,
        )  # fmt: skip
        for field, column in zip(results.schema, results.columns, strict=True):
            table = table.append_column(field, column)
        setup = checked.replica_setup()
        table = table.replace_schema_metadata(dict(setup.metadata))
        counts = replace(count_table(table, DECISION), rows_in=len(rows), seconds={"forward": self.dice.random()})
        return commit_unit(setup.output, unit.output_name, table, counts, change=setup.change)

    def _error(self, file, row):
        is_bad = self.is_flaky and (row + int(file.version)) % 4 == 0
        return "scoring failed: it was a bad day" if is_bad and self.dice.random() < 0.5 else None

    def _check_foreign(self):
        for name, content in self.foreign.items():
            assert name in self.room.names(), f"{name} was removed"
            assert self.room.content(name) == content, f"{name} was changed"

    def _state(self):
        """Return the id of the run that is there now, and the number of its changes, without a call of a process."""
        run = json.loads(self.room.content(MANIFEST))["run"]
        name = max(
            (name for name in self.room.names() if name.startswith("_manifest-") and run[:8] in name), default=""
        )
        content = json.loads(self.room.content(name or MANIFEST))
        return run, len(content["generations"]) + content["retries"]

    def _check_success_lasts(self):
        """Check that what a job has reported stays true until the run is changed: after everybody has ended or died.

        Its summary may be gone: somebody was about to change the run. Files that do not belong to the run may be there
        if a process has died or a worker came late. The next start removes them.
        """
        if self.last_good is None or self._state() != self.good_state:
            return
        content = json.loads(self.room.content(SUMMARY)) if SUMMARY in self.room.names() else {}
        is_current = (content.get("run"), content.get("changes")) == self.good_state
        summary = ScoreSummary.from_json(self.room.output, content) if is_current else None
        self._check_state((self.last_good[0], summary), only=self._unit_names() if self.may_have_strays else None)

    def _unit_names(self):
        manifest = read_manifest(self.room.output)
        listings = [read_listing(self.room.output, generation.listing) for generation in manifest.generations]
        return {unit.output_name for units in units_of(manifest, listings) for unit in units}

    def _check_state(self, good, *, only=None):
        """What must hold at the moment at which a job reports success. With only: in the files of these names."""
        checked, summary = good
        here = Counter()
        in_error = 0
        for name in self.room.names():
            if not name.startswith("part-") or name in self.foreign or (only is not None and name not in only):
                continue
            names = ["source_file", "source_row", "version", "model", "scores", "error"]
            table = pq.ParquetFile(io.BytesIO(self.room.content(name))).read(names, use_threads=False)
            for row in table.to_pylist():
                here[row["source_file"], row["source_row"], row["version"], row["model"]] += 1
                in_error += row["error"] is not None
                if row["error"] is None:
                    file = replace(PLAIN, url=row["source_file"], version=str(row["version"]))
                    wanted = np.float32(score_of(row["model"], file, row["source_row"]))
                    assert np.float32(row["scores"][1]) == wanted, f"a wrong score: {row}"
        twice = [row for row, count in here.items() if count > 1]
        assert not twice, f"{len(twice)} rows are there several times, such as {twice[0]}"
        model = checked.folder.weights_hash
        wanted = {(file.url, row, int(file.version), model) for file in checked.files for row in range(file.num_rows)}
        lost = wanted - set(here)
        assert not lost, f"{len(lost)} of {len(wanted)} rows are lost, such as {min(lost)}"
        now = {file.url for file in checked.files}
        extra = [row for row in set(here) - wanted if row[0] in now or row[3] != model]
        assert not extra, f"{len(extra)} rows of something else are there, such as {min(extra)}"
        if summary is not None:
            assert summary.rows_out == here.total(), f"the summary says {summary.rows_out} of {here.total()} rows"
            assert summary.rows_in_error == in_error, f"the summary says {summary.rows_in_error} of {in_error} errors"
        if self.uses_table and only is None:
            self._check_table()

    def _check_table(self):
        names = [name for _, _, added in self.table.commits for name in added]
        assert len(set(names)) == len(names), "a file is in the table several times"
        parts = {name for name in self.room.names() if name.startswith("part-") and name not in self.foreign}
        assert set(names) == parts, f"the table has {len(names)} of {len(parts)} files"
        for _, _, added in self.table.commits:
            for name, size in added.items():
                assert len(self.room.content(name)) == size, f"{name} was changed after it was added to the table"


PLAIN = InputFile("", "", 0, "0", None)


def score_of(model, file, row):
    """Return the score that a model gives a row: a number that tells all of them apart."""
    return round((sum(map(ord, f"{model}{file.url}")) * 31 + int(file.version) * 17 + row * 7) % 997 / 997, 4)
