"""What is told before there is anything to tell."""

import math

import pytest

from fedcore.observe.metrics import WorkerMetrics


@pytest.mark.parametrize("name", ["fl_worker_loss", "fl_worker_accuracy"])
def test_a_worker_that_has_not_trained_has_no_figures(name):
    assert math.isnan(WorkerMetrics().registry.get_sample_value(name))
