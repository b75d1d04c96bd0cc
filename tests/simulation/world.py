"""A virtual machine room: a clock, hosts, processes that take turns, and deaths at any storage call, all from one seed.

Every process is a real thread, but only one runs at a time. It may be interrupted wherever it calls the storage, sleeps
or waits. Which one runs next, who dies, and how long everything takes is drawn from the seed, so that a seed replays
exactly.
"""

import random
import threading
from collections import Counter

SLEEP_SECONDS = 400
MOST_CALLS = 50_000
"""Calls of a history, which has some hundreds. More are made by a process that tries something for ever."""
READS, WRITES = ("get", "cat_file"), ("put", "link", "rename")
"""Calls that read or write a file, in the object store and on the local disk."""


class KilledError(BaseException):
    """The process is dead. No `except Exception` may catch this."""


def closed_gate():
    """Return a lock that is held. `release` lets one `acquire` through, whoever calls it."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Moment:
    """The moment before or at a call: a part of its name, and how many such calls come first.

    Some calls are rare, and are those that matter. A moment is therefore drawn by the name of a call, and not only by
    the number of calls.
    """

    def __init__(self, part, number):
        self.part, self.left = part, number

    @classmethod
    def drawn(cls, random, parts, most):
        """Draw a moment among the first `most` calls, or among the first calls with one of the parts of names."""
        if random.random() < 0.5:
            return cls("", random.randint(1, most))
        return cls(random.choice(parts), random.choice([1, 1, 1, 2, 2, 3, 4, 6, 9]))

    def is_now(self, call):
        """Whether it is this call."""
        is_such = self.part in call
        self.left -= is_such
        return is_such and self.left == 0


class Process:
    """A process on a host. All its threads die together."""

    def __init__(self, world, name, host):
        self.world, self.name, self.host = world, name, host
        self.pid = world.next_pid()
        self.sleeps_at = self.dies_at = None
        """Moments: a part of the name of a call, and how many such calls come first."""
        self.seen = None
        """How often runs had been changed when it last looked at one. None if it has written a summary since."""
        self.is_dead = False
        self.frozen_until = 0.0
        self.result = None


class Turn:
    """A thread that runs only when it is its turn."""

    def __init__(self, process, target, name):
        self.process, self.name = process, name
        self.go = closed_gate()
        self.wake = 0.0
        self.condition = None
        self.is_done = False
        self.error = None
        self.thread = threading.Thread(target=self._run, args=(target,), daemon=True)

    def _run(self, target):
        self.go.acquire()
        try:
            if not self.process.is_dead:
                target()
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001  # raised in the test by `World.run`
            self.error = error
        self.is_done = True
        self.process.world.has_ended(self)

    def is_ready(self, now):
        """Whether the thread can run now. A dead process's threads run only to end."""
        if self.process.is_dead:
            return True
        if self.process.frozen_until > now:
            return False
        return self.wake <= now or (self.condition is not None and self.condition())


class World:
    """The clock, the processes and the dice."""

    def __init__(self, seed, *, trace=False):
        self.random = random.Random(seed)
        self.now = 1_000_000.0
        self.skew = {host: self.random.choice([0.0, 0.0, self.random.uniform(-20, 20)]) for host in ("a", "b")}
        self.turns, self.current, self.ended = [], None, []
        self.back = closed_gate()
        self.counts = Counter()
        self.trace = [] if trace else None
        self._pids = 100
        self.fail_rate = self.lost_answer_rate = self.freeze_rate = 0.0
        self.on_power_loss = None

    def next_pid(self):
        """Return a new process id."""
        self._pids += 1
        return self._pids

    def start(self, process, target, name="", *, delay=0):
        """Start a thread of a process. It gets its first turn later."""
        turn = Turn(process, target, name or process.name)
        turn.wake = self.now + delay
        self.turns.append(turn)
        turn.thread.start()
        return turn

    def run(self):
        """Run until all threads have ended. Raises the first error that no process may raise."""
        if not self.turns:
            return
        self._choose()
        self.current.go.release()
        self.back.acquire()
        self.current = None
        errors = [turn.error for turn in self.ended if turn.error is not None]
        for turn in self.turns:  # after an error: let every thread end, so that none is left behind
            turn.process.is_dead = True
        for turn in list(self.turns):
            self.current = turn
            turn.go.release()
            self.back.acquire()
        for turn in self.ended:
            turn.thread.join()
        self.current, self.ended = None, []
        if errors:
            raise errors[0]

    def _choose(self):
        """Draw the thread that runs next."""
        while not (ready := [turn for turn in self.turns if turn.is_ready(self.now)]):
            self.now = min(max(turn.wake, turn.process.frozen_until) for turn in self.turns)
        self.current = self.random.choice(ready) if len(ready) > 1 else ready[0]

    def has_ended(self, turn):
        """Let another thread run, or the test, if this was the last one, or an error has ended it."""
        self.turns.remove(turn)
        self.ended.append(turn)
        if self.turns and all(other.error is None for other in self.ended):
            self._choose()
            self.current.go.release()
        else:
            self.back.release()

    def wait(self, seconds, condition=None):
        """Let others run for some time, or until the condition holds."""
        turn = self.current
        self._check_alive(turn)
        turn.wake, turn.condition = self.now + seconds, condition
        self._choose()
        if self.current is not turn:
            self.current.go.release()
            turn.go.acquire()
        turn.condition = None
        self._check_alive(turn)

    def _check_alive(self, turn):
        if turn.process.is_dead:
            raise KilledError

    def call(self, what, effect):
        """Do a storage call of the current process. It may fail, die before or after its effect, or lose its answer."""
        turn = self.current
        if turn is None:  # the test itself looks
            return effect()
        process = turn.process
        self._check_alive(turn)
        self.counts["calls"] += 1
        assert self.counts["calls"] < MOST_CALLS, "the processes do not come to an end"
        self.now += self.random.expovariate(20)
        if process.sleeps_at is not None and process.sleeps_at.is_now(what):
            self._freeze(process, SLEEP_SECONDS)
        elif self.random.random() < self.freeze_rate:
            self._freeze(process, self.random.choice([5, 60, 200]))
        if len(self.turns) > 1 or process.frozen_until > self.now:
            self.wait(0)
        dies = process.dies_at is not None and process.dies_at.is_now(what)
        if dies and self.random.random() < 0.5:
            self._die(process, f"before {what}")
        if self.random.random() < self.fail_rate:
            self.log(f"{process.name} {what}: failed")
            raise OSError("connection reset")
        result = effect()
        self.log(f"{process.name} {what}")
        action, _, name = what.partition(" ")
        if name.startswith("_manifest") and action in WRITES:
            self.counts["changes"] += 1
        elif name == "_summary.json" and action in WRITES:
            process.seen = None
        elif name == "_manifest.json" and action in READS:
            process.seen = self.counts["changes"]
        if dies:
            self._die(process, f"after {what}")
        if self.random.random() < self.lost_answer_rate:
            self.log(f"{process.name} {what}: the answer is lost")
            raise OSError("timeout")
        return result

    def _freeze(self, process, seconds):
        process.frozen_until = self.now + seconds
        self.log(f"{process.name} freezes for {seconds} s")

    def _die(self, process, when):
        self.log(f"{process.name} dies {when}")
        self.counts["deaths"] += 1
        process.is_dead = True
        if self.on_power_loss is not None and self.random.random() < 0.5:
            self.log("the power fails")
            self.counts["power losses"] += 1
            for turn in self.turns:
                turn.process.is_dead = True
            self.on_power_loss()
        raise KilledError

    def log(self, line):
        if self.trace is not None:
            self.trace.append(f"{self.now - 1_000_000:9.2f} {line}")


class VirtualTime:
    """`time`, as the current process sees it."""

    def __init__(self, world):
        self._world = world

    def time(self):
        turn = self._world.current
        return self._world.now + (self._world.skew[turn.process.host] if turn else 0.0)

    def monotonic(self):
        return self._world.now

    perf_counter = monotonic

    def sleep(self, seconds):
        self._world.wait(seconds)


class VirtualEvent:
    """`threading.Event`."""

    def __init__(self, world):
        self._world, self._is_set = world, False

    def set(self):
        self._is_set = True

    def wait(self, seconds):
        if not self._is_set:
            self._world.wait(seconds, lambda: self._is_set)
        return self._is_set


class VirtualThread:
    """`threading.Thread` of the current process."""

    def __init__(self, world, target, name):
        self._world, self._target, self._name, self._turn = world, target, name, None

    def start(self):
        process = self._world.current.process
        self._turn = self._world.start(process, self._target, f"{process.name}-{self._name}")

    def join(self):
        self._world.wait(0, lambda: self._turn.is_done)
        while not self._turn.is_done:
            self._world.wait(1, lambda: self._turn.is_done)


class VirtualThreading:
    """`threading`, for the heartbeat."""

    def __init__(self, world):
        self._world = world

    def Event(self):
        return VirtualEvent(self._world)

    def Thread(self, target, daemon, name):
        return VirtualThread(self._world, target, name)


class InlinePool:
    """`ThreadPoolExecutor` that does everything in the calling thread, in order."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *items):
        return map(function, *items)

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)
        return future

    def shutdown(self):
        pass
