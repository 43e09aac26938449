"""The jobs behind the commands, where no command shows them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ttt4as_fast import TTT4AS
from ttt4as_fast.runs import predict_batch, split_nominal

PATHS = [Path(f"{i}.png") for i in range(20)]


def test_two_images_are_one_to_train_on_and_one_to_validate():
    training, held_out = split_nominal(PATHS[:2], 0.5, 0)
    assert len(training) == len(held_out) == 1


def test_a_split_keeps_the_order_and_depends_on_the_seed():
    splits = [split_nominal(PATHS, 0.25, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    for training, held_out in splits:
        assert len(held_out) == 5 and sorted(training + held_out) == sorted(PATHS)
        assert all(part == sorted(part, key=PATHS.index) for part in (training, held_out))
    assert split_nominal(PATHS, 0.0, 0) == (PATHS, [])
    assert len(split_nominal(PATHS, 0.001, 0)[1]) == 1


def test_nothing_left_to_train_on():
    with pytest.raises(ValueError, match="validation_share: expected images left to train on, got 1 in all"):
        split_nominal(PATHS[:1], 0.5, 0)


def test_a_seed_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"^seed: expected"):
        split_nominal(PATHS[:2], 0.5, -1)


def test_an_image_has_its_share_of_the_time_its_batch_took():
    rng = np.random.default_rng(0)
    made = SimpleNamespace(
        anomaly_map=rng.random((2, 16, 16)), features=rng.random((2, 3, 4, 4)), pred_score=np.ones(2), milliseconds={}
    )
    began = time.perf_counter()
    found = list(predict_batch(SimpleNamespace(predict=lambda *_, **__: made), TTT4AS(), [None, None], None))
    assert 0 < sum(one["milliseconds"]["ttt4as"] for one in found) <= 1e3 * (time.perf_counter() - began)
