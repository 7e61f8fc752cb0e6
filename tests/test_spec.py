"""Identity is a contract: frozen ids, one spelling, and a line for every bad value."""

import dataclasses
import json

import pytest

from gradflow.errors import SpecError
from gradflow.spec import (
    DataSpec,
    EverySpec,
    Execution,
    NetworkSpec,
    RecordSpec,
    RunSpec,
    _leaves,
    key,
)

SIGMOID = {"norm": "none", "activation": "sigmoid", "init": "xavier"}
FROZEN = {
    "6bb0234d92": {},
    "63246df7e7": {"depth": 152, "skip": False},
    "371a4bf25d": {"depth": 56, "skip": "highway", "seed": 7},
    "72e7c87eb1": {"network": "mlp", **SIGMOID, "depth": 30, "skip": False, "max_steps": 0},
    "0f45a9f1bf": {"network": {"target": "package.module.f", "args": {"depth": 8}}, "depth": 8},
    "5235314524": {"data": "fashion_mnist"},
    "95ccd45c65": {"data": {"name": "cifar10", "augment": True, "train": 5000}, "batch_size": 128},
    "44d10ea696": {"data": {"name": "imagefolder", "root": "imagenet"}, "network": "imagenet"},
    "06548aaee4": {"data": "synthetic", "batch_size": 128, "lr": 0.1, "max_steps": 300,
                   "record": "all"},
}  # fmt: skip


def bad(match: str, **keys: object) -> None:
    with pytest.raises(SpecError, match=match) as caught:
        RunSpec(**keys)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected", "keys"), FROZEN.items())
def test_ids_are_frozen(expected, keys):
    assert RunSpec(**keys).run_id == expected


def test_name_is_network_depth_skip_seed_id():
    spec = RunSpec(depth=152, skip=False, seed=3)
    assert spec.name == f"cifar-152-none-s3-{spec.run_id}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"skip": True}, {"skip": "identity"}),
        ({"skip": "true"}, {"skip": "identity"}),
        ({"skip": False}, {"skip": "none"}),
        ({"lr": 2e-2}, {"lr": 0.02}),
        ({"clip": 1}, {"clip": 1.0}),
        ({}, {"network": "cifar", "depth": 20, "width": 16, "skip": True, "order": "post"}),
        ({"skip": False, "skip_forward": 1, "skip_backward": 1}, {"skip": True}),
        ({"skip": True, "skip_backward": 0}, {"skip": "forward_only"}),
        ({"skip": False, "skip_backward": 1}, {"skip": "backward_only"}),
        (
            {"skip": "dosed", "skip_forward": 0.5, "skip_backward": 1},
            {"skip": "identity", "skip_forward": 0.5},
        ),
        ({"record": "none"}, {"record": {"every": {"weights": 0, "outputs": 0, "blocks": 0}}}),
        ({"depth": 20.0, "batch_size": 1e2}, {"depth": 20, "batch_size": 100}),
        ({"precision": 32}, {"precision": "32-true"}),
        ({"max_steps": 3, "epochs": 7}, {"max_steps": 3}),
        ({"skip": False, "shortcut": "B"}, {"skip": False, "shortcut": "A"}),
        ({"data": "synthetic"}, {"data": {"name": "synthetic", "seed": 0, "size": 8}}),
        ({"data": "mnist"}, {"data": {"name": "mnist", "size": 28, "augment": False}}),
    ],
)
def test_every_spelling_is_one_run(one, other):
    assert RunSpec(**one) == RunSpec(**other)
    assert RunSpec(**one).run_id == RunSpec(**other).run_id


def test_every_key_that_is_used_changes_the_id():
    changes = [
        {"depth": 26}, {"width": 8}, {"skip": "none"}, {"skip_forward": 0.5}, {"branch_scale": 0.5},
        {"skip": "stochastic_depth"}, {"skip": "stochastic_depth", "drop_rate": 0.1},
        {"order": "pre"}, {"norm": "group"}, {"norm": "group", "groups": 4}, {"activation": "tanh"},
        {"activation": "leaky_relu"}, {"activation": "leaky_relu", "negative_slope": 0.3},
        {"init": "xavier"}, {"init": "gaussian", "sigma_w": 1.5}, {"init": "gaussian"},
        {"init": "gaussian", "sigma_b": 0.1}, {"padding": "circular"}, {"shortcut": "B"},
        {"data": "synthetic"}, {"data": {"name": "synthetic", "seed": 1}}, {"batch_size": 32},
        {"data": "mnist"}, {"data": "cifar10"}, {"data": {"name": "cifar10", "augment": True}},
        {"data": {"name": "cifar10", "size": 16}},
        {"data": {"name": "cifar10", "train": 500}}, {"data": {"name": "cifar10", "test": 500}},
        {"data": {"name": "imagefolder", "root": "a"}},
        {"data": {"name": "imagefolder", "root": "a", "augment": False}},
        {"data": {"name": "imagefolder", "root": "a", "size": 64}},
        {"data": {"name": "imagefolder", "root": "a", "resize": 230}},
        {"accumulate": 2}, {"optimizer": "adam"}, {"lr": 0.1}, {"momentum": 0.8},
        {"weight_decay": 0}, {"schedule": "cosine"}, {"schedule": "step", "milestones": [10]},
        {"schedule": "cosine", "warmup": 5}, {"schedule": "cosine", "warmup": 5, "warmup_lr": 0.01},
        {"network": "imagenet", "weights_digest": "0" * 16},
        {"clip": 1.0}, {"precision": "bf16"}, {"epochs": 3},
        {"max_steps": 0}, {"on_divergence": "continue"}, {"seed": 1}, {"record": "all"},
        {"record": "none"}, {"record": {"every": {"weights": 2}}}, {"network": "imagenet"},
        {"record": {"details": ["grad_max"]}}, {"record": {"flight": 8}},
        {"record": {"details": ["grad_max"], "every": {"details": 3}}},
        {"network": "mlp"}, {"network": "mlp", "branch_layers": 2},
        {"network": {"target": "a.f"}}, {"network": {"target": "a.f", "args": {"x": 1}}},
    ]  # fmt: skip
    ids = [RunSpec(**change).run_id for change in [{}, *changes]]
    assert len(set(ids)) == len(ids)


def test_a_new_key_or_a_new_default_changes_no_old_id():
    """A key left at its omit value is not hashed, whatever today's default is."""
    later = dataclasses.make_dataclass(
        "Later",
        [("future", int, key(5, None, "a key of tomorrow", omit=5))],
        bases=(RunSpec,),
        frozen=True,
    )
    assert later().run_id == RunSpec().run_id
    changed = dataclasses.make_dataclass(
        "Changed", [("lr", float, key(0.1, None, "", omit=0.02))], bases=(RunSpec,), frozen=True
    )
    assert changed(lr=0.02).run_id == RunSpec(lr=0.02).run_id
    assert changed().run_id == RunSpec(lr=0.1).run_id


def test_every_leaf_has_an_omit_value():
    for name, _, omit in _leaves(RunSpec()):
        assert omit is None or isinstance(omit, str | int | float), name


def test_where_a_public_set_lies_and_how_it_is_read_are_no_part_of_the_id():
    """They are told to other processes, and not written into the record."""
    here, there = (
        RunSpec(data={"name": "svhn", **keys})  # type: ignore[arg-type]
        for keys in ({}, {"root": "/scratch/sets", "download": True})
    )
    assert here.run_id == there.run_id
    assert here.to_dict() == there.to_dict()
    assert not {"root", "download", "workers"} & set(here.to_dict()["data"])
    told = RunSpec.from_dict(json.loads(json.dumps(there.to_job())))
    assert told == there.but(data={"name": "svhn", "root": "/scratch/sets", "download": False})
    folders = [
        RunSpec(data={"name": "imagefolder", "root": root, "workers": workers})  # type: ignore[arg-type]
        for root, workers in (("a", 1), ("a", 2), ("b", 2))
    ]
    ids = [spec.run_id for spec in folders]
    assert ids[0] == ids[1] != ids[2]
    assert folders[0].data.resize == 256
    assert RunSpec.from_dict(folders[0].to_dict()).data.root == "a"


def test_execution_is_no_part_of_the_id():
    assert not set(Execution.__dataclass_fields__) & set(RunSpec.__dataclass_fields__)


# --- to JSON and back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"skip": "highway"},
        {"network": "mlp", "norm": "none", "init": "gaussian", "sigma_b": 0.3},
        {"network": {"target": "package.module.f", "args": {"depth": 3, "names": ["a"]}}},
        {"schedule": "step", "milestones": [3, 9], "data": {"name": "synthetic", "size": 16}},
        {"max_steps": 0},
    ],
)
def test_json_and_back(keys):
    spec = RunSpec(**keys)
    again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_defaults_are_written_out():
    values = RunSpec().to_dict()
    assert values["depth"] == 20
    assert values["width"] == 16
    assert values["momentum"] == 0.9
    assert values["epochs"] == 12
    assert values["record"] == {
        "name": "default",
        "every": {"weights": 1, "outputs": 10, "blocks": 10, "details": None},
        "details": None,
        "flight": None,
    }
    assert values["groups"] is None


def test_columns_are_flat():
    columns = RunSpec(network={"target": "a.f", "args": {"b": 1}}, data="synthetic").columns()  # type: ignore[arg-type]
    assert columns["network"] == "custom"
    assert columns["network_target"] == "a.f"
    assert columns["network_args"] == '{"b": 1}'
    assert columns["data"] == "synthetic"
    assert columns["data_size"] == 8
    assert columns["record_every_outputs"] == 10
    assert not [name for name, value in columns.items() if isinstance(value, dict | list)]


def test_a_spec_of_a_newer_version_is_refused():
    with pytest.raises(SpecError, match="tomorrow: no such key"):
        RunSpec.from_dict(RunSpec().to_dict() | {"tomorrow": 1})


def test_but_takes_dependent_defaults_anew():
    assert RunSpec().but(skip="none") == RunSpec(skip="none")
    assert RunSpec(skip_forward=0.5).but(skip=True) == RunSpec()
    assert RunSpec().but(network="mlp") == RunSpec(network="mlp")
    assert RunSpec(init="gaussian", sigma_w=2).but(init="he") == RunSpec()
    assert RunSpec(norm="group", groups=4).but(norm="batch") == RunSpec()


@pytest.mark.parametrize(
    ("keys", "updates"),
    [({}, 12 * 22), ({"batch_size": 100, "epochs": 2, "accumulate": 3}, 8), ({"max_steps": 7}, 7)],
)
def test_updates_drop_the_partial_batch(keys, updates):
    assert RunSpec(**keys).updates(1437) == updates


# --- bad values -----------------------------------------------------------------------------------


def test_bad_values_name_key_value_and_what_is_allowed():
    bad(r"depth=abc: allowed is a whole number from 1", depth="abc")
    bad(r"depth=21: allowed is 6n\+2 for network=cifar; nearest are 20 and 26", depth=21)
    bad(r"depth=3: .*nearest are 8 and 14", depth=3)
    bad(r"depth=-1", depth=-1)
    bad(r"depth=40: .*nearest are 34 and 50", network="imagenet", depth=40)
    bad(r"depth=7: .*nearest are 6 and 8", network="mlp", depth=7, branch_layers=2)
    bad(r"width=-4: allowed is a whole number from 1", width=-4)
    bad(r"skip=foo: allowed is none, identity", skip="foo")
    bad(r"skip=1: allowed", skip=1)
    bad(r"seed=true: allowed", seed=True)
    bad(r"lr=0: allowed is a number above 0", lr=0)
    bad(r"lr=null: a value is needed", lr=None)
    bad(r"lr=NaN", lr=float("nan"))
    bad(r"epochs=1.5", epochs=1.5)
    bad(r"seed=1\d+: allowed is a whole number from 0", seed=10**20)
    bad(r"batch_size=1: norm=batch", network="mlp", batch_size=1)
    bad(r"network=mlp: network.target names", network={"name": "mlp", "target": "a.f"})
    bad(r"drop_rate=1: allowed", skip="stochastic_depth", drop_rate=1)
    bad(r"batch_size=2000: data=digits has 1437 training images", batch_size=2000)
    bad(r"batch_size=800 × accumulate=2: data=digits has 1437", batch_size=800, accumulate=2)
    bad(r"network.name=lenet: allowed is cifar, imagenet, mlp", network="lenet")
    bad(
        r"data.name=coco: allowed is digits, synthetic, gaussian, files, fashion_mnist", data="coco"
    )
    bad(r"data=imagefolder: name the directory of train/ and val/", data="imagefolder")
    crop = {"name": "imagefolder", "root": "a", "size": 224, "resize": 200}
    bad(r"data.size=13: allowed is a divisor of 28", data={"name": "mnist", "size": 13})
    bad(r"data.resize=200: allowed is a whole number from 224", data=crop)
    bad(r"data.download=true: data=digits does not use", data={"name": "digits", "download": True})
    bad(r"batch_size=60001: data=mnist has 60000", data="mnist", batch_size=60_001)
    bad(r"network.target=os: allowed is an import path", network={"target": "os"})
    bad(r"network.args", network={"args": {"a": 1}})
    bad(r"network=custom: name the callable", network="custom")
    bad(r"milestones=\[5, 3\]", schedule="step", milestones=[5, 3])
    bad(r"schedule=step: name the steps", schedule="step")
    bad(r"warmup=3: schedule=one_cycle", warmup=3)
    bad(r"warmup_lr=0.1: name its steps", warmup_lr=0.1)
    bad(r"weights=/no/such: No such file", network="imagenet", weights="/no/such")
    bad(r"groups=7: does not divide width=16", norm="group", groups=7)
    bad(r"skip=dosed: set both", skip="dosed", skip_forward=1)
    bad(r"skip_forward, skip_backward: skip=rezero has no doses", skip="rezero", skip_forward=1)
    bad(r"data=files: name the directory", data="files")


def test_a_key_that_the_network_does_not_use_is_refused_when_set():
    bad("padding=circular: network=mlp does not use padding", network="mlp", padding="circular")
    bad("shortcut=A: network=imagenet does not use", network="imagenet", shortcut="A")
    bad("branch_layers=2: network=cifar does not use", branch_layers=2)
    bad("norm=batch: network=custom does not use", network={"target": "a.f"}, norm="batch")
    bad("data.size=8: data=digits does not use", data={"name": "digits", "size": 8})
    bad("sigma_w=2.0: only init=gaussian uses it", sigma_w=2)
    bad("momentum=0.5: only optimizer=sgd uses it", optimizer="adam", momentum=0.5)
    bad("record.every.weights=1: record=none", record={"name": "none", "every": {"weights": 1}})
    bad("record.flight=8: record=none", record={"name": "none", "flight": 8})
    bad(
        "record.details=.*grad_max.*: record=none", record={"name": "none", "details": ["grad_max"]}
    )
    bad("record.details=.*grad.*: allowed is a list of", record={"details": ["grad"]})
    bad("record.details=.*: allowed is a list of", record={"details": []})
    bad("record.flight=0: allowed is", record={"flight": 0})
    bad("record.every.details=3: record.details is not set", record={"every": {"details": 3}})


def test_skip_keys_may_be_set_for_all_arms_of_a_sweep():
    plain = RunSpec(network="mlp", skip=False, branch_layers=2, drop_rate=0.1)
    assert plain.branch_layers is None
    assert plain.drop_rate is None
    assert plain == RunSpec(network="mlp", skip=False)


def test_execution_is_checked():
    with pytest.raises(SpecError, match="device=tpu: allowed is auto, cpu"):
        Execution(device="tpu")
    with pytest.raises(SpecError, match="jobs=0: allowed is auto, or a whole number from 1"):
        Execution(jobs=0)
    with pytest.raises(SpecError, match="logger=mlflow: allowed is none, csv, tensorboard, wandb"):
        Execution(logger="mlflow")


def test_parts_are_accepted_as_names_mappings_and_themselves():
    by_name = RunSpec(network="mlp", data="synthetic", record="all")
    assert by_name == RunSpec(
        network=NetworkSpec("mlp"), data=DataSpec("synthetic"), record=RecordSpec("all")
    )
    assert RunSpec(record=RecordSpec(every=EverySpec(outputs=2))).record.every.weights == 1
