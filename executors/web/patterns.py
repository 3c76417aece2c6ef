"""Can this regular expression of a task hold the device up?

`re` cannot be interrupted and holds the interpreter while it searches. So a pattern is refused, before anything is
fetched, if a URL of 1,024 characters may keep it busy for longer than about a quarter of a second. Its parsed form is
walked and the ways to match are multiplied, each place by how many there are to choose from:

    the beginning                       1,024, unless it is ^, \\A or .*
    a repeat (20 times or more)         1,024, where what follows may also be one more turn of it; [^/]+/ is one way
    a repeat up to 19 times, a | b      how many there are, twice, where what follows does not decide between them
    followed by a word                  as many fewer as that word has characters: .*page can stop at 1,024 / 4 places

A repeat inside which there is another, or more than one way, is refused whatever it costs: (a+)+, (a|aa)*.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from executors.web.urls import MAX_URL_CHARACTERS

# Newer Pythons warn of the old name.
_PARSER = "re._parser" if sys.version_info >= (3, 11) else "sre_parse"
_parse: Callable[[str], Any] = importlib.import_module(_PARSER).parse

MANY = 20
MAX_CHARACTERS = 2000
MAX_STEPS = 3e8
OTHER = 128
"""Stands for all characters past ASCII."""

Characters = frozenset[int]
ALL: Characters = frozenset(range(OTHER + 1))
NONE: Characters = frozenset()
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
CATEGORIES = {"DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S", "WORD": r"\w", "NOT_WORD": r"\W"}


class TooSlow(ValueError):
    """It may hold the device up; the text says why."""


def searcher(pattern: str) -> Callable[[str], Any]:
    """What looks for the pattern in a URL. Raises TooSlow, and re.error and others of re.compile."""
    if len(pattern) > MAX_CHARACTERS:
        raise TooSlow(f"it has {len(pattern)} characters, at most {MAX_CHARACTERS} are read")
    compiled = re.compile(pattern)
    items = list(_parse(pattern))
    is_anywhere = bool(items) and _begins_with_anything(items)
    steps = _Steps()
    starts = 1.0 if is_anywhere or _is_anchor(items) else MAX_URL_CHARACTERS / _period(items)
    steps.walk(items, starts, ends=True, after=NONE)
    # A URL has one line: what begins with .* is found from its first character on, or nowhere.
    return compiled.match if is_anywhere else compiled.search


class _Steps:
    """Counts what a search may cost."""

    def __init__(self) -> None:
        self.total = 0.0

    def walk(self, items: Sequence[Any], ways: float, *, ends: bool, after: Characters) -> float:
        """The ways to get through these; `after` may come next, and with `ends` nothing has to."""
        for i, (op, argument) in enumerate(items):
            rest, kind = items[i + 1 :], str(op)
            follows = _first(rest, after)
            is_last = ends and not rest
            if kind in REPEATS:
                ways = self._repeat(argument, ways, rest, follows, is_last)
            elif kind == "BRANCH":
                ways *= self._choice(argument[1], ways, follows, is_last)
            elif kind == "GROUPREF_EXISTS":
                ways *= self._choice([argument[1], argument[2] or []], ways, follows, is_last)
            elif kind in ("SUBPATTERN", "ATOMIC_GROUP"):
                ways = self.walk(_inside(op, argument), ways, ends=is_last, after=follows)
            elif kind in ("ASSERT", "ASSERT_NOT"):
                self.walk(argument[1], ways, ends=True, after=NONE)
            elif kind == "GROUPREF":
                self._spend(ways * MAX_URL_CHARACTERS)
        self._spend(ways)
        return ways

    def _repeat(self, repeat: Any, ways: float, rest: Sequence[Any], follows: Characters, is_last: bool) -> float:
        least, most, body = repeat
        turn = _first(body, follows)
        inner = _Steps()
        ways_of_turn = inner.walk(body, 1.0, ends=False, after=turn | follows)
        most = int(most)
        if most < MANY:
            if most > least and turn & follows:
                ways *= 2 * (most - least) + 1
            self._spend(ways * inner.total * max(1, most) * ways_of_turn ** max(0, most - 1))
            return ways * ways_of_turn**most
        if _has_repeat(body) or ways_of_turn > 1:
            raise TooSlow("a repeat inside a repeat, or one that can go more than one way, may never end")
        if is_last:
            return ways  # it takes what it gets, and that was it
        self._spend(ways * MAX_URL_CHARACTERS * max(1.0, inner.total))
        return ways * MAX_URL_CHARACTERS / _period(rest) if most > least and turn & follows else ways

    def _choice(self, branches: Sequence[Any], ways: float, follows: Characters, is_last: bool) -> float:
        inner = _Steps()
        each = [inner.walk(branch, 1.0, ends=is_last, after=follows) for branch in branches]
        self._spend(ways * inner.total)
        firsts = [_first(branch, follows) for branch in branches]
        is_decided = sum(map(len, firsts)) == len(frozenset().union(*firsts))
        return max(each) if is_decided else 2 * sum(each) - 1

    def _spend(self, steps: float) -> None:
        self.total += steps
        if self.total > MAX_STEPS:
            raise TooSlow("it has too many ways to match one URL")


def _inside(op: Any, argument: Any) -> Sequence[Any]:
    inside: Sequence[Any] = argument[-1] if str(op) == "SUBPATTERN" else argument
    return inside


def _begins_with_anything(items: Sequence[Any]) -> bool:
    op, argument = items[0]
    if str(op) not in REPEATS[:2]:
        return False
    least, most, body = argument
    return least == 0 and int(most) > MAX_URL_CHARACTERS and [str(kind) for kind, _ in body] == ["ANY"]


def _is_anchor(items: Sequence[Any]) -> bool:
    return bool(items) and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING")


def _has_repeat(items: Sequence[Any]) -> bool:
    for op, argument in items:
        kind = str(op)
        if kind in REPEATS and (int(argument[1]) >= MANY or _has_repeat(argument[2])):
            return True
        if kind in ("SUBPATTERN", "ATOMIC_GROUP") and _has_repeat(_inside(op, argument)):
            return True
        if kind in ("ASSERT", "ASSERT_NOT") and _has_repeat(argument[1]):
            return True
        branches = argument[1] if kind == "BRANCH" else argument[1:] if kind == "GROUPREF_EXISTS" else ()
        if any(_has_repeat(branch or ()) for branch in branches):
            return True
    return False


def _period(items: Sequence[Any]) -> int:
    """The word that these begin with can stand at every so many-th place: "abc" 3, "aba" 2, "aaa" 1."""
    word = ""
    for op, argument in items:
        if str(op) != "LITERAL":
            break
        word += chr(argument).lower()
    return next((i for i in range(1, len(word)) if word[i:] == word[:-i]), max(1, len(word)))


def _first(items: Sequence[Any], after: Characters) -> Characters:
    """With which characters these can begin; those of `after` too where all of them can be empty."""
    found: Characters = NONE
    for op, argument in items:
        kind = str(op)
        if kind in REPEATS:
            found |= _first(argument[2], NONE)
            if argument[0] and not _can_be_empty(argument[2]):
                return found
        elif kind in ("SUBPATTERN", "ATOMIC_GROUP", "BRANCH"):
            branches = argument[1] if kind == "BRANCH" else [_inside(op, argument)]
            found = found.union(*(_first(branch, NONE) for branch in branches))
            if not any(map(_can_be_empty, branches)):
                return found
        elif kind == "AT":
            if str(argument) in ("AT_END", "AT_END_STRING"):
                return found
        elif kind in ("GROUPREF", "GROUPREF_EXISTS"):
            return ALL
        elif kind not in ("ASSERT", "ASSERT_NOT"):
            return found | _set(kind, argument)
    return found | after


def _can_be_empty(items: Any) -> bool:
    return bool(items.getwidth()[0] == 0)


def _set(kind: str, argument: Any) -> Characters:
    """What one item of one character takes, in both cases: whether it ignores case does not matter then."""
    if kind == "LITERAL":
        return _both_cases({min(argument, OTHER)})
    if kind == "IN":
        return _class(argument)
    return ALL - {argument} if kind == "NOT_LITERAL" else ALL


def _class(parts: Sequence[Any]) -> Characters:
    found: set[int] = set()
    for op, argument in parts:
        kind = str(op)
        if kind == "LITERAL":
            found.add(min(argument, OTHER))
        elif kind == "RANGE":
            found.update(range(min(argument[0], OTHER), min(argument[1], OTHER) + 1))
        elif kind == "CATEGORY":
            found |= _category(str(argument).partition("_")[2])
    return (ALL - (found - {OTHER})) if parts and str(parts[0][0]) == "NEGATE" else _both_cases(found)


@cache
def _category(name: str) -> Characters:
    takes = re.compile(CATEGORIES[name]).match
    return frozenset(c for c in range(OTHER) if takes(chr(c))) | {OTHER}


def _both_cases(characters: set[int]) -> Characters:
    return frozenset(ord(c) for one in characters for c in (chr(one).lower(), chr(one).upper()))
