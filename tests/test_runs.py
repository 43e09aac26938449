"""The jobs behind the commands, where no command shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ttt4as_fast.runs import split_nominal

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
