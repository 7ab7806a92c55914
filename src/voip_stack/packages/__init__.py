"""Packages: a caching proxy for Debian's, and .debs of our own building for what Debian 13 lacks."""

from voip_stack.packages import proxy
from voip_stack.packages.build import ensure
from voip_stack.packages.recipes import RECIPES, Recipe, decided, key, needed_by
from voip_stack.packages.repository import Built, builds, prune

__all__ = ["RECIPES", "Built", "Recipe", "builds", "decided", "ensure", "key", "needed_by", "proxy", "prune"]
