"""Checks section `train` for held-out pairs, and reads them if they come from a file."""

from collections import Counter

from sso_jax.config import Config, RewardConfig
from sso_jax.data.pair_files import complete_pairs, load_pairs
from sso_jax.data.records import Triple
from sso_jax.data.rows import Records, Table
from sso_jax.preferences.pairs import drop_empty_contrasts, given_triples
from sso_jax.recipes.checks import refuse_unknown_tokens
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.input_tables import drop_refused_turns
from sso_jax.recipes.run import Recipe
from sso_jax.runtime.errors import InputError

FIELD = "train.held_out"


def held_out_table(config: Config) -> Table:
    """Returns the file of the held-out pairs."""
    return Table(str(config.train.held_out), FIELD, "train", None, config.data.on_bad_rows)


def read_held_out(config: Config, recipe: Recipe) -> Records[Triple] | None:
    """Reads the pairs of `train.held_out`; None if it names no file.

    Args:
      config: the config.
      recipe: the recipe, whose `held_out_cells` the pairs of the file must have.

    Raises:
      InputError: for fields that need held-out pairs where there are none, or a file that lacks something.
    """
    given, cells_of = config.train.held_out, recipe.held_out_cells
    if given is not None and cells_of is None:
        raise InputError(f"{FIELD}: {given!r} is not used by recipe {config.recipe!r}; remove it")
    _check_selection(config)
    if not isinstance(given, str) or cells_of is None:
        return None
    table = held_out_table(config)
    return complete_pairs(load_pairs(table), cells_of(config), table, f"recipe {config.recipe!r}")


def _check_selection(config: Config) -> None:
    """Raises `InputError` for a selection or a patience without held-out pairs, or by what they do not have."""
    train, reward = config.train, config.recipe == "reward"
    if reward and train.held_out is not None and config.reward.held_out != RewardConfig().held_out:
        raise InputError(
            f"reward.held_out: {config.reward.held_out} besides {FIELD} {train.held_out!r}; remove one of them"
        )
    has_pairs = train.held_out is not None or (reward and config.reward.held_out > 0)
    for name, value, unset in (("select", train.select, "last"), ("patience", train.patience, None)):
        if value != unset and not has_pairs:
            raise InputError(f"train.{name}: {value!r} needs held-out pairs; give {FIELD}, or remove it")
    without_plain = config.recipe == "generator" or (not reward and config.objective.form == "generator")
    if train.select_by == "accuracy" and without_plain:
        raise InputError(
            "train.select_by: 'accuracy' is that of the plain pair, which form 'generator' does not compare; set it to "
            "loss"
        )


def prepare_held_out(
    config: Config, engine: Engine, found: Records[Triple] | None, recipe: Recipe
) -> list[Triple] | None:
    """Tokenizes the pairs of the file; drops those without a contrast.

    Raises:
      InputError: if no pair is left.
    """
    if found is None or recipe.held_out_cells is None:
        return None
    accepted, refused = drop_refused_turns(engine.chat, found.records, held_out_table(config))
    given = given_triples(engine.chat.tokenizer, accepted)
    refuse_unknown_tokens(given, engine.known_tokens, FIELD)
    pairs, dropped = drop_empty_contrasts(given, recipe.held_out_cells(config))
    if not pairs:
        raise InputError(
            f"{FIELD}: none of the {len(found.records)} pairs of {config.train.held_out} is left "
            f"({dict(found.dropped + refused + Counter(dropped.values()))}); give pairs with two different responses"
        )
    return pairs
