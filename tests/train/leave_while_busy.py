"""`leave_while_busy.py STORE RANK`: one of two processes that ends while gloo's threads still hold tensors."""

import atexit
import sys

import torch
import torch.distributed as dist

from retro_engine.train.signals import leave

if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    atexit.register(print, "done at the end")
    rows = list(torch.ones(300, 100))  # each an object of Python's, which the thread that is last to hold it frees
    works = [dist.all_reduce(row, async_op=True) for row in rows]
    del rows, works
    print("left", end=", ")
    leave(3)
