"""Shared parts of the ``histo-*`` commands: grouped options, settings files, errors in one line."""

from __future__ import annotations

import functools
import logging
import re
import stat
import sys
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from histostream.wsi.errors import HistoError, printable
from histostream.wsi.optional import install_command

MIB = 1024 * 1024
MAX_SETTINGS_BYTES = MIB
BYTES = {"MIB": MIB, "GIB": 1024 * MIB, "TIB": MIB * MIB, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_mib(text: str) -> int:
    """Return whole MiB of a size of memory: ``1GiB``, ``900MiB``, ``2GB``, or a number of MiB.

    It is rounded down, so that a limit stays a limit. It is the type of an option.

    Raises
    ------
    click.BadParameter
        If it is not a size.

    Examples
    --------
    >>> memory_mib("1.5GiB"), memory_mib("900")
    (1536, 900)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", text.strip().upper())
    unit = BYTES.get(match[2] or "MIB") if match else None
    if match is None or unit is None:
        raise click.BadParameter(f"{text!r} is not a size of memory: write 1GiB, 900MiB, 2GB, or a number of MiB")
    return int(float(match[1]) * unit / MIB)


class AliasedOption(click.Option):
    """An option that also takes older names, which ``--help`` does not list."""

    def __init__(self, *args: Any, aliases: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aliases = tuple(aliases)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add all names to the parser of a command line."""
        listed = self.opts
        self.opts = [*listed, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = listed


class GroupedOption(AliasedOption):
    """An option that ``--help`` lists under the title ``group``."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose ``--help`` lists `GroupedOption` under their titles, in order."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, and one for the other options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        others = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or isinstance(parameter, click.Argument):
                continue
            if isinstance(parameter, GroupedOption):
                sections.setdefault(parameter.group, []).append(record)
            else:
                others.append(record)
        for title, records in (*sections.items(), ("Other options", others)):
            with formatter.section(title):
                formatter.write_dl(records)


def option_group(title: str) -> Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Return ``click.option`` for options that ``--help`` lists under a title."""
    return functools.partial(click.option, cls=GroupedOption, group=title)


class SettingsError(click.ClickException):
    """A settings file cannot be used; shown in one line."""

    exit_code = 2  # as for other wrong options
    command = "histostream"

    def show(self, file: Any = None) -> None:
        """Write the message to stderr."""
        fail(self.command, self.message)


def read_settings(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Use a TOML file's values as defaults of a command; the callback of an eager option.

    A key is an option's long name without the dashes (``max-memory = "2GiB"``), or the name of an
    argument in lower case (``slides = ["a.svs"]``). The command line takes precedence.

    Raises
    ------
    SettingsError
        If the file cannot be read or is not TOML, or a key is unknown, or a value is of another type.
    """
    if path is not None:
        try:
            defaults = _read_defaults(context.command, path)
        except SettingsError as error:
            error.command = context.command_path
            raise
        context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _read_defaults(command: click.Command, path: Path) -> dict[str, Any]:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_SETTINGS_BYTES:
            raise SettingsError(f"{path}: is not a file of up to {MAX_SETTINGS_BYTES} bytes; name a TOML file")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not a TOML file ({error}); correct it") from error
    known = _settings(command)
    defaults = {}
    for key, value in values.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        defaults[str(known[key].name)] = _setting(f"{path}: {key}", known[key], value)
    return defaults


def _settings(command: click.Command) -> dict[str, click.Parameter]:
    """Return the parameters that a settings file may set, by their keys."""
    parameters: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            parameters[str(parameter.name)] = parameter
        elif not parameter.is_eager:
            for name in (max(parameter.opts, key=len), *getattr(parameter, "aliases", ())):
                parameters[name.lstrip("-")] = parameter
    return parameters


def _setting(key: str, parameter: click.Parameter, value: Any) -> Any:
    """Return a value of a settings file as the command line would pass it."""
    several = isinstance(parameter, click.Argument) or parameter.multiple
    listed = "," in (parameter.metavar or "")  # written with commas on the command line
    words = value if isinstance(value, list) else [value]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        expected, fits = "true or false", isinstance(value, bool)
    elif parameter.type is click.INT:
        expected, fits = "a whole number", type(value) is int
    elif parameter.type is click.FLOAT:
        expected, fits = "a number", type(value) in (int, float)
    elif several or listed:
        expected = "a text, or a list of texts"
        fits = all(type(word) in (str, int) for word in words)
    else:
        expected, fits = "a text", isinstance(value, str) or type(value) is int
    if not fits:
        raise SettingsError(f"{key} = {value!r}: expected {expected}")
    if several:
        return [str(word) for word in words]
    return ",".join(map(str, words)) if listed else value


def show_only_our_warnings(command: str, formatter: logging.Formatter | None = None) -> None:
    """Show HistoStream's own warnings on stderr, and no warnings of libraries.

    Parameters
    ----------
    command
        Name of the command, with which each line begins.
    formatter
        Writes the lines in another form.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(formatter or logging.Formatter(f"{command}: %(message)s"))
    handler.addFilter(logging.Filter("histostream"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if not sys.warnoptions:  # unless Python's option -W asks for them
        warnings.simplefilter("ignore")


def fail(command: str, message: str) -> None:
    """Write an error in one line to stderr."""
    click.echo(f"{command}: {printable(message)}", err=True)


def one_line_errors(
    command: str, *, out_of_memory: str, stopped: str, extra: str, extras: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: a command writes its error in one line and exits with the error's status, or 130 if stopped.

    Parameters
    ----------
    command
        Name of the command, as "histo-export".
    out_of_memory
        Advice if memory runs out.
    stopped
        What a stopped command leaves, unless the exception says it.
    extra
        Extra of HistoStream that installs what the command needs.
    extras
        Other extras, by the packages that they install.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except HistoError as error:
                message, status = str(error), error.exit_status
            except ImportError as error:
                if error.name is None or error.name.startswith("histostream"):
                    raise
                package = error.name.split(".")[0]
                needed = {"onnxruntime": "cpu", **extras}.get(package, extra)
                message = f"{package} is not installed: {install_command(needed)}"
                status = 1
            except BrokenPipeError:  # of the output, as with `| head`
                raise
            except OSError as error:  # where nothing better is known, as of a current folder that was removed
                where = f"{error.filename}: " if error.filename else ""
                message, status = f"{where}{error.strerror or error}; check that the folders and drives are there", 1
            except MemoryError:
                message, status = f"out of memory; {out_of_memory}", 1
            except KeyboardInterrupt as error:
                message, status = f"stopped; {error.args[0] if error.args else stopped}", 130
            else:
                return
            fail(command, message)
            sys.exit(status)

        return guarded

    return decorate
