"""Put the package's storage code into a virtual world."""

import contextlib
import os
import tempfile
import uuid
from types import SimpleNamespace
from unittest import mock

import fsspec

from pipelines.bulk import manifest, progress, publish, replaced, run_folder, score
from pipelines.storage import locations, marks
from pipelines.training import checkpoints
from tests.simulation.storage import (
    LocalDisk,
    ObjectStore,
    SimulatedFileSystem,
    VirtualOs,
    local_filesystem_on,
    remove_tree,
    virtual_open,
)
from tests.simulation.world import InlinePool, Process, VirtualThreading, VirtualTime, World

fsspec.register_implementation("sim", SimulatedFileSystem, clobber=True)


class Room:
    """A world with an object store or a local disk, in which the package's code runs."""

    def __init__(self, seed, *, trace=False):
        self.world = world = World(seed, trace=trace)
        dice = world.random
        self.is_local = dice.random() < 0.4
        self.store = ObjectStore(world, lag=0 if self.is_local else dice.choice([0, 0, 5, 60]))
        self._scratch = tempfile.TemporaryDirectory(prefix="simulation-", dir=_memory())
        self.disk = LocalDisk(world, self._scratch.name)
        if self.is_local:
            world.on_power_loss = self.disk.lose_power
        self.output = f"{self._scratch.name}/out" if self.is_local else "sim://bucket/out"
        world.fail_rate, world.lost_answer_rate = dice.choice([(0, 0), (0.02, 0.01), (0.1, 0.05)])
        world.freeze_rate = dice.choice([0, 0, 0.005, 0.02])

    def calm(self):
        """From now on nothing fails any more."""
        self.world.fail_rate = self.world.lost_answer_rate = self.world.freeze_rate = 0.0

    def process(self, name):
        """Create a process, on the only host of a local disk, or on one of two."""
        host = "a" if self.is_local else self.world.random.choice(["a", "b"])
        return Process(self.world, name, host)

    def names(self):
        """Return the names of the files in the output folder, as they are, and not as a listing shows them."""
        if self.is_local:
            return sorted(os.listdir(self.output)) if os.path.isdir(self.output) else []
        return sorted(path.removeprefix("bucket/out/") for path in self.store.objects if path.startswith("bucket/out/"))

    def content(self, name):
        """Return the content of a file in the output folder."""
        if self.is_local:
            with open(f"{self.output}/{name}", "rb") as file:
                return file.read()
        return self.store.objects[f"bucket/out/{name}"]

    def put(self, name, content):
        """Write a file into the output folder that is not the package's."""
        if self.is_local:
            os.makedirs(self.output, exist_ok=True)
            with open(f"{self.output}/{name}", "wb") as file:
                file.write(content)
        else:
            self.store.put(f"bucket/out/{name}", content)

    def _uuid(self):
        return uuid.UUID(int=self.world.random.getrandbits(128))

    def _signal(self, pid, _):
        alive = {turn.process.pid for turn in self.world.turns if not turn.process.is_dead}
        if pid not in alive:
            raise ProcessLookupError

    @contextlib.contextmanager
    def entered(self, output_table):
        """Replace what the package's modules use of the real world, inside the context."""
        world = self.world
        SimulatedFileSystem.store = self.store
        clock = VirtualTime(world)
        ids = SimpleNamespace(uuid4=self._uuid, uuid5=uuid.uuid5, NAMESPACE_URL=uuid.NAMESPACE_URL)
        tree = SimpleNamespace(rmtree=remove_tree(self.disk))
        own_os = SimpleNamespace(getpid=lambda: world.current.process.pid, kill=self._signal)
        with contextlib.ExitStack() as stack:
            for module, replacements in (
                (locations, {"os": VirtualOs(self.disk), "open": virtual_open(self.disk), "time": clock,
                             "random": SimpleNamespace(uniform=world.random.uniform), "uuid": ids}),
                (marks, {"os": own_os, "time": clock, "threading": VirtualThreading(world), "uuid": ids,
                         "socket": SimpleNamespace(gethostname=lambda: world.current.process.host)}),
                (run_folder, {"ThreadPoolExecutor": InlinePool, "uuid": ids}),
                (replaced, {"ThreadPoolExecutor": InlinePool}),
                (score, {"repeated": lambda _: contextlib.nullcontext()}),
                (progress, {"time": clock}),
                (publish, {"output_table": lambda _: output_table}),
                (checkpoints, {"ThreadPoolExecutor": InlinePool, "shutil": tree}),
                (manifest, {"uuid": ids}),
            ):  # fmt: skip
                stack.enter_context(mock.patch.multiple(module, create=True, **replacements))
            stack.enter_context(local_filesystem_on(self.disk))
            yield self
        self._scratch.cleanup()


def _memory():
    return "/dev/shm" if os.path.isdir("/dev/shm") else None
