"""`torchrun tests/train/several_runs.py RUNS.json`: the training runs of a file one after another, in the same processes.

RUNS.json has the settings of each by its name; "NAME: exit code N" is printed. Starting processes takes longer than
these runs do.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from retro_engine.train.__main__ import main
from retro_engine.train.signals import leave

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        code = main([*arguments, "--quiet"])
        if dist.get_rank() == 0:
            print(f"{name}: exit code {code}", flush=True)
    dist.destroy_process_group()
    leave(0)
