"""Every setting of a router: how experts are chosen, weighted and balanced (specs/task_aware_gating.md, specs/task_moe.md).

The manual of the keys under ``trial.model.router``. No torch here. Legend: E experts, K chosen, T tasks, d hidden width, p
router probabilities, z logits, sg stop-gradient.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import exp
from typing import Any, Literal

from lightning_modules.building import require

LEARNED = ("task", "example", "token")
"""Kinds that learn what to choose, by the unit that is routed."""
PER_TASK = ("task", "uniform", "random", "task_id", "category")
"""Kinds whose route depends on the task alone: all blocks are planned before the forward, one path can be exported."""
ENCODER_ONLY = ("hash_token", "hash_example")
"""Kinds that read the input's tokens, which a decoder's blocks do not see."""
NETWORKS = (
    "logits", "linear", "linear_per_layer", "rnn", "lstm", "gru", "rnn_per_layer", "lstm_per_layer", "gru_per_layer",
    "transformer", "transformer_per_layer",
)  # fmt: skip
BY_EXPERTS = ("expert_choice", "task_expert_choice")
"""Selections in which experts choose tokens."""
READS_WHOLE_ROWS = (*BY_EXPERTS, "slots")
"""Selections in which a token's route depends on tokens after it: balanced by construction, but no decoder can generate with
them."""
COMPUTED = ("description", "centroid", "text_embedding", "fine_tuned", "fisher")
"""Task vectors that come from the data, so that tasks that are never trained have one."""
CONDITIONED = ("additive", "mlp", "film", "hyper")
"""Conditionings that read task vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """How experts are chosen and weighted. Every kind returns the same routing record."""

    kind: Literal[
        "task", "example", "token", "uniform", "random", "random_example", "hash_token", "hash_example", "task_id", "category",
        "cluster",
    ] = "task"  # fmt: skip
    """Learned, by what is routed: ``task`` (one route per task and block), ``example`` (from the mean of its token states) or
    ``token``. An example with several windows or options is routed row by row.
    Not learned: ``uniform``: weight 1/E for every expert, always (average routing).
    ``random``: a fixed random expert per task and block, drawn from the seed (a buffer, never trained).
    ``random_example``: a fresh random expert per example, block and step in training; the mean of the experts' parameters when
    scoring (AdaMix; with ``consistency`` its two-pass loss).
    ``hash_token``, ``hash_example``: a frozen random table, by token id (balanced) or by the content of the row.
    ``task_id``: the expert that ``experts_of`` names, else expert t of task t (DEMix, "tag" routing).
    ``category``: one expert for each human category of the catalogue (an oracle); the plan fills ``experts_of``.
    ``cluster``: the nearest of E centroids of the examples' mean states, which follow by momentum."""
    conditioning: Literal["none", "per_task", "additive", "mlp", "film", "hyper"] = "none"
    """How a learned ``example`` or ``token`` router knows the task t with vector u: not at all, ``W x`` (the task-agnostic
    control); ``per_task`` ``W_t x + b_t``; ``additive`` ``W x + U u``; ``mlp`` ``W2 gelu(W1 [x; u])``; ``film``
    ``W (x * (1 + A u) + C u)``; ``hyper`` ``(W + sum_r u_r V_r) x``."""
    network: Literal[
        "logits", "linear", "linear_per_layer", "rnn", "lstm", "gru", "rnn_per_layer", "lstm_per_layer", "gru_per_layer",
        "transformer", "transformer_per_layer",
    ] = "logits"  # fmt: skip
    """What turns a task into its routes, for ``kind: task``: one learned logit vector per task and block (``logits``), or one
    of Ye et al.'s ten networks over the task's vector."""
    task_vectors: Literal["id", "onehot", "random", "description", "centroid", "text_embedding", "fine_tuned", "fisher"] = "id"
    """Where task vectors come from: learned (``id``), one-hot, fixed random, a frozen encoding of the catalogue's task
    ``description``, the mean first-token state (``centroid``) or mean token state (``text_embedding``) of training inputs in
    the backbone as it starts, the same after training the task alone (``fine_tuned``), or the diagonal of the Fisher
    information of adapters, by principal components (``fisher``). Read by every ``network`` but ``logits``, by conditionings
    ``additive``, ``mlp``, ``film`` and ``hyper``, and by ``unseen: nearest_vector`` and ``soft_vector``."""
    task_vector_size: int = 32
    """Width of ``id`` and ``random`` vectors, and the number of principal components of ``fisher``."""
    train_task_vectors: bool | None = None
    """Train the vectors with the router. None: only those that start from nothing (``id``)."""
    descriptions: Mapping[str, str] = field(default_factory=dict)
    """Task -> description, of ``task_vectors: description``. The plan fills it in from the catalogue."""
    hidden_size: int = 64
    """Width of the task networks and of ``conditioning: mlp``."""
    selection: Literal[
        "top_k", "soft", "gumbel", "gumbel_st", "sampled", "skills", "expert_choice", "task_expert_choice", "slots"
    ] = "top_k"
    """``top_k``: the k most probable experts run. ``soft``: all, weighted by their probability.
    ``gumbel``: soft weights of a Gumbel-softmax draw in training, ``soft`` when scoring.
    ``gumbel_st``: one expert drawn with the gradient of the soft draw (straight-through); the most probable when scoring.
    ``sampled``: one expert drawn from p, trained by REINFORCE (``example`` only); the most probable when scoring.
    ``skills``: each expert switched by a relaxed Bernoulli draw of its own, weights normalised (Polytropon; ``task`` only).
    ``expert_choice``: each expert takes its ``capacity`` x S/E best tokens of each row, ``task_expert_choice``: of each task's
    rows of the forward. ``slots``: Soft MoE, ``slots`` weighted means of a row's tokens per expert (all three ``token`` only).
    """
    top_k: int = 1
    """Experts per unit under ``top_k``."""
    weighting: Literal["auto", "raw", "renormalise", "straight_through", "scaled"] = "auto"
    """Weight of a chosen expert under ``top_k`` (specs/task_aware_gating.md 2.3): ``raw`` p; ``renormalise`` over the chosen;
    ``straight_through`` 1/K + p - sg(p); ``scaled`` E p / K. ``auto``: straight_through for K = 1, renormalise for more (both
    leave a pretrained function intact and give the router a gradient)."""
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    """From logits to scores. The last two do not compete; their probabilities are the scores over their sum (DeepSeek-V3)."""
    combine: Literal["outputs", "parameters"] = "outputs"
    """Mix the experts' outputs, or their parameters (then one expert runs, whatever E is; SMEAR). Not for tokens."""
    draw: Literal["task", "example"] = "task"
    """Under ``kind: task``, random selections draw once per task, block and step, or once per example (Ye et al.)."""
    temperature: float = 1.0
    """Divides the logits. At step s: max(``temperature_min``, ``temperature`` exp(-``temperature_decay`` s)); scoring uses that
    of the step reached."""
    temperature_min: float = 0.0
    """Floor of the temperature's decay."""
    temperature_decay: float = 0.0
    """Rate of the temperature's exponential decay per optimiser step."""
    init_std: float = 0.02
    """Standard deviation of the initial logits (``network: logits``) or of the last weights before them; 0: zeros."""
    noise: Literal["none", "jitter", "gaussian"] = "none"
    """In training: inputs times U(1 - e, 1 + e) with e = ``noise_scale`` (``jitter``), or logits plus Gaussian noise of a
    learned size softplus(W x) (``gaussian``; noisy top-k, Shazeer et al. 2017). Learned ``example`` and ``token`` routers."""
    noise_scale: float = 0.01
    """Half-width of ``jitter``; unused otherwise."""
    normalise: bool = False
    """LayerNorm on the router's input and unit-norm router weights (SMEAR). Learned ``example`` and ``token`` routers without
    vectors (``none``, ``per_task``)."""
    expert_dropout: float = 0.0
    """In training, the probability with which an expert is left out of the probabilities, which are normalised again (SMEAR's
    0.1). Task-level routers draw once per task, block and step."""
    capacity: float | None = None
    """Room of each expert relative to an even share, of token routers. ``top_k``: what does not fit is dropped and counted
    (None: nothing is dropped); ``expert_choice``: tokens taken (None: 1)."""
    priority: Literal["position", "confidence"] = "position"
    """Who gets room first: earlier tokens, or those with the highest probability (batch-prioritised routing)."""
    slots: int = 1
    """Slots per expert of ``selection: slots``."""
    experts_of: Mapping[str, int] = field(default_factory=dict)
    """Task or pattern -> expert number of ``kind: task_id``; filled in by the plan for ``category``."""
    lr_scale: float = 10.0
    """Learning rate of the router relative to ``train.lr`` (Poly's ratio is 10)."""
    balance: Literal["none", "load", "cv", "bias"] = "none"
    """``load``: E sum_e f_e P_e (Switch), f the share of assignments, P the mean probability; 1 when balanced, whatever K is.
    ``cv``: squared coefficient of variation of the importance P (Shazeer et al. 2017).
    ``bias``: no loss; a bias on the scores that only selection sees is moved against the load (Wang et al. 2024)."""
    balance_weight: float = 0.01
    """Weight of ``load`` and ``cv``."""
    balance_scope: Literal["microbatch", "global", "per_task", "task_balanced"] = "task_balanced"
    """Over what f and P are taken: this forward (``microbatch``; with batches of one task it forbids specialisation), the last
    steps of all workers (``global``), each task for itself (``per_task``: the anti-specialisation control), or the mean over
    tasks of each task's own (``task_balanced``)."""
    balance_window: int = 20
    """Steps over which the running tables of ``global``, ``per_task``, ``task_balanced`` and of ``mutual_information`` average
    (decay 1 - 1/window). They are all-reduced and in the checkpoint. A ``task`` router needs none: its step is exact."""
    bias_rate: float = 0.01
    """Step of ``balance: bias``, falling linearly to a tenth of itself over training. It is on the scale of sigmoid scores;
    softmax scores of many experts are smaller and want a smaller step."""
    mutual_information: float = 0.0
    """Weight of -I(task; expert), every task counting 1/T (Mod-Squad): balanced over tasks, sharp for each."""
    z_loss: float = 0.0
    """Weight of the mean of logsumexp(z)^2 (ST-MoE)."""
    entropy: float = 0.0
    """Weight of the mean entropy of p: positive sharpens, negative spreads."""
    diversity: float = 0.0
    """Weight of the mean squared cosine between what two experts of a block have learned (their parameters minus the common
    start), after specs/task_aware_gating.md 3.4."""
    supervision: float = 0.0
    """Weight of the cross-entropy between p and the task's own expert (``experts_of``, else number t): what a router that only
    predicts the task would do."""
    policy: float = 0.01
    """Weight of REINFORCE's policy gradient under ``selection: sampled``."""
    policy_entropy: float = 5e-4
    """Weight of the entropy that ``sampled`` subtracts from its loss, so that it goes on exploring."""
    value: float = 0.01
    """Weight of the Huber loss of the learned baseline of ``sampled``."""
    consistency: float = 0.0
    """Weight of the symmetric KL divergence between the answers of two passes with routes of their own (AdaMix's 1); the loss
    is the first pass's. ``random_example`` only."""
    unseen: Literal["none", "uniform", "nearest_category", "nearest_vector", "soft_vector", "random"] = "none"
    """Where the route of a held-out task comes from when the router has a row per task: the mean of the trained tasks' rows,
    that of the first trained task of the same category or of the nearest vector (cosine; ``task_vectors`` that are computed),
    a mean weighted by softmax(cosine / 0.1), or a fresh draw (control). The plan fills ``donors`` for ``nearest_category``."""
    donors: Mapping[str, str] = field(default_factory=dict)
    """Held-out task -> the trained task whose row it gets (``unseen: nearest_category``)."""

    def __post_init__(self) -> None:
        for name in ("top_k", "slots", "balance_window", "hidden_size", "task_vector_size"):
            require(getattr(self, name) >= 1, name, f"must be at least 1, got {getattr(self, name)}")
        for name in (
            "init_std", "lr_scale", "temperature_min", "temperature_decay", "noise_scale", "balance_weight", "bias_rate",
            "mutual_information", "z_loss", "diversity", "supervision", "policy", "policy_entropy", "value", "consistency",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, f"must not be negative, got {getattr(self, name)}")
        require(self.temperature > 0, "temperature", f"must be positive, got {self.temperature}")
        law = f"must be positive, so that the decay ends somewhere, got 0 with temperature_decay={self.temperature_decay}"
        require(self.temperature_decay == 0 or self.temperature_min > 0, "temperature_min", law)
        require(0 <= self.expert_dropout < 1, "expert_dropout", f"must be in [0, 1), got {self.expert_dropout}")
        require(self.capacity is None or self.capacity > 0, "capacity", f"must be positive, got {self.capacity}")
        for name, number in self.experts_of.items():
            require(number >= 0, f"experts_of.{name}", f"must be an expert's number from 0, got {number}")
        if self.kind not in LEARNED:
            fixed = "soft" if self.kind == "uniform" else "top_k"
            law = f"applies to learned routers ({', '.join(LEARNED)}), got kind={self.kind!r}, selection={self.selection!r}"
            require(self.selection in (fixed, "top_k"), "selection", law)
            object.__setattr__(self, "selection", fixed)
        # What says the same as a default must not make another trial of it.
        if self.weighting == ("straight_through" if self.top_k == 1 else "renormalise") and self.selection == "top_k":
            object.__setattr__(self, "weighting", "auto")
        if self.train_task_vectors is (self.task_vectors == "id"):
            object.__setattr__(self, "train_task_vectors", None)
        for name, (applies, where) in _APPLIES.items():
            value, default = getattr(self, name), _DEFAULTS[name]
            given = f"got kind={self.kind!r}, selection={self.selection!r}, {name}={value!r}"
            require(value == default or applies(self), name, f"applies to {where}, {given}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        law = f"must be none for selection: slots, whose slots have keys of their own, got {self.conditioning!r}"
        require(self.selection != "slots" or self.conditioning == "none", "conditioning", law)
        if self.unseen in ("nearest_vector", "soft_vector"):
            law = f"must be one of {', '.join(COMPUTED)} for unseen: {self.unseen}, got {self.task_vectors!r}"
            require(self.task_vectors in COMPUTED, "task_vectors", law)
        hard = self.selection == "top_k" and self.kind in LEARNED
        if hard and self.init_std == 0:
            law = "must be positive for a learned top_k router: equal logits send every task to the same expert, got 0"
            require(self.noise == "gaussian", "init_std", law)
        law = "must be positive with normalise: weights of length 1 have no direction to start from at zero, got 0"
        require(not self.normalise or self.init_std > 0, "init_std", law)
        if hard and self.top_k == 1:
            law = "must not renormalise a single expert, whose weight would be 1 and give the router no gradient, "
            require(self.weighting != "renormalise", "weighting", f"{law}got {self.weighting!r} with top_k=1")
        for selection, kind in (("sampled", "example"), ("skills", "task")):
            law = f"{selection} applies to kind: {kind} only, got kind={self.kind!r}"
            require(self.selection != selection or self.kind == kind, "selection", law)
        for selection in READS_WHOLE_ROWS:
            law = f"{selection} applies to kind: token only, got kind={self.kind!r}"
            require(self.selection != selection or self.kind == "token", "selection", law)
        law = "must be outputs for tokens: parameters would merge an expert for every token, got kind={!r}"
        require(self.combine == "outputs" or self.kind not in ("token", "hash_token"), "combine", law.format(self.kind))
        if self.balance == "bias":
            law = f"bias applies to selection: top_k of example and token routers, got {self.kind!r}, {self.selection!r}"
            require(self.selection == "top_k" and self.kind in ("example", "token"), "balance", law)
            law = f"must be global or task_balanced for balance: bias, which all tasks share, got {self.balance_scope!r}"
            require(self.balance_scope in ("global", "task_balanced"), "balance_scope", law)
        if self.kind == "task" and self.balance in ("load", "cv"):
            law = f"must be task_balanced for kind: task, whose units are the step's tasks, got {self.balance_scope!r}"
            require(self.balance_scope == "task_balanced", "balance_scope", law)
        law = f"has no meaning with {self.selection}, which is balanced by construction, got balance={self.balance!r}"
        by_construction = self.selection in READS_WHOLE_ROWS
        require(not (by_construction and self.balance != "none"), "balance", law)
        law = "must be softmax: sigmoid and sqrt_softplus scores are for top_k and expert_choice, "
        given = f"got score={self.score!r}, selection={self.selection!r}"
        require(self.score == "softmax" or self.selection in ("top_k", "expert_choice"), "score", law + given)

    @property
    def learned(self) -> bool:
        """Whether it has something to learn."""
        return self.kind in LEARNED

    @property
    def per_task(self) -> bool:
        """Whether a task's route is the same for all of its examples (when scoring)."""
        return self.kind in PER_TASK

    @property
    def reads_vectors(self) -> bool:
        """Whether task vectors play a part."""
        return (self.kind == "task" and self.network != "logits") or self.conditioning in CONDITIONED

    @property
    def computed_vectors(self) -> bool:
        """Whether it needs task vectors that come from the data."""
        needed = self.reads_vectors or self.unseen in ("nearest_vector", "soft_vector")
        return needed and self.task_vectors in COMPUTED

    @property
    def auxiliary(self) -> bool:
        """Whether it adds a loss of its own or keeps running tables."""
        weights = (self.mutual_information, self.z_loss, self.entropy, self.diversity, self.supervision)
        return any(weights) or self.balance != "none" or self.selection == "sampled"

    def temperature_at(self, step: int) -> float:
        """The temperature of optimiser step ``step``: a function of the step alone, so that nothing compounds."""
        return max(self.temperature_min, self.temperature * exp(-self.temperature_decay * step))


_DEFAULTS: dict[str, Any] = {
    f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(RouterConfig)
}


def _learned(r: RouterConfig) -> bool:
    return r.kind in LEARNED


def _sees(r: RouterConfig) -> bool:
    return r.kind in ("example", "token")


_APPLIES: dict[str, Any] = {
    "conditioning": (_sees, "kind: example and token"),
    "network": (lambda r: r.kind == "task", "kind: task"),
    "task_vectors": (
        lambda r: r.reads_vectors or r.unseen in ("nearest_vector", "soft_vector"),
        f"task networks (every network but logits) and conditioning: {', '.join(CONDITIONED)}",
    ),
    "task_vector_size": (
        lambda r: r.reads_vectors and r.task_vectors in ("id", "random", "fisher"),
        "task_vectors: id, random and fisher that are read",
    ),
    "train_task_vectors": (lambda r: r.reads_vectors, "routers that read task vectors"),
    "descriptions": (lambda r: r.task_vectors == "description", "task_vectors: description"),
    "hidden_size": (
        lambda r: r.conditioning == "mlp" or (r.kind == "task" and r.network != "logits"),
        "task networks and conditioning: mlp",
    ),
    "top_k": (lambda r: _learned(r) and r.selection == "top_k", "learned routers with selection: top_k"),
    "weighting": (lambda r: _learned(r) and r.selection == "top_k", "learned routers with selection: top_k"),
    "combine": (lambda r: _learned(r) or r.kind == "uniform", "learned routers and kind: uniform"),
    "score": (_learned, "learned routers"),
    "draw": (lambda r: r.kind == "task" and r.selection in ("gumbel", "gumbel_st", "skills"), "kind: task that draws"),
    "temperature": (_learned, "learned routers"),
    "temperature_min": (lambda r: r.temperature_decay > 0, "a temperature that decays"),
    "temperature_decay": (_learned, "learned routers"),
    "init_std": (lambda r: _learned(r) and r.selection != "slots", "learned routers but slots"),
    "lr_scale": (_learned, "learned routers"),
    "noise": (lambda r: _sees(r) and r.selection != "slots", "kind: example and token, but slots"),
    "noise_scale": (lambda r: r.noise == "jitter", "noise: jitter"),
    "normalise": (lambda r: _sees(r) and r.conditioning in ("none", "per_task") and r.selection != "slots",
        "kind: example and token without vectors, but slots",
    ),
    "expert_dropout": (lambda r: _learned(r) and r.selection != "slots", "learned routers but slots"),
    "capacity": (
        lambda r: r.kind == "token" and r.selection in ("top_k", *BY_EXPERTS),
        "kind: token with selection: top_k and expert choice",
    ),
    "priority": (lambda r: r.capacity is not None and r.selection == "top_k", "selection: top_k with a capacity"),
    "slots": (lambda r: r.selection == "slots", "selection: slots"),
    "experts_of": (
        lambda r: r.kind in ("task_id", "category") or r.supervision > 0, "kind: task_id and category, and supervision"
    ),
    "balance": (_learned, "learned routers"),
    "balance_weight": (lambda r: r.balance in ("load", "cv"), "balance: load and cv"),
    "balance_scope": (lambda r: r.balance != "none", "routers with a balance"),
    "balance_window": (
        lambda r: _sees(r) and (
            (r.balance in ("load", "cv") and r.balance_scope != "microbatch") or r.mutual_information > 0
        ),
        "kind: example and token with balance: load or cv (but microbatch), or mutual_information",
    ),
    "bias_rate": (lambda r: r.balance == "bias", "balance: bias"),
    "mutual_information": (_learned, "learned routers"),
    "z_loss": (_learned, "learned routers"),
    "entropy": (_learned, "learned routers"),
    "supervision": (_learned, "learned routers"),
    "policy": (lambda r: r.selection == "sampled", "selection: sampled"),
    "policy_entropy": (lambda r: r.selection == "sampled", "selection: sampled"),
    "value": (lambda r: r.selection == "sampled", "selection: sampled"),
    "consistency": (lambda r: r.kind == "random_example", "kind: random_example"),
    "unseen": (
        lambda r: (r.kind == "task" and r.network == "logits")
        or r.conditioning == "per_task"
        or (r.reads_vectors and r.task_vectors == "id"),
        "routers with a row of their own for each task",
    ),
    "donors": (lambda r: r.unseen == "nearest_category", "unseen: nearest_category"),
}  # fmt: skip
"""Setting -> (whether a router reads it, in words): elsewhere it must stay at its default, or it would be in a trial's id
without changing a number."""
