"""Annotated images and a method in, a checkpoint out."""

from typing import TYPE_CHECKING

from histostream.wsi.lazy import import_on_use

if TYPE_CHECKING:
    from histostream.training.checkpoint import Checkpoint, CheckpointError
    from histostream.training.data import DataError, DataSet
    from histostream.training.datasets import open_dataset
    from histostream.training.device import Compute
    from histostream.training.loop import train
    from histostream.training.methods import load_method
    from histostream.training.recipe import Recipe, read_recipe

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Compute",
    "DataError",
    "DataSet",
    "Recipe",
    "load_method",
    "open_dataset",
    "read_recipe",
    "train",
]

_MODULES = {
    "checkpoint": ("Checkpoint", "CheckpointError"),
    "data": ("DataError", "DataSet"),
    "datasets": ("open_dataset",),
    "device": ("Compute",),
    "loop": ("train",),
    "methods": ("load_method",),
    "recipe": ("Recipe", "read_recipe"),
}
__getattr__ = import_on_use(__name__, _MODULES)
