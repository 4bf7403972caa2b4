"""Who multiplies what where programs of the Hopper kernel share tiles: the device code's own arithmetic, in Python."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowint8.kernels.hopper import stream_k
from rowint8.kernels.tiles.hopper_cost import hopper_candidates, hopper_schedule


def as_program(program: int, programs: int) -> SimpleNamespace:
    """What the device code calls, as one of the programs."""
    return SimpleNamespace(
        program_id=lambda axis: program,
        num_programs=lambda axis: programs,
        cdiv=lambda a, b: -(-a // b),
        maximum=max,
        minimum=min,
    )


def dealt(tiles: int, steps: int, programs: int, waves: int) -> tuple[dict, dict, dict]:
    """For each tile how often each of its steps is multiplied, which ranks leave sums of it and which are taken."""
    multiplied = {tile: [0] * steps for tile in range(tiles)}
    left, taken = defaultdict(list), {}
    with pytest.MonkeyPatch.context() as patch:
        for program in range(programs):
            patch.setattr(stream_k, "gl", as_program(program, programs))
            begin, end, total = stream_k.share.fn(tiles, waves, steps)
            for turn in range(stream_k.turns.fn(tiles, waves, steps, begin, end, True)):
                tile, first, last = stream_k.turn_steps.fn(turn, waves, steps, begin, end, True)
                assert 0 <= first < last <= steps
                for step in range(first, last):
                    multiplied[tile][step] += 1
                if first > 0:
                    assert turn == waves, "a program leaves sums of one tile at most, and first of all"
                    left[tile].append(programs - 1 - program)
                else:
                    taken[tile] = list(range(*stream_k.helpers.fn(tile, waves, steps, total)))
    return multiplied, left, taken


@given(
    tile=st.sampled_from([tile for tile in hopper_candidates("linear", 1) if tile.shared]),
    m=st.integers(1, 600),
    n=st.integers(1, 9_000),
    k=st.integers(16, 6_000),
    processors=st.integers(2, 132),
)
def test_every_step_is_multiplied_once_and_all_sums_are_taken(tile, m, n, k, processors):
    tiles, steps = -(-m // tile.width) * -(-n // tile.rows), -(-k // (tile.deep * tile.block_k))
    multiplied, left, taken = dealt(tiles, steps, *hopper_schedule(tile, m, n, k, processors))
    assert all(times == [1] * steps for times in multiplied.values())
    assert set(taken) == set(range(tiles)), "each tile has one program that begins it"
    for number, ranks in taken.items():
        assert sorted(left[number]) == ranks


def test_programs_wait_for_those_before_them():
    """Programs start in the order of their index: rank 1, for which rank 0 waits, is the last program but one."""
    _, left, taken = dealt(tiles=3, steps=4, programs=4, waves=0)
    assert taken == {0: [1], 1: [2], 2: [3]}
    assert left == taken
