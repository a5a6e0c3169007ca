"""Config sections for training: objective, optimizer, train, generator, reward."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class ObjectiveConfig:
    """Loss on preference pairs."""

    base: str = "ipo"
    """Base loss of the objective: dpo, dpo_norm, fdpo_forward_kl, fdpo_js, fdpo_alpha, ipo, cdpo, robust, hinge, simpo,
    orpo, exo, nca, sppo, apo_zero, apo_down, discopop, aps, clipped in every context; rpo, selm, opo,
    reward_conditioned, spo on the plain prompt only."""
    beta: Optional[float] = None
    """Strength of the base loss; null uses the base's own default."""
    label_smoothing: Optional[float] = None
    """Share of labels assumed to be wrong, for base losses that have it."""
    tau: Optional[float] = None
    """Temperature, for base losses that have one."""
    eta: Optional[float] = None
    """Weight of the supervised part, for base losses that have one."""
    margin: Optional[float] = None
    """Target margin, for base losses that have one."""
    alpha: Optional[float] = None
    """Weight of the exploration term of base `selm`; base `fdpo_alpha`: order of the divergence, from the reverse KL
    (near 0) to the forward KL (1)."""
    rho: Optional[float] = None
    """Base `aps`: how far the entropy of a pair's preference is kept below ln 2, in nats."""
    t_min: Optional[float] = None
    """Base `aps`: minimum scale of a pair."""
    t_max: Optional[float] = None
    """Base `aps`: maximum scale of a pair."""
    clip: Optional[float] = None
    """Base `clipped`: bound on the rewards, from above for the chosen and from below for the rejected response."""
    degree_weight: Optional[float] = None
    """gamma of base `spo`: weight of the cross-entropy of its degree head."""
    degree_removal: Literal["keywords", "random"] = "keywords"
    """What is removed from the variants of base `spo`: key phrases, or as many random words (a control)."""
    form: Literal["online", "generator", "pairwise"] = "online"
    """`online`: base + W*g*G (version 1); `generator`: L+ + L- (version 2); `pairwise`: the plain pair alone (PBAA)."""
    steering_weight: float = 0.1
    """g, the weight of the self-steering terms in form `online`."""
    weight_alpha: float = 0.66
    """a, the share of the chosen response in W."""
    token_contrast: float = 0.0
    """Share s of the contrast of the principles in the weights of the base loss's tokens: 1 - s + s |e_t| / mean |e|
    with e_t = log pi(y_t|x+) - log pi(y_t|x-), by the reference (this project's extension of RLCSD); 0 is off."""
    use_weight: bool = True
    """Whether W multiplies the steering terms (or the base loss, if there are none)."""
    use_steering: bool = True
    """Whether G = L+ + L- is added to the base loss in form `online`."""
    detach_weight: bool = False
    """Stop the gradient through W, as in WPO; the authors' code does not."""
    positive_weight: float = 1.0
    """Factor of L+; 0 drops it."""
    negative_weight: float = 1.0
    """Factor of L-; 0 drops it."""
    negative_winner: Literal["original", "rejected"] = "original"
    """Winner over y+ in L-: y_o as in the paper, or y-, the naive form in its ablation."""
    sft_weight: Optional[float] = None
    """gamma, the weight of the supervised terms; null means 0 in form `online` and 0.1 in form `generator`."""

    def __post_init__(self) -> None:
        require(self.beta is None or self.beta > 0, "objective.beta", self.beta, "a number above 0")
        smoothing = self.label_smoothing
        require(
            smoothing is None or 0 <= smoothing < 0.5, "objective.label_smoothing", smoothing, "a share in [0, 0.5)"
        )
        require(self.tau is None or self.tau > 0, "objective.tau", self.tau, "a number above 0")
        alpha = self.weight_alpha
        require(0 <= alpha <= 1, "objective.weight_alpha", alpha, "a share in [0, 1]")
        contrast = self.token_contrast
        require(0 <= contrast <= 1, "objective.token_contrast", contrast, "a share in [0, 1]")
        order = self.alpha if self.base == "fdpo_alpha" else None
        require(order is None or 0 < order <= 1, "objective.alpha", order, "a number in (0, 1] for base fdpo_alpha")
        require(self.rho is None or 0 < self.rho < 0.693, "objective.rho", self.rho, "a number of nats in (0, ln 2)")
        for name in ("t_min", "t_max", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"objective.{name}", value, "a number above 0")
        weights = ("steering_weight", "positive_weight", "negative_weight", "sft_weight", "eta", "alpha")
        for name in (*weights, "degree_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"objective.{name}", value, "0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 5e-7
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Schedule after the warm-up: cosine or linear decay to 0, constant at the peak, or `wsd` (warm-up, stable, decay):
    constant, then linear to 0 over the last optimizer.decay_ratio."""
    warmup_ratio: float = 0.1
    """Share of the updates, rounded up, over which the learning rate rises from 0; the first update has rate 0."""
    decay_ratio: Optional[float] = None
    """Schedule `wsd`: share of the updates, rounded up, over which the learning rate falls to 0; null means 0.1."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Term added to the square root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""

    def __post_init__(self) -> None:
        require(self.learning_rate >= 0, "optimizer.learning_rate", self.learning_rate, "0 or more")
        require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "a share in [0, 1)")
        self._check_decay()
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "a decay in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "a number above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (no clipping) or more")

    def _check_decay(self) -> None:
        share = self.decay_ratio
        if share is None:
            return
        if self.schedule != "wsd":
            raise InputError(
                f"optimizer.decay_ratio: {share} is not used by schedule {self.schedule!r}; set optimizer.schedule to "
                "wsd, or remove it"
            )
        most = 1 - self.warmup_ratio
        require(0 < share <= most, "optimizer.decay_ratio", share, f"a share in (0, {most:g}], after the warm-up")


@dataclass(frozen=True)
class TrainConfig:
    """Training updates: sizes of batches and steps, epochs, length limit."""

    batch_size: int = 64
    """Examples per update."""
    tokens_per_step: Optional[int] = None
    """Maximum tokens, padding included, of a device step of updates and scoring; gradients are summed over the steps
    of an update. Null uses what fits the device's memory."""
    epochs: int = 1
    """Passes over the pairs of a round."""
    max_tokens: int = 2048
    """Maximum tokens of prompt plus response."""
    long_examples: Literal["drop", "cut"] = "drop"
    """What to do with pairs and demonstrations above train.max_tokens, which are counted: leave them out, or cut their
    responses, which then have no end of turn."""
    router_loss: Optional[float] = None
    """Weight of the loss that spreads tokens over a model's experts, 0.001 if null; null for models without experts."""
    shuffle: bool = True
    """Reshuffle the examples in each epoch, by the seed."""
    log_original: bool = True
    """Also compute y_o under the plain prompt, so that metrics.jsonl reports log-probs of chosen, rejected and original
    responses separately."""
    held_out: Optional[float | str] = None
    """Pairs that no update sees: a share of a round's pairs, split by query and seed, or a file of pairs, whose queries
    are then left out of training. Their loss, accuracy and margin are measured every checkpoint.every_steps updates.
    Null holds out none (recipe `reward`: reward.held_out)."""
    select: Literal["last", "best"] = "last"
    """Parameters that a round ends with: those after the last update, or the best of those measured on the held-out
    pairs."""
    select_by: Literal["loss", "accuracy"] = "loss"
    """What is best: the lowest loss or the highest accuracy on the held-out pairs; the earlier one of equals."""
    patience: Optional[int] = None
    """Stop a round's updates after so many measurements in a row that are not better than the best; null never
    does."""

    def __post_init__(self) -> None:
        self._check_held_out()
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "1 or more")
        require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        require(self.max_tokens >= 2, "train.max_tokens", self.max_tokens, "2 or more")
        weight = self.router_loss
        require(weight is None or weight >= 0, "train.router_loss", weight, "0 or more, or null")
        tokens = self.tokens_per_step
        require(tokens is None or tokens >= 1, "train.tokens_per_step", tokens, "1 or more tokens, or null")

    def _check_held_out(self) -> None:
        share, patience = self.held_out, self.patience
        if not isinstance(share, str):
            require(share is None or 0 < share < 1, "train.held_out", share, "a share in (0, 1), a file, or null")
        require(share != "", "train.held_out", share, "a share in (0, 1), a file, or null")
        require(patience is None or patience >= 1, "train.patience", patience, "1 or more, or null")


@dataclass(frozen=True)
class GeneratorConfig:
    """Training of the generator in recipe `generator`; its other settings are those of the policy."""

    queries: Optional[int] = None
    """Number of a round's queries whose triples train the generator of recipe `generator`; null uses all."""
    batch_size: Optional[int] = None
    """Examples per update of the generator; null uses train.batch_size."""
    epochs: Optional[int] = None
    """Passes over the generator's pairs; null uses train.epochs."""
    learning_rate: Optional[float] = None
    """Peak learning rate of the generator; null uses optimizer.learning_rate."""

    def __post_init__(self) -> None:
        for name in ("queries", "batch_size", "epochs"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"generator.{name}", value, "1 or more, or null")
        rate = self.learning_rate
        require(rate is None or rate >= 0, "generator.learning_rate", rate, "0 or more, or null")


@dataclass(frozen=True)
class RewardConfig:
    """Loss and pairs of recipe `reward`."""

    label_smoothing: float = 0.0
    """Share of pairs assumed to be in the wrong order."""
    margin: float = 0.0
    """Reward margin by which the loss wants the chosen response to lead."""
    center_coefficient: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them near 0; 0.01 is usual."""
    held_out: float = 0.1
    """Share of the pairs, split by query, that is held out; accuracy is measured on them every
    checkpoint.every_steps."""
    annotated_path: Optional[str] = None
    """Annotated pairs to mix in: any file or data set that pairs.path accepts."""
    annotated_split: str = "train"
    """Split of a data set."""
    annotated_name: Optional[str] = None
    """Config name of a hub data set with several."""
    annotated_share: Optional[float] = None
    """Share of annotated pairs among the training pairs; surplus pairs of either kind are left out. Null uses all."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 0.5, "reward.label_smoothing", self.label_smoothing, "a share in [0, 0.5)")
        require(self.margin >= 0, "reward.margin", self.margin, "0 or more")
        require(self.center_coefficient >= 0, "reward.center_coefficient", self.center_coefficient, "0 or more")
        require(0 <= self.held_out < 1, "reward.held_out", self.held_out, "a share in [0, 1)")
        share = self.annotated_share
        require(share is None or 0 < share < 1, "reward.annotated_share", share, "a share in (0, 1), or null")
        if share is not None and self.annotated_path is None:
            raise InputError(
                f"reward.annotated_share: {share} without annotated pairs; give reward.annotated_path, or omit "
                "reward.annotated_share"
            )
