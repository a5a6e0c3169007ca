"""Times the same sampling and update with transformers on PyTorch.

Runs it as its users do: `generate` for sampling and, as in the SSO releases, an update with one row for each of the six
log-probs of an example, logits of every token, and both policy and reference. PyTorch is in requirements-test.txt.
"""

from collections.abc import Callable

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.speed.shapes import CELLS, SEED, TEMPERATURE, TOP_P, Shape, example_ids, prompt_ids
from benchmarks.speed.timing import timed

BETA, ALPHA, STEERING_WEIGHT = 0.2, 0.66, 0.1


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(shape: Shape):
    torch.manual_seed(SEED)
    config = Qwen2Config(
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).to(device=_device(), dtype=getattr(torch, shape.dtype))


def _wait() -> None:
    """Waits until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(work: Callable[[], None], repeats: int) -> dict:
    """Returns the results of `timed` with the device's peak memory, 0 on a CPU."""
    return {
        **timed(work, repeats),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def machine(shape: Shape, repeats: int) -> dict:
    """Measures `flops` per second of PyTorch's [N, N] @ [N, N], as `machine.measure` does with XLA."""
    size = 2048 if _device() == "cpu" else 8192
    square = torch.randn(size, size, device=_device(), dtype=getattr(torch, shape.dtype))

    def work() -> None:
        square @ square
        _wait()

    return {"flops": 2.0 * size**3 / min(timed(work, 2 * repeats)["seconds"])}


def sample(shape: Shape, repeats: int) -> dict:
    """Times `generate` with its key/value cache."""
    model = make_model(shape).eval()
    ids = torch.tensor(prompt_ids(shape, shape.sample_rows, shape.sample_prompt), device=model.device)
    settings = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=shape.sample_new)

    def work():
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        _wait()
        if out.shape[1] != shape.sample_prompt + shape.sample_new:
            raise AssertionError("a response is shorter than requested")

    return _timed(work, repeats)


def update(shape: Shape, repeats: int) -> dict:
    """Times the releases' update of version 1 with IPO: six rows per example, all logits, policy and reference."""
    policy = make_model(shape).train()
    reference = make_model(shape).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    examples = example_ids(shape)
    rows = [prompts[context] + responses[name] for prompts, responses in examples for context, name in CELLS]
    ids = torch.tensor(rows, device=policy.device)
    length = float(shape.update_response)

    def log_probs(model):
        """Returns sums over the response, [examples, cells]."""
        logits = model(ids).logits[:, :-1].float().log_softmax(-1)
        of_tokens = logits.gather(-1, ids[:, 1:, None])[..., 0]
        return of_tokens[:, shape.update_prompt - 1 :].sum(-1).view(len(examples), len(CELLS))

    def ipo(ratios):
        return ((ratios[:, 0] - ratios[:, 1]) / length - 1.0 / (2.0 * BETA)) ** 2

    def work():
        with torch.no_grad():
            of_reference = log_probs(reference)
        of_policy = log_probs(policy)
        ratios = of_policy - of_reference
        steering = ipo(ratios[:, 2:4]) + ipo(ratios[:, 4:6])
        weight = torch.sigmoid(-(ALPHA * of_policy[:, 0] + (1.0 - ALPHA) * of_policy[:, 1]) / length)
        loss = (ipo(ratios[:, 0:2]) + STEERING_WEIGHT * weight * steering).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        _wait()

    return _timed(work, repeats)
