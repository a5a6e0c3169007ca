"""This project's sampler on the requests of `benchmarks.ragged`."""

import argparse
import dataclasses
import math
import statistics
import time

import jax
import numpy as np

from benchmarks.ragged.requests import CAP, model_prompts, random_requests
from benchmarks.speed import machine
from benchmarks.speed.ours import make_model, random_params
from benchmarks.speed.shapes import SEED, SHAPES, TEMPERATURE, TOP_P
from benchmarks.speed.timing import timed
from sso_jax.config import ModelConfig, SampleConfig, SamplingConfig
from sso_jax.models.kernels import default_kernel
from sso_jax.models.paged_cache import chunk_size
from sso_jax.models.transformer import abstract_params
from sso_jax.recipes.engine import build_engine, load_params
from sso_jax.runtime.jax_setup import prepare_jax
from sso_jax.runtime.mesh import param_shardings
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.sampling.slots import WINDOW


def run_ours(options: argparse.Namespace) -> dict:
    """Times the sampler: whole stages, then the windows of decode steps alone in one more."""
    prepare_jax()
    machine.require(options.device)
    sampler, params = _model_sampler(options) if options.model else _random_sampler(options)
    if options.model:
        requests = [Request(ids, (SEED, row)) for row, ids in enumerate(model_prompts(options))]
    else:
        drawn = random_requests(options)
        requests = [Request(ids, (SEED, row), limit) for row, (ids, limit) in enumerate(drawn)]
    samples = []
    result = timed(lambda: samples.append(sampler.sample(params, requests, "sampling")), options.repeats)
    seconds, read, live = _windows(sampler, params, requests)
    lengths = [len(response) for response in samples[-1].responses]
    found = {
        **result,
        "tokens": sum(lengths),
        "row_steps_used": samples[-1].stats.share_used,
        "read_over_live": sum(read) / sum(live),
        "mean_length": statistics.mean(lengths),
        "p90_length": float(np.percentile(lengths, 90)),
        "device_peak_bytes": machine.device_peak_bytes(),
    }
    if not options.model:
        found["decode_bytes_s"] = WINDOW * _live_bytes(options, live) / sum(seconds)
    return found


def _windows(sampler: Sampler, params, requests: list[Request]) -> tuple[list[float], list[int], list[int]]:
    """Returns the seconds of each window of a stage, and the slots of the cache that it reads and that are live."""
    seconds, read, live = [], [], []
    kernel = default_kernel(jax.default_backend())

    def window(weights, state, inputs, *rest):
        num_pages, page_size = state.cache.values.shape[1], state.cache.values.shape[3]
        size = chunk_size(num_pages, kernel)
        read.append(math.ceil(int(inputs.table.num_used[0]) / size) * size * page_size)
        live.append(int((inputs.table.positions >= 0).sum()))
        start = time.perf_counter()
        result = jax.block_until_ready(sampler.programs.window(weights, state, inputs, *rest))
        seconds.append(time.perf_counter() - start)
        return result

    timed_sampler = dataclasses.replace(sampler, programs=sampler.programs._replace(window=window))
    timed_sampler.sample(params, requests, "decoding")
    return seconds, read, live


def _live_bytes(options: argparse.Namespace, live: list[int]) -> int:
    """Returns the bytes that one step of each window must read: weights, and the keys and values of live tokens."""
    shape = SHAPES[options.shape]
    size = 2 if shape.dtype == "bfloat16" else 4
    of_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size
    return size * (len(live) * (shape.layer_params + shape.head_params) + sum(live) * of_token)


def _random_sampler(options: argparse.Namespace) -> tuple[Sampler, dict]:
    model, mesh = make_model(SHAPES[options.shape])
    params = random_params(model, param_shardings(abstract_params(model), mesh))
    sampler = Sampler(
        programs=build_programs(model, mesh),
        mesh=mesh,
        strategy=make_sampling_params(TEMPERATURE, TOP_P),
        stop_ids=(),
        max_new_tokens=int(CAP * options.scale),
        max_tokens=4096,
        num_slots=options.slots,
    )
    return sampler, params


def _model_sampler(options: argparse.Namespace) -> tuple[Sampler, dict]:
    sampling = SamplingConfig(TEMPERATURE, TOP_P, max_new_tokens=options.max_new_tokens, batch_size=options.slots)
    config = SampleConfig(model=ModelConfig(path=options.model), sampling=sampling)
    engine = build_engine(options.model, config)
    return engine.sampler, load_params(options.model, engine)
