"""Splits: no patient in two parts, groups together, strata in proportion, seeds repeatable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from motet.fusion.splits import carve, split


@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(20, 80),
    count=st.integers(1, 5),
    share=st.floats(0.1, 0.2),
)
def test_nobody_is_in_two_parts(seed: int, groups: int, count: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    group = generator.integers(0, groups, 3 * groups)
    strata = generator.integers(0, 3, len(group))
    tested: set[int] = set()
    for parts in split(group, strata, count=count, test=share, validation=0.15, seed=seed):
        rows = np.concatenate(parts)
        assert sorted(rows.tolist()) == list(range(len(group)))
        owners = [set(group[part].tolist()) for part in parts]
        assert len(set.union(*owners)) == sum(map(len, owners))
        assert tested.isdisjoint(owners[2])  # each group is tested at most once over all splits
        tested |= owners[2]


def test_strata_keep_their_proportions() -> None:
    events = np.arange(571) < 155
    for parts in split(np.arange(571), events, seed=3):
        sizes = [len(part) for part in parts]
        assert sizes[1:] == [86, 86] or all(abs(size - 85.65) <= 1 for size in sizes[1:])
        for part in parts:
            assert abs(events[part].sum() - len(part) * 155 / 571) <= 1.5


def test_cross_validation_tests_everyone_once() -> None:
    splits = split(range(198), [0] * 150 + [1] * 48, count=5, test=0.2)
    assert sorted(np.concatenate([parts.test for parts in splits])) == list(range(198))


def test_a_seed_gives_one_draw() -> None:
    group, strata = np.arange(100), np.arange(100) % 4
    one, same, other = (split(group, strata, seed=seed) for seed in (1, 1, 2))
    for first, second in zip(one, same, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(one[0].test, other[0].test)
    # The choice of test rows does not depend on their order.
    assert not np.array_equal(np.sort(one[0].test), np.arange(15))


def test_carving_keeps_groups_whole() -> None:
    group = np.repeat(np.arange(40), 2)
    rows = np.arange(10, 80)
    kept, held = carve(rows, group, np.arange(80) % 2, share=0.2, seed=5)
    assert sorted([*kept, *held]) == rows.tolist()
    assert len(held) == 14
    assert not set(group[kept]) & set(group[held])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"test: expected a share in \(0, 1\), got 0"):
        split(range(9), [0] * 9, test=0)
    with pytest.raises(ValueError, match="validation: expected test \\+ validation < 1"):
        split(range(9), [0] * 9, count=1, test=0.6, validation=0.5)
    with pytest.raises(ValueError, match="test: expected at most 1 / 5"):
        split(range(9), [0] * 9, count=5, test=0.3)
    with pytest.raises(ValueError, match="validation part of split 1 empty"):
        split(range(3), [0] * 3, count=1, test=0.4)
    with pytest.raises(ValueError, match=r"strata: expected \(9,\) as groups, got \(8,\)"):
        split(range(9), [0] * 8)
