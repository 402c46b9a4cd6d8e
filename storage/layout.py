"""Every key below the root, as a function; nobody else formats a path. Knows names only: opens nothing.

    activations/<dataset id>/dataset.json
                             data.zarr/<array>/c/<chunk>[/0]
                             commits/<shard>.json
    runs/<run id>/run.json config.toml summary.json controller.json report.json report.html
                  saes/<name>/<step>/{sae.safetensors,checkpoint.json,report.json}
                  state/<slot>/<step>/{state.safetensors,state.json}
                  history/<name>.json

Called by the rest of this floor. Every id and name is checked here, so that none can climb out of its folder.
"""

import re

DATASETS = "activations"
RUNS = "runs"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked(name: str, what: str) -> str:
    """`name` itself, or a ValueError where it could not be one component of a key."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} cannot name a file: use up to 128 letters, digits, '.', '_', '-', and no sign first"
        )
    return name


def _index(number: int, what: str, width: int) -> str:
    if number < 0:
        raise ValueError(f"{what} {number} is negative")
    return f"{number:0{width}d}"


def dataset(dataset_id: str) -> str:
    """Folder of a dataset."""
    return f"{DATASETS}/{checked(dataset_id, 'dataset id')}"


def dataset_record(dataset_id: str) -> str:
    """The DatasetRecord: there once the dataset's tokens are complete."""
    return f"{dataset(dataset_id)}/dataset.json"


def group(dataset_id: str) -> str:
    """Folder that any Zarr v3 reader opens as a group."""
    return f"{dataset(dataset_id)}/data.zarr"


def array(dataset_id: str, name: str) -> str:
    """Folder of one array of the group."""
    return f"{group(dataset_id)}/{checked(name, 'array')}"


def chunk(dataset_id: str, array_name: str, index: int, ndim: int) -> str:
    """One object of raw bytes, by Zarr v3's default chunk key encoding; arrays are cut along rows only."""
    assert ndim in (1, 2)
    assert index >= 0
    return f"{array(dataset_id, array_name)}/c/{index}" + ("/0" if ndim == 2 else "")


def commits(dataset_id: str) -> str:
    """Folder of a dataset's commits."""
    return f"{dataset(dataset_id)}/commits"


def commit(dataset_id: str, shard: int) -> str:
    """The ShardCommit that makes a shard visible."""
    return f"{commits(dataset_id)}/{_index(shard, 'shard', 8)}.json"


def shard_of(commit_key: str) -> int:
    """The shard that a commit's key stands for."""
    return int(commit_key.rpartition("/")[2].removesuffix(".json"))


def run(run_id: str) -> str:
    """Folder of a run."""
    return f"{RUNS}/{checked(run_id, 'run id')}"


def run_record(run_id: str) -> str:
    """The RunRecord."""
    return f"{run(run_id)}/run.json"


def run_dataset(run_id: str) -> str:
    """Which dataset a run is trained on."""
    return f"{run(run_id)}/dataset.json"


def run_config(run_id: str) -> str:
    """The configuration as the user could write it."""
    return f"{run(run_id)}/config.toml"


def run_summary(run_id: str) -> str:
    """The RunSummary of a finished run."""
    return f"{run(run_id)}/summary.json"


def lease(run_id: str) -> str:
    """Who controls the run, and when it last said so."""
    return f"{run(run_id)}/controller.json"


def run_report_json(run_id: str) -> str:
    """The numbers behind the run's page."""
    return f"{run(run_id)}/report.json"


def run_report_page(run_id: str) -> str:
    """The run as one HTML page."""
    return f"{run(run_id)}/report.html"


def checkpoints(run_id: str) -> str:
    """Folder of a run's published SAEs."""
    return f"{run(run_id)}/saes"


def checkpoint(run_id: str, name: str, step: int) -> str:
    """Folder of one published SAE."""
    return f"{checkpoints(run_id)}/{checked(name, 'SAE name')}/{_index(step, 'step', 12)}"


def checkpoint_tensors(run_id: str, name: str, step: int) -> str:
    """Its weights."""
    return f"{checkpoint(run_id, name, step)}/sae.safetensors"


def checkpoint_record(run_id: str, name: str, step: int) -> str:
    """Its CheckpointRecord, written last."""
    return f"{checkpoint(run_id, name, step)}/checkpoint.json"


def report_json(run_id: str, name: str, step: int) -> str:
    """Its MetricsReport."""
    return f"{checkpoint(run_id, name, step)}/report.json"


def states(run_id: str, slot: str) -> str:
    """Folder of the resume states of one trainer."""
    return f"{run(run_id)}/state/{checked(slot, 'slot')}"


def state(run_id: str, slot: str, step: int) -> str:
    """Folder of one resume state."""
    return f"{states(run_id, slot)}/{_index(step, 'step', 12)}"


def state_tensors(run_id: str, slot: str, step: int) -> str:
    """Its tensors."""
    return f"{state(run_id, slot, step)}/state.safetensors"


def state_record(run_id: str, slot: str, step: int) -> str:
    """Its scalars and the checksum of its tensors, written last."""
    return f"{state(run_id, slot, step)}/state.json"


def history(run_id: str, name: str) -> str:
    """A curve: rows of numbers that one trainer or stage reports."""
    return f"{run(run_id)}/history/{checked(name, 'history')}.json"
