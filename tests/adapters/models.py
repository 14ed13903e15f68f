"""Pruned U-Nets for adapters, and patch around what is done to them."""

import fastsd
from tests.combinations import long
from tests.compress.models import PLANS, for_recipe, shared

# the recipes and plans that differ most from each other, and the others
KINDS = ["bk-sdm-tiny", "a-sdm", "ssd-1b", "bypassed", *long("bk-sdm-base", "bk-sdm-small", "level")]
WHEN = ("before", "after")


def full_of(name):
    return for_recipe(name)


def pruned(name):
    return fastsd.compress(shared(name), PLANS.get(name, name))


def patched_around(model, when, step):
    """``step(model)``, with an exact patch before it or after it."""

    def patch():
        # with the rules named, a plan's GRI attention stays away: it would be another function
        fastsd.patch(model, rules=[rule.name for rule in fastsd.registered_rules()])

    if when == "before":
        patch()
    step(model)
    if when == "after":
        patch()
    return model


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
