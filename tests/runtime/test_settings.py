"""Options from a TOML file, a dry run, and what is said in JSON or in a log file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from histostream.runtime import messages
from histostream.runtime.cli import main
from tests.runtime.conftest import random_pixels, write_slide


@pytest.fixture
def slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_slide(tmp_path / "slide.tif", random_pixels(400, 300))


def infer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="histo-infer")


def settings(text: str) -> Path:
    path = Path("run.toml")
    path.write_text(text)
    return path


def test_a_file_gives_options_and_the_command_line_counts_more(slide: Path, tiny_bundle: Path) -> None:
    file = settings(
        f"""
        slides = ["slide.tif"]
        model = "{tiny_bundle}"
        out = "ignored"
        tissue = false
        max-memory = "2GiB"
        annotations = ["qupath", "dsa"]
        objects = ["csv"]
        """
    )
    done = infer("--config", file, "--out", "results")
    assert done.exit_code == 0, done.stderr
    folder = Path("results/slide")
    run = json.loads((folder / "run.json").read_text())
    assert run["options"]["max_memory_mib"] == 2048
    assert run["options"]["tissue"] is False
    assert {"objects.geojson.gz", "annotations.json", "objects.csv"} <= set(run["outputs"])
    assert not Path("ignored").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("overlap-px = 3", "unknown key 'overlap-px'; known: slides, model"),
        ("config = 'other.toml'", "unknown key 'config'"),
        ("[tiles]\noverlap = 3", "unknown key 'tiles'"),
        ("overlap = 'much'", "overlap = 'much': expected a whole number"),
        ("overlap = true", "overlap = True: expected a whole number"),
        ("mpp = '0.5'", "mpp = '0.5': expected a number"),
        ("tissue = 1", "tissue = 1: expected true or false"),
        ("out = 3.5", "out = 3.5: expected a text"),
        ("objects = [1.5]", "objects = [1.5]: expected a text, or a list of texts"),
        ("overlap = ", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_is_written(text: str, complaint: str, slide: Path) -> None:
    done = infer(slide, "--config", settings(text))
    assert done.exit_code == 2
    assert done.stderr.startswith("histo-infer: run.toml: ")
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert sorted(p.name for p in Path().iterdir()) == ["run.toml", "slide.tif"]


def test_a_missing_file_is_one_line(slide: Path) -> None:
    done = infer(slide, "--config", "none.toml")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "none.toml: cannot be read (No such file or directory); check the path" in done.stderr


@pytest.mark.parametrize("name", [".", "/dev/zero", "large.toml"])
def test_what_is_no_file_of_a_sane_size_is_one_line(name: str, slide: Path) -> None:
    with Path("large.toml").open("wb") as file:
        file.truncate(5 << 30)
    done = infer(slide, "--config", name)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"{name}: is not a file of up to 1048576 bytes; name a TOML file" in done.stderr


def test_a_value_outside_of_its_choices_is_refused_as_on_the_command_line(slide: Path) -> None:
    done = infer(slide, "--config", settings("blend = 'magic'"))
    assert done.exit_code == 2
    assert "'magic' is not one of 'auto', 'hann'" in done.stderr


def test_a_dry_run_says_what_a_run_does_and_writes_nothing(slide: Path, tiny_bundle: Path) -> None:
    arguments = (slide, "--model", tiny_bundle, "--no-tissue", "--dry-run")
    done = infer(*arguments, "--log-json")
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    plan = json.loads(line)
    assert (plan["width"], plan["height"], plan["slide_mpp"]) == (400, 300, 0.5)
    assert plan["problem"] == ""
    assert not Path("out").exists()

    ran = infer(*arguments[:-1])
    assert ran.exit_code == 0, ran.stderr
    run = json.loads(Path("out/slide/run.json").read_text())
    assert plan["tiles"] == run["grid"]["tiles_inferred"]
    assert plan["tiles_in_all"] == run["grid"]["tiles"]
    again = infer(*arguments)
    assert "done already" in again.stdout


def test_a_dry_run_names_every_problem(slide: Path, tiny_bundle: Path) -> None:
    Path("text.svs").write_text("no slide")
    done = infer(slide, "text.svs", "none.svs", "--model", tiny_bundle, "--dry-run")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["slide.tif", "text.svs", "none.svs"]
    assert all(": problem: " in line for line in lines[1:3])
    assert lines[3].startswith("3 slides, 2 with a problem: about ")
    assert lines[3].endswith("; nothing was written")


def test_a_log_of_json_has_one_object_a_line(slide: Path, tiny_bundle: Path) -> None:
    Path("text.svs").write_text("no slide")
    done = infer(slide, "text.svs", "--model", tiny_bundle, "--no-tissue", "--log-json")
    assert done.exit_code == 1
    assert done.stdout == ""
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in said] == ["model", "slide", "slide", "cohort"]
    by_slide = {line["slide"]: line for line in said[1:3]}
    assert by_slide["slide.tif"]["status"] == "done"
    assert sum(c["pixels"] for c in by_slide["slide.tif"]["classes"]) == 400 * 300
    assert by_slide["text.svs"]["status"] == "failed"
    assert "text.svs" in by_slide["text.svs"]["message"]
    assert (said[3]["done"], said[3]["failed"]) == (1, 1)


def test_a_log_file_shows_how_far_a_slide_is(slide: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PROGRESS_S", 1e-9)
    done = infer(slide, "--model", tiny_bundle, "--no-tissue", "--batch", "1")
    assert done.exit_code == 0, done.stderr
    far = [line for line in done.stderr.splitlines() if " %, " in line]
    assert far
    assert far[-1].startswith("histo-infer: slide: 100 %, ")


def test_nothing_is_said_of_progress_before_its_time() -> None:
    said: list[object] = []
    report = messages._report_every(3600, said.append)
    for done in range(10):
        report(done, 10)
    assert not said
