"""Ranks that were started for different runs are told apart."""

from typing import Any

import pytest

from kantai.distributed.agreement import refuse_disagreement
from kantai.errors import UserError


def compare(*everyone: tuple[str, dict[str, Any]]) -> None:
    """Compare as rank 0 does, with the answers of all ranks at hand."""
    answers = [[str(values) for _, values in everyone], list(everyone)]
    node, mine = everyone[0]
    refuse_disagreement(mine, node, lambda _: answers.pop(0))


def test_ranks_that_agree_pass() -> None:
    compare(*[("n1", {"seed": 1})] * 4)


def test_difference_names_values_ranks_and_nodes() -> None:
    one = ("n1", {"seed": 1, "max_steps": 4, "only": 1})
    with pytest.raises(UserError) as error:
        compare(one, one, ("n2", {"seed": 2, "max_steps": 4}), one, ("n3", {**one[1], "seed": 2}))
    assert str(error.value) == (
        "the ranks do not agree on the run: only is 1 on ranks 0-1, 3-4 and None on rank 2; seed "
        "is 1 on ranks 0-1, 3 and 2 on ranks 2, 4. Rank 0 is on n1, the others that differ are on "
        "n2, n3. Start all with the same command, code and files"
    )


def test_many_differences_are_cut_short() -> None:
    with pytest.raises(UserError, match="; and 15 more"):
        compare(("n1", dict.fromkeys("abcdefghijklmnopqrst", 1)), ("n2", {}))
