"""A short fuzz at every run of the tests; ``benchmarks.fuzz`` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.robustness.fuzz import make_inputs
from tests.robustness.hostile import KINDS, make_case
from tests.robustness.sandbox import Sandbox

# A number of examples and not a time, so that every machine tries the same ones; a failure is
# reported as it was found, since a smaller one takes longer than the whole run.
EXAMPLES = {"tiff": 20, "image": 10, "dicom": 5, "name": 5, "roi": 10, "card": 15, "onnx": 15}


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_accepted_whole_or_refused_clearly(sandbox: Sandbox, kind: str) -> None:
    @settings(
        max_examples=EXAMPLES[kind],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(rng=st.randoms(use_true_random=True))
    def fuzz(rng: random.Random) -> None:
        case = make_case(kind, rng)
        outcome = sandbox.run(case)
        assert outcome.verdict != "failed", f"{case.what[:300]!r}: {outcome.message}"

    fuzz()


def test_seed_and_number_name_an_input() -> None:
    first, again = (list(make_inputs(3, 24, None)) for _ in range(2))
    assert first == again
    assert {case.kind for _, case in first} == set(KINDS)
    assert first[5][1] != list(make_inputs(4, 6, None))[5][1]


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_stay_in_their_folder(kind: str) -> None:
    for seed in range(20):
        for name in make_case(kind, random.Random(seed)).files:
            assert not Path(name).is_absolute()
            assert ".." not in Path(name).parts
