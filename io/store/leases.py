"""Leases: which worker works on which key, among processes on machines that share a folder.

A lease is a file. Its owner creates it, sets its modification time once per heartbeat ("touches"
it), and removes it. Leases only save work: two workers rarely do the same slide. Correct results
do not depend on them. The commit protocol (write.py) holds even if two workers believe that they
own one lease.

How a worker learns that the owner of a lease is dead:

* The owner ran on this machine (same boot id, same namespace of process numbers): it is dead if no
  process has its process number and its start time. A reused process number has another start
  time; a container with the same host name has another namespace.
* The owner ran elsewhere: it is dead once its lease was not touched for two heartbeats, measured by
  the monotonic clock of the worker that looks. Times of two machines or of the file server are
  never compared, since their clocks differ. So the lease of a lost machine blocks other workers for
  two heartbeats, counted from the moment when they first read it.

How a dead owner's lease is taken over:

1. Create the file `.<token of the dead lease>`, the claim. Only one worker can create it.
2. Read the lease again. If it changed (another worker took it over, or the owner is alive), remove
   the claim and give up.
3. Rename the claim onto the lease. The claim already holds the new owner's token.

A claim is itself a lease: if its creator dies before step 3, the next worker takes over the claim
in the same way. All of this needs only atomic rename and exclusive creation of files. Shared file
systems provide these more often than file locks. A killed worker may leave a small file whose name
begins with a dot; it blocks no other worker, and `clean` removes it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

HEARTBEAT_S = 30.0


class _LeaseState(NamedTuple):
    """The content and the modification time of a lease file when it was read.

    Two states are equal only if the lease has the same owner and was not touched in between.
    """

    token: str
    touched_ns: int
    boot: str
    namespace: str
    pid: int
    start: str
    heartbeat_s: float


class Lease:
    """A lease that this process holds until it releases it; a context manager."""

    def __init__(self, leases: Leases, key: str, token: str) -> None:
        self.key, self.token, self._leases, self._pid = key, token, leases, os.getpid()
        self.lost = False
        """True once the lease file has another owner or is gone.

        That happens if this process did not run for two heartbeats (a suspended machine, say):
        another worker then takes the lease over.
        """

    def release(self) -> None:
        """Release the key. A second call does nothing."""
        self._leases._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Leases:
    """Take leases on keys; each key has one owner at a time.

    One daemon thread touches all the leases that this object has taken and not yet released.

    Args:
        folder: the folder of the lease files; created with the first lease.
        heartbeat_s: seconds between two touches.
    """

    def __init__(self, folder: str | os.PathLike[str], heartbeat_s: float = HEARTBEAT_S) -> None:
        self.folder, self.heartbeat_s = Path(folder), heartbeat_s
        self._held: dict[str, Lease] = {}
        # State of a lease of another machine, and when (monotonic clock) it was first read so.
        self._seen: dict[str, tuple[_LeaseState, float]] = {}
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, key: str) -> Lease | None:
        """Return a lease on the key, or None while another worker or thread holds it.

        Never waits. If the owner ran on another machine, the two heartbeats after which it counts
        as dead start with the first call: so call this for all keys early, and again later. After
        taking a lease, check again whether the work is still to be done: another worker may have
        finished it just before.
        """
        token = self._acquire(key)
        if token is None:
            return None
        lease = Lease(self, key, token)
        with self._lock:
            self._held[token] = lease
            # A forked child inherits the object but not the running thread.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
        return lease

    def wait(self, key: str) -> Lease:
        """Wait until the key is free and return a lease on it. Use it for short work."""
        pause_s = 0.002
        while (lease := self.take(key)) is None:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self.heartbeat_s / 10)
        return lease

    def clean(self) -> None:
        """Remove the unfinished lease files of workers of this machine that died."""
        for path in self.folder.glob(".*.new"):
            state = _read_lease(path)
            # A file without content may be of a worker that is about to write it.
            if state is not None and state.boot and self._is_dead(path.name, state):
                path.unlink(missing_ok=True)

    def _acquire(self, name: str) -> str | None:
        """Create the file `name`, or take it over from a dead owner; return the new token."""
        path, token = self.folder / name, secrets.token_hex(8)
        if self._create(path, token):
            return token
        state = _read_lease(path)
        if state is None or not self._is_dead(name, state):
            return None
        claim = f".{state.token}"
        token = self._acquire(claim)  # recursive: the claim may itself be of a dead worker
        if token is None:
            return None
        # While this worker holds the claim, no other replaces the dead lease. But one may have
        # done so before: it renamed its claim away, and only then could this worker create one
        # of the same name. So read the lease again.
        if _read_lease(path) == state:
            os.replace(self.folder / claim, path)
            self._seen.pop(name, None)
            return token
        (self.folder / claim).unlink(missing_ok=True)
        return None

    def _create(self, path: Path, token: str) -> bool:
        owner = {
            "boot": _boot_id(),
            "heartbeat_s": self.heartbeat_s,
            "host": socket.gethostname(),
            "namespace": _pid_namespace(),
            "pid": os.getpid(),
            "start": _start_time(os.getpid()),
            "token": token,
        }
        text = json.dumps(owner, sort_keys=True).encode()
        complete = self.folder / f".{token}.new"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # A hard link makes the lease appear together with its content. Created empty and
            # written afterwards, a lease whose creator dies in between would name no owner and
            # block for two heartbeats.
            complete.write_bytes(text)
            os.link(complete, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return _create_exclusively(path, text)  # a file system without hard links
        finally:
            complete.unlink(missing_ok=True)
        return True

    def _is_dead(self, name: str, state: _LeaseState) -> bool:
        this_machine = (_boot_id(), _pid_namespace())
        is_local = state.boot and (state.boot, state.namespace) == this_machine
        if is_local and _start_time(state.pid) != state.start:
            return True
        # A local owner that runs but does not touch its lease is halted: it counts as dead too.
        now = time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if before != state:
            self._seen[name] = state, now
            return False
        return now - since >= 2 * state.heartbeat_s

    def _beat(self) -> None:
        while True:
            with self._lock:
                if self._lock.wait_for(lambda: not self._held_here(), self.heartbeat_s):
                    self._thread = None
                    return
                leases = self._held_here()
            for lease in leases:
                path = self.folder / lease.key
                try:
                    state = _read_lease(path)
                    if state is None or state.token != lease.token:
                        lease.lost = True
                        with self._lock:
                            self._held.pop(lease.token, None)
                    else:
                        os.utime(path)
                # A shared folder may be unreachable for a moment: one heartbeat may be missed,
                # since others wait for two.
                except OSError:
                    continue

    def _held_here(self) -> list[Lease]:
        """Return the leases of this process. A forked child also has copies of its parent's."""
        return [lease for lease in self._held.values() if lease._pid == os.getpid()]

    def _release(self, lease: Lease) -> None:
        if lease._pid != os.getpid():  # the copy in a forked child: the parent still holds it
            return
        with self._lock:
            if self._held.pop(lease.token, None) is None:
                return
            self._lock.notify_all()
        path = self.folder / lease.key
        state = _read_lease(path)
        if state is not None and state.token == lease.token:  # else another worker took it over
            path.unlink(missing_ok=True)


def _create_exclusively(path: Path, text: bytes) -> bool:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    return True


def _read_lease(path: Path) -> _LeaseState | None:
    """Read a lease; None if there is no such file.

    The times are read from the open file: opening makes a network file system ask its server for
    them, instead of returning cached ones.
    """
    try:
        with open(path, "rb") as file:
            status, text = os.fstat(file.fileno()), file.read(4096)
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
        token, heartbeat_s = str(owner["token"]), float(owner["heartbeat_s"])
        if not (re.fullmatch("[0-9a-f]{16}", token) and 0 < heartbeat_s < 3600):
            # Not written by motet. The token becomes a file name, so it must be refused.
            raise ValueError(token)
        return _LeaseState(
            token, status.st_mtime_ns, str(owner["boot"]), str(owner["namespace"]),
            int(owner["pid"]), str(owner["start"]), heartbeat_s,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        # Created but not yet written, on a file system without hard links, or cut by a power
        # failure. The owner is unknown, so the lease blocks until it is two heartbeats old.
        token = f"{status.st_ino:x}-{status.st_ctime_ns:x}"
        return _LeaseState(token, status.st_mtime_ns, "", "", 0, "", HEARTBEAT_S)


def _boot_id() -> str:
    """Return the id of this machine's current boot, empty if it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    """Return the namespace of process numbers. Numbers of two containers are not comparable."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks, empty if it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The second field is the program's name in parentheses, which may contain spaces: skip it.
    # After it: field 0 is the process state (Z, X: ended), field 19 the start time.
    fields = state.rpartition(b")")[2].split()
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
