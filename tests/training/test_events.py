"""Event files: what TensorBoard's own reader finds in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from histostream.training import events, loop
from histostream.training.cli import main
from histostream.training.data import DataSet
from histostream.training.methods.imems import method as imems
from histostream.wsi.errors import OutputError
from tests.commands import call
from tests.training.resuming import logged
from tests.training.test_running import recipe


def test_without_the_package_the_command_says_how_to_install_it(
    nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, purpose: str, extra: str) -> None:
        raise OutputError(f"{purpose} {module}: pip install 'histostream[{extra}]'")

    monkeypatch.setattr(events, "require", missing)
    done = call(main, "--data", nuclei_folder, "--out", tmp_path / "run", "--mpp", 0.5, "--tensorboard")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "histo-train: --tensorboard needs the package tensorboard: pip install 'histostream[tensorboard]'"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_every_step_is_in_the_event_files_once_though_the_run_was_killed(found: DataSet, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Killed(Exception):
        pass

    def kill(progress: loop.Progress) -> None:
        if progress.step == 7:  # the checkpoint is of step 6
            raise Killed

    with pytest.raises(Killed):
        loop.train(recipe(steps=10), imems, found, tmp_path, tensorboard=True, report=kill)
    loop.train(recipe(steps=10), imems, found, tmp_path, tensorboard=True)
    reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    rows = logged(tmp_path)
    tags = {
        "loss/l1": "l1",
        "loss/adversarial": "adversarial",
        "learning_rate/generator": "rate_generator",
        "validation/loss": "validation_loss",
        "validation/dice": "validation_dice",
        "validation_dice/class 0": "dice_class 0",
    }
    for tag, column in tags.items():
        read = [(event.step, event.value) for event in reader.Scalars(tag)]
        wanted = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        assert [step for step, _ in read] == [step for step, _ in wanted], tag
        assert [value for _, value in read] == pytest.approx([value for _, value in wanted], rel=1e-5)
    assert [image.step for image in reader.Images("samples")] == [2, 4, 6, 8, 10]
    assert not any(math.isnan(event.value) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag))
