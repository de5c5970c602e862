"""Puts the code of a mutant into a package that is imported, and takes it out again."""

import contextlib
import functools
import gc
import re
import sys
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, re.Pattern, types.NoneType)


class CannotSwapError(Exception):
    """The change is of what only an import evaluates, a decorator say."""


class Package:
    """A package whose functions can be given other code while the tests hold them.

    Made when all tests are imported: what exists then is found once, what comes later each time.
    """

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, str(folder)
        gc.unfreeze()  # what tests/conftest.py froze is not listed
        self._functions, self._caches = self._found()
        gc.collect()
        gc.freeze()

    def _found(self) -> tuple[list[types.FunctionType], list[Any]]:
        objects = gc.get_objects()
        functions = [
            x
            for x in objects
            if type(x) is types.FunctionType and x.__code__.co_filename.startswith(self._folder)
        ]
        caches = [x for x in objects if isinstance(x, functools._lru_cache_wrapper)]
        return functions, [x for x in caches if str(x.__module__).startswith(self._name)]

    @contextlib.contextmanager
    def mutated(self, file: str, source: str, text: str) -> Generator[None]:
        """Where the package is as if a file of it had been `text`, and not `source`.

        Raises:
          CannotSwapError: If it takes an import for that.
        """
        if source.count("\n") != text.count("\n"):  # all functions below would be others
            raise CannotSwapError
        functions, caches = self._found()
        caches += self._caches
        path = f"{self._folder}/{file}"
        codes = dict(_pairs(compile(source, path, "exec"), compile(text, path, "exec")))
        undo: list[Callable[[], None]] = []
        try:
            for function in (*self._functions, *functions):
                new = codes.get(function.__code__)
                if new is not None and new != function.__code__:
                    undo.append(_set(function, "__code__", new))
            if not undo:
                undo += self._swapped_globals(path, text)
            for cache in caches:
                cache.cache_clear()
            yield
        finally:
            for step in reversed(undo):
                step()
            for cache in caches:
                cache.cache_clear()

    def _swapped_globals(self, file: str, text: str) -> list[Callable[[], None]]:
        parts = Path(file).relative_to(self._folder).with_suffix("").parts
        module = sys.modules[".".join((self._name, *parts)).removesuffix(".__init__")]
        scratch = types.ModuleType(module.__name__)
        try:
            exec(compile(text, file, "exec"), vars(scratch))
        except Exception as error:
            raise CannotSwapError from error
        users = [x for name, x in sys.modules.items() if name.startswith(self._name)]
        changes = list(_changes(vars(module), vars(scratch), users))
        if not changes:
            raise CannotSwapError
        return [_set(*change) for change in changes]


def _pairs(
    old: types.CodeType, new: types.CodeType
) -> Iterator[tuple[types.CodeType, types.CodeType]]:
    """The code of each function with what it becomes."""
    inner = [[x for x in code.co_consts if isinstance(x, types.CodeType)] for code in (old, new)]
    if len(inner[0]) != len(inner[1]) or old.co_freevars != new.co_freevars:
        raise CannotSwapError
    yield old, new
    for pair in zip(*inner, strict=True):
        yield from _pairs(*pair)


def _changes(
    old: dict[str, Any], new: dict[str, Any], users: list[types.ModuleType]
) -> Iterator[tuple[Any, str, Any]]:
    """What to set where, so that a module has the constants and defaults of another."""
    for name in (name for name in old.keys() & new.keys() if not name.startswith("__")):
        was, now = old[name], new[name]
        if isinstance(was, types.FunctionType) and isinstance(now, types.FunctionType):
            for part in ("__defaults__", "__kwdefaults__"):
                if _is_another(getattr(was, part), getattr(now, part)):
                    yield was, part, getattr(now, part)
        elif _is_another(was, now):
            yield from ((user, name, now) for user in users if vars(user).get(name) is was)


def _set(target: Any, name: str, new: Any) -> Callable[[], None]:
    old = getattr(target, name)
    setattr(target, name, new)
    return functools.partial(setattr, target, name, old)


def _is_another(was: Any, now: Any) -> bool:
    return _is_plain(was) and _is_plain(now) and repr(was) != repr(now)


def _is_plain(x: Any) -> bool:
    if isinstance(x, dict):
        return _is_plain((*x.keys(), *x.values()))
    if isinstance(x, tuple | list | set | frozenset):
        return all(map(_is_plain, x))
    return isinstance(x, _PLAIN)
