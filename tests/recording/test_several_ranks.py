"""A recorder on each rank of somebody's own DDP loop: what it records is of the whole batch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

LOOP = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradflow
from gradflow.ranks import Ranks

torch.set_num_threads(1)
rank, world, port, save = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
scales = [float(scale) for scale in sys.argv[5:]]


class Experts(nn.Module):
    '''Each image goes through one of three layers, by its first value: not all on every rank.'''

    def __init__(self, scale):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.skip, self.last = gradflow.Skip("identity"), nn.Linear(8, 4)
        self.scale = scale

    def forward(self, x):
        h = self.first(x) * self.scale
        chosen, out = (x[:, 0] * 3).long(), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            mine = torch.nonzero(chosen == number).flatten()
            if len(mine):
                out = out.index_add(0, mine, expert(h[mine]))
        return self.last(self.skip(h, out) / self.scale)


if world > 1:
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
place = Ranks(rank, world)
for scale in scales:
    torch.manual_seed(0)
    model = Experts(scale).double()
    # The first rank never meets the third expert, nor the second rank the first.
    x = torch.rand(5, 12, 6, dtype=torch.float64)
    x[:, :, 0] = torch.linspace(0, 0.99, 12)
    y = torch.randint(0, 4, (5, 12))
    trained = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # The model itself, with its ranks, or what DDP made of it, which knows them.
    watched, ranks = (trained, None) if scale == 1 else (model, place)
    with gradflow.Recorder(
        watched, "all", schedule=lambda step: step != 3, optimizer=optimizer,
        save=f"{save}-{scale}", ranks=ranks,
    ) as recorder:
        for images, labels in zip(x, y):
            optimizer.zero_grad()
            share = place.share(12)
            loss = nn.functional.cross_entropy(trained(images[share]), labels[share])
            loss.backward()
            recorder.step(loss, rank=float(rank))
            optimizer.step()
            latest = recorder.latest["loss"]
    print(json.dumps([latest, len(recorder.table("steps")) if rank == 0 else 0]))
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a Python that is ending
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, free_port):
    """(one process's run, two ranks' run) by scale of the activations, and what was printed."""
    from gradflow.store import Run

    where, scales = tmp_path_factory.mktemp("ranks"), ["1.0", "1e+150", "1e-150"]
    said = {}
    for world in (2, 1):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LOOP, *map(str, (rank, world, free_port)),
                 str(where / f"of{world}"), *scales],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0] * world, outputs
        said[world] = [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]
    runs = {
        scale: [Run(where / f"of{world}-{float(scale)}") for world in (1, 2)] for scale in scales
    }
    return runs, said, sorted(path.name for path in where.iterdir())


@pytest.fixture(scope="module")
def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("scale", ["1.0", "1e+150", "1e-150"])
@pytest.mark.parametrize("table", ["weights", "outputs", "blocks", "steps"])
def test_the_tables_are_those_of_one_process(recorded, scale, table):
    """Also of modules that not every rank executes, and of very large and very small numbers."""
    single, shared = (run.frame(table) for run in recorded[0][scale])
    keys = [name for name in ("step", "layer") if name in single]
    assert set(shared["step"]) == ({0, 1, 2, 4} if table != "steps" else set(range(5)))
    single, shared = (
        frame.assign(**{key: frame[key].astype(str) for key in keys}).set_index(keys).sort_index()
        for frame in (single, shared)
    )
    assert (single.index == shared.index).all()
    for name in single:
        if name == "rank":
            assert set(single[name]) == {0.0}
            assert set(shared[name]) == {0.5}
            continue
        mine, theirs = (frame[name].to_numpy(float, na_value=-1.0) for frame in (shared, single))
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, err_msg=name)


def test_only_rank_0_keeps_it(recorded):
    runs, said, names = recorded
    assert names == sorted(f"of{world}-{float(scale)}" for world in (1, 2) for scale in runs)
    first, other = said[2]
    assert [count for _, count in first] == [5, 5, 5]
    assert [loss for loss, _ in first] == [loss for loss, _ in other]


def test_the_files_say_over_how_many_ranks(recorded):
    single, shared = recorded[0]["1.0"]
    for table, name in (("outputs", "output_rms"), ("blocks", "branch_grad_norm")):
        notes = [run.table(table).schema.field(name).metadata for run in (single, shared)]
        alone, together = (note[b"meaning"].decode() for note in notes)
        assert "reduced over 2 ranks" in together
        assert together.replace("reduced over 2 ranks, ", "") == alone


def test_a_torch_without_a_group_is_refused():
    import gradflow
    from gradflow.errors import SpecError
    from gradflow.ranks import Ranks

    with pytest.raises(SpecError, match=r"ranks: torch\.distributed has no group of 2"):
        gradflow.Recorder(torch.nn.Linear(2, 2), ranks=Ranks(0, 2))
