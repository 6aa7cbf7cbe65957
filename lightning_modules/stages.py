"""Training in stages: parts of a network, freezing them, and taking them from an earlier trial (specs/task_moe.md 1.6).

Legend: T tasks.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.building import ConfigError
from lightning_modules.checkpoints import load_newest
from lightning_modules.config import Part, TrialConfig

PARTS: tuple[Part, ...] = get_args(Part)

_EXPERTS = re.compile(r"backbone\..*\.(replacement|follower|inserted)\.(.*\.)?(experts|shared)\.")
_BY_ROW = re.compile(r"routers\.(vectors\.rows|network\.logits\.\d+)")
"""Tensors with a row for each task."""
_BY_COLUMN = re.compile(r"routers\.network\.expert")
"""Tensors with a column for each task."""
_BY_NUMBER = re.compile(r"(heads\.|routers\.blocks\.\d+\.(?:weights|biases)\.)(\d+)(.*)")
"""Tensors of one task, whose number is in their name."""
_OF_A_TRIAL = re.compile(r"routers\.(step|tables\.\d+\.(share|mass|seen|weight))")
"""What belongs to the steps of one trial: no later one takes it."""
_OF_TRAINING = re.compile(r"routers\.blocks\.\d+\.(noise_weight|baseline\..*)")
"""What a router needs only while it draws: the size of its noise, the baseline of its policy."""
_BIAS = re.compile(r"routers\.tables\.\d+\.bias")
"""Selection biases, zero in a router that balances otherwise."""


def part_of(name: str) -> Part:
    """The part that the parameter or buffer called ``name`` in a network belongs to."""
    if name.startswith("routers."):
        return "router"
    if name.startswith("heads."):
        return "heads"
    return "experts" if _EXPERTS.match(name) else "backbone"


def freeze(network: nn.Module, parts: Collection[Part]) -> None:
    """Let ``parts`` train no more.

    Raises:
        ConfigError: a part has nothing that trains, or nothing that trains is left.
    """
    before = trainable_parts(network)
    for part in parts:
        if not before[part]:
            has = ", ".join(name for name, count in before.items() if count)
            raise ConfigError("train.freeze", f"must name parts that train ({has}), got {part}, which has nothing that does")
    for name, parameter in network.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    if not any(trainable_parts(network).values()):
        raise ConfigError("train.freeze", f"must leave something to train, got {', '.join(parts)}")


def trainable_parts(network: nn.Module) -> dict[Part, int]:
    """Part -> parameters that train."""
    counts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] += parameter.numel()
    return counts


def check_optimiser(network: nn.Module, optimiser: Optimizer, frozen: Collection[Part], others: Sequence[Tensor] = ()) -> None:
    """Whether the optimiser holds exactly what is to train: the trainable parameters of the parts that are not ``frozen``, and
    ``others`` that are not the network's.

    Raises:
        RuntimeError: it does not.
    """
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        trains = parameter.requires_grad and part_of(name) not in frozen
        if (id(parameter) in held) != trains:
            raise RuntimeError(
                f"the optimiser {'lacks' if trains else 'holds'} {name}, which is {'' if trains else 'not '}to train"
            )
    expected = sum(parameter.requires_grad for parameter in network.parameters()) + len(others)
    if len(held) != expected:
        raise RuntimeError(f"the optimiser holds {len(held)} parameters, {expected} are to train")


def start_from(network: nn.Module, config: TrialConfig, earlier: TrialConfig, checkpoints: Path) -> None:
    """Take ``config.start.load`` from the final weights of the trial ``earlier``, in its folder of checkpoints.

    Raises:
        ConfigError: it has no final weights there, or they do not fit.
    """
    trial_id, steps = config.start.trial, earlier.train.steps
    state, refused = load_newest(checkpoints, trial_id)
    if state is None or state["step"] != steps:
        found = f"its newest checkpoint is of step {state['step']}" if state else "; ".join(refused) or "it has no checkpoint"
        raise ConfigError("start.trial", f"must be a trial with its final weights (step {steps}), got {trial_id}: {found}")
    load_parts(network, state["network"], config.start.load, config.mixture.tasks, earlier.mixture.tasks)


def load_parts(
    network: nn.Module, state: Mapping[str, Tensor], parts: Collection[Part], names: Sequence[str], earlier: Sequence[str]
) -> None:
    """Copy ``parts`` of another network's ``state`` into ``network``, bit by bit; all of each part, or nothing at all.

    Running tables and the count of steps belong to a trial and stay as they are here.

    Args:
        names: this network's tasks in order.
        earlier: the other's. What belongs to one task is matched by name; a task that the other lacks keeps what it has.

    Raises:
        ConfigError: a tensor is missing on one side or has another shape, or the other network has nothing of a part.
    """
    own = network.state_dict()
    numbers = {name: number for number, name in enumerate(earlier)}
    source = [numbers.get(name) for name in names]
    loaded: dict[str, Tensor] = {}
    used = set()
    for name, here in own.items():
        if part_of(name) not in parts or not _is_taken(name, state):
            continue
        numbered = _BY_NUMBER.fullmatch(name)
        was = source[int(numbered[2])] if numbered else None
        if numbered and was is None:
            continue
        there = f"{numbered[1]}{was}{numbered[3]}" if numbered else name
        if there not in state:
            raise ConfigError("start.load", f"must fit the earlier trial's weights, which lack {there}")
        used.add(there)
        loaded[name] = _tensor(name, here, state[there], source, len(earlier))
    for name in state:
        if part_of(name) in parts and name not in used and _is_taken(name, state) and not _BY_NUMBER.fullmatch(name):
            raise ConfigError("start.load", f"must fit the earlier trial's weights, whose {name} has no place here")
    for part in parts:
        if not any(part_of(name) == part for name in loaded):
            raise ConfigError("start.load", f"must name parts that both trials have, got {part}")
    network.load_state_dict({**own, **loaded})


def _is_taken(name: str, state: Mapping[str, Tensor]) -> bool:
    if _OF_TRAINING.fullmatch(name):
        return False
    if _BIAS.fullmatch(name):
        return name in state and bool(state[name].any())
    return _OF_A_TRIAL.fullmatch(name) is None


def _tensor(name: str, here: Tensor, there: Tensor, source: Sequence[int | None], count: int) -> Tensor:
    """What ``name`` becomes: ``there``, or where there is a slice for each task, those of the tasks that it has."""
    axis = 0 if _BY_ROW.fullmatch(name) else 1 if _BY_COLUMN.fullmatch(name) else None
    if axis is None:
        _check_shape(name, here.shape, there.shape)
        return there
    _check_shape(name, _without(here, axis), _without(there, axis))
    _check_shape(name, (len(source), count), (here.shape[axis], there.shape[axis]))
    result = here.clone()
    for task, was in enumerate(source):
        if was is not None:
            result.select(axis, task).copy_(there.select(axis, was))
    return result


def _without(tensor: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(tensor.shape) if i != axis)


def _check_shape(name: str, here: Sequence[int], there: Sequence[int]) -> None:
    if tuple(here) != tuple(there):
        law = f"must fit the earlier trial's weights: {name} has shape {list(there)} there and {list(here)} here"
        raise ConfigError("start.load", law)
