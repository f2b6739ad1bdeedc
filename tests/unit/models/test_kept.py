"""What a rule keeps, in the model that a server starts with: made once, and recovered as it was."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from fedcore.aggregation.rules import rule_named
from fedcore.errors import ConfigError
from fedcore.models.checkpoints import load_newest, save
from fedcore.models.formats import ModelFile, read_model, write_ckpt
from fedcore.models.kept import with_kept
from fedcore.wire.arrays import Layout

SCAFFOLD = rule_named("Scaffold", 5)
MODEL = ModelFile(
    {"b": np.float32(3), "w": np.ones((2, 3), np.float32), "z": np.ones(2, np.float32)},
    frozenset({"z"}),
    {"a": "1"},
)
NAMES = ["b", "control.b", "control.w", "control.z", "w", "z"]


def trained() -> ModelFile:
    """The model after some iterations."""
    model = with_kept(MODEL, SCAFFOLD)
    return ModelFile(
        {n: v + np.float32(i + 1) for i, (n, v) in enumerate(model.weights.items())}, model.not_aggregated
    )


def assert_same(one: ModelFile, two: ModelFile) -> None:
    assert Layout.of(one.weights, one.not_aggregated) == Layout.of(two.weights, two.not_aggregated)
    for name, values in one.weights.items():
        np.testing.assert_array_equal(values, two.weights[name])


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedNova"])
def test_rules_that_keep_nothing_change_nothing(name: str) -> None:
    assert_same(with_kept(MODEL, rule_named(name)), MODEL)
    assert_same(with_kept(trained(), rule_named(name)), trained())


def test_controls_begin_with_zeros_in_the_shapes_and_flags_of_their_weights() -> None:
    model = with_kept(MODEL, SCAFFOLD)
    assert list(model.weights) == NAMES
    assert [model.weights[n].shape for n in NAMES] == [(), (), (2, 3), (2,), (2, 3), (2,)]
    assert not any(model.weights[n].any() for n in NAMES if n.startswith("control."))
    assert model.not_aggregated == {"z", "control.z"}
    assert model.metadata == {"a": "1"}
    for name, values in MODEL.weights.items():
        np.testing.assert_array_equal(model.weights[name], values)


def test_a_checkpoint_s_controls_are_neither_doubled_nor_zeroed(tmp_path: Path) -> None:
    model = trained()
    for k in range(3):
        save(tmp_path, "job", k, model.weights, model.not_aggregated, {}, datetime(2026, 1, 1, 0, 0, k))
        found = load_newest(tmp_path, "job")
        assert found is not None
        model = with_kept(found.model, SCAFFOLD)
    assert_same(model, trained())


def test_controls_of_a_mindspore_checkpoint_get_the_flags_of_their_weights(tmp_path: Path) -> None:
    """The format has no flags; of a model's weights they come from the initial model."""
    path = tmp_path / "job_recovery_iteration_4_20260101_000000.ckpt"
    write_ckpt(path, trained().weights)
    read = read_model(path)
    assert_same(with_kept(ModelFile(read.weights, frozenset({"z"})), SCAFFOLD), trained())
    none = with_kept(ModelFile(read.weights, frozenset({"control.b"})), SCAFFOLD)
    assert none.not_aggregated == frozenset()


def test_a_control_that_lost_its_shape_gets_it_back() -> None:
    weights = {**MODEL.weights, "control.w": np.arange(6, dtype=np.float32)}
    control = with_kept(ModelFile(weights), SCAFFOLD).weights["control.w"]
    assert control.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_model_that_has_some_controls_gets_the_others() -> None:
    model = trained()
    some = ModelFile(
        {n: v for n, v in model.weights.items() if n != "control.w"}, model.not_aggregated - {"control.w"}
    )
    made = with_kept(some, SCAFFOLD)
    assert not made.weights["control.w"].any()
    np.testing.assert_array_equal(made.weights["control.b"], model.weights["control.b"])


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"control.gate": np.ones(2)}, "name of a control of Scaffold.*rename it"),
        (
            {"w": np.ones(2), "control.w": np.ones(3)},
            "'control.w' has 3 values, 2 belong to it.*leave that weight out",
        ),
    ],
)
def test_what_does_not_fit_the_rule_is_the_operator_s_to_mend(
    weights: dict[str, np.ndarray], fault: str
) -> None:
    model = ModelFile({name: values.astype(np.float32) for name, values in weights.items()})
    with pytest.raises(ConfigError, match=fault):
        with_kept(model, SCAFFOLD)


def test_a_model_may_become_too_large_for_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcore.models.formats.MODEL_LIMIT_BYTES", 60)
    assert with_kept(MODEL, rule_named("FedAvg")).weights.keys() == MODEL.weights.keys()
    with pytest.raises(ConfigError, match="Model size 72 cannot"):
        with_kept(MODEL, SCAFFOLD)
