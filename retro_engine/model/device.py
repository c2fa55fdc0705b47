"""The one place that decides which device a model is on, for training and for everything after it.

accelerator: auto (a GPU where there is one) | cpu | gpu; `cuda` is Lightning's other name of gpu.
"""

import torch

from retro_engine.errors import OutOfResourceError, UsageError, nearest
from retro_engine.model.ops import check_environment

ACCELERATORS = ("auto", "cpu", "gpu")


def pick_device(accelerator: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of process `local_rank` of a node. Raises OutOfResourceError where a GPU is asked for and is not there,
    UsageError where the environment names kernels that are not.
    """
    check_environment()
    if accelerator == "cuda":
        accelerator = "gpu"
    if accelerator not in ACCELERATORS:
        names = list(ACCELERATORS)
        raise UsageError(f"device {accelerator!r} does not exist", nearest(accelerator, names), ", ".join(names))
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise OutOfResourceError(
            "trainer.accelerator=gpu, and there is no GPU",
            "torch.cuda.is_available() is false",
            "trainer.accelerator=cpu",
        )
    if accelerator == "cpu" or not has_gpu:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise OutOfResourceError(
            f"process {local_rank} of this node has no GPU",
            f"there are {torch.cuda.device_count()}",
            f"torchrun --nproc-per-node {torch.cuda.device_count()}",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def describe_device(device: torch.device) -> str:
    """What a command says it runs on."""
    if device.type == "cuda":
        return f"on {device}, {torch.cuda.get_device_name(device)}"
    return "on the CPU" + (", though there is a GPU" if torch.cuda.is_available() else "")


def num_processes(accelerator: str, devices: int | None) -> int | None:
    """Processes that `trainer.devices` asks for on a node; None = it does not say.

    Raises UsageError for -1 without GPUs to count, OutOfResourceError for more processes than GPUs.
    """
    if devices is None:
        return None
    device = pick_device(accelerator)
    if device.type != "cuda":
        if devices == -1:
            raise UsageError(
                "trainer.devices=-1 cannot be used",
                "it means every GPU, and there is none",
                "trainer.devices=N processes",
            )
        return devices
    count = torch.cuda.device_count()
    if devices > count:
        why = f"there are {count}" if count > 1 else "there is one"
        raise OutOfResourceError(f"trainer.devices={devices} GPUs are asked for", why, f"trainer.devices={count}")
    return count if devices == -1 else devices
