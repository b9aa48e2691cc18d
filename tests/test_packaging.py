"""The files beside the code agree with the project, with each other, and are in the sdist."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from histostream.runtime.cli import main as histo_infer

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIG["project"]
PACKAGES = set(CONFIG["tool"]["setuptools"]["package-dir"].values())
PYTHONS = {
    name.rsplit(" ", 1)[1]
    for name in PROJECT["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
}
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
GUIDES = (*PAGES, *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
IMAGES = ("docker/cpu.Dockerfile", "docker/cuda.Dockerfile", "docker/histostream.def")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def links(page: str) -> list[str]:
    """Return the files that a page links to, as paths from the root."""
    found = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", text(page)))
    here = (ROOT / page).parent
    return [(here / link).resolve().relative_to(ROOT).as_posix() for link in found if "://" not in link]


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """Return the files that MANIFEST.in adds to the sdist."""
    files = importlib.import_module("setuptools.command.egg_info").FileList()  # which has no types
    with contextlib.chdir(ROOT):
        for line in text("MANIFEST.in").splitlines():
            if line and not line.startswith("#"):
                files.process_template_line(line)
    return {Path(name).as_posix() for name in files.files} | {  # which setuptools always takes
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
    }


def test_the_sdist_is_the_repository(packed: set[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}
    kept = {name for name in found if not name.startswith((".ci/", ".typecheck/"))}
    assert kept - packed == set()
    assert packed - kept == set()


@pytest.mark.parametrize("page", GUIDES)
def test_what_a_page_links_to_is_in_the_sdist(page: str, packed: set[str]) -> None:
    folders = {parent.as_posix() for name in packed for parent in Path(name).parents}
    assert set(links(page)) <= packed | folders


def test_the_newest_release_has_the_version_of_the_project() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    citation = text("CITATION.cff")
    cited = [re.findall(rf"^{key}: (.+)$", citation, re.MULTILINE) for key in ("version", "date-released")]
    assert [[headings[1][0]], [headings[1][1]]] == cited
    assert headings[1][0] == PROJECT["version"]


def test_the_citation_names_the_license_the_authors_and_each_method() -> None:
    citation = text("CITATION.cff")
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert f"\n  - name: {PROJECT['authors'][0]['name']}\n" in citation
    methods = {file.parent.name for file in (ROOT / "training" / "methods").glob("*/method.py")}
    assert set(re.findall(r"^    notes: method (\w+)$", citation, re.MULTILINE)) == methods


def test_the_workflow_runs_every_python_that_is_supported() -> None:
    workflow = text(".github/workflows/ci.yml")
    found = re.search(r"^ +python: (\[.+\])$", workflow, re.MULTILINE)
    assert found
    assert set(json.loads(found[1])) == PYTHONS
    assert set(re.findall(r"python-version: \"(.+)\"", workflow)) <= PYTHONS
    assert PROJECT["requires-python"].removeprefix(">=") == min(PYTHONS)


@pytest.mark.parametrize("page", [*GUIDES, ".github/workflows/ci.yml"])
def test_every_target_that_a_page_names_is_in_the_makefile(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    content = text(page)
    code = "\n".join(FENCE.findall(content))
    named = set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE))
    named |= set(re.findall(r"(?:`|run: )make ([a-z-]+)", content))
    assert named <= targets


@pytest.mark.parametrize("page", [*GUIDES, *IMAGES])
def test_every_extra_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"(?:\.\[|EXTRAS=)([a-z,]+)", text(page))
    extras = {name for some in named for name in some.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/extending.md"])
def test_a_guide_for_developers_names_what_is_there(page: str) -> None:
    guide = FENCE.sub("", text(page))
    top = PACKAGES | {"tests", "docs", "docker"}
    for name in re.findall(r"`([\w/.-]+/[\w.-]*)`", guide):
        if name.split("/")[0] in top:
            path = ROOT / name
            assert (path.parent if "NAME" in path.name else path).exists(), name
    for names, file in re.findall(r"((?:`\w+`(?: or | and )?)+) in `([\w/.]+\.py)`", guide):
        for name in re.findall(r"\w+(?=`)", names):
            defined = rf"^(?:def |class ){name}\b|^{name}(?::.+)? = "
            assert re.search(defined, text(file), re.MULTILINE), (name, file)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_built_from_files_that_exist_on_a_python_that_is_supported(image: str) -> None:
    recipe = text(image)
    allowed = set(re.findall(r"^!(.+)$", text(".dockerignore"), re.MULTILINE))
    if image.endswith(".def"):
        copied = set(re.findall(r"^    (\S+) /src/", recipe, re.MULTILINE))
    else:
        lines = re.findall(r"^COPY (?!--from)(.+) \S+$", recipe, re.MULTILINE)
        copied = {name for line in lines for name in line.split()}
    assert copied == allowed
    assert {"pyproject.toml", "constraints.txt", *PACKAGES} <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert set(re.findall(r"^(?:FROM|From:) python:(\d\.\d+)-", recipe, re.MULTILINE)) <= PYTHONS


def run_script(name: str, folder: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run a script of docker/ where the programs of a folder are found first."""
    done = subprocess.run(
        ["bash", str(ROOT / "docker" / name), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_building_without_a_docker_engine_is_one_line(tmp_path: Path) -> None:
    program(tmp_path / "docker", "echo no daemon >&2; exit 1")
    code, out, err = run_script("build.sh", tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no Docker engine" in err


def test_a_task_of_the_slurm_array_runs_its_line_of_the_list(tmp_path: Path) -> None:
    program(tmp_path / "histo-infer", 'printf "%s\\n" "$@"')
    slides = tmp_path / "slides.csv"
    slides.write_text("path\n/data/first.svs\n/data/the second.svs\n")
    arguments = ("slurm-array.sh", tmp_path, str(slides), "results")
    code, out, _ = run_script(*arguments, SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="4")
    slide, *options = out.splitlines()
    assert (code, slide) == (0, "/data/the second.svs")
    assert options == ["--out", "results", "--threads", "4"]
    help_text = CliRunner().invoke(histo_infer, ["--help"]).output
    assert {"--out", "--threads"} <= set(re.findall(r"^ +(--[a-z-]+)", help_text, re.MULTILINE))
    code, out, err = run_script(*arguments, SLURM_ARRAY_TASK_ID="3")
    assert (code, out, err.count("\n")) == (1, "", 1)
