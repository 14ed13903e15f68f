"""The second phase of a patch: make the planned changes, all or none; and take them back."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastsd.gri import GRI
from fastsd.nn.replacement import settings_of
from fastsd.patching.plan import Change, GraphsChange, Plan, plan_patch, plan_unpatch
from fastsd.patching.rule import Rule
from fastsd.patching.survey import parts_of
from fastsd_kernels import cpu_memory

Model = TypeVar("Model")


def patch(
    model: Model,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    gri: GRI | None = None,
    cuda_graphs: bool | int | None = None,
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
        cuda_graphs: records what a U-Net or ControlNet does on a CUDA device, at the third call with inputs of a
            shape, and replays it in later calls; the most recordings that a model keeps, ``True`` for 8, ``False`` or
            0 for none, ``None`` for what an earlier patch of the model set, at first none. A call that cannot be
            replayed runs as without, as all do of a model with code of your own in it; :func:`report` says why.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is neither a module nor a pipeline, or ``gri`` no :class:`fastsd.GRI`.
        ValueError: ``model`` holds no module that a rule knows, there is no such backend or rule,
            ``gri`` names a level without transformers, or ``cuda_graphs`` is not a number of graphs or ``model``
            nothing that they serve.
        PatchError: ``strict``, and some module was refused; the message names each with the reason. Or something
            else, such as an offloading hook, stands in the place of the forward that ``cuda_graphs`` is to record.
        BackendUnavailable: ``backend`` cannot run here, or not where the model is.

    An error leaves the model as it was.

    Warns:
        UserWarning: not ``strict``, and some module was refused; :func:`report` names each with the reason.
    """
    plan = plan_patch(model, strict=strict, backend=backend, rules=rules, gri=gri, cuda_graphs=cuda_graphs)
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
    cpu_memory.release()
    return model


@contextmanager
def patched(
    model: Model,
    *,
    strict: bool = False,
    backend: str | None = None,
    rules: Iterable[Rule | str] | None = None,
    gri: GRI | None = None,
    cuda_graphs: bool | int | None = None,
) -> Iterator[Model]:
    """Patch ``model`` for the length of a ``with`` block; arguments and errors are those of :func:`patch`.

    On exit it undoes what it did and nothing else: a module that was patched before stays patched, with the
    settings that it had, and one that was patched anew inside the block keeps what it got there.
    """
    plan = plan_patch(model, strict=strict, backend=backend, rules=rules, gri=gri, cuda_graphs=cuda_graphs)
    before = make(plan.changes)
    _warn_of_refusals(plan)
    try:
        yield model
    finally:
        there = [change.is_made() for change in plan.changes]
        # where nothing of it is left, the model has been unpatched, and what had been made stock stays so
        is_left = any(is_there and not c.is_stock for is_there, c in zip(there, plan.changes, strict=True))
        # and where it only took graphs away, an earlier patch tells
        is_left = is_left or (all(change.is_stock for change in plan.changes) and _is_patched(model))
        make(earlier for earlier, is_there in zip(before, there, strict=True) if is_there and is_left)


def make(changes: Iterable[Change | GraphsChange]) -> list[Change | GraphsChange]:
    """Make every change, or none where one fails; returns the changes that lead back, in the same order."""
    before: list[Change | GraphsChange] = []
    try:
        for change in changes:
            before.append(change.back())
            change.make()
    except BaseException:
        for earlier in reversed(before):
            earlier.make()
        raise
    return before


def _is_patched(model: Any) -> bool:
    modules = (module for root in parts_of(model).values() for module in root.modules())
    return any(settings_of(module) is not None for module in modules)


def _warn_of_refusals(plan: Plan) -> None:
    if plan.refused:
        first = plan.refused[0]
        warnings.warn(
            f"fastsd.patch left {len(plan.refused)} modules as they are, {first.path} because {first.refusal}; "
            "fastsd.report(model) says why for each",
            stacklevel=3,
        )
