"""The published methods: one folder is one paper, and this folder is the registry.

The folder of a method has ``method.py``, ``networks.py`` and its recipes, ``NAME.toml``; a small
method may be one file. Another package adds a method with an entry point of the group
``histostream.methods`` that names its module, which offers

``Config``
    Frozen dataclass; every default with its source, every type with its range (`checks`).
``build(config, classes, channels) -> State``
    The networks and their optimisers.
``step(state, batch) -> losses``
    Train on one batch. Networks are called through ``state.modules``, as a whole, and optimisers
    through their ``step``: there the loop puts mixed precision and the average over processes.
``validate(state, images, labels) -> (loss, predicted labels)``
    The loss that chooses the checkpoint.
``align_px(config) -> int``
    The sides of its images are multiples of this.
``deployed(state) -> nn.Module``
    The module that export wraps. Its attribute ``tile_px``, where it has one that is not 0, is the
    only side of a tile that it takes.

and may offer (`hook` gives the default of what is missing)

``score_kind(config) -> str``
    What the scores of ``deployed`` are; default "probability".
``least_px(config) -> int``, ``only_px(config) -> int``
    The smallest side of its images, default 1, and the only one, default 0, which is any. A run
    with another ``schedule.crop_px`` is refused before it starts.
``pools(config) -> names``
    The pools of images without labels that it trains on; default none.
``before_step(state, parts, step, steps)``
    Called before every step with all the data: measure it (in step 0), choose pseudo-labels, change
    the phase. Results are kept in the modules' buffers, so that a resumed run has them too.
``settle(state, parts)``
    Bring the batch statistics to what would ship, as by measuring them anew on clean images. The
    loop calls it before every validation, so that what ships is what is judged. The best checkpoint
    holds the statistics that it was judged with; training goes on with its own (all buffers are
    put back).
``eligible(config, done, steps) -> bool``
    Whether the best checkpoint may be that after ``done`` of ``steps`` steps; default always.
``finish(state, parts)``
    Called with the best checkpoint, settled as it was judged, before it is scored.
``paint(state, images) -> {name: images}``
    Further columns, (N, C, H, W) uint8, of the sample sheets of a run, whose own columns are
    ``image``, ``true`` and ``predicted``; default none.
``takes_class_weights(config) -> str``
    "" if the losses weigh pixels by ``state.class_weights``, else why they do not, for a message
    that ends with what to set; default: they do not.
``can_extend(config, done, steps, more) -> str``
    "" if a run of so many ``steps``, of which some are ``done``, can go on to ``more`` of them, else
    why not; default: it can. For methods whose steps depend on the number of all steps.
``explained(state) -> nn.Module``, ``EXPLAINED_BY``
    A second graph that can be exported, and the names of the modules that it needs; no default.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from types import ModuleType
from typing import Any

from histostream.wsi.errors import HistoError
from histostream.wsi.registry import Registry


class MethodError(HistoError, ValueError):
    """There is no method of that name."""

    exit_status = 2


METHODS = Registry(__name__, "histostream.methods", "method", MethodError, submodule="method")
DEFAULTS: dict[str, Callable[..., Any]] = {
    "score_kind": lambda config: "probability",
    "least_px": lambda config: 1,
    "only_px": lambda config: 0,
    "pools": lambda config: (),
    "before_step": lambda state, parts, step, steps: None,
    "settle": lambda state, parts: None,
    "eligible": lambda config, done, steps: True,
    "finish": lambda state, parts: None,
    "paint": lambda state, images: {},
    "takes_class_weights": lambda config: "the method does not weigh pixels by their class",
    "can_extend": lambda config, done, steps, more: "",
}


def load_method(name: str) -> ModuleType:
    """Import the module of the method called ``name``.

    Raises
    ------
    MethodError
        If there is none; the message names the nearest.
    """
    method: ModuleType = METHODS.load(name)
    return method


def hook(method: ModuleType, name: str) -> Callable[..., Any]:
    """Return an optional function of a method, or its default."""
    function: Callable[..., Any] = getattr(method, name, DEFAULTS[name])
    return function


def recipes() -> dict[str, Traversable]:
    """Return the recipes that ship, by name: the TOML files in the folders of all methods."""
    folders = [folder for folder in resources.files(__name__).iterdir() if folder.is_dir()]
    return {
        file.name.removesuffix(".toml"): file
        for folder in folders
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
