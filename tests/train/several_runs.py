"""`torchrun tests/train/several_runs.py RUNS.json`: the training runs of a file one after another, in the same processes.

RUNS.json is a list of lists of settings. Starting processes takes longer than these runs do.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from retro_engine.train.__main__ import main

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        code = main([*arguments, "--quiet"])
        if code:
            sys.exit(code)
    dist.destroy_process_group()
