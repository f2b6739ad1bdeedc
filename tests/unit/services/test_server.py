"""What a server says of itself, and what it looks at before it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedcore.core.iteration import CipherRound, Iteration, Phase, Policy
from fedcore.core.job import RunningState
from fedcore.errors import ConfigError
from fedcore.models.formats import ModelFile
from fedcore.services.server import ServerOptions, _history, check_writable, course_of, size_of_models
from fedcore.wire.arrays import Layout
from fedcore.wire.image import ImageTemplate

POLICY = Policy(10, 8, 1.0, 1.0, 1.0, last_iteration=20, cipher_rounds=(("reconstructSecrets", 5),))


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Iteration(7, uploaded=3), "iteration 7 of 20, collecting, 3 of 8 updates"),
        (
            Iteration(7, 2, Phase.REDUCING, uploaded=8),
            "iteration 7 of 20, attempt 2, reducing, 8 of 8 updates",
        ),
        (Iteration(7, phase=Phase.UNMASKING, uploaded=8), "iteration 7 of 20, unmasking, 0 of 5 reports"),
        (
            Iteration(7, phase=Phase.UNMASKING, rounds=(CipherRound("reconstructSecrets", 6, 1.0),)),
            "iteration 7 of 20, unmasking, 6 of 5 reports",
        ),
        (Iteration(20, phase=Phase.TRAINING, uploaded=8), "iteration 20 of 20, training, 8 of 8 updates"),
        (Iteration(7, running=RunningState.DISABLE), "iteration 7 of 20, disabled"),
        (Iteration(7, running=RunningState.FINISH), "finished: all 20 iterations are done"),
        (Iteration(21), "finished: all 20 iterations are done"),
    ],
)
def test_where_an_iteration_is(now: Iteration, words: str) -> None:
    assert course_of(now, POLICY) == words


def test_checkpoints_may_go_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_checkpoints_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(ConfigError, match="a is no folder"):
        check_writable(tmp_path / "a" / "b")


def test_what_may_have_to_be_read_is_measured(tmp_path: Path) -> None:
    folder, model = tmp_path / "checkpoints", tmp_path / "model.npz"
    assert size_of_models("job", ServerOptions(folder, None, folder, "", 0)) == 0
    assert size_of_models("job", ServerOptions(folder, model, folder, "", 0)) == 0
    folder.mkdir()
    for path, size in ((model, 1), (folder / "job_1", 2), (folder / "job_2", 4), (folder / "other_1", 8)):
        path.write_bytes(b"x" * size)
    assert size_of_models("job", ServerOptions(folder, model, folder, "", 0)) == 7


@pytest.mark.parametrize(
    ("newest", "fits", "kept"), [(1, True, [0, 1]), (2, True, [2]), (1, False, [1]), (0, True, [0])]
)
def test_the_initial_model_is_at_hand_while_the_first_iteration_may_not_be_over(
    newest: int, fits: bool, kept: list[int]
) -> None:
    """A server that is killed while it publishes model 1 has its checkpoint, and Redis is in iteration 1 still."""

    def model(value: float, size: int = 2) -> ModelFile:
        return ModelFile({"a": np.full(size, value, np.float32)}, frozenset())

    newer, initial = model(1.0), model(0.0, 2 if fits else 3)
    template = ImageTemplate(Layout.of(newer.weights, newer.not_aggregated))
    history = _history(newest, newer, initial, template)
    assert [number for number in range(3) if history.get(number) is not None] == kept
    assert history.newest_image.arrays["a"].tolist() == [1.0, 1.0]
    assert _history(newest, newer, None, template).newest == newest
