"""Leases: who works on what, among processes on any machines that share a folder.

A lease is a file that its owner creates, touches once per heartbeat, and removes. It keeps workers
from doing the same work twice; it is not what keeps their results whole, which the commit protocol
(write.py) does even where two believe to hold one lease.

An owner that died on this machine is known by its process number and start time, under the boot id
and the process namespace, so that neither a reused number nor a container with the same host name
deceives. Any other owner is dead once its lease has not been touched during two heartbeats *of the
watcher's own monotonic clock*: clocks of machines and file servers are never compared, since they
differ. Hence a lease of a machine that is gone blocks for two heartbeats from the first look at it.

A dead lease is taken over by whoever creates the claim, a file named by the dead lease's token, and
then renames it onto the lease: one rename that only one worker can make. A claim is a lease itself,
so that a claimer that dies blocks no one. All of it needs atomic rename and exclusive creation
alone, which shared filesystems have more often than locks. A killed worker may leave a small file
whose name begins with a dot; it blocks nothing.
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


class _Found(NamedTuple):
    """A lease as it was seen; equal only if it is the same lease, not touched in between."""

    token: str
    touched_ns: int
    boot: str
    namespace: str
    pid: int
    start: str
    heartbeat_s: float


class Lease:
    """Hold a key until it is released; a context manager."""

    def __init__(self, leases: Leases, key: str, token: str) -> None:
        self.key, self.token, self._leases, self._pid = key, token, leases, os.getpid()
        self.lost = False
        """True once another worker has taken it, as this one was halted for two heartbeats."""

    def release(self) -> None:
        """Give the key back; a second time does nothing."""
        self._leases._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Leases:
    """Take keys, each for one worker at a time. All its leases are touched by one daemon thread."""

    def __init__(self, folder: str | os.PathLike[str], heartbeat_s: float = HEARTBEAT_S) -> None:
        self.folder, self.heartbeat_s = Path(folder), heartbeat_s
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, tuple[_Found, float]] = {}
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, key: str) -> Lease | None:
        """Return a lease on the key, or None while another worker, or thread, holds it.

        Never waits. Where the owner may be dead on another machine, the time of its death counts
        from the first call that saw it: call for all keys early, and again later. Whoever got a
        lease looks again at what it is about: another may have done it just before.
        """
        token = self._acquire(key)
        if token is None:
            return None
        lease = Lease(self, key, token)
        with self._lock:
            self._held[token] = lease
            if self._thread is None or not self._thread.is_alive():  # not alive: after a fork
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
        return lease

    def wait(self, key: str) -> Lease:
        """Return a lease on the key as soon as it can be had: for work of moments."""
        pause_s = 0.002
        while (lease := self.take(key)) is None:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self.heartbeat_s / 10)
        return lease

    def _acquire(self, name: str) -> str | None:
        """Create the file `name` or take it over from the dead; return its token."""
        path, token = self.folder / name, secrets.token_hex(8)
        if self._create(path, token):
            return token
        found = _look(path)
        if found is None or not self._is_dead(name, found):
            return None
        claim = f".{found.token}"
        token = self._acquire(claim)
        if token is None:
            return None
        # With the claim in hand nobody else replaces that lease. Unless they have: look again.
        if _look(path) == found:
            os.replace(self.folder / claim, path)
            self._seen.pop(name, None)
            return token
        (self.folder / claim).unlink(missing_ok=True)
        return None

    def _create(self, path: Path, token: str) -> bool:
        owner = {
            "boot": _boot(),
            "heartbeat_s": self.heartbeat_s,
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "start": _started(os.getpid()),
            "token": token,
        }
        text = json.dumps(owner, sort_keys=True).encode()
        whole = self.folder / f".{token}.new"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # A link makes the lease and what it says appear at once: a worker that dies in between
            # leaves no lease without an owner, which would block for two heartbeats.
            whole.write_bytes(text)
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return _write_new(path, text)  # a filesystem without links
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _is_dead(self, name: str, found: _Found) -> bool:
        here = found.boot and (found.boot, found.namespace) == (_boot(), _namespace())
        if here and _started(found.pid) != found.start:
            return True
        now = time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if before != found:
            self._seen[name] = found, now
            return False
        return now - since >= 2 * found.heartbeat_s

    def _beat(self) -> None:
        while True:
            with self._lock:
                if self._lock.wait_for(lambda: not self._own(), self.heartbeat_s):
                    self._thread = None
                    return
                held = self._own()
            for lease in held:
                path = self.folder / lease.key
                try:
                    found = _look(path)
                    if found is None or found.token != lease.token:
                        lease.lost = True
                        with self._lock:
                            self._held.pop(lease.token, None)
                    else:
                        os.utime(path)
                except OSError:  # a shared folder that is away for a moment: a beat may be missed
                    continue

    def _own(self) -> list[Lease]:
        """Return the leases of this process: after a fork there are copies of the parent's."""
        return [lease for lease in self._held.values() if lease._pid == os.getpid()]

    def _release(self, lease: Lease) -> None:
        if lease._pid != os.getpid():  # a copy of the parent's, which goes on
            return
        with self._lock:
            if self._held.pop(lease.token, None) is None:
                return
            self._lock.notify_all()
        path = self.folder / lease.key
        found = _look(path)
        if found is not None and found.token == lease.token:
            path.unlink(missing_ok=True)


def _write_new(path: Path, text: bytes) -> bool:
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


def _look(path: Path) -> _Found | None:
    """Read a lease; None if there is none. Opening it makes network filesystems ask the server."""
    try:
        with open(path, "rb") as file:
            status, text = os.fstat(file.fileno()), file.read(4096)
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
        token, heartbeat_s = str(owner["token"]), float(owner["heartbeat_s"])
        if not (re.fullmatch("[0-9a-f]{16}", token) and 0 < heartbeat_s < 3600):
            raise ValueError(token)  # nothing of ours: it would name files
        return _Found(
            token, status.st_mtime_ns, str(owner["boot"]), str(owner["namespace"]),
            int(owner["pid"]), str(owner["start"]), heartbeat_s,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        # Created and not yet written, on a filesystem without links; or after a power cut.
        token = f"{status.st_ino:x}-{status.st_ctime_ns:x}"
        return _Found(token, status.st_mtime_ns, "", "", 0, "", HEARTBEAT_S)


def _boot() -> str:
    """Return what names this machine since it was started, empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    """Return the namespace of process numbers: those of two containers are not comparable."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process of this machine started, in clock ticks; empty if it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    fields = state.rpartition(b")")[2].split()  # the name before may hold blanks
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
