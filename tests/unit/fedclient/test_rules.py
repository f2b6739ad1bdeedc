"""What each rule asks of a cloud worker, checked against its formula on numbers that are exact."""

import numpy as np
import pytest

from fedclient import rules
from fedclient.rules import Rule
from fedcore.errors import ConfigError

BASE = {"a": np.float32([1, 2]), "b": np.float32([-4])}
TRAINED = {"a": np.float32([3, 1]), "b": np.float32([-2])}


def lists(weights):
    assert all(values.dtype == np.float32 for values in weights.values())
    return {name: values.tolist() for name, values in weights.items()}


@pytest.mark.parametrize("name", ["FedProx", "fedprox", "FEDPROX"])
def test_rules_are_named_in_any_case(name):
    assert Rule.named(name) is Rule.FEDPROX


def test_an_unknown_rule_is_refused_in_the_protocols_words():
    with pytest.raises(ConfigError) as caught:
        Rule.named("qffl")
    said = "aggregation_type must be in ('FedAvg', 'FedProx', 'Scaffold', 'FedNova'), but got qffl."
    assert str(caught.value) == said


@pytest.mark.parametrize("rule", [Rule.FEDAVG, Rule.FEDPROX, Rule.SCAFFOLD])
def test_most_rules_upload_weights_times_samples(rule):
    assert rules.declared_size(rule, samples=5, steps=2) == 5
    assert lists(rules.uploaded(rule, TRAINED, BASE, 5, 2)) == {"a": [15, 5], "b": [-10]}


def test_fednova_uploads_the_move_per_step():
    assert rules.declared_size(Rule.FEDNOVA, samples=5, steps=2) == 2
    assert lists(rules.uploaded(Rule.FEDNOVA, TRAINED, BASE, 5, 2)) == {"a": [1, -0.5], "b": [1]}


def test_a_product_that_overflows_is_left_to_the_check():
    huge = {"a": np.float32([3e38])}
    assert np.isinf(rules.weighted(huge, 10)["a"]).all()


def test_absolute_changes():
    assert lists(rules.absolute_changes(TRAINED, BASE)) == {"as_abs_grad.a": [2, 1], "as_abs_grad.b": [2]}


def test_the_proximal_gradient_is_that_of_its_term():
    assert lists(rules.proximal_gradient(0.5, TRAINED, BASE)) == {"a": [1, -0.5], "b": [1]}


def test_a_step_of_scaffold_is_corrected():
    control, own = (
        {"a": np.float32([1, 1]), "b": np.float32([2])},
        {"a": np.float32([0, 3]), "b": np.float32([2])},
    )
    drift = rules.drift(control, own)
    assert lists(drift) == {"a": [1, -2], "b": [0]}
    assert lists(rules.corrected(TRAINED, drift, 0.5)) == {"a": [2.5, 2], "b": [-2]}


def test_the_other_rules_correct_nothing():
    assert rules.corrected(TRAINED, {}, 0.5) is TRAINED


def test_the_new_control_is_option_two_of_the_paper():
    own, control = (
        {"a": np.float32([1, 0]), "b": np.float32([3])},
        {"a": np.float32([2, 0]), "b": np.float32([1])},
    )
    new = rules.new_control(own, control, BASE, TRAINED, steps=4, learning_rate=0.25)
    assert lists(new) == {"a": [1 - 2 - 2, 0 - 0 + 1], "b": [3 - 1 - 2]}
    assert lists(rules.control_changes(new, own)) == {"control.a": [-4, 1], "control.b": [-3]}


def test_controls_are_found_by_their_weights_names():
    received = {"control.a": np.float32([1]), "a": np.float32([2]), "control.control.a": np.float32([3])}
    assert lists(rules.named_controls(received)) == {"a": [1], "control.a": [3]}


def test_an_initial_model_for_adaptive_synchronisation():
    model = rules.with_absolute_changes({"a": np.ones((2, 3), np.float32)})
    assert list(model) == ["a", "as_abs_grad.a"]
    assert model["as_abs_grad.a"].shape == (2, 3)
    assert not model["as_abs_grad.a"].any()
