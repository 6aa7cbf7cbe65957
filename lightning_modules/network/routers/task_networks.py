"""From a task to the router logits of all blocks at once: a table, or one of the ten networks of Ye et al. (2022).

Structures and parameter counts are those of specs/task_moe.md 1.3; the code is our own. Three choices are ours. Nothing here
has dropout, so that a route is a function of the task and the weights alone (whether the encoder layer of the release ran
with its library's default of 0.1 is not known). Weights start from N(0, 0.02^2) with zero biases, as they did there, but the
last ones before the logits from N(0, ``init_std``^2), so that the setting means the same for every router; recurrent weights
start from torch's own rule, U(-h^-1/2, h^-1/2), and an attention's joint projection from its Xavier rule. And blocks
may differ in their number of experts: where one projection serves all blocks it has the most, and each block reads its own.

Legend: R tasks asked for, T tasks, L routed blocks in ascending order, E experts of a block, u width of the task vectors,
h ``hidden_size``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.building import require
from lightning_modules.network.routers.vectors import TaskVectors
from lightning_modules.router_config import RouterConfig
from lightning_modules.seeds import derive

HEADS = 4
"""Attention heads of the two transformers."""

WEIGHT_STD = 0.02
"""Standard deviation of the initial weights and block embeddings but for the last weights before the logits."""

RECURRENT: dict[str, type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def build_task_network(
    config: RouterConfig, num_tasks: int, experts: Mapping[int, int], vectors: TaskVectors | None, seed: int
) -> nn.Module:
    """The network of ``config.network`` over the blocks of ``experts`` (block -> its number of experts).

    The result is called with (R,) int64 task numbers and gives block -> (R, E) float32 logits, without any randomness. It
    reads ``vectors`` but does not own them: whoever made them registers them.

    Raises:
        ConfigError: the width of what a transformer attends over cannot be divided among its heads.
        ValueError: the network reads vectors and has none.
    """
    experts = {block: experts[block] for block in sorted(experts)}
    if config.network == "logits":
        return _Table(config, num_tasks, experts, seed)
    if vectors is None:
        raise ValueError(f"network: {config.network} reads task vectors, got none")
    match config.network.removesuffix("_per_layer"), config.network.endswith("_per_layer"):
        case "linear", False:
            network = _Shared(vectors, config.hidden_size, experts)
        case "linear", True:
            network = _PerBlock(vectors, config.hidden_size, experts)
        case cell, per_block:
            network = _Sequence(vectors, config, experts, cell, per_block)
    _initialise(network, config.init_std, seed)
    return network


class _Table(nn.Module):
    """One learned logit vector per task and block, drawn from N(0, ``init_std``^2).

    Each task has its own stream at each block, whatever the number of tasks.
    """

    def __init__(self, config: RouterConfig, num_tasks: int, experts: Mapping[int, int], seed: int) -> None:
        super().__init__()
        self.logits = nn.ParameterDict()
        for block, count in experts.items():
            streams = [torch.Generator().manual_seed(derive(seed, "router", block, task)) for task in range(num_tasks)]
            rows = torch.stack([torch.randn(count, generator=stream) for stream in streams])
            self.logits[str(block)] = nn.Parameter(rows * config.init_std)

    def forward(self, task_ids: Tensor) -> dict[int, Tensor]:
        """(R,) int64 -> block -> (R, E)."""
        return {int(block): rows[task_ids].float() for block, rows in self.logits.items()}


class _OverVectors(nn.Module, ABC):
    """A network over task vectors, in float32 under every precision."""

    def __init__(self, vectors: TaskVectors) -> None:
        super().__init__()
        # In a tuple, because a module may be registered once only: twice, its rows would be twice in every checkpoint.
        self._vectors = (vectors,)

    def forward(self, task_ids: Tensor) -> dict[int, Tensor]:
        """(R,) int64 -> block -> (R, E)."""
        with torch.autocast(task_ids.device.type, enabled=False):
            return self.of_vectors(self._vectors[0](task_ids))

    @abstractmethod
    def of_vectors(self, vectors: Tensor) -> dict[int, Tensor]:
        """(R, u) -> block -> (R, E)."""


class _MLP(nn.Module):
    """``last gelu(first x)`` with biases."""

    def __init__(self, width: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden_size)
        self.last = nn.Linear(hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(R, width) -> (R, outputs)."""
        return self.last(functional.gelu(self.first(x)))


class _Shared(_OverVectors):
    """``linear``: one MLP, whose outputs are the logits of all blocks side by side."""

    def __init__(self, vectors: TaskVectors, hidden_size: int, experts: Mapping[int, int]) -> None:
        super().__init__(vectors)
        self._experts = dict(experts)
        self.mlp = _MLP(vectors.width, hidden_size, sum(experts.values()))

    def of_vectors(self, vectors: Tensor) -> dict[int, Tensor]:
        parts = self.mlp(vectors).split(list(self._experts.values()), dim=-1)
        return dict(zip(self._experts, parts, strict=True))


class _PerBlock(_OverVectors):
    """``linear_per_layer``: an MLP for each block."""

    def __init__(self, vectors: TaskVectors, hidden_size: int, experts: Mapping[int, int]) -> None:
        super().__init__(vectors)
        self.mlps = nn.ModuleDict({str(block): _MLP(vectors.width, hidden_size, e) for block, e in experts.items()})

    def of_vectors(self, vectors: Tensor) -> dict[int, Tensor]:
        return {int(block): mlp(vectors) for block, mlp in self.mlps.items()}


class _Sequence(_OverVectors):
    """The recurrent networks and transformers: the blocks are the steps of a sequence, whose states become the logits.

    A step is the task vector plus a learned embedding of the block, of width u; or, per block, the block's own projection of
    the vector to width h.
    """

    def __init__(
        self, vectors: TaskVectors, config: RouterConfig, experts: Mapping[int, int], cell: str, per_block: bool
    ) -> None:
        super().__init__(vectors)
        self._experts = dict(experts)
        width = config.hidden_size if per_block else vectors.width
        if per_block:
            self.steps = nn.ModuleDict({str(block): nn.Linear(vectors.width, width) for block in experts})
        else:
            self.steps = nn.Embedding(len(experts), width)
        if cell == "transformer":
            key = "hidden_size" if per_block else "task_vector_size"
            what = "hidden_size" if per_block else f"the width of the vectors ({config.task_vectors})"
            law = f"{what} must be a multiple of the {HEADS} heads of network: {config.network}, got {width}"
            require(width % HEADS == 0, f"model.router.{key}", law)
            self.mixer = nn.TransformerEncoderLayer(width, HEADS, config.hidden_size, dropout=0.0, batch_first=True)
            self.last = nn.Linear(width, max(experts.values()))
        else:
            self.mixer = RECURRENT[cell](width, config.hidden_size, batch_first=True, bidirectional=True)
            self.last = nn.Linear(2 * config.hidden_size, max(experts.values()))

    def of_vectors(self, vectors: Tensor) -> dict[int, Tensor]:
        if isinstance(self.steps, nn.Embedding):
            steps = vectors.unsqueeze(1) + self.steps.weight
        else:
            steps = torch.stack([project(vectors) for project in self.steps.values()], dim=1)
        if isinstance(self.mixer, nn.RNNBase):
            # cuDNN would round to TF32, may differ from run to run, and has no backward outside of training.
            with torch.backends.cudnn.flags(enabled=False):
                states, _ = self.mixer(steps)
        else:
            states = self.mixer(steps)
        logits = self.last(states)
        return {block: logits[:, i, :count] for i, (block, count) in enumerate(self._experts.items())}


def _initialise(network: nn.Module, init_std: float, seed: int) -> None:
    """Draw every parameter from a stream of its own name."""
    with torch.no_grad():
        for path, module in network.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                generator = torch.Generator().manual_seed(derive(seed, "task network", f"{path}.{name}"))
                if isinstance(module, nn.RNNBase):
                    bound = module.hidden_size**-0.5
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name == "in_proj_weight":
                    nn.init.xavier_uniform_(parameter, generator=generator)
                elif parameter.ndim > 1:
                    parameter.normal_(0, init_std if path.endswith("last") else WEIGHT_STD, generator=generator)
                elif not isinstance(module, nn.LayerNorm):
                    parameter.zero_()
