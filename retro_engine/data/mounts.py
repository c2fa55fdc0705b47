"""Whether a mount's own options say that a lock is this host's alone: another host's would be granted beside it.

Reads /proc/self/mountinfo (Linux): `... MAJOR:MINOR ROOT PLACE OPTIONS ... - TYPE SOURCE OPTIONS`.
"""

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
LOCAL = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "cifs": ("nobrl", "nolock"),
    "ocfs2": ("localflocks",),
}
LOCAL |= {"nfs4": LOCAL["nfs"], "smb3": LOCAL["cifs"], "lustre": ("localflock",), "gfs2": ("localflocks",)}


def local_locks(descriptor: int) -> str:
    """The option of an open file's mount that keeps its locks on this host; "" where there is none, or nothing is known."""
    device = os.fstat(descriptor).st_dev
    mark = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        about, _, source = line.partition(" - ")
        words, more = about.split(), source.split()
        if len(words) > 5 and len(more) > 2 and words[2] == mark:
            options = {*words[5].split(","), *more[2].split(",")}
            return next((name for name in LOCAL.get(more[0], ()) if name in options), "")
    return ""
