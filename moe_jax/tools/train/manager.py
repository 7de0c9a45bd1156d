"""The manager of orbax that writes and reads the checkpoints of a run. Importing orbax takes a second."""

import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from moe_jax.tools.train.seal import write_seal


class _RunHandler(ocp.JsonCheckpointHandler):
    """Writes the item "run", which is the last one, and seals all items before the checkpoint gets its name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        write_seal(Path(directory).parent, Path(directory))


def make_manager(path: Path, *, keep: int) -> ocp.CheckpointManager:
    """The manager of the checkpoints in the folder `path`. What a killed run was writing there is removed."""
    # Orbax logs each error of its threads with pages of their stacks, and raises it too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, run = ocp.StandardCheckpointHandler(), _RunHandler()
    for item, arguments, handler in (
        ("state", ocp.args.StandardSave, state),
        ("state", ocp.args.StandardRestore, state),
        ("run", ocp.args.JsonSave, run),
        ("run", ocp.args.JsonRestore, run),
    ):
        registry.add(item, arguments, handler)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, lightweight_initialize=True)
    return ocp.CheckpointManager(path.absolute(), options=options, handler_registry=registry)


def items_to_save(state: Any, run: dict[str, Any]) -> Any:
    return ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))


def run_to_restore() -> Any:
    return ocp.args.Composite(run=ocp.args.JsonRestore())


def state_to_restore(like: Any) -> Any:
    return ocp.args.Composite(state=ocp.args.StandardRestore(like))
