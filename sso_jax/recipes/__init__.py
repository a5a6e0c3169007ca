"""What a run can do: the recipe of each name that the config field `recipe` takes."""

from sso_jax.recipes import generator, offline, online, sft

RECIPES = {"online": online.RECIPE, "generator": generator.RECIPE, "offline": offline.RECIPE, "sft": sft.RECIPE}
