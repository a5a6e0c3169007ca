"""The recipe of each name that the config field `recipe` takes."""

from sso_jax.recipes import generator, offline, online, reward, sft
from sso_jax.recipes.run import Recipe

RECIPES: dict[str, Recipe] = {
    "online": online.RECIPE,
    "generator": generator.RECIPE,
    "offline": offline.RECIPE,
    "sft": sft.RECIPE,
    "reward": reward.RECIPE,
}
