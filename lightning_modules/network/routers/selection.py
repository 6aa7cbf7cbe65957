"""From logits to routings: which experts a unit gets, and with what weight (specs/task_aware_gating.md 2.3, 2.6 and 8).

Legend: U units routed (tasks, examples or tokens), N real tokens, B rows of the batch, S positions, E experts, K chosen per
unit, P slots (``slots`` for each expert, expert by expert), d hidden width. All numbers are float32, under autocast too.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from lightning_modules.building import ConfigError
from lightning_modules.network.routers.record import Routing, Units
from lightning_modules.router_config import RouterConfig


def choose(
    config: RouterConfig,
    logits: Tensor,
    *,
    temperature: float,
    training: bool,
    uniform: Tensor | None = None,
    bias: Tensor | None = None,
    drop: Tensor | None = None,
    value: Tensor | None = None,
) -> Routing:
    """Every selection that decides unit by unit: (U, E) logits -> routing of U units.

    An expert whose logit is -inf is masked: its weight is 0, and it is chosen only where fewer than K others are left.

    Args:
        temperature: divides the logits.
        training: random selections draw; without it they are deterministic.
        uniform: (U, E) random numbers in (0, 1) for a drawing selection in training; ``sampled`` reads the first column.
        bias: (E,) added to the scores that ``top_k`` chooses by; weights and probabilities do not see it.
        drop: (U, E) bool, the experts left out of each unit's distribution. A unit that would lose all of them keeps all.
            They are treated as masked.
        value: (U,) the learned baseline of ``sampled``, handed on in the terms.

    Raises:
        ConfigError: the selection compares units with each other (expert choice, slots).
        ValueError: a drawing selection in training without ``uniform``.
    """
    logits = logits.float()
    live = _live(logits, drop)
    scores, probabilities = _scores(config, logits, temperature, live)
    match config.selection:
        case "top_k":
            weights, chosen = _top_k(config, scores, probabilities, bias, live)
            return Routing(weights, chosen, probabilities, logits)
        case "soft":
            return Routing(probabilities, _ranked(probabilities), probabilities, logits)
        case "gumbel":
            weights = _gumbel(_masked(logits, live), uniform, temperature) if training else probabilities
            return Routing(weights, _ranked(probabilities), probabilities, logits)
        case "gumbel_st":
            soft = _gumbel(_masked(logits, live), uniform, temperature) if training else probabilities
            chosen = soft.argmax(-1, keepdim=True)
            weights = _one_hot(chosen, logits)
            if training:
                weights = (soft - soft.detach()) + weights
            return Routing(weights, chosen, probabilities, logits)
        case "sampled":
            if not training:
                chosen = probabilities.argmax(-1, keepdim=True)
                return Routing(_one_hot(chosen, logits), chosen, probabilities, logits)
            chosen = _inverse_cdf(probabilities.detach(), _open(uniform)[:, :1])
            logs = (_masked(logits, live) / temperature).log_softmax(-1)
            terms = {"log_probability": logs.gather(-1, chosen).squeeze(-1)}
            if value is not None:
                terms["value"] = value
            return Routing(_one_hot(chosen, logits), chosen, probabilities, logits, terms=terms)
        case "skills":
            switched = logits.sigmoid()
            probabilities = _normalised(switched * live)
            weights = probabilities
            if training:
                u = _open(uniform)
                weights = _normalised(((logits + u.log() - (-u).log1p()) / temperature).sigmoid() * live)
            return Routing(weights, _ranked(probabilities), probabilities, logits)
        case _:
            raise ConfigError("selection", f"must decide unit by unit to be chosen here, got {config.selection!r}")


def limit(config: RouterConfig, routing: Routing, units: Units, length: Tensor | None = None) -> Routing:
    """``routing`` of N tokens with room for C = ceil(capacity K N / E) of them at each expert (specs/task_aware_gating.md 8).

    ``length`` (B,), the real tokens of each row: every row has room of its own, C = ceil(capacity K n / E) for its n tokens, so
    that no row depends on the others. None: all share the room.

    All first choices come before all second ones; within a choice earlier tokens come first, or those with the highest
    probability (``priority: confidence``). What finds no room is -1 in ``chosen`` and has weight 0, and the other weights stay
    as they are. With ``capacity: null`` nothing is dropped.
    """
    if config.capacity is None:
        return routing
    chosen, experts = routing.chosen, routing.weights.shape[1]
    size = torch.tensor([len(chosen)], device=chosen.device) if length is None else length
    group = torch.zeros_like(units.example) if length is None else units.example
    room = (config.capacity * chosen.shape[1] * size.double() / experts - _HAIR).ceil().long()
    if config.priority == "confidence":
        order = routing.probabilities.amax(-1).argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(chosen), device=chosen.device)
    queue = chosen[order].T.reshape(-1, 1)
    # Of each row's own queue at each expert: after all of the others what chose nothing.
    rows = group[order].repeat(chosen.shape[1]).unsqueeze(-1)
    fits = ((_places(queue + (experts + 1) * rows) < room[rows]) & (queue >= 0)).view(chosen.shape[1], -1).T
    kept = torch.empty_like(fits).index_copy(0, order, fits)
    spare = chosen.masked_fill(chosen < 0, experts)
    runs = routing.weights.new_zeros(len(chosen), experts + 1).scatter(-1, spare, kept.to(routing.weights.dtype))
    return replace(routing, weights=routing.weights * runs[:, :experts], chosen=chosen.masked_fill(~kept, -1), wanted=chosen)


def expert_choice(
    config: RouterConfig,
    logits: Tensor,
    units: Units,
    length: Tensor,
    *,
    temperature: float = 1.0,
    drop: Tensor | None = None,
    by_row: bool = False,
) -> Routing:
    """Each expert takes its best tokens of each group (expert choice, Zhou et al. 2022): (N, E) logits -> routing of N tokens.

    A group is a row of the batch, or all rows of one task under ``task_expert_choice``; an expert takes
    min(n, ceil(capacity n / E)) of its n tokens, so no row depends on another, or no task. Weights are the scores where chosen.

    Args:
        length: (B,) real tokens of each row.
        temperature: divides the logits.
        drop: (N, E) bool, as of :func:`choose`; a token's dropped expert gives it nothing.
        by_row: rows are groups under ``task_expert_choice`` too, so that no row depends on another.

    Returns:
        ``chosen`` is (N, E): a token's experts, most probable first, then -1.
    """
    logits = logits.float()
    live = _live(logits, drop)
    scores, probabilities = _scores(config, logits, temperature, live)
    by_row = by_row or config.selection == "expert_choice"
    group, size = (units.example, length) if by_row else _task_groups(units)
    room = ((config.capacity or 1.0) * size.double() / logits.shape[1] - _HAIR).ceil().long().minimum(size)
    order = scores.detach().argsort(dim=0, descending=True, stable=True)
    place = torch.empty_like(order).scatter(0, order, _places(group[order]))
    taken = (place < room[group].unsqueeze(-1)) & live
    ranked = probabilities.detach().masked_fill(~taken, -1.0).argsort(-1, descending=True)
    chosen = ranked.masked_fill(~taken.gather(-1, ranked), -1)
    return Routing(scores * taken, chosen, probabilities, logits)


def slots(
    config: RouterConfig,
    hidden: Tensor,
    mask: Tensor,
    keys: Tensor,
    scale: Tensor,
    units: Units,
    *,
    temperature: float = 1.0,
) -> Routing:
    """Soft MoE (Puigcerver et al. 2023): every slot is a mean of a row's tokens, every token a mean of the slots' outputs.

    With z = scale cos(token, key) / temperature, (B, S, P): ``dispatch`` is softmax(z) over the real tokens of the row,
    ``combine`` softmax(z) over the slots; both are 0 at padding. Rows do not mix.

    Args:
        hidden: (B, S, d).
        mask: (B, S) bool, true at real tokens.
        keys: (P, d) one key for each slot.
        scale: scalar, learned.
        units: the real tokens, with their ``index``.

    Returns:
        Weights and probabilities (N, E) are ``combine`` summed over each expert's slots, the logits their logsumexp.

    Raises:
        ValueError: ``units`` has no ``index``.
    """
    if units.index is None:
        raise ValueError("slots need the places of the tokens: units.index is None")
    with torch.autocast(hidden.device.type, enabled=False):
        tokens, directions = functional.normalize(hidden.float(), dim=-1), functional.normalize(keys.float(), dim=-1)
        logits = scale.float() * (tokens @ directions.T) / temperature
    real = mask.unsqueeze(-1)
    dispatch = logits.masked_fill(~real, torch.finfo(logits.dtype).min).softmax(1) * real
    combine = logits.softmax(-1) * real
    by_expert = logits.flatten(0, 1)[units.index].unflatten(-1, (-1, config.slots)).logsumexp(-1)
    weights = by_expert.softmax(-1)
    return Routing(weights, _ranked(weights), weights, by_expert, terms={"dispatch": dispatch, "combine": combine})


def _live(logits: Tensor, drop: Tensor | None) -> Tensor:
    """(U, E) bool: the experts that each unit has."""
    there = ~logits.isneginf()
    if drop is None:
        return there
    left = there & ~drop
    return torch.where(left.any(-1, keepdim=True), left, there)


def _scores(config: RouterConfig, logits: Tensor, temperature: float, live: Tensor) -> tuple[Tensor, Tensor]:
    """(U, E) scores that selection and weights read, and probabilities; both 0 for experts that are not ``live``."""
    scaled = logits / temperature
    match config.score:
        case "softmax":
            probabilities = _masked(scaled, live).softmax(-1)
            return probabilities, probabilities
        case "sigmoid":
            scores = scaled.sigmoid()
        case "sqrt_softplus":
            # The root of a softplus that underflowed has an infinite slope.
            scores = functional.softplus(scaled).clamp_min(torch.finfo(scaled.dtype).tiny).sqrt()
    scores = scores * live
    return scores, _normalised(scores)


def _top_k(
    config: RouterConfig, scores: Tensor, probabilities: Tensor, bias: Tensor | None, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights (U, E) and numbers (U, K), most probable first; an expert that is not ``live`` comes last and weighs 0."""
    preference = scores.detach() if bias is None else scores.detach() + bias
    chosen = _masked(preference, live).topk(config.top_k, dim=-1).indices
    kept = scores.gather(-1, chosen)
    if bias is not None:
        kept, order = kept.sort(dim=-1, descending=True)
        chosen = chosen.gather(-1, order)
    alive = live.gather(-1, chosen)
    weighting = config.weighting
    if weighting == "auto":
        weighting = "straight_through" if config.top_k == 1 else "renormalise"
    match weighting:
        case "raw":
            weights = kept
        case "renormalise":
            weights = _normalised(kept)
        case "straight_through":
            weights = (kept - kept.detach()) + 1 / alive.sum(-1, keepdim=True)
        case "scaled":
            # A score that does not compete is not near 1/E, so it is the probability that E brings to about 1.
            weights = scores.shape[-1] * probabilities.gather(-1, chosen) / config.top_k
    return torch.zeros_like(scores).scatter(-1, chosen, weights * alive), chosen


def _gumbel(logits: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """A Gumbel-softmax draw: the largest weight falls on expert e with probability softmax(logits)_e at any temperature."""
    return ((logits - (-_open(uniform).log()).log()) / temperature).softmax(-1)


def _open(uniform: Tensor | None) -> Tensor:
    """``uniform`` kept off 0 and 1, where the logarithms end."""
    if uniform is None:
        raise ValueError("a drawing selection needs uniform random numbers in training, got None")
    limits = torch.finfo(torch.float32)
    return uniform.float().clamp(limits.tiny, 1 - limits.eps)


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(U, 1) numbers drawn from (U, E) probabilities with (U, 1) uniform numbers; never one of probability 0."""
    total = probabilities.cumsum(-1)
    return (total / total[:, -1:] <= uniform).sum(-1, keepdim=True)


def _one_hot(chosen: Tensor, like: Tensor) -> Tensor:
    """(U, 1) numbers -> (U, E) weights of exactly 1."""
    return torch.zeros_like(like).scatter(-1, chosen, 1.0)


def _ranked(probabilities: Tensor) -> Tensor:
    """(U, E) numbers of all experts, most probable first."""
    return probabilities.argsort(-1, descending=True)


def _normalised(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _masked(values: Tensor, live: Tensor) -> Tensor:
    return values.masked_fill(~live, -torch.inf)


def _task_groups(units: Units) -> tuple[Tensor, Tensor]:
    """(N,) group number of each unit, one group per task, and (G,) units of each group."""
    tasks = [task for task, _, _ in units.groups]
    number = {task: place for place, task in enumerate(dict.fromkeys(tasks))}
    counts = [stop - start for _, start, stop in units.groups]
    device = units.task.device
    runs, of = torch.tensor(counts, device=device), torch.tensor([number[task] for task in tasks], device=device)
    group = of.repeat_interleave(runs, output_size=sum(counts))
    return group, torch.zeros(len(number), dtype=torch.int64, device=device).index_add(0, of, runs)


def _places(group: Tensor) -> Tensor:
    """(M, C) group numbers in the order of a queue -> (M, C) each one's place, from 0, among those of its group before it.

    The columns are queues of their own over the same members.
    """
    order = group.argsort(dim=0, stable=True)
    members = group[:, 0][order[:, 0]]
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(members, members)
    return torch.empty_like(group).scatter(0, order, place.unsqueeze(-1).expand_as(order))


_HAIR = 1e-9
"""Taken off before rounding up, so that rounding errors do not push an even share over the next whole number."""
