"""What stands in for a card where CUDA graphs are tested.

A tape keeps every operation of torch and the memory that it read, and Python runs no more when it is replayed. So what
a graph would not notice, a tape does not notice either.
"""

from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastsd
from tests.patching import models


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result


class Tape:
    """A card whose graphs are lists of operations."""

    device_type = "cpu"
    made: ClassVar = []
    is_busy = False
    error: ClassVar = None

    def __init__(self, device):
        self.device = device
        self.events = []
        self.made.append(self)

    @classmethod
    def is_capturing(cls, device):
        return cls.is_busy

    @contextmanager
    def turn(self):
        self.events.append("turn")
        yield

    def capture(self, function):
        self.events.append("capture")
        if self.error is not None:
            raise self.error
        with Recorder() as recorder:
            output = function()
        made = {id(leaf) for *_, result in recorder.operations for leaf in tree_leaves(result)}

        def fixed(leaf):
            # the memory of now, wherever a parameter may lie later
            return leaf.detach() if isinstance(leaf, Tensor) and id(leaf) not in made else leaf

        tape = [(f, *tree_map(fixed, (args, kwargs)), result) for f, args, kwargs, result in recorder.operations]
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                leaf.fill_(float("nan"))  # a capture computes nothing
        return lambda: self.replay(tape, tree_leaves(output)), output

    def replay(self, tape, outputs):
        self.events.append("replay")
        now = {}

        def current(leaf):
            return now.get(id(leaf), leaf)

        for function, args, kwargs, result in tape:
            again = function(*tree_map(current, args), **tree_map(current, kwargs))
            now.update({id(old): new for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True)})
        for leaf in outputs:
            if isinstance(leaf, Tensor):
                leaf.copy_(now[id(leaf)])

    def finish(self):
        self.events.append("finish")


def events(tape, *kinds):
    return [event for card in tape.made for event in card.events if event in (kinds or ("capture", "replay"))]


def build(name="small", *, seed=0):
    return models.build(name, seed=seed)


def graphed(name="small", *, most=True, seed=0):
    return fastsd.patch(build(name, seed=seed), cuda_graphs=most)


def state(model):
    (part,) = fastsd.report(model).parts
    return part.cuda_graphs
