"""Whether all ranks were started for the same run.

Ranks that were started by different commands, or that read different files, would train one model
that nobody asked for, or wait for each other for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from kantai.errors import UserError
from kantai.storage.atomic import digest

GatherFromAll = Callable[[Any], list[Any]]
_MAX_NAMED = 5  # differences; the rest follow from the same cause


def refuse_disagreement(mine: Mapping[str, Any], node: str, from_all: GatherFromAll) -> None:
    """Compare what the ranks are to have in common; all ranks call this together.

    Args:
        mine: values by name, which JSON can write.
        node: this rank's.
        from_all: gathers a value of every rank.

    Raises:
        UserError: a rank differs. The message names it, what differs, and both values.
    """
    if len(set(from_all(digest(mine)))) == 1:
        return
    everyone: list[tuple[str, dict[str, Any]]] = from_all((node, dict(mine)))
    found = [
        f"{name} is {_by_rank([values.get(name) for _, values in everyone])}"
        for name in sorted({name for _, values in everyone for name in values})
        if any(values.get(name) != everyone[0][1].get(name) for _, values in everyone)
    ]
    others = [rank for rank, (_, values) in enumerate(everyone) if values != everyone[0][1]]
    nodes = sorted({everyone[rank][0] for rank in others})
    more = f"; and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    raise UserError(
        f"the ranks do not agree on the run: {'; '.join(found[:_MAX_NAMED])}{more}. Rank 0 is on "
        f"{everyone[0][0]}, the others that differ are on {', '.join(nodes)}. Start all with the "
        "same command, code and files"
    )


def _by_rank(values: Sequence[Any]) -> str:
    """Each value with its ranks: ``0.001 on ranks 0-7 and 1e-05 on ranks 8-15``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(_shown(value), []).append(rank)
    return " and ".join(f"{value} on {_ranges(those)}" for value, those in ranks.items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks in words: ``rank 3``, ``ranks 0-2, 5``."""
    runs = [
        [rank for _, rank in group]
        for _, group in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    ]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
