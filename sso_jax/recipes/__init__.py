"""The recipes by name, as given by the config field `recipe`."""

from sso_jax.recipes import generator, offline, online, reward, sft
from sso_jax.recipes.run import Recipe

RECIPES: dict[str, Recipe] = {
    "online": online.RECIPE,
    "generator": generator.RECIPE,
    "offline": offline.RECIPE,
    "sft": sft.RECIPE,
    "reward": reward.RECIPE,
}
