"""Packages: a caching proxy for Debian's, .debs of our own building for what Debian 13 lacks, and the user's own."""

from voip_stack.packages import proxy
from voip_stack.packages.build import ensure, ensure_source
from voip_stack.packages.recipes import RECIPES, Recipe, decided, key, needed_by
from voip_stack.packages.repository import RECIPE, Built, builds, prune, publish

__all__ = [
    "RECIPE",
    "RECIPES",
    "Built",
    "Recipe",
    "builds",
    "decided",
    "ensure",
    "ensure_source",
    "key",
    "needed_by",
    "proxy",
    "prune",
    "publish",
]
