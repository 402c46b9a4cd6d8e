"""A controller's lease, kept alive by a thread: a second controller on a live run is refused (`storage.leases`)."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from storage import leases
from storage.filesystem import Storage

_TTL_SECONDS = 30.0


@contextmanager
def held(storage: Storage, run_id: str) -> Iterator[None]:
    """Hold the lease of a run. LeaseHeldError where another controller lives; one that died here is replaced."""
    owner = f"{socket.gethostname()}/{os.getpid()}/{time.time():.0f}"
    before = leases.holder(storage, run_id)
    if before is not None and _died_here(before):
        leases.release(storage, run_id, before)
    leases.acquire(storage, run_id, owner, _TTL_SECONDS)
    ended = threading.Event()
    lost: list[leases.LeaseHeldError] = []
    thread = threading.Thread(target=_renew, args=(storage, run_id, owner, ended, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost:
            raise lost[0] from None
        raise
    finally:
        ended.set()
        thread.join()
        leases.release(storage, run_id, owner)


def _renew(
    storage: Storage, run_id: str, owner: str, ended: threading.Event, lost: list[leases.LeaseHeldError]
) -> None:
    """Say that the controller lives, until it ends; stop it where another one has taken the run."""
    while not ended.wait(_TTL_SECONDS / 3):
        try:
            leases.renew(storage, run_id, owner)
        except leases.LeaseHeldError as error:
            lost.append(error)
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # unlike `_thread.interrupt_main`, it ends a wait at once
            return
        except OSError:
            continue  # storage has retried already; the next beat may still be in time


def _died_here(owner: str) -> bool:
    host, process, started = owner.split("/")
    if host != socket.gethostname():
        return False
    try:
        return psutil.Process(int(process)).create_time() > float(started) + 1  # another process has its number now
    except psutil.NoSuchProcess:
        return True
