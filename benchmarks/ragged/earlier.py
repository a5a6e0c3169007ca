"""Times the sampler of commit db61208, from a checkout of it: sorted batches that decode until their longest ends.

Its requests had no limits of their own: a batch gets that of its longest response, and a row's tokens count up to its
own.
"""

import argparse
import dataclasses
import sys

from benchmarks.ragged.requests import random_requests
from benchmarks.speed.timing import timed


def run_earlier(options: argparse.Namespace) -> dict:
    """Returns the figures of the requests of random weights in batches of `slots` rows.

    Imports the checkout's packages in place of this project's, so that nothing of this one can be used afterwards.
    """
    requests, num_rows = random_requests(options), options.slots
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sso_jax", "benchmarks")]:
        del sys.modules[name]
    sys.path.insert(0, options.earlier)
    from benchmarks.speed import ours, shapes  # the checkout's, as the rest below
    from sso_jax.sampling.sampler import Request, Sampler, cut_batches

    limits = [limit for _, limit in requests]
    found: dict = {}

    class Found(Exception):
        """The sampler and its weights are there."""

    def take(self, params, *_):
        found.update(sampler=self, params=params)
        raise Found

    sample, Sampler.sample = Sampler.sample, take
    shape = dataclasses.replace(shapes.SHAPES[options.shape], sample_rows=num_rows, sample_new=max(limits))
    try:
        ours.start_sampling(shape)[0]()
    except Found:
        Sampler.sample = sample
    sampler, params = found["sampler"], found["params"]
    own = [Request(ids, (shapes.SEED, row)) for row, (ids, _) in enumerate(requests)]
    batches = cut_batches([len(ids) for ids, _ in requests], num_rows)

    def by_batch():
        for batch in batches:
            sampler.sample(params, [own[i] for i in batch], "sampling", max(limits[i] for i in batch))

    row_steps = sum(num_rows * max(limits[i] for i in batch) for batch in batches)
    result = timed(by_batch, options.repeats)
    return {**result, "tokens": sum(limits), "row_steps_used": sum(limits) / row_steps}
