"""Each rule against its paper, however updates are spread over servers, with NumPy and with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.aggregation import reference
from unit.aggregation.reference import Client

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic
from fedcore.aggregation.fednova import FedNova
from fedcore.aggregation.rule import Rule, Total, new_model
from fedcore.aggregation.rules import rule_named
from fedcore.aggregation.scaffold import Scaffold
from fedcore.aggregation.sums import RunningSum, Spans
from fedcore.errors import LocalError, ShapeMismatch
from fedcore.wire.arrays import Floats, Layout, Weight

POPULATION = 40
ROUND = 2.0**-24  # of one float32 operation, relative

Upload = Callable[[Client, reference.Model], tuple[dict[str, Floats], int]]


@dataclass
class Partial:
    sums: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.uint64]


@dataclass
class Case:
    """A model, the clients that trained it, and which server took whose update."""

    plain: Layout
    model: dict[str, Floats]
    clients: list[Client]
    places: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.sampled_from([(), (1,), (2, 3), (7,)]), min_size=1, max_size=4))
    weights = tuple(
        Weight(f"w{i}", shape, aggregated=draw(st.sampled_from([True, True, True, False])))
        for i, shape in enumerate(sizes)
    )
    names = [weight.name for weight in weights]
    chance = np.random.default_rng(draw(st.integers(0, 10_000)))

    def values(scale: float) -> dict[str, Floats]:
        return {w.name: (scale * chance.standard_normal(w.size)).astype(np.float32) for w in weights}

    model = values(1.0)
    clients = []
    for _ in range(draw(st.integers(1, 7))):
        moves, control = values(draw(st.sampled_from([0.01, 1.0]))), values(0.1)
        sent = draw(st.one_of(st.just(names), st.lists(st.sampled_from(names), unique=True)))
        clients.append(
            Client(
                {name: (model[name] + moves[name]).astype(np.float32) for name in sent},
                draw(st.integers(1, 65535)),
                draw(st.integers(1, 500)),
                {name: control[name] for name in sent if draw(st.sampled_from([True, True, False]))},
            )
        )
    places = draw(st.lists(st.integers(0, 3), min_size=len(clients), max_size=len(clients)))
    return Case(Layout(weights), model, clients, places)


def layout_for(rule: Rule, plain: Layout) -> Layout:
    return Layout((*plain.weights, *rule.keeps(plain)))


def partials_of(layout: Layout, uploads: Sequence[tuple[dict[str, Floats], int]]) -> Partial:
    """What a ledger's sums are."""
    spans = Spans(layout)
    made = Partial(np.zeros(spans.total), np.zeros(len(spans.names), np.uint64))
    for weights, size in uploads:
        for index, (name, span) in enumerate(spans):
            if name in weights:
                made.sums[span] += weights[name]
                made.sizes[index] += np.uint64(size)
    return made


def total_of(
    layout: Layout,
    uploads: Sequence[tuple[dict[str, Floats], int]],
    places: Sequence[int],
    arithmetic: Arithmetic,
) -> Total:
    spans = Spans(layout)
    running = RunningSum(spans, arithmetic)
    for place in sorted(set(places)):
        part = partials_of(layout, [up for up, at in zip(uploads, places, strict=True) if at == place])
        running.add(part, keep=place % 2 == 0)
    sizes = [size for _, size in uploads]
    return Total(spans, running.sums, running.sizes, len(sizes), sum(sizes), arithmetic)


def results(
    name: str, upload: Upload, case: Case, arithmetic: Arithmetic, model: dict[str, Floats]
) -> tuple[dict[str, Floats], dict[str, bytes]]:
    """The float32 model, and the float64 values before they were rounded, as bytes."""
    rule = rule_named(name, POPULATION)
    layout = layout_for(rule, case.plain)
    uploads = [upload(client, model) for client in case.clients]
    total = total_of(layout, uploads, case.places, arithmetic)
    exact = rule.finish(total, lambda weight: arithmetic.doubles(model[weight]))
    doubles = {weight: arithmetic.host(values).tobytes() for weight, values in exact}
    return new_model(rule, total, model), doubles


def compare(
    made: Mapping[str, Floats], expected: Mapping[str, np.ndarray], case: Case, scales: Mapping[str, float]
) -> None:
    """Aggregated weights are the paper's within ``scales``; all others are what they were, to the bit."""
    assert made.keys() == scales.keys()
    for name, values in made.items():
        assert values.dtype == np.float32
        difference = abs(values.astype(np.float64) - expected[name]).max()
        assert difference <= scales[name], name


def largest(case: Case, name: str) -> float:
    arrays = [c.weights[name] for c in case.clients if name in c.weights]
    return max((float(abs(a).max()) for a in [case.model[name], *arrays]), default=0.0)


def fixed(case: Case) -> set[str]:
    return {weight.name for weight in case.plain if not weight.aggregated}


FEW = settings(max_examples=60, deadline=None)


@FEW
@pytest.mark.parametrize("name", ["FedAvg", "FedProx"])
@given(case=cases())
def test_fedavg_and_fedprox(name: str, arithmetic: Arithmetic, case: Case) -> None:
    """Tolerance: one rounding of the products, one of the result, both relative to the largest weight."""
    made, doubles = results(name, reference.upload_fedavg, case, arithmetic, case.model)
    expected = reference.fedavg(case.clients, case.model) | {n: case.model[n] for n in fixed(case)}
    compare(made, expected, case, {n: 2.01 * ROUND * largest(case, n) for n in case.model})
    assert_same_bits(name, reference.upload_fedavg, case, case.model, made, doubles)


@FEW
@given(case=cases())
def test_scaffold(arithmetic: Arithmetic, case: Case) -> None:
    """Tolerance: as FedAvg; of controls, the roundings of the sum are float64's, so only the result's."""
    chance = np.random.default_rng(1)
    controls = {
        f"control.{n}": chance.standard_normal(v.size).astype(np.float32) for n, v in case.model.items()
    }
    model = case.model | controls
    made, doubles = results("Scaffold", reference.upload_scaffold, case, arithmetic, model)
    expected = reference.scaffold(case.clients, model, POPULATION)
    expected |= {n: model[n] for f in fixed(case) for n in (f, f"control.{f}")}
    scales = {n: 2.01 * ROUND * largest(case, n) for n in case.model}
    for name, before in controls.items():
        moved = [abs(c.control_moves.get(name[8:], np.zeros(1))).max() for c in case.clients]
        scales[name] = 1.01 * ROUND * (float(abs(before).max()) + sum(moved) / POPULATION)
    compare(made, expected, case, scales)
    assert_same_bits("Scaffold", reference.upload_scaffold, case, model, made, doubles)


@FEW
@given(case=cases())
def test_fednova(arithmetic: Arithmetic, case: Case) -> None:
    """Tolerance: two roundings of each client's move per step, times tau_eff, and one of the result."""
    made, doubles = results("FedNova", reference.upload_fednova, case, arithmetic, case.model)
    expected = reference.fednova(case.clients, case.model) | {n: case.model[n] for n in fixed(case)}
    tau_eff = sum(c.steps for c in case.clients) / len(case.clients)
    scales = {}
    for name, before in case.model.items():
        moves = [abs(c.weights.get(name, before) - before).max() / c.steps for c in case.clients]
        scales[name] = 3.01 * ROUND * (largest(case, name) + tau_eff * float(max(moves)))
    compare(made, expected, case, scales)
    assert_same_bits("FedNova", reference.upload_fednova, case, case.model, made, doubles)


def assert_same_bits(
    name: str,
    upload: Upload,
    case: Case,
    model: dict[str, Floats],
    made: dict[str, Floats],
    doubles: dict[str, bytes],
) -> None:
    """NumPy's results, to the last bit of a double."""
    plain, plain_doubles = results(name, upload, case, NUMPY, model)
    assert doubles == plain_doubles
    assert {n: v.tobytes() for n, v in made.items()} == {n: v.tobytes() for n, v in plain.items()}


@given(case=cases(), other=st.lists(st.integers(0, 3), min_size=7, max_size=7))
@FEW
@pytest.mark.parametrize(
    ("name", "upload"),
    [
        ("FedAvg", reference.upload_fedavg),
        ("Scaffold", reference.upload_scaffold),
        ("FedNova", reference.upload_fednova),
    ],
)
def test_the_servers_that_took_the_updates_do_not_matter(
    name: str, upload: Upload, case: Case, other: list[int]
) -> None:
    """Another grouping changes the last bits of float64 sums, so a float32 by one unit at most."""
    controls = {f"control.{n}": np.zeros(v.size, np.float32) for n, v in case.model.items()}
    model = case.model | (controls if name == "Scaffold" else {})
    one, _ = results(name, upload, case, NUMPY, model)
    regrouped = Case(case.plain, case.model, case.clients, other[: len(case.clients)])
    two, _ = results(name, upload, regrouped, NUMPY, model)
    for weight in model:
        np.testing.assert_allclose(one[weight], two[weight], rtol=2 * ROUND, atol=1e-12)


LAYOUT = Layout((Weight("a", (2,)), Weight("b", ()), Weight("frozen", (3,), aggregated=False)))
BEFORE = {w.name: np.full(w.size, 2.0, np.float32) for w in LAYOUT}


def made_of(rule: Rule, uploads: Sequence[tuple[dict[str, Floats], int]]) -> dict[str, Floats]:
    layout = layout_for(rule, LAYOUT)
    before = {w.name: BEFORE.get(w.name, np.full(w.size, 0.5, np.float32)) for w in layout}
    return new_model(rule, total_of(layout, uploads, [0] * len(uploads), NUMPY), before)


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "Scaffold", "FedNova"])
class TestWhatNobodySent:
    def test_keeps_its_value_without_any_update(self, name: str) -> None:
        for values in made_of(rule_named(name, 9), []).values():
            assert set(values.tolist()) <= {2.0, 0.5}

    def test_keeps_its_value_beside_what_was_sent(self, name: str) -> None:
        model = made_of(rule_named(name, 9), [({"a": np.float32([8, 4])}, 2)])
        assert model["b"].tolist() == [2.0] and model["frozen"].tolist() == [2.0] * 3
        assert model["a"].tolist() != [2.0, 2.0]
        assert all(v.tolist() == [0.5] * v.size for n, v in model.items() if n.startswith("control."))

    def test_stays_although_somebody_sends_what_is_not_aggregated(self, name: str) -> None:
        sent = {
            "frozen": np.ones(3, np.float32),
            "control.frozen": np.ones(3, np.float32),
            "b": np.ones(1, np.float32),
        }
        model = made_of(rule_named(name, 9), [(sent, 2)])
        assert model["frozen"].tolist() == [2.0] * 3
        assert model.get("control.frozen", np.full(3, 0.5)).tolist() == [0.5] * 3


class TestFedNova:
    def test_by_hand(self) -> None:
        """Steps 2 and 6, moves per step 1 and 3: tau_eff 4, mean 2, so the weight moves by 8."""
        model = made_of(FedNova(), [({"b": np.float32([1])}, 2), ({"b": np.float32([3])}, 6)])
        assert model["b"].tolist() == [10.0]

    def test_clients_that_never_came_do_not_matter(self) -> None:
        """One came, as with a ratio of 0.5 of two: it moves the model by all its steps."""
        assert made_of(FedNova(), [({"b": np.float32([1])}, 5)])["b"].tolist() == [7.0]

    def test_who_leaves_a_weight_out_has_not_moved_it(self) -> None:
        still = ({"a": np.float32([0, 0])}, 6)
        left_out = made_of(FedNova(), [({"b": np.float32([1])}, 2), still])
        told = made_of(FedNova(), [({"b": np.float32([1])}, 2), ({"b": np.float32([0]), **still[0]}, 6)])
        assert left_out["b"].tolist() == told["b"].tolist() == [4.0]


class TestScaffold:
    def test_keeps_a_control_for_each_weight(self) -> None:
        assert Scaffold(3).keeps(LAYOUT) == (
            Weight("control.a", (2,)),
            Weight("control.b", ()),
            Weight("control.frozen", (3,), aggregated=False),
        )

    def test_keeps_no_controls_of_controls(self) -> None:
        rule = Scaffold(3)
        assert rule.keeps(layout_for(rule, LAYOUT)) == rule.keeps(LAYOUT)

    def test_needs_its_names_for_itself(self) -> None:
        with pytest.raises(
            ShapeMismatch, match=r"'control.gate' has the name of a control .* no weight 'gate'"
        ):
            Scaffold(3).keeps(Layout((Weight("control.gate", (1,)),)))

    def test_a_control_moves_by_the_sum_over_the_whole_population(self) -> None:
        uploads = [({"control.b": np.float32([4])}, 1000), ({"control.b": np.float32([-1])}, 1)]
        assert made_of(Scaffold(10), uploads)["control.b"].tolist() == [np.float32(0.8)]

    def test_over_many_iterations_controls_are_neither_doubled_nor_lost(self) -> None:
        rule = Scaffold(4)
        layout = layout_for(rule, LAYOUT)
        model = {w.name: np.zeros(w.size, np.float32) for w in layout}
        for _ in range(5):
            upload = ({"control.a": np.float32([1, 2])}, 3)
            model = new_model(rule, total_of(layout, [upload], [0], NUMPY), model)
        assert model["control.a"].tolist() == [1.25, 2.5]


class TestTheOthers:
    @pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedNova"])
    def test_keep_nothing(self, name: str) -> None:
        rule = rule_named(name)
        assert rule.keeps(Layout((Weight("control.gate", (1,)),))) == ()
        assert not rule.is_kept("control.gate")

    def test_an_unknown_rule_is_a_bug(self) -> None:
        with pytest.raises(LocalError):
            rule_named("qffl")
