"""Slides in object storage, ``s3://`` and ``gs://``, through fsspec's s3fs and gcsfs."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from histostream.wsi.errors import SlideError
from histostream.wsi.optional import install_command
from histostream.wsi.slides.sources.base import MAX_INDEX_BYTES, SlidePart, file_name, is_plain_name, named_files

SCHEMES = ("s3", "gs")

LOGGERS = ("s3fs", "aiobotocore", "botocore", "gcsfs", "google", "asyncio")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
    """for a public bucket FSSPEC_S3='{"anon": true}'""",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login; "
    """for a public bucket FSSPEC_GS='{"token": "anon"}'""",
}
VERSIONS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime")  # in this order


def find_parts(source: str) -> list[SlidePart]:
    """List the files of a slide: the slide's own first, then those that belong to it."""
    file_name(source)  # raises if it is not a plain name
    with _translated_errors(source):
        fs, path = _filesystem(source)
        infos = _files_below(fs, path, maxdepth=1) if source.endswith("/") else [fs.info(path), *_companions(fs, path)]
    if not infos or infos[0]["type"] != "file":
        raise SlideError(f"{source}: not an object; name one, or end a DICOM series' folder with /")
    return [_part(source, info, path.rpartition("/")[0]) for info in infos]


def read_part(part: SlidePart, chunk_bytes: int) -> Generator[bytes]:
    """Yield the content of one object, a request for each chunk."""
    with _translated_errors(part.address):
        fs, path = _filesystem(part.address)
        with fs.open(path, "rb", cache_type="none") as file:
            if _version(file.details) != part.modified:
                raise SlideError(f"{part.address}: replaced while it was staged; try again")
            while chunk := file.read(chunk_bytes):
                yield chunk


def list_files(url: str) -> list[str]:
    """List the URLs of the objects below a folder (``.../``), or that match a pattern, sorted."""
    with _translated_errors(url):
        fs, path = _filesystem(url)
        if url.endswith("/"):
            infos = _files_below(fs, path)
        elif fs.exists(path):  # a name with [ or * in it
            return [url]
        else:
            infos = list(fs.glob(path, detail=True).values())
    scheme = url.partition("://")[0]
    return sorted(f"{scheme}://{info['name']}" for info in infos if info["type"] == "file")


def _files_below(fs: Any, path: str, maxdepth: int | None = None) -> list[dict[str, Any]]:
    infos = fs.find(path, maxdepth=maxdepth, detail=True)
    return [
        infos[name]
        for name in sorted(infos)
        # Some consoles make an empty object for a folder.
        if infos[name]["type"] == "file" and name != path and not name.endswith("/")
        if not name.rpartition("/")[2].startswith(".")
    ]


def _companions(fs: Any, path: str) -> list[dict[str, Any]]:
    """List the further files of a .mrxs, .dcm, .vms or .vmu; see `disk`."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".mrxs":
        return _files_below(fs, path[: -len(suffix)])
    if suffix not in {".dcm", ".vms", ".vmu"}:
        return []
    beside = _files_below(fs, path.rpartition("/")[0], maxdepth=1)
    files = {info["name"].rpartition("/")[2]: info for info in beside if info["name"] != path}
    if suffix == ".dcm":
        return [files[name] for name in sorted(files) if name.endswith(".dcm")]
    names = named_files(fs.cat_file(path, start=0, end=MAX_INDEX_BYTES))
    return [files[name] for name in sorted(names & files.keys())]


def _part(source: str, info: dict[str, Any], folder: str) -> SlidePart:
    name = str(info["name"])[len(folder) :].lstrip("/")
    if not all(is_plain_name(part) for part in name.split("/")):
        raise SlideError(f"{source}: {name!r} in it is not a plain file name; rename it there")
    scheme = source.partition("://")[0]
    return SlidePart(f"{scheme}://{info['name']}", name, int(info["size"]), _version(info))


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]).strip('"') for key in VERSIONS if info.get(key)), "")


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the file system and the path in it, without the scheme."""
    scheme, _, path = url.partition("://")
    scheme = scheme.lower()
    if not path or path.startswith("/"):
        raise SlideError(f"{url}: names no bucket; write {scheme}://bucket/path")
    try:
        import fsspec

        for library in LOGGERS:  # they also log the traceback of what they raise
            if not logging.getLogger(library).handlers:
                logging.getLogger(library).addHandler(logging.NullHandler())
        # Without listings kept: an object may be replaced while a cohort runs.
        return fsspec.filesystem(scheme, use_listings_cache=False), path.rstrip("/")
    except ImportError:
        raise SlideError(f"{scheme}:// needs {PACKAGES[scheme]}: {install_command('cloud')}") from None


@contextmanager
def _translated_errors(url: str) -> Iterator[None]:
    """Turn the many kinds of errors that the libraries raise into a `SlideError` of one line."""
    scheme = url.partition("://")[0].lower()
    try:
        yield
    except SlideError:
        raise
    except _library_errors(scheme) as error:
        raise _slide_error(url, scheme, error) from None


def _library_errors(scheme: str) -> tuple[type[Exception], ...]:
    try:
        from aiohttp import ClientError as HttpError

        if scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            return OSError, ValueError, HttpError, BotoCoreError, ClientError
        from gcsfs.retry import ChecksumError
        from gcsfs.retry import HttpError as GoogleError
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException
    except ImportError:  # `_filesystem` names the missing package
        return OSError, ValueError
    return (
        OSError,
        ValueError,
        HttpError,
        ChecksumError,
        GoogleError,
        GoogleAuthError,
        RequestException,
    )


def _slide_error(url: str, scheme: str, error: Exception) -> SlideError:
    kind, message = type(error).__name__, " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return SlideError(f"{url}: there is no such object or bucket; check the URL")
    if "Credential" in kind or kind in {"ProfileNotFound", "RefreshError"}:
        return SlideError(f"{url}: no credentials ({message}); {CREDENTIALS[scheme]}")
    status = getattr(error, "code", None)  # of gcsfs; for Forbidden it raises a bare OSError
    if isinstance(error, PermissionError) or status in {401, 403} or message.startswith("Forbidden"):
        return SlideError(f"{url}: access denied ({message}); {CREDENTIALS[scheme]}")
    if isinstance(error, ValueError) or kind == "ParamValidationError":
        return SlideError(f"{url}: cannot be requested ({message}); check the URL and the endpoint")
    return SlideError(  # after five and more attempts of the libraries
        f"{url}: the storage cannot be reached ({message}); check the network and the endpoint"
    )
