"""Many processes: who this one is, and a model spread over them by torch's own means (DDP, FSDP2, DTensor).

The mesh is [data, tensor]: processes beside each other share every matrix (tensor parallel), groups of them each train
on sequences of their own (data parallel). Gradients are averaged over the groups; a micro-batch's loss is scaled so that
the sum over all of them is what one process would have. Letters: B sequences, N tokens, D width.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from retro_engine.config import Config
from retro_engine.errors import UnavailableError, UsageError
from retro_engine.model.device import num_processes, pick_device
from retro_engine.model.linear import is_sharded
from retro_engine.model.retro import RetroModel


def strategy_of(config: Config, data: int) -> str:
    """How `data` groups of processes share a model: none | ddp | fsdp."""
    m = config.model
    is_fsdp = config.trainer.strategy == "fsdp" or m.optim.name == "distributed_fused_adam"
    return "none" if data == 1 else "fsdp" if is_fsdp or m.tensor_model_parallel_size > 1 else "ddp"


def sequences_per_step(config: Config, data: int | None = None) -> int:
    """Of all `data` data-parallel groups together; None = of the processes that torchrun started."""
    m = config.model
    if data is None:
        data = max(1, int(os.environ.get("WORLD_SIZE", "1")) // m.tensor_model_parallel_size)
    return m.global_batch_size or m.micro_batch_size * config.trainer.accumulate_grad_batches * data


def micro_batches(config: Config, data: int) -> int:
    """Of a step and group. Raises UsageError where the global batch is not whole ones."""
    size, total = config.model.micro_batch_size, sequences_per_step(config, data)
    if total % (size * data):
        raise UsageError(
            f"model.global_batch_size={total} cannot be used",
            f"{data} data-parallel processes take model.micro_batch_size={size} sequences each",
            f"use a multiple of {size * data}",
        )
    return total // (size * data)


class Parallel:
    """This process among the others; one process is a group of one."""

    def __init__(self, config: Config):
        """Joins the group that torchrun started. Raises UsageError where world, devices and sizes do not fit."""
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        m, trainer = config.model, config.trainer
        self.tensor = m.tensor_model_parallel_size
        devices = num_processes(trainer.accelerator, trainer.devices)
        if devices is not None and devices * trainer.num_nodes != self.world:
            nodes = f"--nnodes {trainer.num_nodes} " if trainer.num_nodes > 1 else ""
            raise UsageError(
                f"trainer.devices={trainer.devices} on trainer.num_nodes={trainer.num_nodes} does not fit",
                f"{self.world} processes were started",
                f"torchrun {nodes}--nproc-per-node {devices} -m retro_engine.train ..., or leave trainer.devices out",
            )
        if self.world % self.tensor:
            raise UsageError(
                f"model.tensor_model_parallel_size={self.tensor} does not fit",
                f"it must divide the {self.world} processes",
                f"torchrun --nproc-per-node {self.tensor}, or model.tensor_model_parallel_size=1",
            )
        self.data = self.world // self.tensor
        self.data_rank = self.rank // self.tensor
        self.is_main = self.rank == 0
        self.strategy = strategy_of(config, self.data)
        self.is_sequence_parallel = m.sequence_parallel
        self.device = pick_device(trainer.accelerator, int(os.environ.get("LOCAL_RANK", "0")))
        self.background: Any = None  # a group of its own for checkpoints, beside the training's communication
        self.is_own_group = self.world > 1 and not dist.is_initialized()  # else the caller's, who also ends it
        timeout = timedelta(seconds=trainer.timeout_s)
        if self.world > 1:
            if self.is_own_group:
                kind = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                # torchrun may keep its store over a restart: addresses of the processes before must not be found there
                store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
                store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                dist.init_process_group(kind, store=store, rank=rank, world_size=world, timeout=timeout)
            self.background = dist.new_group(backend="gloo", timeout=timeout)
            self.mesh = dist.init_device_mesh(
                self.device.type, (self.data, self.tensor), mesh_dim_names=("data", "tensor")
            )

    def spread(self, model: RetroModel, is_bf16: bool = False, finds_unused: bool = False) -> nn.Module:
        """Shard `model` in place; the module to call. `is_bf16`: computation on bf16 copies of fp32 shards."""
        if self.tensor > 1:
            _tensor_parallel(model, self.mesh["tensor"], self.is_sequence_parallel)
            model.packs_neighbors = model.packs_neighbors and not self.is_sequence_parallel
        if self.strategy == "fsdp":
            _fully_shard(model, self.mesh["data"], is_bf16)
        elif self.strategy == "ddp":
            group = self.mesh["data"].get_group()
            return nn.parallel.DistributedDataParallel(
                model, process_group=group, find_unused_parameters=finds_unused, gradient_as_bucket_view=True
            )
        return model

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        if self.strategy == "fsdp":
            module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        if self.strategy == "ddp" and not is_last:
            with module.no_sync():  # type: ignore[operator]
                yield
        else:
            yield

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over the data-parallel groups."""
        total = np.array(list(values), np.float64)
        self.sum_arrays([total])
        return total.tolist()

    def sum_arrays(self, arrays: Iterable[np.ndarray]) -> None:
        """The same for arrays, in place."""
        for array in arrays:
            if self.data > 1:
                total = torch.from_numpy(array).to(self.device)
                dist.all_reduce(total, group=self.mesh["data"].get_group())
                array[...] = total.cpu().numpy()

    def any(self, value: int) -> int:
        """The largest of all processes' values: a signal or a deadline that one saw counts for all."""
        if self.world == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def from_main(self, value: Any) -> Any:
        """What the first process has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.background)
        return box[0]

    def joined(self, own: dict[str, str], error: BaseException | None = None) -> dict[str, str]:
        """What all processes have, in each, through the background's group. Raises `error`, what this process met, and
        UnavailableError where another one met something: it says what.
        """
        boxes: list[Any] = [(own, error is not None)]
        if self.world > 1:
            boxes = [None] * self.world
            dist.all_gather_object(boxes, (own, error is not None), group=self.background)
        if error is not None:
            raise error
        failed = [str(rank) for rank, (_, has_failed) in enumerate(boxes) if has_failed]
        if failed:
            raise UnavailableError(
                f"process {', '.join(failed)} could not go on", "it says why", "run the same command again"
            )
        return {name: value for part, _ in boxes for name, value in part.items()}

    def agree(self, what: dict[str, Any]) -> None:
        """Raise UsageError, in every process, where one sees other data or settings than the first: what each decides
        from them (how many steps there are, when it validates) would differ, and the others would wait for it.
        """
        main = self.from_main(what)
        differing = [key for key, value in what.items() if main.get(key) != value]
        if self.any(int(bool(differing))):
            raise UsageError(
                f"process {self.rank} sees what the first one does: another process does not"
                if not differing
                else f"process {self.rank} has another {', '.join(differing)} than the first",
                "every process reads the same settings and the same files",
                "start all of them with one command, and let every node see the same stores",
            )

    def close(self) -> None:
        if self.is_own_group and dist.is_initialized():
            dist.destroy_process_group()


def _fully_shard(model: RetroModel, mesh: Any, is_bf16: bool) -> None:
    """FSDP2 (arXiv 2304.11277): every layer is gathered when it runs; gradients and optimizer state stay shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if is_bf16 else MixedPrecisionPolicy()
    parts: list[nn.Module] = [*model.layers, *(model.encoder.layers if model.encoder is not None else [])]
    if model.neighbor_projection is not None:
        parts.append(model.neighbor_projection)
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def _tensor_parallel(model: RetroModel, mesh: Any, is_sequence: bool) -> None:
    """Heads, FFN features and vocabulary are cut over the processes (arXiv 1909.08053 section 3); with `is_sequence`
    what lies between, the residual, along the sequence (arXiv 2205.05198 section 4).
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        parallelize_module,
    )

    def scatter() -> PrepareModuleOutput:
        return PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))

    plan: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and name not in ("encoder_input", "head"):
            is_out = last in ("out", "down")
            is_masked = name.startswith("layers.") and last == "out" and ".cross." in name  # over the whole sequence
            layout = Shard(1) if is_sequence and not is_masked else Replicate()
            plan[name] = RowwiseParallel(output_layouts=layout) if is_out else ColwiseParallel()
        elif is_sequence and (last.endswith("norm")):
            plan[name] = _gathering()
        elif is_sequence and (name in ("dropout", "encoder.dropout") or last == "cross_dropout"):
            plan[name] = scatter()
    if model.head is not None:
        plan["head"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    if model.output_bias is not None:
        model.output_bias = nn.Parameter(distribute_tensor(model.output_bias.detach(), mesh, [Shard(0)]))


def _gathering() -> Any:
    """A norm over this process's part of the sequence, whose output is gathered to the whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel.style import ParallelStyle

    class GatheredNorm(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
            def read(_: nn.Module, inputs: Any, mesh: Any) -> Any:
                return (DTensor.from_local(inputs[0], mesh, [Shard(1)]),)

            def gather(_: nn.Module, output: Any, mesh: Any) -> Any:
                return output.redistribute(placements=[Replicate()]).to_local()

            return distribute_module(module, device_mesh, None, read, gather)

    return GatheredNorm()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients; shards of one mesh are summed together (torch's own function takes one mesh only)."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if is_sharded(parameter.grad) else None  # type: ignore[attr-defined]
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    squares = []
    for mesh, gradients in by_mesh.items():
        norm = torch.nn.utils.get_total_norm(gradients)
        squares.append((norm.full_tensor() if mesh is not None else norm) ** 2)  # type: ignore[attr-defined]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
