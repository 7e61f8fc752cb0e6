"""FSDP2 on two ranks: what is recorded is of whole parameters, as of one process."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recorded import on_ranks

from gradflow.recording.shards import share
from gradflow.store import Run

LOOP = """
import json, math, os, sys
import torch
import torch.distributed as dist
from torch import nn

import gradflow
from gradflow.recording import buffers

torch.set_num_threads(1)
buffers.FLUSH_STEPS, buffers.FLUSH_SECONDS = 3, 0.0  # ranks empty their buffers together
rank, world, port, parts = map(int, sys.argv[1:5])
save, scale = sys.argv[5], float(sys.argv[6])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.skip = nn.Linear(7, 7), gradflow.Skip("identity")

    def forward(self, x):
        return self.skip(x, torch.tanh(self.linear(x)))


class Net(nn.Module):
    '''Of the last layer's 3 rows one rank has 2, of the single number one has none.'''

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 7), Block(), Block(), nn.Linear(7, 3))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layers(x) * self.gain


torch.manual_seed(0)
model = Net().double()
x, y = torch.randn(8, 12, 6, dtype=torch.float64), torch.randint(0, 3, (8, 12))
if world > 1:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world // parts, parts), mesh_dim_names=("copies", "parts"))
    mesh = mesh if parts < world else mesh["parts"]
    for module in (model.layers[1], model.layers[2], model):
        fully_shard(module, mesh=mesh)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
with gradflow.Recorder(
    model, "all", schedule=lambda step: step != 4, optimizer=optimizer, save=save
) as recorder:
    for images, labels in zip(x, y):
        optimizer.zero_grad()
        share = slice(rank * 12 // world, (rank + 1) * 12 // world)
        loss = nn.functional.cross_entropy(model(images[share]), labels[share])
        (loss if math.isnan(scale) else scale * loss).backward()
        if math.isnan(scale) and rank == 1:
            model.layers[3].weight.grad.to_local()[0] = scale  # no other rank sees it
        recorder.step(loss)
        optimizer.step()
divergence = recorder.divergence and list(vars(recorder.divergence).values())
print(json.dumps([recorder.latest, divergence]))
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a Python that is ending
"""


def run(world: int, save: Path, scale: float, parts: int = 2) -> list[Any]:
    return on_ranks(LOOP, world, parts, save, scale)


@pytest.mark.parametrize(
    ("scale", "parts"), [(1.0, 2), (1.0, 1), pytest.param(1e-30, 2, marks=pytest.mark.slow)]
)
def test_sharded_parameters_are_recorded_whole(tmp_path: Path, scale: float, parts: int) -> None:
    """In two parts, or in one of which there are two copies; buffers are emptied at the same steps
    on both ranks, after which all is one table."""
    run(1, tmp_path / "one", scale)
    said = run(2, tmp_path / "two", scale, parts)
    assert all("grad_norm" not in latest for latest, _ in said)
    assert [divergence for _, divergence in said] == [None, None]
    for table in ("weights", "outputs", "blocks", "steps"):
        one, two = (Run(tmp_path / name).frame(table) for name in ("one", "two"))
        keys = [name for name in ("step", "layer") if name in one]
        assert set(one["step"]) == set(range(8)) - ({4} if table != "steps" else set())
        one, two = (
            frame.assign(**{key: frame[key].astype(str) for key in keys}).set_index(keys)
            for frame in (one, two)
        )
        assert sorted(one.index) == sorted(two.index)
        for name in one:
            theirs = one[name].to_numpy(float, na_value=-1.0)
            mine = two[name].reindex(one.index).to_numpy(float, na_value=-1.0)
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, err_msg=f"{table} {name}")
    field = Run(tmp_path / "two").table("weights").schema.field("weight_grad_norm")
    assert "reduced over 2 ranks" in field.metadata[b"meaning"].decode()


def test_a_divergence_is_known_to_every_rank(tmp_path: Path) -> None:
    """At the next flush: no rank may stop alone."""
    said = run(2, tmp_path / "two", math.nan)
    assert [divergence for _, divergence in said] == [[0, "layers.3", "weight_grad_norm"]] * 2


def test_a_part_counts_by_how_many_ranks_have_it() -> None:
    def placed(*shards: bool) -> Any:
        placements = [SimpleNamespace(is_shard=lambda s=s: s) for s in shards]
        mesh = SimpleNamespace(shape=(2, 3)[: len(shards)])
        return SimpleNamespace(to_local=None, device_mesh=mesh, placements=placements)

    assert share(placed(True, True), 6) == 1
    assert share(placed(False, True), 6) == pytest.approx(2**-0.5)
    assert share(torch.ones(2), 6) == pytest.approx(6**-0.5)
