"""Two processes, gloo on CPU and NCCL where there are two GPUs: a model that uses the op under DDP and FSDP2 takes the step of
one process."""
from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gdn_ir
from gdn_ir.ops import chunk_gated_delta_rule

PROCESSES = 2


class Mixer(nn.Module):
    """Projections, the op, a residual: enough to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 2 * 16 + 32)
        self.gates = nn.Linear(32, 4)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).split([16, 16, 32], -1)
        g, beta = self.gates(x).chunk(2, -1)
        o, _ = chunk_gated_delta_rule(q.unflatten(-1, (1, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (2, 16)), g, beta,
                                      use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True,
                                      A_log=self.A_log, dt_bias=self.dt_bias)
        return x + o.flatten(-2)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mixer(), Mixer())


def batch() -> torch.Tensor:
    return torch.randn(2 * PROCESSES, 20, 32, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()


def worker(rank: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", rank=rank, world_size=PROCESSES,
                            init_method=f"file://{folder}/store")
    with gdn_ir.use("torch"):
        mine = batch().chunk(PROCESSES)[rank].to(device)
        wrapped = DistributedDataParallel(build().to(device))
        step(wrapped, mine)
        sharded = build().to(device)
        mesh = init_device_mesh(device, (PROCESSES,))
        for layer in sharded:                              # type: ignore[attr-defined]
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        step(sharded, mine)
    whole = {n: p.full_tensor() for n, p in sharded.state_dict().items()}
    if rank == 0:
        torch.save({"ddp": wrapped.module.state_dict(), "fsdp": whole}, f"{folder}/after.pt")
    del layer, wrapped, sharded, mesh, whole               # threads of what outlives the group abort the exit
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_take_the_step_of_one(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(worker, (str(tmp_path), device), nprocs=PROCESSES)    # type: ignore[attr-defined]
    after = torch.load(tmp_path / "after.pt", map_location="cpu")
    model, before = build(), build().state_dict()
    with gdn_ir.use("torch"):
        step(model, batch())
    for name, want in model.state_dict().items():
        assert not torch.equal(want, before[name]), name
        for kind in ("ddp", "fsdp"):
            assert torch.allclose(after[kind][name], want, atol=1e-6 if device == "cpu" else 1e-5), (kind, name)
