"""Histories of training: checkpoints, deaths, resumes, two starts at once, the finished folder."""

import json
import tempfile
from pathlib import Path

from pipelines.errors import OutputError, PipelinesError
from pipelines.model_files import PIPELINE_FILE
from pipelines.storage.locations import make_folder
from pipelines.storage.marks import heartbeat
from pipelines.training.checkpoints import (
    Checkpoints,
    check_start,
    fetch_newest,
    open_training,
    publish,
    remove_all,
)
from tests.simulation.world import Moment

STEPS = 4
CALLS = ("ls ", "_run.json", "step-", "rename", "put ", "rm", "_running-", "pipeline.json", "fsync", "train")
"""Parts of the names of calls at which trainings sleep and die."""


class TrainHistory:
    """One history of a training run that saves a checkpoint after each step."""

    def __init__(self, room):
        self.room, self.dice = room, room.world.random
        self.saved = 0
        """Step of the newest checkpoint whose saving has returned since the power last failed."""
        self.is_finished = False

    def run(self):
        """Draw a history and check it."""
        with self.room.entered(None):
            for _ in range(self.dice.randint(1, 4)):
                has_sleeper = self.dice.random() < 0.3  # beside it, another one works
                for number in range(2 if has_sleeper else self.dice.choice([1, 1, 2])):
                    process = self.room.process(f"train{number}")
                    if has_sleeper and number == 0:
                        process.sleeps_at = Moment.drawn(self.dice, CALLS, 60)
                    elif self.dice.random() < 0.7:
                        process.dies_at = Moment.drawn(self.dice, CALLS, 100)
                    self._launch(process, delay=100 * number if has_sleeper else 0)
                self.room.world.run()
            self.room.calm()
            for _ in range(3):
                if self.is_finished:
                    break
                self.room.world.now += 300
                self._launch(self.room.process("last"))
                self.room.world.run()
            assert self.is_finished, f"no end without faults: {self.reason}"

    def _launch(self, process, *, delay=0):
        self.reason = "it died"

        def work():
            try:
                self._train()
            except (PipelinesError, OSError) as error:
                self.reason = str(error)
                self.room.world.log(f"{process.name} ends with: {error}")
                if PIPELINE_FILE in self.room.names() and "is not empty" in str(error):
                    self._check_finished()  # an earlier start has finished it

        self.room.world.start(process, work, delay=delay)

    def _train(self):
        output = self.room.output
        make_folder(output)
        with heartbeat(output) as mark, tempfile.TemporaryDirectory() as scratch:
            if mark.others:
                raise OutputError(f"another training writes to it now ({mark.others[0]})")
            open_training(output, {"seed": 1}, start=mark.name)
            step = self._resume(Path(scratch), mark.name)
            checkpoints = Checkpoints(output, keep=2, start=mark.name)
            while step < STEPS:
                step += 1
                self.room.world.call("train", lambda: None)
                checkpoints.save(step, lambda folder, step=step: _write(folder, step))
                checkpoints.wait()
                self.saved = step
            folder = Path(scratch, "model")
            folder.mkdir()
            _write(folder, STEPS)
            (folder / PIPELINE_FILE).write_text("{}")
            check_start(output, mark.name)
            publish(folder, output, last=PIPELINE_FILE)
            remove_all(output)
        self._check_finished()

    def _resume(self, scratch, start):
        newest = fetch_newest(self.room.output, scratch)
        check_start(self.room.output, start)
        step = 0
        if newest is not None:
            state = json.loads((newest / "training_state.json").read_text())
            step = state["step"]
            assert (newest / "model.safetensors").read_bytes() == _weights(step), "weights of another step"
        may_be_older = self.room.world.fail_rate or self.room.store.lag  # a listing that lags shows an older checkpoint
        assert step >= self.saved or may_be_older, f"resumed at step {step}, and step {self.saved} was saved"
        return step

    def _check_finished(self):
        names = self.room.names()
        assert {PIPELINE_FILE, "model.safetensors", "training_state.json"} <= set(names), f"only {names} are there"
        assert self.room.content("model.safetensors") == _weights(STEPS), "the model is not the last one"
        self.is_finished = True


def _weights(step):
    return bytes([step]) * 100


def _write(folder, step):
    (folder / "model.safetensors").write_bytes(_weights(step))
    (folder / "training_state.json").write_text(json.dumps({"step": step}))
