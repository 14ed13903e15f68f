"""Triton kernels in Triton's interpreter, in a child process.

A process has either compiled or interpreted kernels, as ``TRITON_INTERPRET`` says when they are imported: one child
for each test process interprets, so that the tests themselves can compile.
"""

import atexit
import dataclasses
import functools
import math
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fastsd_kernels import triton_runtime
from fastsd_kernels.dispatch import Op, ops
from tests.artefacts import ROOT
from tests.runners import protocol
from tests.runners.protocol import attributes

# A program takes some 10 ms
PROGRAMS_FOR_A_PAIR = 8


class Interpreter:
    name, backend, device = "interpreter", "triton", "cpu"
    dtypes = (torch.float32, torch.float16)  # it rounds bfloat16 wrongly
    settings = {"tiles": ("as_launched", "small")}  # noqa: RUF012 (read only)
    one_in = 3

    def unavailable(self):
        return "Triton is not installed" if triton_runtime.triton is None else None

    def run(self, op, sample, setting):
        return interpreted(_run, op.name, sample, setting["tiles"] == "small")

    def cost(self, op, sample, setting):
        return _programs(op, sample.name, setting["tiles"] == "small") / PROGRAMS_FOR_A_PAIR

    def same_bits(self, setting):
        return None  # its programs run in one order only

    def launches(self, op, sample):
        recorded = []
        with as_interpreted(), attributes((triton_runtime.Launch, "__call__", lambda launch: recorded.append(launch))):
            protocol.call(op, sample, "triton")
        return recorded

    def served(self, op, samples):
        too_large = getattr(op.cases, "NOT_INTERPRETED", ())
        with as_interpreted():
            found = protocol.not_refused(op, samples, "triton")
        return {name: needs for name, needs in found.items() if not name.startswith(too_large)}


@functools.cache
def _programs(op: Op, name: str, small: bool) -> int:
    """How many programs run for a sample of the op's; a step that is another op's counts as one."""
    sample = protocol.samples(op, "cpu", torch.float32)[name]
    with small_tiles(op.name) if small else attributes():
        launches = Interpreter().launches(op, sample)
    return sum(math.prod(getattr(launch, "grid", (1,))) for launch in launches)


def interpreted(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in the child. It must be a module's own, and everything must pickle.

    Raises:
        AssertionError: it raised; the message is the child's traceback.
    """
    failure, result = _child().ask(function, args)
    assert failure is None, failure
    return result


def with_constants(constants: Mapping[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` where module constants, named as ``"package.module.NAME"``, have other values."""
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(mock.patch(name, value))
        return function(*args)


def constants_of(op_name: str) -> dict[str, int]:
    """Constants of the Triton backends that make small samples take the paths of large inputs, by dotted name."""
    return getattr(next(op for op in ops() if op.name == op_name).cases, "SMALL_TILES", {})


@functools.cache
def _as_small(op_name: str) -> tuple[tuple[Any, str, int], ...]:
    """Changes for :func:`attributes`; a name without a dot is of the op's own module."""
    modules = {op.name: op.backends["triton"].module for op in ops()}
    changes = []
    for name, value in constants_of(op_name).items():
        module, _, constant = name.rpartition(".")
        changes.append((modules[module or op_name], constant, value))
    return tuple(changes)


def small_tiles(op_name: str):
    """A context with :func:`constants_of`."""
    return attributes(*_as_small(op_name), *_uncached())


def _uncached():
    """Launch planning without its caches, which know nothing of constants that change."""
    for op in ops():
        module = op.backends["triton"].module
        for name, value in list(vars(module).items()):
            if hasattr(value, "cache_clear"):
                yield module, name, value.__wrapped__


def as_interpreted():
    """A context in which the backend's refusals are those of the child."""
    modules = {op.backends["triton"].module for op in ops()}
    return attributes(
        (triton_runtime, "INTERPRETED", True), *((module, "unavailable", lambda: None) for module in modules)
    )


def _run(op_name: str, sample: Any, small: bool) -> torch.Tensor:
    op = next(op for op in ops() if op.name == op_name)
    with small_tiles(op_name) if small else attributes():
        return protocol.call(op, sample, "triton")


class _Child:
    """A process that calls functions, one at a time, and pickles what they return."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.runners import interpreter; interpreter._serve()"],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self._process.kill)

    def ask(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str | None, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((function, args), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            _child.cache_clear()
            return f"the interpreter's process ended with {self._process.wait()}; its words are above", None


@functools.cache
def _child() -> _Child:
    return _Child()


def _speed_up() -> None:
    """Make Triton's interpreter leave out work without effect: more than half of the time of a program.

    It replaces the functions of ``triton.language`` again for each call of a function in a kernel, makes a table of
    data types for each look at one, and computes whether integers overflow for an assertion that is off.
    """
    from triton import language
    from triton.runtime import interpreter

    replace, of_scalar = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)

    @functools.cache
    def replace_once(function):
        replace(function)
        return SimpleNamespace(restore=lambda: None)  # every kernel of this process is interpreted

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = lambda type: of_scalar(language.uint64 if type.scalar.is_ptr() else type.scalar)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _serve() -> None:
    """Answer until the parent ends. Results go through a copy of stdout, so that kernels may print."""
    _speed_up()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    # with deterministic algorithms torch fills what torch.empty returns with NaN
    torch.use_deterministic_algorithms(True)
    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = None, function(*args)
        except Exception:
            answer = traceback.format_exc(), None
        pickle.dump(answer, answers)
        answers.flush()
