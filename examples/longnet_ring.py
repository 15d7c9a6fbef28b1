"""Train a LongNet over bytes with the sequence shared by all ranks, and the parameters too (FSDP2 over the same ranks).

    torchrun --nproc-per-node 4 examples/longnet_ring.py --steps 40 --save checkpoint
    torchrun --nproc-per-node 2 examples/longnet_ring.py --steps 60 --resume checkpoint   # at another ring size
    python examples/longnet_ring.py --steps 60                                            # one process: the same losses

The text is the source of this Python's standard library. Every rank draws the same windows and keeps its shard of them;
the loss of a step is the mean over the whole sequence, whatever the number of ranks. On GPUs add --device cuda.
Shapes: B batch, N whole sequence, S = N / ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from dilated_attention import ContextParallel, build_attention, local_positions, shard_sequence
from dilated_attention.demo.model import Block, ByteModel, ModelConfig
from dilated_attention.demo.text import Corpus, standard_library


def join(device: str) -> DeviceMesh:
    """The mesh of all ranks that torchrun started, or of this process alone."""
    if "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    else:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),))


def make_model(config: ModelConfig, mesh: DeviceMesh) -> ByteModel:
    """The demo's model, its attentions over the ring, its positions those of the shard, its parameters sharded."""
    model = ByteModel(config, torch.Generator().manual_seed(0)).to(mesh.device_type)
    positions = local_positions(config.seq_len, mesh)
    model.table = model.table[:, positions]
    parallel = ContextParallel(size=mesh.size())
    for block in model.blocks:
        assert isinstance(block, Block)
        fields = attrs.evolve(block.attention.config, device=mesh.device_type, context_parallel=parallel)
        block.attention = build_attention(fields, mesh=mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def windows_of(corpus: Corpus, step: int, config: ModelConfig, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The shards (B, S) of a step's inputs and targets; every rank draws the same windows."""
    generator = torch.Generator().manual_seed(step)
    whole = corpus.batch(1, config.seq_len, generator).to(mesh.device_type)
    return shard_sequence(whole[:, :-1], mesh), shard_sequence(whole[:, 1:], mesh)


def train_step(
    model: ByteModel, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, mesh: DeviceMesh
) -> float:
    """One step; returns bits per byte over the whole sequence.

    Each rank's loss is the mean over its shard. The ring brings home what other ranks' losses say of this rank's keys,
    and FSDP averages the gradients over ranks: together the gradient of the mean over the whole sequence.
    """
    logits = model(inputs)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total.item() / mesh.size()


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="the step to train to")
    parser.add_argument("--seq-len", type=int, default=1024, help="of the whole sequence")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--save", type=Path, help="folder for a checkpoint after the last step")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint, written at any number of ranks")
    parser.add_argument("--losses", type=Path, help="file for the losses, as JSON")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.seq_len < 8:  # the shortest segment is an eighth of it
        parser.error(f"--seq-len must be at least 8, got {args.seq_len}")
    if args.resume and not args.resume.is_dir():
        parser.error(f"--resume must be the folder of a checkpoint, got {str(args.resume)!r}")
    mesh = join(args.device)
    n = args.seq_len
    config = ModelConfig(seq_len=n, segment_lengths=(n // 8, n // 2, n), dilation_rates=(1, 4, 8))
    model = make_model(config, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    first = resume(args.resume, model, optimizer) if args.resume else 0
    corpus, losses, start = standard_library(), {}, time.perf_counter()
    for step in range(first, args.steps):
        losses[step] = train_step(model, optimizer, *windows_of(corpus, step, config, mesh), mesh)
        if mesh.get_rank() == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:5d}  {losses[step]:.4f} bits per byte  {time.perf_counter() - start:6.1f} s", flush=True)
    if args.save:
        weights, moments = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": moments, "step": args.steps}, checkpoint_id=args.save)
    if args.losses and mesh.get_rank() == 0:
        args.losses.write_text(json.dumps(losses))
    dist.destroy_process_group()


def resume(folder: Path, model: ByteModel, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint, each rank the parts that it now has; returns the step to go on with."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 0}
    load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(state["step"])


if __name__ == "__main__":
    main()
