"""Draw a history from a seed, and say whether it broke a promise."""

from tests.simulation.bulk import BulkHistory
from tests.simulation.room import Room
from tests.simulation.train import TrainHistory


def broken_promise(seed, *, trace=False):
    """Run the history of a seed. Return the error that shows a broken promise, or None, and the trace."""
    room = Room(seed, trace=trace)
    kind = TrainHistory if room.world.random.random() < 0.2 else BulkHistory
    try:
        kind(room).run()
    except Exception as error:  # noqa: BLE001  # every error that no process may raise is a finding
        return error, room.world.trace
    return None, room.world.trace
