"""The newest models of a job, by iteration."""

from __future__ import annotations

from fedcore.wire.image import ModelImage

KEPT = 3  # models in memory, as devices may ask for


class ModelHistory:
    """The model of iteration k is the result of iteration k; iteration 0 is the initial model."""

    def __init__(self, iteration: int, image: ModelImage) -> None:
        self._models = {iteration: image}

    @property
    def newest(self) -> int:
        """Iteration of the newest model."""
        return max(self._models)

    @property
    def newest_image(self) -> ModelImage:
        """The newest model."""
        return self._models[self.newest]

    def get(self, iteration: int) -> ModelImage | None:
        """Return the model of an iteration if it is still kept."""
        return self._models.get(iteration)

    def find(self, digest: str) -> ModelImage | None:
        """Return the model with a digest if it is kept."""
        return next((image for image in self._models.values() if image.digest == digest), None)

    def add(self, iteration: int, image: ModelImage) -> None:
        """Keep a model; models of the same or later iterations are superseded, the oldest makes room."""
        kept = {number: model for number, model in self._models.items() if number < iteration}
        kept[iteration] = image
        self._models = dict(sorted(kept.items())[-KEPT:])

    def carry_over(self, iteration: int) -> None:
        """Let the newest model stand for an iteration that made none."""
        self.add(iteration, self.newest_image)
