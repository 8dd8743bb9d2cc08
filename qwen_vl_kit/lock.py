"""One run in a folder: a lock that ends with the process that holds it, however that ends.

Wraps `save`, after which the folder is free. `options` takes the lock before it looks at what lies in the folder, and
`training` before it trains. Of several processes of one run, the first holds it for all.
"""

import json
import os
import socket
from datetime import datetime
from errno import EACCES, ENOSPC, EPERM, EROFS

from filelock import FileLock, Timeout

held = None  # in a notebook the options are read again and again, by the same process
inode = None  # of the lock's file, as long as that lies where it was


def take(outputs, error):
    """Takes the folder `outputs` for this process; calls `error` with a sentence if another process has it."""
    global held, inode
    file = (outputs / ".lock").resolve()
    if held and held.lock_file == str(file):
        return
    lock = FileLock(file, thread_local=False)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    try:
        lock.acquire(timeout=0)
        part = outputs / ".holder.part"
        part.write_text(json.dumps(about), encoding="utf-8")
        part.replace(outputs / ".holder.json")
        inode = file.stat().st_ino
    except Timeout:
        error(f"{holder(outputs)} is using {outputs}: wait for it, or write to another folder with --output_dir")
    except OSError as reason:
        if reason.errno in (EACCES, EPERM, EROFS, ENOSPC):
            error(f"can't write to {outputs} ({reason.strerror}): choose another folder with --output_dir")
        print(f"{outputs} is on a file system that can't lock: make sure that no other run writes there.")
    if held:
        held.release()
    held = lock


def still_ours():
    """Whether the lock's file lies where it was: else someone has deleted the folder, and another run may have it."""
    try:
        return not held or os.stat(held.lock_file).st_ino == inode
    except OSError:
        return False


def holder(outputs):
    """Who has the folder, in words."""
    try:
        about = json.loads((outputs / ".holder.json").read_text(encoding="utf-8"))
        return f"a run (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError):  # it has only just come
        return "another run"


def save(step, *results):
    global held
    step(*results)
    if held:  # in a notebook the process goes on
        held.release()
    held = None
