"""A virtual object store, and a local disk that may lose what was not synced."""

import io
import os
import posixpath
import shutil
import stat
from contextlib import contextmanager

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


class ObjectStore:
    """The objects of all buckets. Listings may lag behind."""

    def __init__(self, world, *, lag=0.0):
        self.world, self.lag = world, lag
        self.objects = {}
        self._listed = {}
        """By path: the time from which a listing shows the latest change, and whether the object was listed before."""

    def put(self, path, content):
        self._changed(path)
        self.objects[path] = bytes(content)

    def remove(self, path):
        self._changed(path)
        del self.objects[path]

    def _changed(self, path):
        if self.lag:
            self._listed[path] = (self.world.now + self.world.random.uniform(0, self.lag), path in self.listing())

    def listing(self):
        """Return sizes by path, as a listing shows them now."""
        found = {path: len(content) for path, content in self.objects.items()}
        for path, (shown_from, was_listed) in self._listed.items():
            if self.world.now < shown_from:
                if was_listed:
                    found.setdefault(path, 1)
                else:
                    found.pop(path, None)
        return found


class SimulatedFileSystem(AbstractFileSystem):
    """fsspec's view of the object store. It creates objects exclusively if asked to, as S3 does."""

    protocol = ("sim", "s3")
    cachable = False
    store = None
    """The store of the history that runs now."""

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("sim://").rstrip("/")

    def _call(self, what, path, effect):
        return self.store.world.call(f"{what} {posixpath.basename(path)}", effect)

    def ls(self, path, detail=True, **_):
        def effect():
            inside = self._strip_protocol(path) + "/"
            below = {name: size for name, size in self.store.listing().items() if name.startswith(inside)}
            entries = {}
            for name, size in below.items():
                first, _, rest = name.removeprefix(inside).partition("/")
                kind = "directory" if rest else "file"
                entries[inside + first] = {"name": inside + first, "size": 0 if rest else size, "type": kind}
            if not entries:
                raise FileNotFoundError(path)
            return sorted(entries.values(), key=lambda entry: entry["name"])

        found = self._call("ls", path, effect)
        return found if detail else [entry["name"] for entry in found]

    def cat_file(self, path, **_):
        return self._call("get", path, lambda: self._content(path))

    def _content(self, path):
        try:
            return self.store.objects[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    def pipe_file(self, path, value, mode="overwrite", **_):
        def effect():
            if mode == "create" and path in self.store.objects:
                raise FileExistsError(path)
            self.store.put(path, value)

        self._call("put", path, effect)

    def rm_file(self, path):
        def effect():
            if path not in self.store.objects:
                raise FileNotFoundError(path)
            self.store.remove(path)

        self._call("rm", path, effect)

    def rm(self, path, recursive=False, **_):
        for name in [name for name in self.store.listing() if name.startswith(path + "/")]:
            if name in self.store.objects:
                self.rm_file(name)

    def _open(self, path, mode="rb", **_):
        return io.BytesIO(self.cat_file(path))

    def exists(self, path, **_):
        return self._call("exists", path, lambda: path in self.store.objects or self._has_inside(path))

    def _has_inside(self, path):
        return any(name.startswith(path + "/") for name in self.store.listing())

    def isfile(self, path):
        return self._call("isfile", path, lambda: path in self.store.objects)

    def put_file(self, local, path, **_):
        with open(local, "rb") as file:
            self.pipe_file(path, file.read())

    def get_file(self, path, local, **_):
        content = self.cat_file(path)
        with open(local, "wb") as file:
            file.write(content)

    def makedirs(self, path, exist_ok=False):
        pass

    def invalidate_cache(self, path=None):
        pass


class LocalDisk:
    """A real folder in memory, and a journal of what would be lost if the power failed now.

    The content of a file survives from its fsync on, and the names in a folder from the fsync of the folder on. Changes
    of names are lost from some point on, in the order in which they were made. A file that was not synced keeps a part
    of its content.
    """

    def __init__(self, world, root):
        self.world, self.root = world, str(root)
        self.unsynced = set()
        self.journal = []

    def covers(self, path):
        return str(path).startswith(self.root)

    def note_write(self, path):
        self.unsynced.add(os.stat(path).st_ino)
        self.journal.append(("create", str(path), None))

    def note_move(self, source, target, before):
        self.journal.append(("move", str(target), (str(source), before)))

    def note_remove(self, path, content):
        self.journal.append(("remove", str(path), content))

    def note_sync(self, descriptor):
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            self.journal = [entry for entry in self.journal if os.path.dirname(entry[1]) != folder]
        else:
            self.unsynced.discard(found.st_ino)

    def lose_power(self):
        """Undo the last changes of names that were not synced, and tear files that were not."""
        keep = self.world.random.randint(0, len(self.journal))
        for number, (kind, path, _) in enumerate(self.journal):
            self.world.log(f"  {kind} {os.path.basename(path)}: {'kept' if number < keep else 'lost'}")
        for kind, path, before in reversed(self.journal[keep:]):
            if kind == "create":
                _discard(path)
            elif kind == "remove":
                _write(path, before)
            else:
                source, old = before
                if os.path.exists(path):
                    os.replace(path, source)
                if old is not None:
                    _write(path, old)
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if os.stat(path).st_ino in self.unsynced:
                    size = os.path.getsize(path)
                    os.truncate(path, self.world.random.choice([0, self.world.random.randint(0, size), size]))
        self.journal, self.unsynced = [], set()


def _discard(path):
    if os.path.exists(path):
        os.unlink(path)


def _write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


class VirtualOs:
    """`os`, with the calls that change the disk going through the world."""

    def __init__(self, disk):
        self._disk = disk

    def __getattr__(self, name):
        return getattr(os, name)

    def _call(self, what, path, effect):
        return self._disk.world.call(f"{what} {os.path.basename(path)}", effect)

    def replace(self, source, target):
        def effect():
            before = _read(target)
            os.replace(source, target)
            self._disk.note_move(source, target, before)

        self._call("rename", target, effect)

    def link(self, source, target):
        def effect():
            os.link(source, target)
            self._disk.journal.append(("create", target, None))

        self._call("link", target, effect)

    def unlink(self, path):
        def effect():
            content = _read(path)
            os.unlink(path)
            self._disk.note_remove(path, content)

        self._call("unlink", path, effect)

    def fsync(self, descriptor):
        self._call("fsync", "", lambda: self._disk.note_sync(descriptor))


def virtual_open(disk):
    """Return `open`, whose writes the disk knows of."""

    def opened(path, mode="r", *arguments, **options):
        if "w" not in mode or not disk.covers(path):
            return open(path, mode, *arguments, **options)

        def effect():
            file = open(path, mode, *arguments, **options)  # noqa: SIM115  # the caller closes it
            disk.note_write(path)
            return file

        return disk.world.call(f"open {os.path.basename(path)}", effect)

    return opened


@contextmanager
def local_filesystem_on(disk):
    """Let fsspec's local filesystem call the world, inside the context."""
    names = ("ls", "rm_file", "put_file", "mv", "cat_file", "_open")
    real = {name: getattr(LocalFileSystem, name) for name in names}

    def through(name, what):
        def call(self, path, *arguments, **options):
            if not disk.covers(self._strip_protocol(path)) and name != "put_file":
                return real[name](self, path, *arguments, **options)
            return disk.world.call(
                f"{what} {os.path.basename(path)}", lambda: effects[name](self, path, *arguments, **options)
            )

        return call

    def remove(self, path):
        content = _read(path)
        os.unlink(path)
        disk.note_remove(path, content)

    def put(self, source, target, **_):
        shutil.copyfile(source, target)
        disk.note_write(target)

    def move(self, source, target, **_):
        before = _read(target)
        os.replace(source, target)
        disk.note_move(source, target, before)

    def get(self, path, **_):
        content = _read(path)
        if content is None:
            raise FileNotFoundError(path)
        return content

    effects = {**real, "cat_file": get, "rm_file": remove, "put_file": put, "mv": move}
    try:
        for name in names:
            setattr(LocalFileSystem, name, through(name, name.strip("_")))
        yield
    finally:
        for name in names:
            setattr(LocalFileSystem, name, real[name])


def remove_tree(disk):
    """Return `shutil.rmtree`: file after file, as it is done on a disk."""

    def rmtree(folder, ignore_errors=False):
        for place, _, names in os.walk(folder, topdown=False):
            for name in sorted(names, key=lambda _: disk.world.random.random()):
                VirtualOs(disk).unlink(os.path.join(place, name))
            disk.world.call("rmdir", lambda place=place: os.rmdir(place))

    return rmtree
