"""Slides behind ``http://`` and ``https://`` URLs, with nothing but the standard library."""

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
from histostream.wsi.slides.staging import SlidePart, TransientError, file_name, shown

TIMEOUT_S = 60  # of silence, not of the whole download
MANY_FILES = {".mrxs", ".vms", ".vmu"}  # formats of several files, which http cannot list
BUSY = {408, 425, 429, *range(500, 600)}


def find_parts(source: str) -> list[SlidePart]:
    """Ask the server for the slide's size and version.

    With GET, not HEAD: signed URLs are signed for one of them. The body is not read.

    Raises
    ------
    SlideError
        If the server does not have it, does not give it to us, or does not say how big it is.
    """
    name = file_name(source)
    if PurePosixPath(name).suffix.lower() in MANY_FILES:
        raise SlideError(
            f"{shown(source)}: this format is several files, and http has no listing; "
            "download all of them and pass the local one"
        )
    with _opened(source) as response:
        headers = response.headers
    size = headers.get("Content-Length", "")
    if not size.isdecimal() or headers.get("Content-Encoding", "identity") != "identity":
        raise SlideError(
            f"{shown(source)}: the server does not say how big the file is; download it and pass the local one"
        )
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    return [SlidePart(source, name, int(size), version)]


def read_part(part: SlidePart, chunk_bytes: int) -> Generator[bytes]:
    """Yield the content of the file; a connection that is cut ends it early.

    Raises
    ------
    SlideError
        If the server refuses or fails; `TransientError` if another attempt may help.
    """
    with _opened(part.address) as response:
        while chunk := response.read(chunk_bytes):
            yield chunk


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another host, but neither to http from https nor to a file."""

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
            return None  # which makes it an HTTPError of that status
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


@contextmanager
def _opened(url: str) -> Iterator[http.client.HTTPResponse]:
    """Open a URL and turn what fails, then or while it is read, into one clear line."""
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
        raise SlideError(f"{shown(url)}: not a URL that can be opened ({error}); check it") from None
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
        raise SlideError(f"{shown(url)}: name and password in a URL would be recorded with it; put them into ~/.netrc")
    request = urllib.request.Request(quote(url, safe="%/:?&=+$,;#@!*'()[]~"))
    request.add_header("User-Agent", "histostream")
    login = _login(urlsplit(url).hostname or "")
    if login:  # unredirected: not shown to other hosts
        request.add_unredirected_header("Authorization", f"Basic {login}")
    return request


def _login(host: str) -> str | None:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        raise SlideError(f"{path}: cannot be read ({error}); mend or remove it") from None
    if found is None:
        return None
    return base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _refused(url: str, error: HTTPError) -> SlideError:
    status = f"{error.code} {error.reason}".strip()
    if error.code in {401, 403}:
        return SlideError(
            f"{shown(url)}: access denied ({status}); check whether the signed URL has expired, "
            "or put name and password into ~/.netrc"
        )
    if error.code in {404, 410}:
        return SlideError(f"{shown(url)}: there is no such file ({status}); check the URL")
    if error.code in BUSY:
        return TransientError(f"{shown(url)}: the server fails ({status}); try again later")
    if 300 <= error.code < 400:
        to = shown(error.headers.get("Location") or "nowhere")
        return SlideError(
            f"{shown(url)}: it redirects to {to}, which is not followed; pass that URL itself if you trust it"
        )
    return SlideError(f"{shown(url)}: the server refuses it ({status}); check the URL")


def _unreachable(url: str, reason: object) -> SlideError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return SlideError(
            f"{shown(url)}: the server's certificate is not trusted ({reason.verify_message}); "
            "check the host, or name your authority's file in SSL_CERT_FILE"
        )
    said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return TransientError(f"{shown(url)}: the server cannot be reached ({said}); check the host and the network")
