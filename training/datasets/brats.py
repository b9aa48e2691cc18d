"""BraTS 2017: tumours in MRI of the brain, as half-slices with and without (Menze et al. 2015).

``HGG/`` and ``LGG/`` with a folder for each patient, and in it ``NAME_flair.nii.gz``,
``NAME_t1ce.nii.gz``, ``NAME_t1.nii.gz``, ``NAME_t2.nii.gz`` and ``NAME_seg.nii.gz``, as published.
Cut up as for the paper of image-to-image translation (003, section 4.2, and its authors' code):
axial slices, split into hemispheres of 240 x 120 pixels; those with a quarter of brain or more.
Needs nibabel (extra ``nifti``).

Unlike there, images have 1 or 3 of the 4 sequences, since HistoStream's images are grey or RGB; and
the bias field is not corrected (N4), which has to be done to the files beforehand.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histostream.training.data import DataError, DataSet, StoredPicture, StoredSample
from histostream.training.datasets._files import collect

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

GRADES = ("HGG", "LGG")
SEQUENCES = ("flair", "t1ce", "t1", "t2")
SUFFIXES = (".nii.gz", ".nii")
CLASSES = (("background", (0, 0, 0)), ("tumour", (255, 120, 40)))
MPP = 1000.0  # 1 mm
BRAIN = 0.25  # of a half-slice, at least; paper
TUMOUR = 0.01  # of the brain, at least, in presence images; paper
DEVIATIONS = 5  # that are -1 and 1; authors' code, so that a tanh has them
HELD_BACK = 0.1  # of the patients of each grade, for validation and as many for the test; paper


def read(path: Path, *, sequences: str = "flair,t1ce,t2", labelled: float = 0.01, seed: int = 0) -> DataSet:
    """Read the volumes; pools "presence" and "absence" are half-slices of the training patients.

    Training, validation and test images are half-slices with tumour. All of them are kept in
    memory, about 3 GB of the 285 patients. Grey 128 is the mean of the brain, and the background.

    Parameters
    ----------
    path
        Folder of ``HGG`` and ``LGG``, or of one of them.
    sequences
        One or three, with commas between them.
    labelled
        Share of the training volumes that have masks, one at least; 0.01 in the paper.
    seed
        Another seed is another division of the patients, and another choice of masks.

    Raises
    ------
    DataError
        If an option does not fit, or a file is missing or cannot be used.
    """
    names = tuple(sequences.split(","))
    if len(names) not in (1, 3) or len(set(names) & set(SEQUENCES)) != len(names):
        raise DataError(f"sequences={sequences!r}: give one or three of {', '.join(SEQUENCES)}")
    if not 0 < labelled <= 1 or seed < 0:
        raise DataError(f"labelled={labelled}, seed={seed}: use more than 0 up to 1, and 0 or more")
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for grade in GRADES:
        patients = _patients(path / grade)
        order = [patients[i] for i in rng.permutation(len(patients))]
        first, second = int(HELD_BACK * len(order)), -int(-HELD_BACK * len(order) // 1)
        parts["validation"] += order[:first]
        parts["test"] += order[first : first + second]
        parts["train"] += order[first + second :]
    if not parts["train"]:
        raise DataError(f"{path}: no patient to train on in its {' or '.join(GRADES)}; fetch the whole set")
    read_part = {name: collect(lambda folder: _half_slices(folder, names), folders) for name, folders in parts.items()}
    with_tumour = {n: [s for present, _ in v for s in present] for n, v in read_part.items()}
    volumes = [present for present, _ in read_part["train"] if present]
    chosen = rng.permutation(len(volumes))[: max(1, round(labelled * len(volumes)))]
    train = tuple(s for i in sorted(chosen) for s in volumes[i])
    return DataSet(
        "brats",
        CLASSES,
        MPP,
        train,
        tuple(with_tumour["validation"]),
        tuple(with_tumour["test"]),
        pools={
            "presence": tuple(StoredPicture(s.name, s.group, s.image) for s in with_tumour["train"]),
            "absence": tuple(p for _, absent in read_part["train"] for p in absent),
        },
    )


def _patients(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _half_slices(folder: Path, sequences: Sequence[str]) -> tuple[list[StoredSample], list[StoredPicture]]:
    """Cut a patient's volumes into images with tumour and without."""
    volumes = [_volume(folder, name) for name in sequences]
    tumour = _volume(folder, "seg") > 0  # labels 1, 2 and 4: the whole tumour
    if len({v.shape for v in (*volumes, tumour)}) > 1:
        shapes = ", ".join(str(v.shape) for v in (*volumes, tumour))
        raise DataError(f"{folder}: its volumes differ in size ({shapes}); fetch them again")
    brain = np.any([v != 0 for v in volumes], axis=0)
    if not brain.any():
        raise DataError(f"{folder}: no brain in it, all voxels are 0; leave this patient out")
    images = np.stack([_uint8(v, brain) for v in volumes], axis=-1)
    present, absent = [], []
    middle = images.shape[0] // 2
    for z in range(images.shape[2]):
        for side, xs in (("left", slice(0, middle)), ("right", slice(middle, 2 * middle))):
            inside = brain[xs, :, z]
            if inside.mean() < BRAIN:
                continue
            # (x, y) as stored -> rows and columns.
            image = np.ascontiguousarray(images[xs, :, z].swapaxes(0, 1))
            labels = np.ascontiguousarray(tumour[xs, :, z].swapaxes(0, 1)).astype(np.uint8)
            name = f"{folder.name}_{z:03d}_{side}"
            if labels.sum() > TUMOUR * inside.sum():
                present.append(StoredSample(name, folder.name, image, labels))
            elif not labels.any():
                absent.append(StoredPicture(name, folder.name, image))
    return present, absent


def _uint8(volume: NDArray[np.float32], brain: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Centre at the mean of the brain; 5 standard deviations are the whole range."""
    values = volume[brain]
    scaled = (volume - values.mean()) / (DEVIATIONS * values.std() + 1e-6)
    scaled[~brain] = 0
    return np.asarray((np.clip(scaled, -1, 1) + 1) * 127.5 + 0.5, np.uint8)


def _volume(folder: Path, name: str) -> NDArray[np.float32]:
    import nibabel

    files = [p for suffix in SUFFIXES if (p := folder / f"{folder.name}_{name}{suffix}").is_file()]
    if not files:
        raise DataError(f"{folder}: no {folder.name}_{name}{SUFFIXES[0]} in it; fetch the whole set")
    try:
        image: Nifti1Image | Any = nibabel.load(files[0])
        volume = np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as e:
        raise DataError(f"{files[0]}: cannot be read ({e}); fetch it again") from e
    if volume.ndim != 3 or not np.isfinite(volume).all():
        raise DataError(f"{files[0]}: {volume.shape}, or values that are no numbers: no volume; fetch it again")
    return volume
