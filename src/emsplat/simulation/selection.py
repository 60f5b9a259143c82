"""A few words that select atoms: ``chain A B``, ``resid 1-213 220``, ``resname ALA``, ``name CA``, ``segid X`` or
``all``, joined by ``and``, ``or``, ``not`` and parentheses. ``not`` binds most closely, then ``and``, then ``or``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emsplat.errors import InputError
from emsplat.io.atoms import Sites

Chosen = NDArray[np.bool_]

_GRAMMAR = 'expected words such as "(chain H and resid 1-213 220) or chain L" (chain, segid, resid, resname, name, all)'
_TEXTS: dict[str, Callable[[Sites], NDArray[Any]]] = {
    "chain": lambda sites: sites.chain,
    "segid": lambda sites: sites.segment,
    "resname": lambda sites: sites.residue_name,
    "name": lambda sites: sites.name,
}
_WORDS = {*_TEXTS, "resid", "all", "and", "or", "not", "(", ")"}
_LONGEST = 200  # words; each may be a parenthesis
_RANGE = re.compile(r"(-?\d{1,9})(?:[-:](-?\d{1,9}))?")


def select(sites: Sites, text: str, option: str) -> Chosen:
    """Which atoms the words mean; ``option`` is where they were given, for messages.

    Raises:
        InputError: they cannot be understood, or mean no atom.
    """
    words = re.findall(r"[()]|[^\s()]+", text)
    if len(words) > _LONGEST:
        raise InputError(f"{option}: a selection of {len(words):,} words; expected up to {_LONGEST}; name ranges")
    chosen, rest = _any(sites, words, f'{option} "{text}"')
    if rest:
        raise InputError(f'{option} "{text}": not understood from "{" ".join(rest)}" on; {_GRAMMAR}')
    if not chosen.any():
        chains = " ".join(sorted(set(sites.chain.tolist()))) or "without names"
        raise InputError(f'{option} "{text}": selects no atom; expected some; the chains are {chains}')
    return chosen


def _any(sites: Sites, words: list[str], where: str) -> tuple[Chosen, list[str]]:
    chosen, words = _all(sites, words, where)
    while words[:1] == ["or"]:
        further, words = _all(sites, words[1:], where)
        chosen = chosen | further
    return chosen, words


def _all(sites: Sites, words: list[str], where: str) -> tuple[Chosen, list[str]]:
    chosen, words = _one(sites, words, where)
    while words[:1] == ["and"]:
        further, words = _one(sites, words[1:], where)
        chosen = chosen & further
    return chosen, words


def _one(sites: Sites, words: list[str], where: str) -> tuple[Chosen, list[str]]:
    match words:
        case ["not", *rest]:
            chosen, rest = _one(sites, rest, where)
            return ~chosen, rest
        case ["(", *rest]:
            chosen, rest = _any(sites, rest, where)
            if rest[:1] != [")"]:
                raise InputError(f"{where}: a parenthesis is not closed; {_GRAMMAR}")
            return chosen, rest[1:]
        case ["all", *rest]:
            return np.ones(len(sites), bool), rest
        case [("chain" | "segid" | "resname" | "name") as key, *rest]:
            values, rest = _values(rest, key, where)
            return np.isin(_TEXTS[key](sites), values), rest
        case ["resid", *rest]:
            values, rest = _values(rest, "resid", where)
            return _numbered(sites.residue, values, where), rest
    found = f'"{words[0]}"' if words else "nothing"
    raise InputError(f"{where}: {found} where a selection has to begin; {_GRAMMAR}")


def _values(words: list[str], key: str, where: str) -> tuple[list[str], list[str]]:
    """What stands behind a key."""
    count = next((i for i, word in enumerate(words) if word in _WORDS), len(words))
    if not count:
        raise InputError(f"{where}: nothing behind {key}; {_GRAMMAR}")
    return words[:count], words[count:]


def _numbered(residue: NDArray[np.int64], values: list[str], where: str) -> Chosen:
    chosen = np.zeros(len(residue), bool)
    for value in values:
        match = _RANGE.fullmatch(value)
        if match is None:
            raise InputError(f'{where}: resid {value}; expected numbers and ranges such as "1-213 220"')
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise InputError(f"{where}: resid {value} ends before it begins; swap the numbers")
        chosen |= (first <= residue) & (residue <= last)
    return chosen
