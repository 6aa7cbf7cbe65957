"""A finished trial brought back: its network as it was at the last step, with its data."""

from dataclasses import dataclass, replace
from pathlib import Path

from lightning_modules.building import ConfigError
from lightning_modules.checkpoints import load_newest
from lightning_modules.config import TrialConfig
from lightning_modules.data.batches import StepBatches
from lightning_modules.data.prepared import TaskData, open_tasks
from lightning_modules.multitask import MultiTaskModule
from lightning_modules.network.model import MultiTaskNetwork
from lightning_modules.task_vectors import task_vectors
from pipelines.store import TrialFolder, TrialResult


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A finished trial."""

    folder: TrialFolder
    config: TrialConfig
    tasks: list[TaskData]
    """In the order of the mixture: their numbers are those of the network."""
    network: MultiTaskNetwork
    """On the CPU, scoring (no dropout), held-out tasks with the routes that the trial scored them by; never compiled."""
    result: TrialResult


def restore(storage: Path, trial_id: str) -> Restored:
    """The trial ``trial_id`` of the folder ``storage``.

    Raises:
        ConfigError: there is no such trial, it has not finished, or its prepared data or its last checkpoint are gone.
    """
    folder = TrialFolder(storage, trial_id)
    if not (folder.path / "config.yaml").is_file():
        raise ConfigError(trial_id, f"there is no such trial in {storage / 'trials'}")
    config, result = folder.read_config(), folder.result()
    if result is None:
        raise ConfigError(trial_id, f"must have finished, got state {folder.status().get('state', 'new')}")
    prepared = storage / "prepared"
    try:
        tasks = open_tasks(config, prepared)
    except FileNotFoundError as error:
        raise ConfigError(trial_id, f"its prepared data are gone ({error}); its sweep's command prepares them again") from error
    state, refused = load_newest(folder.checkpoints, trial_id)
    if state is None or state["step"] != config.train.steps:
        found = "none" if state is None else f"one of step {state['step']}"
        law = f"needs the checkpoint of its last step, {config.train.steps}, in {folder.checkpoints}, got {found}"
        raise ConfigError(trial_id, "; ".join([law, *refused]))
    plain = replace(config, train=replace(config.train, compile=False))
    batches = StepBatches(plain, tasks)
    network = MultiTaskModule(plain, tasks, batches, vectors=task_vectors(plain, tasks, prepared)).network
    network.load_state_dict(state["network"])
    if network.routers is not None and config.mixture.held_out:
        unseen = [task for task in range(len(tasks)) if task not in batches.trained]
        network.routers.seed_unseen(batches.trained, unseen)
    return Restored(folder=folder, config=config, tasks=tasks, network=network.eval(), result=result)
