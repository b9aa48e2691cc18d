"""Slides behind ``http://`` and ``https://`` URLs, read with the standard library."""

from __future__ import annotations

import base64
import email.message
import http.client
import netrc
import os
import ssl
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from histostream.wsi.errors import SlideError
from histostream.wsi.slides.sources.base import SlidePart, TransientError, file_name, redact_url

SCHEMES = ("http", "https")

TIMEOUT_S = 60  # of silence, not of the whole download
MANY_FILES = {".mrxs", ".vms", ".vmu"}  # formats of several files, which http cannot list
BUSY = {408, 425, 429, *range(500, 600)}


def find_parts(source: str) -> list[SlidePart]:
    """List the one file of a slide, with its size and version from the server.

    The request is GET, not HEAD, since a signed URL is signed for one method. The body is not read.
    """
    name = file_name(source)
    if PurePosixPath(name).suffix.lower() in MANY_FILES:
        raise SlideError(
            f"{redact_url(source)}: this format is several files, and http has no listing; "
            "download all of them and pass the local one"
        )
    with _opened(source) as response:
        headers = response.headers
    size = headers.get("Content-Length", "")
    if not size.isdecimal() or headers.get("Content-Encoding", "identity") != "identity":
        raise SlideError(
            f"{redact_url(source)}: the server does not announce the size of this file; "
            "download it and pass the local one"
        )
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return [SlidePart(source, name, int(size), version)]


def read_part(part: SlidePart, chunk_bytes: int) -> Generator[bytes]:
    """Yield the content of the file; if the connection is cut, it ends early."""
    with _opened(part.address) as response:
        while chunk := response.read(chunk_bytes):
            yield chunk


def list_files(url: str) -> list[str]:
    """Refuse: a web server has no listings."""
    raise SlideError(f"{redact_url(url)}: http has no listings; name every slide, in a .csv if many")


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other hosts, but not from https to http or to a local file."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage | email.message.Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != req.type:
            return None  # it then raises an HTTPError of that status
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@contextmanager
def _opened(url: str) -> Iterator[http.client.HTTPResponse]:
    """Open a URL; turn errors, also those while it is read, into a `SlideError` of one line."""
    try:
        with _opener().open(_request(url), timeout=TIMEOUT_S) as response:
            yield response
    except SlideError:
        raise
    except HTTPError as error:
        error.close()
        raise _refused(url, error) from None
    except (ssl.SSLCertVerificationError, URLError) as error:
        raise _unreachable(url, getattr(error, "reason", error)) from None
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise SlideError(f"{redact_url(url)}: not a URL that can be opened ({error}); check it") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from None


def _opener() -> urllib.request.OpenerDirector:
    # Not build_opener: it would open file:, ftp: and data: as well.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SameScheme(),
    ):
        opener.add_handler(handler)
    return opener


def _request(url: str) -> urllib.request.Request:
    if "@" in urlsplit(url).netloc:
        raise SlideError(
            f"{redact_url(url)}: name and password in a URL would be recorded with it; put them into ~/.netrc"
        )
    request = urllib.request.Request(quote(url, safe="%/:?&=+$,;#@!*'()[]~"))
    request.add_header("User-Agent", "histostream")
    login = _login(urlsplit(url).hostname or "")
    if login:  # unredirected: not shown to other hosts
        request.add_unredirected_header("Authorization", f"Basic {login}")
    return request


def _login(host: str) -> str | None:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        login = netrc.netrc(str(path)).authenticators(host)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        raise SlideError(f"{path}: cannot be read ({error}); correct or remove it") from None
    return base64.b64encode(f"{login[0]}:{login[2]}".encode()).decode() if login else None


def _refused(url: str, error: HTTPError) -> SlideError:
    status = f"{error.code} {error.reason}".strip()
    if error.code in {401, 403}:
        return SlideError(
            f"{redact_url(url)}: access denied ({status}); check whether the signed URL has expired, "
            "or put name and password into ~/.netrc"
        )
    if error.code in {404, 410}:
        return SlideError(f"{redact_url(url)}: there is no such file ({status}); check the URL")
    if error.code in BUSY:
        return TransientError(f"{redact_url(url)}: the server fails ({status}); try again later")
    if 300 <= error.code < 400:
        to = redact_url(error.headers.get("Location") or "nowhere")
        return SlideError(
            f"{redact_url(url)}: it redirects to {to}, which is not followed; pass that URL itself if you trust it"
        )
    return SlideError(f"{redact_url(url)}: the server refuses it ({status}); check the URL")


def _unreachable(url: str, reason: object) -> SlideError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return SlideError(
            f"{redact_url(url)}: the server's certificate is not trusted ({reason.verify_message}); "
            "check the host, or name your authority's file in SSL_CERT_FILE"
        )
    message = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return TransientError(
        f"{redact_url(url)}: the server cannot be reached ({message}); check the host and the network"
    )
