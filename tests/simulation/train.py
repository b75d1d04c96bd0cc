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

STEPS = 4


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
                sleeper = self.dice.randint(1, 60) if self.dice.random() < 0.3 else None
                for number in range(2 if sleeper else self.dice.choice([1, 1, 2])):
                    lives = self.dice.choice([None, self.dice.randint(1, 20), self.dice.randint(1, 120)])
                    self._launch(f"train{number}", lives, sleeps=None if number else sleeper, delay=100 * number)
                self.room.world.run()
            self.room.calm()
            for _ in range(3):
                if self.is_finished:
                    break
                self.room.world.now += 300
                self._launch("last", None)
                self.room.world.run()
            assert self.is_finished, f"no end without faults: {self.reason}"

    def _launch(self, name, lives, *, sleeps=None, delay=0):
        process = self.room.process(name, lives)
        process.calls_to_sleep = sleeps
        self.reason = "it died"

        def work():
            try:
                self._train()
            except (PipelinesError, OSError) as error:
                self.reason = str(error)
                self.room.world.log(f"{name} ends with: {error}")
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
