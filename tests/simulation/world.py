"""A virtual machine room: a clock, hosts, processes that take turns, and deaths at any storage call, all from one seed.

Every process is a real thread, but only one runs at a time. It may be interrupted wherever it calls the storage, sleeps
or waits. Which one runs next, who dies, and how long everything takes is drawn from the seed, so that a seed replays
exactly.
"""

import random
import threading
from collections import Counter

SLEEP_SECONDS = 400


class KilledError(BaseException):
    """The process is dead. No `except Exception` may catch this."""


def closed_gate():
    """Return a lock that is held. `release` lets one `acquire` through, whoever calls it."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Process:
    """A process on a host. All its threads die together."""

    def __init__(self, world, name, host, calls_to_live=None):
        self.world, self.name, self.host = world, name, host
        self.pid = world.next_pid()
        self.calls_to_live = calls_to_live
        self.calls_to_sleep = None
        """Number of calls after which it sleeps for so long that others think that it is dead."""
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
        self.process.world.back.release()

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
        self.turns, self.current = [], None
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
        while self.turns:
            ready = [turn for turn in self.turns if turn.is_ready(self.now)]
            if not ready:
                self.now = min(max(turn.wake, turn.process.frozen_until) for turn in self.turns)
                continue
            turn = self.random.choice(ready) if len(ready) > 1 else ready[0]
            self.current = turn
            turn.go.release()
            self.back.acquire()
            self.current = None
            if turn.is_done:
                turn.thread.join()
                self.turns.remove(turn)
                if turn.error is not None:
                    self._end_all()
                    raise turn.error

    def _end_all(self):
        """Let every thread end, so that no thread is left behind."""
        for turn in self.turns:
            turn.process.is_dead = True
        for turn in list(self.turns):
            self.current = turn
            while not turn.is_done:
                turn.go.release()
                self.back.acquire()
            turn.thread.join()
        self.turns.clear()

    def wait(self, seconds, condition=None):
        """Let others run for some time, or until the condition holds."""
        turn = self.current
        turn.wake, turn.condition = self.now + seconds, condition
        self.back.release()
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
        self.now += self.random.expovariate(20)
        if process.calls_to_sleep is not None:
            process.calls_to_sleep -= 1
        if process.calls_to_sleep == 0:
            process.frozen_until = self.now + SLEEP_SECONDS
            self.log(f"{process.name} sleeps")
        if self.random.random() < self.freeze_rate:
            process.frozen_until = self.now + self.random.choice([5, 60, 200])
            self.log(f"{process.name} freezes for {process.frozen_until - self.now:.0f} s")
        if len(self.turns) > 1 or process.frozen_until > self.now:
            self.wait(0)
        dies = False
        if process.calls_to_live is not None:
            process.calls_to_live -= 1
            dies = process.calls_to_live <= 0
        if dies and self.random.random() < 0.5:
            self._die(process, f"before {what}")
        if self.random.random() < self.fail_rate:
            self.log(f"{process.name} {what}: failed")
            raise OSError("connection reset")
        result = effect()
        self.log(f"{process.name} {what}")
        if dies:
            self._die(process, f"after {what}")
        if self.random.random() < self.lost_answer_rate:
            self.log(f"{process.name} {what}: the answer is lost")
            raise OSError("timeout")
        return result

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
