"""Commands called in this process: a new one would import torch again, for seconds."""

from __future__ import annotations

import subprocess

import click
from click.testing import CliRunner


def call(command: click.Command, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call a command as its entry point does; an exception that it lets through is raised here."""
    words = [*map(str, arguments)]
    result = CliRunner().invoke(command, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)
