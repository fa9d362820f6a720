"""hf://: files of a hub's repository, by range requests, no large one whole; knows not what the bytes mean.

`locate` pins the revision to its commit, once, and gives a HubPath, which answers as much of pathlib.Path as
checkpoint.py asks; its bytes are a HubFile. huggingface_hub tells the endpoint, the token and the cache, and lends its
HTTP client. The requests are our own: its listings wait without a limit and log while they wait, and its file system
takes a shifted, short or changed answer for the bytes that were asked for.
"""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote as escape
from urllib.parse import unquote, urlsplit

from weightops.errors import NetworkError, TruncatedError, UsageError, WeightopsError, listing, printable, quote
from weightops.files.source import ByteSource, LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from httpx2 import Response

PREFIX = "hf://"
FIRST_NBYTES = 64 << 10  # of a large file, read when it is opened: most headers whole
HEAD_NBYTES = 1 << 20  # kept of each file: nearly every other header, with one more request; a small file whole
MAX_REDIRECTS = 5
MAX_ATTEMPTS = 7  # waits of 0.5 to 16 seconds, 31.5 in all
MAX_ATTEMPTS_UNMET = 3  # while the hub has never answered: more likely a wrong address than a passing fault
DEADLINE_SECONDS = 300.0  # without a new byte; a hub counts its requests in windows of that length
_TIMEOUTS = (10.0, 30.0, 30.0, 60.0)  # seconds to connect, read, write, and to get a connection of the pool
_MAX_JSON_BYTES = 32 << 20
_MAX_FILES = 100_000
_MAX_PATH = 1_000  # characters
_DRAINED_NBYTES = 64 << 10  # a body up to this size is read to its end, so that its connection can be used again

_ADDRESS = re.compile(
    r"hf://(?:models/)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/[\w.-]+)(?=/|$)|[^/]+))?(?:/(?P<path>.*))?",
    re.ASCII | re.DOTALL,
)
_PART = re.compile(r"(?!\.{1,2}$)[^\\]{1,250}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_FETCH = "fetch the file with `hf download` and name it on the disk"
_TOKEN = "check the name; what is private or gated needs a token: set HF_TOKEN, or run `hf auth login`"

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ addresses


class Address(NamedTuple):
    repo: str
    revision: str
    path: str
    root: str  # the address as it was typed, without the path


def parse_address(label: str) -> Address:
    """Take `hf://owner/name[@revision][/path]` apart. A slash in a revision is written %2F, but for refs/pr/7."""
    found = _ADDRESS.fullmatch(label)
    if found is None or ".." in found["repo"]:
        raise UsageError(label, f"expected {PREFIX}owner/name[@revision][/path]")
    if found["repo"].split("/")[0] in ("datasets", "spaces", "buckets", "kernels"):
        raise UsageError(label, f"expected a model, {PREFIX}owner/name[@revision][/path]")
    path = (found["path"] or "").rstrip("/")
    revision = unquote(found["revision"] or "main")
    for what, text in (("path", path), ("revision", revision)):
        if text and not all(_PART.fullmatch(part) and part.isprintable() for part in text.split("/")):
            raise UsageError(label, f"no {what} in a repository reads {quote(text)}")
    return Address(found["repo"], revision, path, label[: max(found.end("repo"), found.end("revision"))])


def locate(label: str, hub: Hub | None = None) -> Path | HubPath:
    """What an address names: a place in a repository, or with HF_HUB_OFFLINE one in the local cache.

    Raises UsageError when there is no such thing, NetworkError when the hub cannot be reached or answers oddly.
    """
    from huggingface_hub import constants

    address = parse_address(label)
    if constants.HF_HUB_OFFLINE:
        return _locate_in_cache(address, label)
    hub = hub or Hub(label)
    commit = address.revision if _COMMIT.fullmatch(address.revision) else _pin(hub, address, label)
    path = PurePosixPath(address.path)
    if not address.path:
        return HubPath(Repository(hub, address, commit, dict(_list(hub, address, commit, "", label))), path)
    # A file's neighbours come with it: its shards (which may lie deeper than their index), its adapter_config.json.
    beside = "" if path.parent == PurePosixPath() else str(path.parent)
    files = dict(_list(hub, address, commit, beside, label, deep=path.suffix == ".json"))
    if files.get(address.path) is None:
        if not any(f == address.path or f.startswith(f"{address.path}/") for f in files):
            found = listing(sorted(PurePosixPath(f).name for f in files))
            raise UsageError(label, "no such file or folder in the repository", f"there are {found}")
        files = dict(_list(hub, address, commit, address.path, label))
    return HubPath(Repository(hub, address, commit, files), path)


def _pin(hub: Hub, address: Address, label: str) -> str:
    url = f"{hub.endpoint}/api/models/{address.repo}/revision/{escape(address.revision, safe='')}?expand=sha"
    answer, _ = hub.json(url, label)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise NetworkError(label, f"{hub.name} names no commit for revision {quote(address.revision)}")
    return commit


def _list(
    hub: Hub, address: Address, commit: str, folder: str, label: str, *, deep: bool = True
) -> Iterator[tuple[str, int | None]]:
    """Path and size of each file in `folder`; a folder in it that is not entered has no size."""
    tree = f"{hub.endpoint}/api/models/{address.repo}/tree/{commit}"
    base = f"{tree}/{escape(folder, safe='')}" if folder else tree
    query = "recursive=true" if deep else "recursive=false"
    count = 0
    while query:
        entries, following = hub.json(f"{base}?{query}", label)
        if not isinstance(entries, list):
            raise NetworkError(label, f"{hub.name} lists a JSON {type(entries).__name__}, expected files")
        for entry in entries:
            path, size = (entry.get("path"), entry.get("size")) if isinstance(entry, dict) else (None, None)
            if (
                not isinstance(path, str)
                or len(path) > _MAX_PATH
                or (entry.get("type") == "file" and not _is_size(size))
            ):
                raise NetworkError(label, f"{hub.name} lists {quote(entry)}, expected a file's path and size")
            if entry.get("type") == "file":
                yield path, size
            elif not deep:
                yield path, None
        count += len(entries)
        if count > _MAX_FILES:
            raise NetworkError(
                label, f"{hub.name} lists over {_MAX_FILES:,} files", "name a file or folder deeper down"
            )
        # Only the page's mark is taken: behind a mirror, the whole address may lead past it.
        query = urlsplit(following).query if following and entries else ""


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 2**63


def _locate_in_cache(address: Address, label: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=address.repo, repo_type="model")
    ref = cache / "refs" / address.revision
    commit = ref.read_text().strip() if ref.is_file() else address.revision
    place = cache / "snapshots" / commit / address.path
    if not place.exists():
        what = "HF_HUB_OFFLINE is set, and the local cache does not hold this"
        raise NetworkError(label, what, f"unset it, or fetch first: `hf download {address.repo}`")
    return place


# ------------------------------------------------------------------------------------------------ places


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit; `files`: path and size of those that were listed."""

    hub: Hub
    address: Address
    commit: str
    files: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class HubPath:
    """A place in a repository, asked as a pathlib.Path is asked."""

    repository: Repository
    path: PurePosixPath

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> HubPath:
        return HubPath(self.repository, self.path.parent)

    def __truediv__(self, name: str) -> HubPath:
        return HubPath(self.repository, self.path / name)

    def __str__(self) -> str:
        root = self.repository.address.root
        return root if self.path == PurePosixPath() else f"{root}/{self.path}"

    def is_file(self) -> bool:
        return self.repository.files.get(str(self.path)) is not None

    def is_dir(self) -> bool:
        inside = "" if self.path == PurePosixPath() else f"{self.path}/"
        return not self.is_file() and any(f.startswith(inside) for f in self.repository.files)

    def glob(self, pattern: str) -> Iterator[HubPath]:
        """The files right in this folder whose names fit `pattern`."""
        for file in map(PurePosixPath, self.repository.files):
            if file.parent == self.path and fnmatchcase(file.name, pattern) and (self / file.name).is_file():
                yield self / file.name

    def open(self, label: str) -> ByteSource:
        """The file's bytes: from the local cache where it holds this commit's file, else from the hub."""
        from huggingface_hub import try_to_load_from_cache

        found, name = self.repository, str(self.path)
        size = found.files.get(name)
        if size is None:
            raise UsageError(label, f"no file {quote(name)} in the repository")
        cached = try_to_load_from_cache(found.address.repo, name, revision=found.commit)
        if isinstance(cached, str):
            return LocalFile(cached, label)
        url = f"{found.hub.endpoint}/{found.address.repo}/resolve/{found.commit}/{escape(name)}"
        return HubFile(found.hub, url, label, size)


# ------------------------------------------------------------------------------------------------ requests


class _TryAgain(Exception):
    """What went wrong and may pass; `after`: how many seconds the server asks to wait."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class Hub:
    """The hub that HF_ENDPOINT names, as far as requests go: redirects, refusals, and the one loop that tries again.

    The token goes to the hub itself (scheme, host and port) and nowhere else.
    """

    def __init__(
        self, label: str, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from huggingface_hub import constants, get_token

        from weightops import __version__

        self.endpoint = constants.ENDPOINT.rstrip("/")
        try:
            self._origin = _origin(self.endpoint)
        except ValueError:
            raise UsageError(label, f"HF_ENDPOINT is {quote(self.endpoint)}, expected https://host") from None
        self.name = urlsplit(self.endpoint).netloc.rpartition("@")[2]
        self._sleep, self._clock = sleep, clock
        self._met = False
        # Not the library's own headers: to make them, it asks the hub for a list of agents to look for.
        self._headers = {"accept-encoding": "identity", "user-agent": f"weightops/{__version__}"}
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        if token and not re.fullmatch(r"[!-~]+", token):
            raise UsageError(label, "HF_TOKEN holds characters that no token has", "copy it anew, or unset it")
        self._token = {"authorization": f"Bearer {token}"} if token else {}

    def persist(self, label: str, ask: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """What `ask` returns; asked again while its trouble may pass. The deadline runs from the latest `progress`."""
        wait, attempts, before, deadline = 0.5, 0, progress(), self._clock() + DEADLINE_SECONDS
        while True:
            try:
                return ask()
            except _TryAgain as e:
                attempts += 1
                trouble, after = str(e), e.after
            now = self._clock()
            if progress() > before:
                before, deadline = progress(), now + DEADLINE_SECONDS
            pause = wait if after is None else after
            if attempts >= (MAX_ATTEMPTS if self._met else MAX_ATTEMPTS_UNMET) or now + pause > deadline:
                asked = f" and asks to wait {after:,.0f} seconds" if after else ""
                what = f"gave up on {self.name} at attempt {attempts}: {trouble}{asked}"
                raise NetworkError(label, what, "check the connection, or try again later")
            self._sleep(pause)
            wait *= 2

    @contextmanager
    def answer(self, url: str, label: str, headers: Mapping[str, str]) -> Iterator[Response]:
        """The answer to GET, after redirects, its body unread. What breaks while it is read may pass, too."""
        from huggingface_hub import get_session
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's, httpx's or httpx2's

        try:
            for _ in range(MAX_REDIRECTS + 1):
                sent = {**self._headers, **headers, **(self._token if self._is_own(url) else {})}
                with get_session().stream(
                    "GET", url, headers=sent, follow_redirects=False, timeout=_TIMEOUTS
                ) as response:
                    self._met = True
                    if response.status_code not in (301, 302, 303, 307, 308):
                        self._refuse_trouble(response)
                        yield response
                        return
                    url = self._redirected(url, response, label)
                    _drain(response)
        except HTTPError as e:
            raise _TryAgain(printable(str(e))[:200] or type(e).__name__) from None
        raise NetworkError(label, f"{self.name} redirects more than {MAX_REDIRECTS} times")

    def _redirected(self, url: str, response: Response, label: str) -> str:
        target = str(response.next_request.url) if response.next_request else ""
        try:
            scheme, _, _ = _origin(target)
        except ValueError:
            found = quote(response.headers.get("location", ""))
            raise NetworkError(label, f"{self.name} redirects to {found}, expected http:// or https://") from None
        if scheme != "https" and _origin(url)[0] == "https":
            raise NetworkError(label, f"{self.name} redirects from https to {scheme}, which is not followed")
        return target

    def _refuse_trouble(self, response: Response) -> None:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            _drain(response)
            raise _TryAgain(f"it answers {status}", _seconds_to_wait(response))

    def _is_own(self, url: str) -> bool:
        return _origin(url) == self._origin

    def json(self, url: str, label: str) -> tuple[Any, str | None]:
        """A JSON answer, and the address of the next page."""

        def ask() -> tuple[bytes, str | None]:
            body = bytearray()
            with self.answer(url, label, {}) as response:
                if response.status_code != 200:
                    self.refuse(response, label)
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MAX_JSON_BYTES:
                        raise NetworkError(label, f"{self.name} answers more than {_MAX_JSON_BYTES:,} bytes of JSON")
                return bytes(body), response.links.get("next", {}).get("url")

        body, following = self.persist(label, ask)
        try:
            return json.loads(body), following
        except (ValueError, RecursionError):
            what = f"{self.name} answers something that is no JSON, as a login page would be"
            raise NetworkError(label, what, "check HF_ENDPOINT and any proxy in between") from None

    def refuse(self, response: Response, label: str) -> NoReturn:
        """Say what an answer of 4xx, or one that nobody asked for, means."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        own = self._is_own(str(response.url))
        refused: WeightopsError
        if own and code == "GatedRepo":
            what = f"{self.name} asks to accept this repository's conditions first"
            refused = NetworkError(label, what, "accept them on its web page, then set HF_TOKEN or run `hf auth login`")
        elif own and code == "RevisionNotFound":
            refused = UsageError(label, "the repository has no such revision", "check what stands after the @")
        elif own and code == "EntryNotFound":
            refused = UsageError(label, "the repository has no such file or folder at this revision")
        elif own and (code == "RepoNotFound" or (status == 401 and not self._token)):
            refused = UsageError(label, f"{self.name} shows no such repository", _TOKEN)
        elif own and status == 404:
            refused = UsageError(label, f"{self.name} has no such repository, revision or file", _TOKEN)
        elif own and status == 401:
            refused = NetworkError(label, f"{self.name} refuses the token", "renew HF_TOKEN, or run `hf auth login`")
        elif own and status == 403:
            refused = NetworkError(label, f"{self.name} forbids the access", "check what the token may read")
        else:
            refused = NetworkError(label, f"{urlsplit(str(response.url)).hostname} answers {status}", _FETCH)
        raise refused


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for anything but http and https."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", parts.hostname or "", re.ASCII):
        raise ValueError(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _drain(response: Response) -> None:
    length = response.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 9 and int(length) <= _DRAINED_NBYTES:
        response.read()


def _seconds_to_wait(response: Response) -> float | None:
    """What Retry-After says, in seconds or as a date, or the hub's own RateLimit: "api";r=0;t=55."""
    from email.utils import parsedate_to_datetime

    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        left = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", response.headers.get("ratelimit", ""))
        return float(left[1]) if left else None


# ------------------------------------------------------------------------------------------------ files


class HubFile:
    """A file of a hub, read by position. An answer that is not exactly what was asked for is refused, not mended."""

    def __init__(self, hub: Hub, url: str, label: str, size: int) -> None:
        self.label = label
        self.size = size
        self._hub = hub
        self._url = url
        self._storage: str | None = None  # where the hub last sent us, asked directly until that no longer works
        self._etag: str | None = None
        self._lock = threading.Lock()
        self._head = bytearray()
        # At once, so that the ETag is known before there are other threads.
        self._extend_head(FIRST_NBYTES if size > HEAD_NBYTES else size)

    def read_into(self, start: int, out: memoryview) -> None:
        stop = start + len(out)
        if stop > self.size:
            raise TruncatedError(self.label, f"ends at byte {self.size:,}, expected at least {stop:,}")
        if stop > HEAD_NBYTES:
            self._fetch(start, out)
            return
        with self._lock:
            if stop > len(self._head):
                self._extend_head(HEAD_NBYTES)
            out[:] = self._head[start:stop]

    def will_need(self, start: int, nbytes: int) -> None:
        pass

    def check_unchanged(self) -> None:
        """The commit is pinned, and every answer's ETag was compared with the first one's."""

    def close(self) -> None:
        """The connections belong to huggingface_hub, which keeps them for the next file."""

    def _extend_head(self, nbytes: int) -> None:
        more = bytearray(min(nbytes, self.size) - len(self._head))
        self._fetch(len(self._head), memoryview(more))
        self._head += more

    def _fetch(self, start: int, out: memoryview) -> None:
        """Fill `out` from `start` on; after a broken connection, from where it broke."""
        done = 0

        def ask() -> None:
            nonlocal done
            first, last = start + done, start + len(out) - 1
            if first > last:  # the connection broke once all had come
                return
            storage = self._storage
            try:
                with self._hub.answer(storage or self._url, self.label, {"range": f"bytes={first}-{last}"}) as response:
                    if storage and response.status_code in (401, 403, 404, 410):
                        raise _TryAgain("the address of the storage has expired", after=0)
                    self._check(response, first, last)
                    for chunk in response.iter_raw():
                        if done + len(chunk) > len(out):
                            self._refuse(f"sends more than bytes {first:,} to {last:,}, which were asked for")
                        out[done : done + len(chunk)] = chunk
                        done += len(chunk)
                    if done < len(out):
                        self._refuse(f"ends its answer at byte {start + done:,}, expected {last + 1:,}")
                    self._storage = str(response.url)
            except _TryAgain:
                self._storage = None
                raise

        self._hub.persist(self.label, ask, lambda: done)

    def _check(self, response: Response, first: int, last: int) -> None:
        """Refuse an answer that is not bytes `first` to `last` of the file that was opened. Reads no byte of it."""
        asked = f"bytes {first:,} to {last:,}"
        status, headers = response.status_code, response.headers
        if status == 200 and last + 1 - first < self.size:
            self._refuse(f"ignores the range: answers 200 to a request for {asked}, expected 206")
        if status == 206:
            found = _RANGE.fullmatch(headers.get("content-range", "").strip())
            if not found:
                self._refuse(f"answers {quote(headers.get('content-range', ''))} to a request for {asked}")
            begin, end, size = int(found[1]), int(found[2]), found[3]
            if (begin, end) != (first, last):
                self._refuse(f"answers bytes {begin:,} to {end:,} to a request for {asked}")
            if size != "*" and int(size) != self.size:
                self._refuse(f"says that the file holds {int(size):,} bytes, but lists it with {self.size:,}")
        elif status != 200:
            self._hub.refuse(response, self.label)
        length = headers.get("content-length")
        if length is not None and length != str(last + 1 - first):
            self._refuse(f"sends {quote(length)} bytes to a request for {asked}, expected {last + 1 - first:,}")
        if headers.get("content-encoding", "identity") != "identity":
            self._refuse(f"sends the bytes encoded as {quote(headers['content-encoding'])}, expected them as they are")
        etag = headers.get("etag", "").removeprefix("W/")
        if not etag:
            self._refuse("sends no ETag, without which a change of the file would not be seen")
        self._etag = self._etag or etag
        if etag != self._etag:
            self._refuse(f"changed the file while it was read: ETag {quote(etag)}, at first {quote(self._etag)}")

    def _refuse(self, what: str) -> NoReturn:
        raise NetworkError(self.label, f"{self._hub.name} {what}", _FETCH)
