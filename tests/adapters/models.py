"""Pruned U-Nets for adapters, and patch around what is done to them."""

import fastsd
from tests.compress.models import PLANS, SD_RECIPES, SMALL_SD, build, for_recipe

# what vega does, ssd-1b does, too
RECIPES = (*SD_RECIPES, "ssd-1b")
# of what no recipe does
SOME_PLANS = ("bypassed", "level")
WHEN = ("before", "after")


def full_of(name):
    return build(SMALL_SD) if name in PLANS else for_recipe(name)


def pruned(name, full=None):
    return fastsd.compress(full_of(name) if full is None else full, PLANS.get(name, name))


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
