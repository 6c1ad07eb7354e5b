"""Checkpoints: complete or invisible.

    run_dir/checkpoints/step-00000100/
        deepspeed/            model and optimizer as DeepSpeed writes them, a part a rank
        model.safetensors     every weight of the model, readable without DeepSpeed
        random-00000.safetensors ...    each rank's random state
        progress.json         step, epoch, batch, world size, W&B run
        recipe.yaml           the resolved recipe
        manifest.json         size and SHA-256 of every file above
    run_dir/checkpoints/latest          the newest one's name, moved last; for people and scripts

A checkpoint is written as ``.step-...partial``, given its manifest, and only then renamed. Loading goes
through the checkpoints from the newest, and takes the first that every rank finds whole; damaged newer ones
are removed by the run that goes on from it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from audiotext_dist import storage
from audiotext_dist.distributed import World, barrier, from_main, gather_items
from audiotext_dist.errors import UserError, require_positive
from audiotext_dist.training.engine import Engine
from audiotext_dist.training.health import Health

CHECKPOINTS = "checkpoints"
MODEL_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_POINTER = "latest"
_DEEPSPEED_TAG = "deepspeed"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every_epochs: int = 1
    every_steps: int | None = None
    keep_last: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint", "every_epochs", "every_steps", "keep_last")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: ``step`` updates done; the next batch is number ``batch`` of ``epoch``.

    The other numbers fix what those three mean: a run goes on only where they are the same.
    """

    step: int
    epoch: int
    batch: int
    seed: int
    global_batch_size: int
    steps_an_epoch: int
    world_size: int
    optimizer: str
    zero_stage: int
    wandb_id: str | None = None
    health: Health = field(default_factory=Health)

    def check_fits(self, other: Progress, where: str) -> None:
        """Raise ``UserError`` unless the other run reads the same batches on as many processes."""
        for key, what in (
            ("seed", "training.seed"),
            ("global_batch_size", "training.global_batch_size"),
            ("steps_an_epoch", "the number of batches an epoch (its data sets and weights)"),
            ("world_size", "the number of processes"),
            ("optimizer", "optim.name"),
            ("zero_stage", "engine.zero_stage"),
        ):
            before, now = getattr(self, key), getattr(other, key)
            if before != now:
                raise UserError(f"{where} was made with {what} {before}, not {now}: give the same, or a new run_dir")


def save(
    engine: Engine,
    model: nn.Module,
    progress: Progress,
    run_dir: Path,
    world: World,
    *,
    recipe_yaml: str,
    keep_last: int,
) -> None:
    """Write a checkpoint; every rank calls it, and returns when it is complete."""
    folder = run_dir / CHECKPOINTS
    name = f"step-{progress.step:08d}"
    partial = folder / f".{name}.partial"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial, _DEEPSPEED_TAG)
    save_file(_random_state(world), partial / _random_file(world.rank))
    if world.is_main:
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, partial / MODEL_FILE)
        make_readable(partial / MODEL_FILE)
        storage.write_bytes(str(partial / _PROGRESS), json.dumps(asdict(progress)).encode())
        storage.write_bytes(str(partial / RECIPE_FILE), recipe_yaml.encode())
    barrier()
    if world.is_main:
        storage.write_bytes(str(partial / _MANIFEST), json.dumps(_describe_files(partial), indent=1).encode())
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        storage.write_bytes(str(folder / _POINTER), name.encode())
        for old in _complete_checkpoints(run_dir)[keep_last:]:
            shutil.rmtree(old)
    barrier()


def find_newest_whole(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose every file has the size and digest of its manifest, on all ranks; or None.

    Each rank checks the digests of its share of the files.
    """
    for candidate in from_main(_complete_checkpoints(run_dir) if world.is_main else None):
        if all(gather_items(_is_whole(candidate, world))):
            return candidate
    return None


def load(engine: Engine, checkpoint: Path, start: Progress, world: World) -> Progress:
    """Bring the engine and this rank's random state to where the checkpoint stands.

    Args:
        start: what this run would start with.

    Raises:
        UserError: the checkpoint is of a run with other batches, processes or towers.
    """
    progress = read_progress(checkpoint)
    progress.check_fits(start, str(checkpoint))
    engine.load(checkpoint, _DEEPSPEED_TAG)
    random = load_file(checkpoint / _random_file(world.rank))
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    return progress


def remove_newer(checkpoint: Path) -> None:
    """Remove the checkpoints after this one, which were found damaged; else they would outlive whole ones."""
    for other in checkpoint.parent.glob("step-*"):
        if other.name > checkpoint.name:
            shutil.rmtree(other)


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that this process finds whole, or None."""
    return next((found for found in _complete_checkpoints(run_dir) if _is_whole(found, World())), None)


def make_readable(weights_file: Path) -> None:
    """Let the group read a weights file as it reads all others: safetensors writes for its owner alone."""
    weights_file.chmod(0o644)


def read_progress(checkpoint: Path) -> Progress:
    """Where the checkpoint's run stood."""
    try:
        found = json.loads((checkpoint / _PROGRESS).read_text())
        health = found.pop("health")
        return Progress(**found, health=Health(**{**health, "recent_losses": tuple(health["recent_losses"])}))
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{checkpoint} is of another version of this program: start under a new run_dir") from None


def load_model(model: nn.Module, source: str) -> None:
    """Load every weight of a model from where ``read_weights`` finds them.

    Raises:
        UserError: nothing there, or weights of another model.
    """
    _load_strictly(model, read_weights(source), f"the weights at {source}")


def load_tower(tower: nn.Module, modality: str, source: str) -> None:
    """Load one tower (``audio``, ``image`` or ``text``) from the weights of another run.

    Raises:
        UserError: nothing there, or a run without such a tower.
    """
    prefix = f"{modality}."
    weights = {key.removeprefix(prefix): value for key, value in read_weights(source).items() if key.startswith(prefix)}
    if not weights:
        raise UserError(f"{source} has no {modality} tower: point model.{modality}.init at a run that trained one")
    _load_strictly(tower, weights, f"the {modality} tower of {source}")


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """Weights from a run folder (its newest whole checkpoint), a checkpoint or export folder, or a .safetensors file.

    Raises:
        UserError: nothing of the kind there.
    """
    path = Path(source)
    if path.is_dir():
        path = (newest_whole(path) or path) / MODEL_FILE
    if not path.is_file():
        raise UserError(f"no weights at {source}: give a run folder, a checkpoint folder or a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): export it again") from None


def has_checkpoints(run_dir: Path) -> bool:
    """True when the run folder holds a checkpoint, whole or not."""
    return bool(_complete_checkpoints(run_dir))


def _load_strictly(module: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} is of another model than this recipe's: set the same names and sizes ({reason})"
        ) from None


def _complete_checkpoints(run_dir: Path) -> list[Path]:
    """The named checkpoints, newest first."""
    return sorted((run_dir / CHECKPOINTS).glob("step-*"), reverse=True)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _random_state(world: World) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _describe_files(folder: Path) -> dict[str, dict[str, str | int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
        for path in files
    }


def _is_whole(checkpoint: Path, world: World) -> bool:
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for number, (name, expected) in enumerate(sorted(manifest.items())):
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return False
            if number % world.size == world.rank and storage.sha256_of(path) != expected["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True
