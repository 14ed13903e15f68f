"""The second phase of a patch: make the planned changes, all or none; and take them back."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from fastsd.gri import GRI
from fastsd.nn.replacement import SETTINGS, Settings, settings_of
from fastsd.patching.plan import Change, Plan, plan_patch, plan_unpatch
from fastsd.patching.rule import Rule

Model = TypeVar("Model")


def patch(
    model: Model,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    gri: GRI | None = None,
) -> Model:
    """Replace every module that a rule knows by its fast twin: same weights, same function.

    The model computes what it computed before, to rounding; it stays trainable, and may be moved, cast, hooked,
    given adapters or compiled as before. A replaced module that something is put on which the fast forward would
    skip runs its stock forward from then on; :func:`report` says so. Names, parameters, ``state_dict`` and
    ``save_pretrained`` are those of the stock model.

    Copies are stock: ``copy.deepcopy`` and ``pickle`` give an unpatched model, which loads without fastsd. Patch
    the copy again.

    Patching twice changes nothing; patching with another ``backend`` switches to it.

    Args:
        model: a U-Net, ControlNet, VAE or any other module that holds modules that a rule knows, or a pipeline with
            such parts; changed in place.
        strict: refuse to leave any module behind that a rule knows.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"`` for every op; ``None`` leaves the choice to
            each op at each call.
        rules: rules to use, or names of registered ones; ``None`` for all that are registered.
        gri: puts global-regional interactive attention in the place of some self-attentions, which changes what the
            model computes; ``None`` for what an earlier patch of the model set, at first none. :func:`report` calls
            such layers approximate.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline, or ``gri`` no :class:`fastsd.GRI`.
        ValueError: ``model`` holds no module that a rule knows, there is no such backend or rule, or ``gri`` names
            a level without transformers.
        PatchError: ``strict``, and some module was refused; the message names each with the reason.
        BackendUnavailable: ``backend`` cannot run here, or not where the model is.

    An error leaves the model as it was.

    Warns:
        UserWarning: not ``strict``, and some module was refused; :func:`report` names each with the reason.
    """
    plan = plan_patch(model, strict=strict, backend=backend, rules=rules, gri=gri)
    make(plan.changes)
    _warn_of_refusals(plan)
    return model


def unpatch(model: Model) -> Model:
    """Give every replaced module its stock class back: bitwise the stock model. Unpatching twice changes nothing.

    Args:
        model: what was given to :func:`patch`, or a part of it; changed in place.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline.
        PatchError: something else has changed the class of a replaced module since.
    """
    make(plan_unpatch(model).changes)
    return model


@contextmanager
def patched(
    model: Model,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    gri: GRI | None = None,
) -> Iterator[Model]:
    """Patch ``model`` for the length of a ``with`` block; arguments and errors are those of :func:`patch`.

    On exit it undoes what it did and nothing else: a module that was patched before stays patched, with the
    settings that it had, and one that was patched anew inside the block keeps what it got there.
    """
    plan = plan_patch(model, strict=strict, backend=backend, rules=rules, gri=gri)
    before = make(plan.changes)
    _warn_of_refusals(plan)
    try:
        yield model
    finally:
        there = [settings_of(c.module) is c.settings and type(c.module) is c.cls for c in plan.changes]
        # where nothing of it is left, the model has been unpatched, and what had been made stock stays so
        is_left = any(is_there and c.settings is not None for is_there, c in zip(there, plan.changes, strict=True))
        make(earlier for earlier, is_there in zip(before, there, strict=True) if is_there and is_left)


def make(changes: Iterable[Change]) -> list[Change]:
    """Make every change, or none where one fails; returns the changes that lead back, in the same order."""
    before: list[Change] = []
    try:
        for change in changes:
            before.append(Change(change.module, type(change.module), settings_of(change.module)))
            _switch(change.module, change.cls, change.settings)
    except BaseException:
        for earlier in reversed(before):
            _switch(earlier.module, earlier.cls, earlier.settings)
        raise
    return before


def _switch(module: nn.Module, cls: type[nn.Module], settings: Settings | None) -> None:
    module.__class__ = cls
    if settings is None:
        module.__dict__.pop(SETTINGS, None)
        return
    module.__dict__[SETTINGS] = settings


def _warn_of_refusals(plan: Plan) -> None:
    if plan.refused:
        first = plan.refused[0]
        warnings.warn(
            f"fastsd.patch left {len(plan.refused)} modules as they are, {first.path} because {first.refusal}; "
            "fastsd.report(model) says why for each",
            stacklevel=3,
        )
