"""Tiny networks, batches and slow references for the tests of the network."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_modules.config import BackboneConfig, ModelConfig, RouterConfig, TinySizeConfig, TrialConfig
from lightning_modules.data.batches import Batch, TaskRows
from lightning_modules.network.model import MultiTaskNetwork, build_network
from lightning_modules.network.task_heads.base import HeadSpec

VOCAB = 320
HEADS = (
    HeadSpec("pets", "classification", 3),
    HeadSpec("stars", "regression", 1, {"mean": 0.0, "sd": 1.0}),
    HeadSpec("names", "tagging", 5),
    HeadSpec("mood", "classification", 2),
)
TINY = BackboneConfig(
    size=TinySizeConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=32, vocab_size=VOCAB), max_length=16, dropout=0.0
)
LEARNED = {
    "top_1": RouterConfig(init_std=1.0, top_k=1),
    "top_2": RouterConfig(init_std=1.0, top_k=2),
    "soft": RouterConfig(init_std=1.0, selection="soft"),
    "soft_cold": RouterConfig(init_std=1.0, selection="soft", temperature=0.3),
}
CATALOGUE: dict[str, RouterConfig] = {
    **LEARNED,
    "uniform": RouterConfig(kind="uniform"),
    "random": RouterConfig(kind="random"),
    "random_example": RouterConfig(kind="random_example"),
    "adamix": RouterConfig(kind="random_example", consistency=1.0),
    "hash_token": RouterConfig(kind="hash_token"),
    "hash_example": RouterConfig(kind="hash_example"),
    "task_id": RouterConfig(kind="task_id"),
    "category": RouterConfig(kind="category", experts_of={"pets": 0, "stars": 1, "names": 2, "mood": 0}),
    "cluster": RouterConfig(kind="cluster"),
    "task_gumbel": RouterConfig(init_std=1.0, selection="gumbel"),
    "task_gumbel_st": RouterConfig(init_std=1.0, selection="gumbel_st"),
    "task_gumbel_st_by_example": RouterConfig(init_std=1.0, selection="gumbel_st", draw="example"),
    "skills": RouterConfig(init_std=1.0, selection="skills", combine="parameters"),
    "task_dropout": RouterConfig(init_std=1.0, top_k=2, expert_dropout=0.3),
    "lstm": RouterConfig(network="lstm", init_std=1.0),
    "transformer": RouterConfig(network="transformer_per_layer", selection="soft", init_std=1.0),
    "onehot": RouterConfig(network="linear", task_vectors="onehot", init_std=1.0),
    "token_top_1": RouterConfig(kind="token", init_std=1.0),
    "token_top_2": RouterConfig(kind="token", init_std=1.0, top_k=2),
    "token_capacity": RouterConfig(kind="token", init_std=1.0, top_k=2, capacity=0.5, priority="confidence"),
    "token_soft": RouterConfig(kind="token", init_std=1.0, selection="soft"),
    "token_gumbel_st": RouterConfig(kind="token", init_std=1.0, selection="gumbel_st"),
    "token_bias": RouterConfig(kind="token", init_std=1.0, balance="bias", score="sigmoid"),
    "token_noisy": RouterConfig(kind="token", init_std=1.0, top_k=2, noise="gaussian", balance="cv", balance_scope="global"),
    "token_per_task": RouterConfig(kind="token", conditioning="per_task", init_std=1.0, balance="load"),
    "mod_squad": RouterConfig(
        kind="token", conditioning="per_task", init_std=1.0, top_k=2, weighting="raw", mutual_information=0.1
    ),
    "token_additive": RouterConfig(kind="token", conditioning="additive", init_std=1.0, z_loss=0.01, entropy=0.01),
    "token_mlp": RouterConfig(kind="token", conditioning="mlp", init_std=1.0),
    "token_film": RouterConfig(kind="token", conditioning="film", init_std=1.0),
    "token_hyper": RouterConfig(kind="token", conditioning="hyper", init_std=1.0),
    "expert_choice": RouterConfig(kind="token", selection="expert_choice", init_std=1.0),
    "task_expert_choice": RouterConfig(kind="token", selection="task_expert_choice", init_std=1.0),
    "soft_moe": RouterConfig(kind="token", selection="slots", slots=2),
    "example_top_1": RouterConfig(kind="example", init_std=1.0),
    "example_per_task": RouterConfig(kind="example", conditioning="per_task", init_std=1.0, top_k=2),
    "smear": RouterConfig(
        kind="example", selection="soft", combine="parameters", normalise=True, expert_dropout=0.1, init_std=1.0
    ),
    "reinforce": RouterConfig(kind="example", selection="sampled", init_std=1.0),
}
"""A router of every kind, conditioning, network family and selection; all with E = 4."""
ROUTERS = LEARNED | {"random": RouterConfig(kind="random"), "uniform": RouterConfig(kind="uniform")}
BOTH_WAYS = {
    f"{name}-{combine}": replace(router, combine=combine)
    for name, router in ROUTERS.items()
    for combine in ("outputs", "parameters")
    if (name, combine) != ("random", "parameters")  # one expert at weight 1: nothing to combine
}


def tiny_network(model: ModelConfig, heads: Sequence[HeadSpec] = HEADS, seed: int = 0) -> MultiTaskNetwork:
    """A two-block network without dropout."""
    return build_network(TrialConfig(backbone=TINY, model=model, seed=seed), heads, VOCAB)


def shake(network: nn.Module, std: float = 0.3) -> None:
    """Move every parameter away from its initial value, zeros included, by the same noise each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def labels_for(head: HeadSpec, rows: int, words: int, generator: torch.Generator) -> Tensor:
    """Random labels in the head's form."""
    if head.kind == "regression":
        return torch.randn(rows, generator=generator)
    shape = (rows, words) if head.kind == "tagging" else (rows,)
    return torch.randint(head.num_labels, shape, generator=generator)


def tiny_batch(tasks: Sequence[int], rows: int = 2, width: int = 7, heads: Sequence[HeadSpec] = HEADS) -> Batch:
    """``rows`` random examples of each task in ``tasks``, of 3 to ``width`` tokens, two tokens to a word."""
    generator = torch.Generator().manual_seed(1)
    size = rows * len(tasks)
    lengths = torch.randint(3, width + 1, (size, 1), generator=generator)
    lengths[0] = width
    position = torch.arange(width).expand(size, -1)
    mask = (position < lengths).long()
    inside = (position > 0) & (position < lengths - 1)
    groups = tuple(
        TaskRows(
            task,
            i * rows,
            (i + 1) * rows,
            labels_for(heads[task], rows, (width - 1) // 2, generator),
            torch.full((rows,), 1 / size),
        )
        for i, task in enumerate(tasks)
    )
    ids = torch.randint(5, VOCAB, (size, width), generator=generator) * mask
    words = torch.where(inside, (position - 1) // 2, -1)
    return Batch(ids, mask, (position > 3).long() * mask, words, groups)


def one_group(batch: Batch, i: int) -> Batch:
    """The batch that holds only group ``i`` of ``batch``, at the same width."""
    group = batch.tasks[i]
    rows = slice(group.start, group.stop)
    alone = replace(group, start=0, stop=group.stop - group.start)
    tensors = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.word_index)
    return Batch(*(tensor[rows] for tensor in tensors), (alone,))


def wider(batch: Batch, padding: int) -> Batch:
    """The same examples with ``padding`` more masked positions, filled with an ordinary token."""
    filled = ((batch.input_ids, 9), (batch.attention_mask, 0), (batch.token_type_ids, 1), (batch.word_index, -1))
    columns = [torch.cat([tensor, torch.full((len(tensor), padding), fill)], 1) for tensor, fill in filled]
    return Batch(*columns, batch.tasks)


def losses(network: MultiTaskNetwork, batch: Batch) -> Tensor:
    """Loss of every example of the batch, (B,)."""
    return torch.cat(network.losses(batch))


def assert_only_trains(network: nn.Module, expected: set[str]) -> None:
    """Exactly the parameters whose names contain one of ``expected`` have a gradient."""
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    wanted = {name for name, _ in network.named_parameters() if any(part in name for part in expected)}
    assert trained == wanted, f"unexpected: {sorted(trained - wanted)}; without gradient: {sorted(wanted - trained)}"
