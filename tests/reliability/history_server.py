"""Servers that clients write to while they are killed: `python history_server.py RUN` forks one for each folder that it reads.

A line on standard input is a folder, with the library and accounts of a server; the answer, once it listens, is a line of JSON:
its address, a key, and its process's number, by which it is killed; or why it failed.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from serve_helpers import serving_run


def serve(run: Path, folder: Path) -> None:
    with serving_run(run, folder) as server:
        print(json.dumps({"url": server.url, "key": server.keys["write"], "pid": os.getpid()}), flush=True)
        while True:
            time.sleep(1)


def main() -> None:
    run = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who is killed is waited for by nobody
    with tempfile.TemporaryDirectory() as folder, serving_run(run, Path(folder)) as server, server.client() as client:
        client.post("/v1/documents", json={"id": "a", "text": "what is imported and compiled is there in every fork"})
    for line in sys.stdin:
        if not os.fork():
            try:
                serve(run, Path(line.strip()))
            except BaseException:
                print(json.dumps({"failed": traceback.format_exc()}), flush=True)
                os._exit(1)


if __name__ == "__main__":
    main()
