"""What a rule of aggregation keeps between iterations, put into the model that a server starts with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcore.aggregation.rule import Rule
from fedcore.errors import ArrayError, ConfigError
from fedcore.models.formats import ModelFile, check_weights
from fedcore.wire.arrays import Floats, Layout, Weight


def with_kept(model: ModelFile, rule: Rule) -> ModelFile:
    """Return a model with all arrays that a rule keeps: those that it has as they are, the others zero.

    Flags and shapes of kept arrays follow from the model's own weights, whatever the file says: a MindSpore checkpoint
    has no flags, and not every writer keeps the shapes.

    Raises:
        ConfigError: the model cannot be used with this rule.
    """
    try:
        kept = rule.keeps(Layout.of(model.weights, model.not_aggregated))
        weights = {**model.weights, **{each.name: _values(model, each) for each in kept}}
        plain = {each.name for each in kept if not each.aggregated}
        flags = (model.not_aggregated - {each.name for each in kept}) | plain
        check_weights(weights, flags)
    except ArrayError as error:
        raise ConfigError(
            f"the model and its rule of aggregation: {error.args[0]}", hint=error.hint
        ) from error
    return replace(model, weights={name: weights[name] for name in sorted(weights)}, not_aggregated=flags)


def _values(model: ModelFile, kept: Weight) -> Floats:
    values = model.weights.get(kept.name)
    if values is None:
        values = np.zeros(kept.shape, np.float32)
    elif values.size != kept.size:
        raise ArrayError(
            f"weight {kept.name!r} has {values.size} values, {kept.size} belong to it",
            hint="take a checkpoint of this model, or leave that weight out",
        )
    values = values.reshape(kept.shape)
    values.setflags(write=False)
    return values
