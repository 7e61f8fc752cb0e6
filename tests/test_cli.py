"""The command line as a user meets it: keys, one line for each mistake, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gradflow import cli, config, load_runs
from gradflow.help import text
from gradflow.spec import Execution, RunSpec

TINY = ["depth=8", "width=4", "threads=1"]


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """`python -m gradflow ARGUMENTS` in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


# --- good input -----------------------------------------------------------------------------------


def test_overrides_become_specs():
    got = cli._configure(
        ["-m", "depth=20,56", "skip=true,false", "lr=5e-3", "record.every.outputs=2", "jobs=3"]
    )
    assert [spec for spec, _ in got] == [
        RunSpec(depth=depth, skip=skip, lr=0.005, record={"every": {"outputs": 2}})  # type: ignore[arg-type]
        for depth in (20, 56)
        for skip in (True, False)
    ]
    assert {execution for _, execution in got} == {Execution(jobs=3)}


def test_groups_and_custom_targets():
    [(spec, _)] = cli._configure(["network=mlp", "data=synthetic", "data.size=16", "record=all"])
    assert spec == RunSpec(
        network="mlp", data={"name": "synthetic", "size": 16}, record="all"  # type: ignore[arg-type]
    )  # fmt: skip
    [(spec, _)] = cli._configure(
        ["network.target=package.module.f", "network.args={depth:'${depth}',k:1}", "depth=11"]
    )
    assert spec.network.args == {"depth": 11, "k": 1}
    assert spec.name.startswith("custom-11-na-s0-")


def test_one_run_says_what_happened_and_where_and_leaves_only_the_store(main, tmp_path):
    code, out, err = main(*TINY, "max_steps=2", "batch_size=32")
    assert code == 0, err
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "done"
    assert str(run.path.name) in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    before = (run.path / "run.json").stat().st_mtime_ns
    code, out, _ = main(*TINY, "max_steps=2", "batch_size=32")
    assert code == 0
    assert out.startswith("in the store already, not run again")
    assert (run.path / "run.json").stat().st_mtime_ns == before


def test_step_0_comes_without_lightning_and_a_sweep_without_torch(command):
    code = (
        "import sys, gradflow.cli as cli; assert cli.main({}) == 0; "
        "sys.exit(any(name in sys.modules for name in {}))"
    )
    once = [*TINY, "max_steps=0"]
    alone = command("-c", code.format(once, ["pytorch_lightning"]))
    assert alone.returncode == 0, alone.stderr
    sweep = command(
        "-c", code.format(["-m", *TINY, "max_steps=0", "seed=0,1", "jobs=1"], ["torch"])
    )
    assert sweep.returncode == 0, sweep.stderr


def test_a_sweep_runs_what_is_missing(main, tmp_path):
    arguments = ["-m", *TINY, "max_steps=0", "skip=true,false", "jobs=1"]
    code, out, err = main(*arguments)
    assert code == 0, err
    assert sorted(run.spec["skip"] for run in load_runs(tmp_path / "runs")) == ["identity", "none"]
    code, out, _ = main(*arguments)
    assert code == 0
    assert "2 of them from before" in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_divergence_is_a_result(main, tmp_path):
    code, out, _ = main(*TINY, "max_steps=40", "lr=1e9", "schedule=constant", "norm=none")
    assert code == 0
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "diverged"
    assert "diverged" in out


def test_help_explains_every_key():
    shown = text()
    for name in config.known_keys():
        if name not in (
            "network.name",
            "data.name",
            "record.name",
            "probe.name",
            "record.every",
            "slurm",
        ):
            assert f"\n  {name} " in shown, name
    assert max(map(len, shown.splitlines())) <= 100
    assert "python -m gradflow.report runs " in shown
    assert "python -m analysis" not in shown  # it is no part of the wheel


def test_help_and_bad_values_load_neither_torch_nor_lightning(command):
    for arguments, expected in ((["--help"], 0), (["depth=21"], 1)):
        code = (
            f"import sys, gradflow.cli as cli; code = cli.main({arguments}); "
            "loaded = {'torch', 'pytorch_lightning'} & set(sys.modules); "
            "sys.exit(99 if loaded else code)"
        )
        assert command("-c", code).returncode == expected


def test_cfg_shows_the_configuration_and_runs_nothing(main, tmp_path):
    code, out, _ = main("--cfg", "job", "depth=56")
    assert code == 0
    assert "depth: 56" in out
    assert not list(tmp_path.iterdir())


# --- Hydra's habits -------------------------------------------------------------------------------


@pytest.fixture
def presets(tmp_path):
    """Writes presets of a user's, by their path below the directory that is returned."""
    directory = tmp_path / "presets" / "of mine"

    def write(**files: str):
        for name, content in files.items():
            path = directory / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return str(directory)

    return write


WIDE = "# @package _global_\nnetwork: {name: mlp}\nwidth: 64\ndepth: 10\nnorm: none\n"
SAME = {
    "a network under another name": (
        ["network=mine"], {"network__mine": "name: mlp\n"}, ["network=mlp"]
    ),
    "a network with keys of its own": (
        ["network=wide", "depth=12"], {"network__wide": WIDE},
        ["network=mlp", "width=64", "depth=12", "norm=none"],
    ),
    "data": (
        ["data=small"], {"data__small": "name: synthetic\nsize: 16\ntrain: 500\n"},
        ["data=synthetic", "data.size=16", "data.train=500"],
    ),
    "a record": (
        ["record=often"], {"record__often": "name: default\nevery: {outputs: 2}\n"},
        ["record.every.outputs=2"],
    ),
    "a preset upon gradflow's": (
        ["data=more", "data.seed=3"],
        {"data__more": "defaults: [synthetic]\ntrain: 500\n"},
        ["data=synthetic", "data.train=500", "data.seed=3"],
    ),
    "keys of all kinds, in a group of one's own": (
        ["+habit=fast"],
        {"habit__fast": "# @package _global_\nlr: 0.3\nrecord: {every: {blocks: 5}}\n"},
        ["lr=0.3", "record.every.blocks=5"],
    ),
    "a start of one's own": (
        ["--config-name", "lab", "batch_size=32"],
        {"lab": "defaults: [config, _self_]\nlr: 0.5\n"},
        ["lr=0.5", "batch_size=32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_users_presets_are_the_keys_that_they_set(presets, name):
    arguments, files, keys = SAME[name]
    directory = presets(**files)
    [(spec, _)] = cli._configure([*arguments, "--config-dir", directory])
    [(plain, _)] = cli._configure(keys)
    assert spec == plain
    assert spec.name == plain.name


def test_a_sweep_over_presets_of_the_users(presets):
    directory = presets(network__wide=WIDE)
    found = cli._configure(["-m", f"--config-dir={directory}", "network=wide,mlp", "seed=0,1"])
    assert [(spec.network.name, spec.width, spec.seed) for spec, _ in found] == [
        ("mlp", width, seed) for width in (64, 256) for seed in (0, 1)
    ]


def test_a_sweep_composes_each_job_once(monkeypatch):
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed = []
    compose = ConfigLoaderImpl.load_sweep_config

    def count(self, *arguments):
        composed.append(arguments)
        return compose(self, *arguments)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", count)
    assert len(cli._configure(["-m", "depth=8,14,20", "seed=0,1"])) == 6
    assert len(composed) == 6


SHOWN = [
    ("--cfg job depth=56", "depth: 56"),
    ("depth=56 --cfg job", "depth: 56"),
    ("-c job -p record record=all", "name: all"),
    ("--cfg=job --resolve depth=56 network.target=a.f network.args={d:${depth}}", "d: 56"),
    ("--cfg hydra -p hydra.job", "chdir: false"),
    ("--cfg all -p network", "name: cifar"),
    ("--info", "Installed Hydra Plugins"),
    ("--info defaults", "network/cifar"),
    ("--info searchpath", "conf"),
    ("--info defaults-tree depth=56", "record: default"),
    ("--hydra-help", "Hydra (1.3"),
    ("--version", "gradflow 0"),
    ("-sc install=bash", "hydra_bash_completion"),
    ("hydra.verbose=false --cfg job", "depth: null"),
]


@pytest.mark.parametrize(("arguments", "shown"), SHOWN)
def test_what_shows_something_shows_it_and_runs_nothing(
    command, tmp_path, arguments, shown
):  # some end the process, as Hydra does
    done = command("-m", "gradflow", *arguments.split())
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert not done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", ["--help", "--info defaults", "--cfg job", "--version"])
def test_a_reader_who_leaves_early_is_no_error(tmp_path, arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "gradflow", *arguments.split()],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 0


def test_the_shell_completes_keys_and_presets(monkeypatch, capsys):
    for typed, offered in (
        ("dep", ["depth="]),
        ("network=", [f"network={name}" for name in ("cifar", "imagenet", "mlp")]),
        ("depth=56 record=d", ["record=default"]),
    ):
        monkeypatch.setenv("COMP_LINE", f"gradflow {typed}")
        assert cli._configure(["-sc", "query=bash"]) == []
        assert capsys.readouterr().out.split() == offered


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    ("depht=20", "depht: no such key; did you mean depth?"),
    ("depth", "depth: give keys as KEY=VALUE"),
    ("depth=abc", "depth=abc: allowed is a whole number from 1"),
    ("depth=21", "nearest are 20 and 26"),
    ("width=-3", "width=-3: allowed is a whole number from 1"),
    ("skip=foo", "skip=foo: allowed is none, identity"),
    ("network=foo", "network=foo: allowed is cifar, imagenet, mlp"),
    ("data=foo", "data=foo: allowed is cifar10, cifar100, digits, fashion_mnist, files, gaussian"),
    ("batch_size=5000", "data=digits has 1437 training images"),
    ("data=files data.root=/no/such/place", "data.root=/no/such/place: no such directory"),
    ("runs_dir=/dev/null/runs", "runs_dir=/dev/null/runs: cannot be written"),
    ("network.target=nowhere.f", "network.target=nowhere.f: there is no module 'nowhere'"),
    ("hydra/launcher=joblib", "launcher=local"),
    ("hydra/sweeper=optuna", "launcher=local"),
    ("+foo=1", "foo: no such key"),
    ("~runs_dir", "~runs_dir: a key cannot be taken away"),
    ("record.every=3", "record.every=3: allowed is record.every.weights=N"),
    (
        "network.args={depth:${dept}} network.target=a.f",
        "network.args.depth: ${dept} is no key; did you mean depth?\n",
    ),
    ("-m depth=8,14 runs_dir=a,b", "runs_dir=a,b: one value for a whole sweep"),
    ("device=cpu precision=fp16", "precision=fp16: the CPU trains in"),
    ("lr=[1", "gradflow: lr=[1: cannot be read; half a pair of quotes or brackets, a comma"),
    ("depth='8", "gradflow: depth='8: cannot be read; half a pair of quotes or brackets"),
    ("-m depth=8,,14", "gradflow: depth=8,,14: cannot be read; "),
    ("lr=${nope}", "gradflow: lr: ${nope} is no key; did you mean nodes?\n"),
    ("lr=${lr}", "gradflow: lr: Recursive interpolation detected\n"),
    ("=3", "gradflow: =3: give keys as KEY=VALUE"),
    ("+=3", "gradflow: +=3: give keys as KEY=VALUE"),
    ("seed=99999999999999999999", "allowed is a whole number from 0 to 9223372036854775807\n"),
    ("seed=-1", "seed=-1: allowed is a whole number from 0\n"),
    ("skip=maybe", "rezero, highway, stochastic_depth, dosed, true, false\n"),
    ("--foo", "gradflow: --foo: no such option; there are --help, --multirun, --run, --resolve, "),
    ("-m depth=20,21", "depth=21: allowed is 6n+2"),
    ("--fco job", "--fco: no such option; "),
    ("--multrun depth=8", "--multrun: no such option; did you mean --multirun"),
    ("--cfg jobs", "--cfg: wants job, hydra, all"),
    ("--cfg", "--cfg: wants job, hydra, all"),
    ("--resolve=1", "--resolve=1: wants no value"),
    ("--config-dir", "--config-dir: wants a value"),
    ("--config-dir nowhere", "Additional config directory"),
    ("--config-dir /dev/null", "Additional config directory '/dev/null' not found"),
    ("--config-name nope", "--config-name nope: neither gradflow nor --config-dir has nope.yaml"),
    ("-cp conf", "--config-path: use --config-dir DIR"),
    ("+habit=fast", "habit: no such key"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_value_is_one_line_and_exit_1(main, tmp_path, arguments, message):
    code, out, err = main(*arguments.split())
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [("skip=true,false", "skip", "identity"), ("depth=3,6 network.args={k:1}", "depth", "3")],
)
def test_a_network_that_is_not_made_of_what_names_it_is_refused(
    main, tmp_path, monkeypatch, keys, name, value
):
    """Else runs of one and the same network would be compared as if they differed."""
    (tmp_path / "shared.py").write_text("def make(k=1, depth=2): raise AssertionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = main("-m", "network.target=shared.make", *keys.split(), "max_steps=0")
    assert code == 1
    assert err == (
        f"gradflow: {name}={value}: shared.make is not called with it; "
        f"network.args={{{name}:'${{{name}}}'}} passes it on\n"
    )
    assert not (tmp_path / "runs").exists()


BAD_PRESETS = [
    ("network=mine", {"network__mine": "name: mlp\nwdth: 3\n"},
     "network/mine.yaml: network.wdth: no such key; did you mean width"),
    ("network=mine", {"network__mine": "name: mlp\nwidth: 3\n"},
     "network/mine.yaml: network.width: no such key; for width itself, let the file begin with "
     "`# @package _global_`"),
    ("network=mine", {"network__mine": "name: nonet\n"}, "network.name=nonet: allowed is cifar"),
    ("network=mine", {"network__mine": "- mlp\n"},
     "network/mine.yaml: a list or a word stands where lines of KEY: VALUE are wanted\n"),
    ("network=mine", {"network__mine": "name: mlp\n  foo: [1\n"},
     "of mine/network/mine.yaml, line 2: mapping values are not allowed here"),
    ("network=mine", {"network__mine": "name: mlp\nname: cifar\n"},
     "of mine/network/mine.yaml, line 2: found duplicate key name"),
    ("network=mine", {"network__mine": "# @package _global_\ndefaults: [/network: mlp]\n"},
     "of mine: presets there choose one another without end"),
    ("network=mine", {"network__mine": "# @package of mine\nname: mlp\n"},
     "Too many components in '@package of mine'"),
    ("network=nope", {"network__mine": "name: mlp\n"},
     "network=nope: allowed is cifar, imagenet, mine, mlp"),
    ("--config-name=lab", {"lab": "defaults: [config, _self_]\nlrr: 0.5\n"},
     "lab.yaml: lrr: no such key; did you mean lr"),
    ("+habit=slow", {"habit__fast": "lr: 1\n"}, "habit=slow: allowed is fast"),
    ("+habit=fast", {"habit__fast": "lr: 1\n"},
     "habit/fast.yaml: its keys would go below habit; let the file begin with `# @package _glob"),
    ("recipe=mine", {"recipe__mine": "lr: 1\n"},
     "recipe/mine.yaml: its keys would go below recipe; let the file begin with `# @package _glo"),
    ("recipe=mine", {"recipe__mine": ""},
     "recipe/mine.yaml: its keys would go below recipe; let the file begin with `# @package _glo"),
    ("recipe=mine", {"recipe__mine": "# @package _global_\n- lr\n"},
     "recipe/mine.yaml: a list or a word stands where lines of KEY: VALUE are wanted\n"),
    ("--config-name=lab", {"lab": "- lr\n"},
     "lab.yaml: a list or a word stands where lines of KEY: VALUE are wanted\n"),
    ("data=mine", {"data__mine": "nam: synthetic\n"},
     "data/mine.yaml: data.nam: no such key; did you mean name?\n"),
    ("data=mine", {"data__mine": "size: 16\n"},
     "gradflow: data: the preset has no name, say `name: digits`\n"),
    ("network=mine", {"network__mine": ""},
     "gradflow: network: the preset has no name, say `name: cifar`\n"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "files", "message"), BAD_PRESETS)
@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_bad_preset_is_one_line_that_names_it(main, presets, argument, files, message, sweep):
    code, out, err = main(*sweep, "--config-dir", presets(**files), argument, "max_steps=0")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_a_preset_that_is_no_text_is_named(main, presets, tmp_path):
    directory = presets(network__mine="")
    (tmp_path / "presets/of mine/network/mine.yaml").write_bytes(b"\xff\xfe")
    code, _, err = main("--config-dir", directory, "network=mine")
    assert code == 1
    assert err.endswith("of mine/network/mine.yaml: is not text in UTF-8\n")


def test_data_that_is_damaged_is_one_line(main, tmp_path):
    (tmp_path / "train.npz").write_bytes(b"PK not an archive")
    np.savez(tmp_path / "test.npz", x=np.zeros((4, 1, 8, 8)), y=np.zeros(4, int))
    code, _, err = main(*TINY, "data=files", f"data.root={tmp_path}", "max_steps=0")
    assert code == 1
    assert "train.npz: unreadable" in err
    assert "Traceback" not in err


LATE = """
import torch
class Late(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 5:  # the first two are the trying out
            raise ValueError('enough')
        return super().forward(x)
def make():
    return torch.nn.Sequential(torch.nn.Flatten(), Late(64, 10))
"""


def test_what_a_users_network_raises_is_shown_and_where_its_run_lies_is_said_last(
    main, tmp_path, monkeypatch
):
    (tmp_path / "late_net.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = main("network.target=late_net.make", "max_steps=9", "threads=1")
    assert code == 1
    [failed] = (tmp_path / "runs").iterdir()
    *_, raised, last = err.splitlines()
    assert raised == "ValueError: enough"
    assert "late_net.py" in err
    assert last == f"gradflow: the run failed; what was recorded lies in runs/{failed.name}"
    assert load_runs(tmp_path / "runs").members[0].status == "failed"


def test_ctrl_c_leaves_an_interrupted_run_that_can_be_read(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "gradflow", *TINY, "max_steps=100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/attempt-*/steps-*.parquet")):  # the first flush
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err.splitlines()[-1]
    assert "Traceback" not in err
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "interrupted"
    steps = run.frame("steps")
    assert len(steps) >= 22  # an epoch, at whose end the first checkpoint flushes
    assert list(steps["step"]) == list(range(len(steps)))


def test_run_json_is_plain_json(main, tmp_path):
    main(*TINY, "max_steps=0")
    [run] = load_runs(tmp_path / "runs")
    record = json.loads((run.path / "run.json").read_text())
    assert record["origin"] == "gradflow"
    assert record["environment"]["threads"] == 1
    assert os.fspath(tmp_path) not in json.dumps(record["certificate"])
