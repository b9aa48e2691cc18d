from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from histostream.wsi.console import memory_mib


@click.command()
@click.option("--max-memory", type=memory_mib, default=None)
def command(max_memory: int | None) -> None:
    click.echo(repr(max_memory))


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("1GiB", 1024),
        ("900MiB", 900),
        ("900", 900),
        ("2GB", 1907),  # of 10^9 bytes; the part of a MiB is dropped
        ("1.5 gib", 1536),
        ("700mb", 667),
        ("1TiB", 1024 * 1024),
        ("0", 0),  # the option's own limit is the command's affair
    ],
)
def test_sizes_of_memory_are_read_as_people_write_them(text: str, mib: int) -> None:
    done = CliRunner().invoke(command, ["--max-memory", text])
    assert (done.exit_code, done.output) == (0, f"{mib}\n")


@pytest.mark.parametrize("text", ["1G", "GiB", "-1GiB", "1e3", "lots", "", "1GiB2", "1kB", "nan"])
def test_what_is_no_size_is_refused_with_what_to_write(text: str) -> None:
    done = CliRunner().invoke(command, [f"--max-memory={text}"])
    assert done.exit_code == 2
    assert repr(text) in done.output
    assert "write 1GiB, 900MiB, 2GB, or a number of MiB" in " ".join(done.output.split())


def test_without_the_option_there_is_no_bound() -> None:
    assert CliRunner().invoke(command, []).output == "None\n"
