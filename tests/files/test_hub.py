"""hf:// addresses, against a small hub of our own: few requests, exact bytes, and a refusal for each wrong answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from weightops.errors import FormatError, NetworkError, TruncatedError, UsageError, WeightopsError
from weightops.files.checkpoint import open_checkpoint
from weightops.files.hub import FIRST_NBYTES, HEAD_NBYTES, Hub, HubFile, HubPath, locate, parse_address
from weightops.files.source import ByteSource, LocalFile, read

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "hf://owner/name"
DATA = Random(0).randbytes(3 << 20)


def safetensors(tensors: dict[str, bytes], spaces: int = 0) -> bytes:
    header, at = {}, 0
    for key, value in tensors.items():
        header[key] = {"dtype": "U8", "shape": [len(value)], "data_offsets": [at, at + len(value)]}
        at += len(value)
    text = json.dumps(header).encode() + b" " * spaces
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


class Server(ThreadingHTTPServer):
    """A hub's two API answers and its files, or the storage to which it redirects. `faults`: one per file request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.lasting = ""  # a fault of every file request
        self.api: list[tuple[int, dict[str, str], Any]] = []  # answers in place of the API's own, in this order
        self.storage: Server | None = None
        self.page = 1000
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def kinds(self) -> list[str]:
        """What was asked, in order: revision, tree, file."""
        return ["file" if "/resolve/" in p or "/bytes/" in p else p.split("/")[5] for p, _ in self.asked]

    @property
    def ranges(self) -> list[str]:
        return [h["range"].removeprefix("bytes=") for _, h in self.asked if "range" in h]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up on an answer that it refuses."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def give(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        if path.startswith("/api/"):
            self.answer_api(path, query)
        elif path.startswith(root := f"/owner/name/resolve/{COMMIT}/"):
            self.answer_file(path.removeprefix(root))
        elif path.startswith("/bytes/"):
            self.answer_file(path.removeprefix("/bytes/"))
        else:
            self.give(404, {"X-Error-Code": "RepoNotFound"})

    def answer_api(self, path: str, query: dict[str, list[str]]) -> None:
        root = "/api/models/owner/name"
        if self.server.api:
            status, headers, body = self.server.api.pop(0)
            self.give(status, headers, body if isinstance(body, bytes) else json.dumps(body).encode())
        elif path in (f"{root}/revision/main", f"{root}/revision/refs/pr/7", f"{root}/revision/a/b"):
            self.give(200, {}, json.dumps({"id": "owner/name", "sha": COMMIT}).encode())
        elif path.startswith(f"{root}/revision/"):
            self.give(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{root}/tree/{COMMIT}"):
            self.answer_tree(path.removeprefix(f"{root}/tree/{COMMIT}").strip("/"), query)
        else:
            self.give(401, {"X-Error-Code": "RepoNotFound"})

    def answer_tree(self, folder: str, query: dict[str, list[str]]) -> None:
        entries = []
        for name, data in sorted(self.server.files.items()):
            parents = [str(p) for p in PurePosixPath(name).parents]
            if (folder or ".") in parents:
                for p in parents[: parents.index(folder or ".")]:
                    if {"type": "directory", "path": p, "size": 0} not in entries:
                        entries.append({"type": "directory", "path": p, "size": 0})
                entries.append({"type": "file", "path": name, "size": len(data)})
        if query["recursive"] == ["false"]:
            entries = [e for e in entries if str(PurePosixPath(str(e["path"])).parent) == (folder or ".")]
        if not entries:
            self.give(404, {"X-Error-Code": "EntryNotFound"})
            return
        at = int(query.get("cursor", ["0"])[0])
        headers = {}
        if at + self.server.page < len(entries):
            mark = f"recursive={query['recursive'][0]}&cursor={at + self.server.page}"
            headers["Link"] = f'<https://huggingface.co{urlsplit(self.path).path}?{mark}>; rel="next"'
        self.give(200, headers, json.dumps(entries[at : at + self.server.page]).encode())

    def answer_file(self, name: str) -> None:
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else self.server.lasting
        if name not in self.server.files and not self.server.storage:
            self.give(404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.server.storage and not fault:
            where = f"http://localhost:{self.server.storage.server_port}/bytes/{name}"
            self.give(302, {"Location": where, "X-Repo-Commit": COMMIT}, b"Found")
            return
        data = self.server.files.get(name, b"")
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        last = min(last, len(data) - 1)
        body = data[first : last + 1]
        headers = {
            "ETag": '"first"',
            "Content-Range": f"bytes {first}-{last}/{len(data)}",
            "Accept-Ranges": "bytes",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": '"linked"',
        }
        match fault.split():
            case []:
                self.give(206, headers, body)
            case ["whole"]:
                self.give(200, {"ETag": '"first"'}, data)
            case ["longer"]:
                self.give(200, {"ETag": '"first"'}, data + b"x")
            case ["shifted"]:
                moved = data[first + 1 : last + 2]
                self.give(206, headers | {"Content-Range": f"bytes {first + 1}-{last + 1}/{len(data)}"}, moved)
            case ["short"]:
                self.give(206, headers, body[:-1])
            case ["short-range"]:
                self.give(206, headers | {"Content-Range": f"bytes {first}-{last - 1}/{len(data)}"}, body[:-1])
            case ["chunked", kept]:
                body = body[: int(kept)] if int(kept) < 0 else body + b"x" * int(kept)
                self.send_response(206)
                for k, v in (headers | {"Transfer-Encoding": "chunked"}).items():
                    self.send_header(k, v)
                self.end_headers()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
                if fault != "chunked +0":
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True
            case ["cut", kept]:
                self.give(206, headers | {"Content-Length": str(len(body)), "Connection": "close"}, body[: int(kept)])
                self.close_connection = True
            case ["hang-up"]:
                self.close_connection = True
            case ["etag", *value]:
                self.give(206, headers | {"ETag": " ".join(value)}, body)
            case ["no", name]:
                self.give(206, {k: v for k, v in headers.items() if k != name}, body)
            case ["size"]:
                self.give(206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data) + 1}"}, body)
            case ["encoded"]:
                self.give(206, headers | {"Content-Encoding": "gzip"}, body)
            case ["redirect", where]:
                self.give(307, {"Location": where.replace("SELF", self.path)}, b"Found")
            case ["status", status, *more]:
                self.give(int(status), dict(m.split(":", 1) for m in more), b"an error page")
            case _:
                raise AssertionError(fault)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    close_session()  # its connections are to the hub of an earlier test, and its proxies are the user's
    server = Server()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def storage(server: Server) -> Iterator[Server]:
    """Another host, to which the hub redirects for the bytes."""
    server.storage = Server()
    yield server.storage
    close_session()
    server.storage.shutdown()
    server.storage.server_close()


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.extra = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def clock(self) -> float:
        return sum(self.slept) + self.extra


@pytest.fixture
def time() -> Time:
    return Time()


def source(server: Server, time: Time, data: bytes = DATA, name: str = "a.safetensors") -> HubFile:
    """A file of a hub that is well until it is opened."""
    server.files[name] = data
    label = f"{REPO}/{name}"
    place = locate(label, Hub(label, time.sleep, time.clock))
    assert isinstance(place, HubPath)
    file = place.open(label)
    assert isinstance(file, HubFile)
    return file


def refusal(error: type[WeightopsError], what: Any, *args: Any) -> str:
    with pytest.raises(error) as caught:
        what(*args)
    assert caught.type is error
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("hf://owner/name", ("owner/name", "main", "", "hf://owner/name")),
        ("hf://owner/name/", ("owner/name", "main", "", "hf://owner/name")),
        ("hf://owner/na.me-1/x.safetensors", ("owner/na.me-1", "main", "x.safetensors", "hf://owner/na.me-1")),
        ("hf://owner/name@v1/unet", ("owner/name", "v1", "unet", "hf://owner/name@v1")),
        ("hf://owner/name@v1.0/un et/a@b/", ("owner/name", "v1.0", "un et/a@b", "hf://owner/name@v1.0")),
        ("hf://owner/name@refs/pr/7/unet", ("owner/name", "refs/pr/7", "unet", "hf://owner/name@refs/pr/7")),
        ("hf://owner/name@a%2Fb/unet", ("owner/name", "a/b", "unet", "hf://owner/name@a%2Fb")),
        ("hf://models/owner/name", ("owner/name", "main", "", "hf://models/owner/name")),
    ],
)
def test_an_address_is_taken_apart(label: str, expected: tuple[str, ...]) -> None:
    assert parse_address(label) == expected


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("hf://", "expected hf://owner/name[@revision][/path]"),
        ("hf://name", "expected hf://owner/name[@revision][/path]"),
        ("hf://../name", "expected hf://owner/name[@revision][/path]"),
        ("hf://owner/na..me", "expected hf://owner/name[@revision][/path]"),
        ("hf://owner/na me", "expected hf://owner/name[@revision][/path]"),
        ("hf://owner/name@", "expected hf://owner/name[@revision][/path]"),
        ("hf://datasets/owner/name", "expected a model, hf://owner/name[@revision][/path]"),
        ("hf://owner/name/../a", "no path in a repository reads '../a'"),
        ("hf://owner/name//a", "no path in a repository reads '/a'"),
        ("hf://owner/name/a\\b", "no path in a repository reads 'a\\\\b'"),
        ("hf://owner/name@..%2F..%2Fx/a", "no revision in a repository reads '../../x'"),
        ("hf://owner/name@%00", "no revision in a repository reads '\\x00'"),
    ],
)
def test_an_address_that_is_none_is_refused_before_any_request(label: str, what: str) -> None:
    assert refusal(UsageError, locate, label) == f"{label}: {what}"


# ------------------------------------------------------------------------------------------------ reading


def test_a_file_is_inspected_with_three_requests(server: Server, tmp_path: Path) -> None:
    data = safetensors({"a": DATA[:300_000], "b": DATA[5:9]})
    server.files = {"model.safetensors": data, "README.md": b"a model"}
    (tmp_path / "model.safetensors").write_bytes(data)
    with (
        open_checkpoint(f"{REPO}@main/model.safetensors") as found,
        open_checkpoint(tmp_path / "model.safetensors") as local,
    ):
        assert server.kinds == ["revision", "tree", "file"]
        assert (found.label, found.name) == (f"{REPO}@main/model.safetensors", "model.safetensors")
        assert (found.container, found.tensors, found.nbytes) == ("safetensors", local.tensors, local.nbytes)
        for key in found.tensors:
            slot = found.slot(key)
            out = bytearray(slot.spec.nbytes)
            found.read_bytes(slot, 0, len(out), memoryview(out))
            assert out == data[found.tensors[key].start : found.tensors[key].stop]
        found.check_unchanged()
    assert {p.split("/")[4] for p, _ in server.asked if "/resolve/" in p} == {COMMIT}
    assert server.kinds.count("revision") == 1


def test_a_commit_needs_no_pinning(server: Server) -> None:
    server.files = {"model.safetensors": safetensors({"a": b"1"})}
    with open_checkpoint(f"{REPO}@{COMMIT}/model.safetensors"):
        assert server.kinds == ["tree", "file"]


@pytest.mark.parametrize(("spaces", "requests"), [(0, 1), (FIRST_NBYTES, 2), (HEAD_NBYTES, 2)])
def test_a_header_costs_one_or_two_requests(server: Server, spaces: int, requests: int) -> None:
    server.files = {"model.safetensors": safetensors({"a": DATA}, spaces)}
    with open_checkpoint(f"{REPO}/model.safetensors") as found:
        assert list(found.tensors) == ["a"]
    assert server.kinds.count("file") == requests
    assert server.ranges[0] == f"0-{FIRST_NBYTES - 1}"


def test_bytes_are_read_by_position_from_several_threads(server: Server, time: Time) -> None:
    file: ByteSource = source(server, time)
    rng = Random(1)
    spans = [(0, len(DATA)), (len(DATA), 0), (HEAD_NBYTES - 5, 10), (0, HEAD_NBYTES), (len(DATA) - 1, 1)]
    spans += [(start, rng.randrange(200_000)) for start in (rng.randrange(len(DATA) - 200_000) for _ in range(40))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: read(file, *span), spans))
    assert all(data == DATA[start : start + nbytes] for data, (start, nbytes) in zip(found, spans, strict=True))
    file.will_need(0, 10)
    file.close()


def test_the_head_is_read_once(server: Server, time: Time) -> None:
    file = source(server, time)
    for start in range(0, HEAD_NBYTES, 50_000):
        read(file, start, min(1000, HEAD_NBYTES - start))
    assert server.ranges == [f"0-{FIRST_NBYTES - 1}", f"{FIRST_NBYTES}-{HEAD_NBYTES - 1}"]


def test_an_empty_file_is_not_asked_for(server: Server) -> None:
    server.files = {"a.safetensors": b""}
    label = f"{REPO}/a.safetensors"
    assert refusal(FormatError, open_checkpoint, label) == f"{label}: an empty file, expected safetensors"
    assert server.kinds == ["revision", "tree"]


def test_reading_past_the_end_is_refused(server: Server, time: Time) -> None:
    file = source(server, time, DATA[:100])
    assert (
        refusal(TruncatedError, read, file, 99, 2) == f"{REPO}/a.safetensors: ends at byte 100, expected at least 101"
    )


def test_a_bad_file_on_a_hub_is_refused_as_one_on_the_disk_is(server: Server) -> None:
    server.files = {"a.safetensors": b"<!DOCTYPE html>" + bytes(100)}
    label = f"{REPO}/a.safetensors"
    assert refusal(FormatError, open_checkpoint, label) == f"{label}: a web page, expected safetensors"


# ------------------------------------------------------------------------------------------------ wrong answers

WRONG = {
    "whole": "ignores the range: answers 200 to a request for bytes 2,000,000 to 2,000,999, expected 206",
    "shifted": "answers bytes 2,000,001 to 2,001,000 to a request for bytes 2,000,000 to 2,000,999",
    "short": "sends '999' bytes to a request for bytes 2,000,000 to 2,000,999, expected 1,000",
    "short-range": "answers bytes 2,000,000 to 2,000,998 to a request for bytes 2,000,000 to 2,000,999",
    "chunked -1": "ends its answer at byte 2,000,999, expected 2,001,000",
    "chunked 1": "sends more than bytes 2,000,000 to 2,000,999, which were asked for",
    'etag "second"': "changed the file while it was read: ETag '\"second\"', at first '\"first\"'",
    "no ETag": "sends no ETag, without which a change of the file would not be seen",
    "no Content-Range": "answers '' to a request for bytes 2,000,000 to 2,000,999",
    "size": "says that the file holds 3,145,729 bytes, but lists it with 3,145,728",
    "encoded": "sends the bytes encoded as 'gzip', expected them as they are",
}


@pytest.mark.parametrize("fault", WRONG)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(server: Server, time: Time, fault: str) -> None:
    file = source(server, time)
    server.lasting = fault
    host = server.url.removeprefix("http://")
    with pytest.raises(NetworkError) as caught:
        read(file, 2_000_000, 1000)
    assert str(caught.value) == f"{REPO}/a.safetensors: {host} {WRONG[fault]}"
    assert caught.value.hint == "fetch the file with `hf download` and name it on the disk"
    assert time.slept == []


def test_a_wrong_first_answer_is_refused_too(server: Server, time: Time) -> None:
    server.faults = ["whole"]
    assert "ignores the range" in refusal(NetworkError, source, server, time)


def test_a_small_file_may_come_whole(server: Server, time: Time) -> None:
    server.lasting = "whole"
    assert read(source(server, time, DATA[:HEAD_NBYTES]), 5, 9) == DATA[5:14]
    server.lasting = "longer"
    message = refusal(NetworkError, source, server, time, DATA[:HEAD_NBYTES])
    assert message.endswith("sends '1048577' bytes to a request for bytes 0 to 1,048,575, expected 1,048,576")


def test_a_weak_etag_is_the_same_etag(server: Server, time: Time) -> None:
    file = source(server, time)
    server.lasting = 'etag W/"first"'
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]


def test_a_chunked_answer_is_read(server: Server, time: Time) -> None:
    file = source(server, time)
    server.lasting = "chunked 0"
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]


# ------------------------------------------------------------------------------------------------ trouble that may pass


@pytest.mark.parametrize(
    ("faults", "slept"),
    [
        (["status 503", "status 503"], [0.5, 1]),
        (["status 500", "status 502", "status 504", "status 408"], [0.5, 1, 2, 4]),
        (["status 429 Retry-After:7"], [7]),
        (["status 429 Retry-After:7", "status 503"], [7, 1]),
        (['status 429 RateLimit:"api";r=0;t=55'], [55]),
        (["status 429 Retry-After:soon"], [0.5]),
        (["hang-up", "hang-up"], [0.5, 1]),
        (["cut 0"], [0.5]),
        (["chunked +0"], [0.5]),  # all of it, but not its end
        (["cut 300", "status 503", "cut 300"], [0.5, 1, 2]),
    ],
)
def test_trouble_that_passes_is_waited_for(server: Server, time: Time, faults: list[str], slept: list[float]) -> None:
    file = source(server, time)
    server.faults = list(faults)
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]
    assert time.slept == slept


def test_after_a_cut_only_the_rest_is_asked_for(server: Server, time: Time) -> None:
    file = source(server, time)
    server.faults = ["cut 300"]
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]
    first, second = server.ranges[1:]
    assert first == "2000000-2000999"
    # What had arrived before the cut was seen depends on the system; the rest is asked for, and no byte more.
    assert second in ("2000300-2000999", "2000000-2000999")


def test_the_file_may_not_change_across_a_cut(server: Server, time: Time) -> None:
    file = source(server, time)
    server.faults = ["cut 300", 'etag "second"']
    assert "changed the file while it was read" in refusal(NetworkError, read, file, 2_000_000, 1000)


@pytest.mark.parametrize(("fault", "trouble"), [("status 503", "it answers 503"), ("cut 0", ""), ("hang-up", "")])
def test_trouble_that_does_not_pass_is_given_up(server: Server, time: Time, fault: str, trouble: str) -> None:
    file = source(server, time)
    server.lasting = fault
    host = server.url.removeprefix("http://")
    message = refusal(NetworkError, read, file, 2_000_000, 1000)
    assert message.startswith(f"{REPO}/a.safetensors: gave up on {host} at attempt 7: {trouble}")
    assert time.slept == [0.5, 1, 2, 4, 8, 16]


def test_a_wait_beyond_the_deadline_is_not_begun(server: Server, time: Time) -> None:
    file = source(server, time)
    server.lasting = "status 429 Retry-After:3600"
    message = refusal(NetworkError, read, file, 2_000_000, 1000)
    assert message.endswith(" at attempt 1: it answers 429 and asks to wait 3,600 seconds")
    assert time.slept == []


def test_waits_are_bounded_by_the_deadline(server: Server, time: Time) -> None:
    file = source(server, time)
    server.lasting = "status 429 Retry-After:100"
    refusal(NetworkError, read, file, 2_000_000, 1000)
    assert time.slept == [100, 100, 100]


def test_the_deadline_runs_from_the_latest_byte(server: Server, time: Time) -> None:
    file = source(server, time)
    server.faults = ["status 429 Retry-After:290", "cut 300", "status 429 Retry-After:290"]
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]


def test_a_date_to_wait_for_is_understood(server: Server, time: Time) -> None:
    file = source(server, time)
    server.api = [(503, {"Retry-After": formatdate(usegmt=True)}, b""), (429, {"Retry-After": "3"}, b"")]
    assert read(file, 0, 3) == DATA[:3]
    source(server, time)
    assert time.slept == [0, 3]


def test_a_hub_that_nobody_runs_is_given_up_soon(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as gone:
        gone.shutdown()
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    message = refusal(NetworkError, source, server, time)
    assert message.startswith(f"{REPO}/a.safetensors: gave up on {gone.url.removeprefix('http://')} at attempt 3: ")
    assert time.slept == [0.5, 1]


# ------------------------------------------------------------------------------------------------ redirects


def test_the_token_stays_with_the_hub(
    server: Server, storage: Server, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    storage.files["a.safetensors"] = DATA
    file = source(server, time)
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]
    assert [h.get("authorization") for _, h in server.asked] == ["Bearer hf_secret"] * 3
    assert [h.get("authorization") for _, h in storage.asked] == [None, None]
    assert {h["host"] for _, h in storage.asked} == {f"localhost:{storage.server_port}"}


def test_the_storage_is_asked_directly_until_its_address_expires(server: Server, storage: Server, time: Time) -> None:
    storage.files["a.safetensors"] = DATA
    file = source(server, time)
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]
    assert server.kinds.count("file") == 1
    storage.faults = ["status 403"]
    assert read(file, 2_000_000, 1000) == DATA[2_000_000:2_001_000]
    assert (server.kinds.count("file"), storage.kinds.count("file")) == (2, 4)
    assert time.slept == [0]


def test_a_storage_that_refuses_is_named(server: Server, storage: Server, time: Time) -> None:
    storage.files["a.safetensors"] = DATA
    storage.lasting = "status 403"
    assert refusal(NetworkError, source, server, time) == f"{REPO}/a.safetensors: localhost answers 403"


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("SELF", "redirects more than 5 times"),
        ("ftp://127.0.0.1/x", "redirects to 'ftp://127.0.0.1/x', expected http:// or https://"),
        ("file:///etc/passwd", "redirects to 'file:///etc/passwd', expected http:// or https://"),
        ("http://x:99999/", "redirects to 'http://x:99999/', expected http:// or https://"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_refused(server: Server, time: Time, where: str, what: str) -> None:
    server.lasting = f"redirect {where}"
    host = server.url.removeprefix("http://")
    assert refusal(NetworkError, source, server, time) == f"{REPO}/a.safetensors: {host} {what}"
    assert server.kinds.count("file") == (6 if where == "SELF" else 1)


def test_a_redirect_without_an_address_is_refused(server: Server, time: Time) -> None:
    server.lasting = "status 307"
    message = refusal(NetworkError, source, server, time)
    assert message.endswith(" redirects to '', expected http:// or https://")


def test_a_redirect_within_the_hub_keeps_the_token(server: Server, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.faults = ["redirect SELF", "redirect SELF"]
    assert read(source(server, time), 5, 9) == DATA[5:14]
    assert {h.get("authorization") for _, h in server.asked} == {"Bearer hf_secret"}


# ------------------------------------------------------------------------------------------------ refusals of the hub

REFUSED = [
    ("401 X-Error-Code:RepoNotFound", "", UsageError, "HOST shows no such repository"),
    ("401", "", UsageError, "HOST shows no such repository"),
    ("401", "hf_old", NetworkError, "HOST refuses the token"),
    ("401 X-Error-Code:GatedRepo", "", NetworkError, "HOST asks to accept this repository's conditions first"),
    ("403 X-Error-Code:GatedRepo", "hf_a", NetworkError, "HOST asks to accept this repository's conditions first"),
    ("403", "hf_a", NetworkError, "HOST forbids the access"),
    ("404 X-Error-Code:EntryNotFound", "", UsageError, "the repository has no such file or folder at this revision"),
    ("404 X-Error-Code:RevisionNotFound", "", UsageError, "the repository has no such revision"),
    ("404", "", UsageError, "HOST has no such repository, revision or file"),
    ("416", "", NetworkError, "127.0.0.1 answers 416"),
    ("204", "", NetworkError, "127.0.0.1 answers 204"),
]


@pytest.mark.parametrize(("answer", "token", "error", "what"), REFUSED)
def test_what_the_hub_refuses_is_said_plainly(
    server: Server,
    time: Time,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    token: str,
    error: type[WeightopsError],
    what: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    host = server.url.removeprefix("http://")
    expected = f"{REPO}/a.safetensors: {what.replace('HOST', host)}"
    server.faults = [f"status {answer}"]
    assert refusal(error, source, server, time) == expected
    status, *headers = answer.split()
    server.api = [(int(status), dict(h.split(":") for h in headers), b"")]
    assert refusal(error, source, server, time) == expected
    assert time.slept == []


def test_a_repository_that_is_not_there(server: Server) -> None:
    host = server.url.removeprefix("http://")
    with pytest.raises(UsageError) as caught:
        open_checkpoint("hf://owner/nobody")
    assert str(caught.value) == f"hf://owner/nobody: {host} shows no such repository"
    assert "HF_TOKEN" in str(caught.value.hint)


def test_a_revision_that_is_not_there(server: Server) -> None:
    assert refusal(UsageError, open_checkpoint, f"{REPO}@v9") == f"{REPO}@v9: the repository has no such revision"


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ([b"<html>Log in</html>"], "HOST answers something that is no JSON, as a login page would be"),
        ([b"[" * 100_000], "HOST answers something that is no JSON, as a login page would be"),
        ([["sha"]], "HOST names no commit for revision 'main'"),
        ([{"sha": None}], "HOST names no commit for revision 'main'"),
        ([{"sha": "../" * 13 + "x"}], "HOST names no commit for revision 'main'"),
        ([{"sha": COMMIT}, {"error": "none"}], "HOST lists a JSON dict, expected files"),
        ([{"sha": COMMIT}, ["a"]], "HOST lists 'a', expected a file's path and size"),
        ([{"sha": COMMIT}, [{"type": "file", "path": "a", "size": -1}]], None),
        ([{"sha": COMMIT}, [{"type": "file", "path": "a", "size": True}]], None),
        ([{"sha": COMMIT}, [{"type": "file", "path": "a" * 1001, "size": 1}]], None),
        ([{"sha": COMMIT}, [{"type": "file", "path": 7, "size": 1}]], None),
    ],
)
def test_an_answer_that_no_hub_gives_is_refused(server: Server, answers: list[Any], what: str | None) -> None:
    server.files = {"a.safetensors": safetensors({"a": b"1"})}
    server.api = [(200, {}, a) for a in answers]
    message = refusal(NetworkError, open_checkpoint, REPO)
    if what:
        assert message == f"{REPO}: {what.replace('HOST', server.url.removeprefix('http://'))}"
    else:
        assert message.endswith("expected a file's path and size")


# ------------------------------------------------------------------------------------------------ what a path means


def tensors_of(label: str) -> dict[str, bytes]:
    with open_checkpoint(label) as found:
        out = {}
        for key in found.tensors:
            out[key] = bytearray(found.tensors[key].spec.nbytes)
            found.read_bytes(found.slot(key), 0, len(out[key]), memoryview(out[key]))
        return {key: bytes(value) for key, value in out.items()}


def index(**table: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": table}).encode()


DIFFUSERS = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "feature_extractor": [None, None],
        }
    ).encode(),
    "tokenizer/vocab.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors.index.json": index(a="one.safetensors", b="two.safetensors"),
    "unet/one.safetensors": safetensors({"a": b"unet a"}),
    "unet/two.safetensors": safetensors({"b": b"unet b"}),
    "vae/diffusion_pytorch_model.safetensors": safetensors({"a": b"vae a"}),
    "text_encoder/model.safetensors": safetensors({"a": b"text a"}),
}
PIPELINE = {"unet.a": b"unet a", "unet.b": b"unet b", "vae.a": b"vae a", "text_encoder.a": b"text a"}


def test_a_repository_is_its_diffusers_folder(server: Server) -> None:
    server.files = {**DIFFUSERS, "all-in-one.safetensors": safetensors({"x": b"not this"})}
    assert tensors_of(REPO) == PIPELINE
    assert server.kinds.count("tree") == 1
    assert server.kinds.count("file") == 6  # two JSON texts, four weights


def test_a_diffusers_folder_may_lie_deeper(server: Server) -> None:
    server.files = {f"deep/down/{name}": data for name, data in DIFFUSERS.items()} | {"b.safetensors": b"no"}
    assert tensors_of(f"{REPO}/deep/down") == PIPELINE
    assert tensors_of(f"{REPO}@refs/pr/7/deep/down/vae") == {"a": b"vae a"}
    with open_checkpoint(f"{REPO}/deep/down/") as found:
        assert found.components == ("unet", "vae", "text_encoder")
        assert found.files[0].label == f"{REPO}/deep/down/ (unet)"


def test_shards_are_read_by_their_index(server: Server) -> None:
    server.files = {
        "model.safetensors.index.json": index(a="one.safetensors", b="more/two.safetensors"),
        "one.safetensors": safetensors({"a": b"1"}),
        "more/two.safetensors": safetensors({"b": b"22"}),
    }
    assert tensors_of(f"{REPO}/model.safetensors.index.json") == {"a": b"1", "b": b"22"}
    assert tensors_of(REPO) == {"a": b"1", "b": b"22"}


def test_a_missing_shard_is_named(server: Server) -> None:
    server.files = {"m.safetensors.index.json": index(a="one.safetensors")}
    message = refusal(FormatError, open_checkpoint, f"{REPO}/m.safetensors.index.json")
    assert message == f"{REPO}/m.safetensors.index.json: the shard 'one.safetensors' is missing"


def test_the_only_model_of_a_repository_needs_no_name(server: Server) -> None:
    server.files = {"odd-name.safetensors": safetensors({"a": b"1"}), "old/x.safetensors": b"", "README.md": b""}
    assert tensors_of(REPO) == {"a": b"1"}


def test_of_several_models_one_must_be_named(server: Server) -> None:
    server.files = {"a.safetensors": safetensors({"a": b"1"}), "b.safetensors": safetensors({"b": b"2"})}
    with pytest.raises(UsageError) as caught:
        open_checkpoint(REPO)
    assert str(caught.value) == f"{REPO}: a folder with several models: 'a.safetensors', 'b.safetensors'"
    assert tensors_of(f"{REPO}/b.safetensors") == {"b": b"2"}


def test_a_repository_without_weights_says_what_there_is(server: Server) -> None:
    server.files = {"README.md": b"hello", "model.gguf": b"GGUF"}
    with pytest.raises(UsageError, match="a folder without weights") as caught:
        open_checkpoint(REPO)
    assert caught.value.hint == "it holds 'README.md', 'model.gguf'"


def test_a_path_that_is_not_there_says_what_there_is(server: Server) -> None:
    server.files = {"a.safetensors": b"", "unet/b.safetensors": b""}
    with pytest.raises(UsageError) as caught:
        open_checkpoint(f"{REPO}/c.safetensors")
    assert str(caught.value) == f"{REPO}/c.safetensors: no such file or folder in the repository"
    assert caught.value.hint == "there are 'a.safetensors', 'unet'"
    message = refusal(UsageError, open_checkpoint, f"{REPO}/nowhere/c.safetensors")
    assert message == f"{REPO}/nowhere/c.safetensors: the repository has no such file or folder at this revision"


def test_a_long_listing_comes_in_pages_of_the_hub_that_was_asked(server: Server) -> None:
    server.files = {f"epoch-{n}.txt": b"" for n in range(30)} | {"m.safetensors": safetensors({"a": b"1"})}
    server.page = 7
    assert tensors_of(REPO) == {"a": b"1"}
    assert server.kinds.count("tree") == 5


def test_a_place_is_asked_as_a_path_is_asked(server: Server) -> None:
    server.files = dict(DIFFUSERS)
    place = locate(f"{REPO}@main")
    assert isinstance(place, HubPath)
    unet = place / "unet"
    assert (str(place), str(unet), unet.name) == (f"{REPO}@main", f"{REPO}@main/unet", "unet")
    assert (place.is_dir(), unet.is_dir(), unet.is_file(), (place / "nothing").is_dir()) == (True, True, False, False)
    assert [p.name for p in unet.glob("*.safetensors")] == ["one.safetensors", "two.safetensors"]
    assert str(next(unet.glob("two.*")).parent / "x.bin") == f"{REPO}@main/unet/x.bin"
    assert (unet / "x.bin").suffix == ".bin"
    message = refusal(UsageError, (unet / "x.bin").open, "x.bin")
    assert message == "x.bin: no file 'unet/x.bin' in the repository"


# ------------------------------------------------------------------------------------------------ cache, environment


def fill_cache(files: dict[str, bytes]) -> Path:
    cache = Path(constants.HF_HUB_CACHE) / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    snapshot = cache / "snapshots" / COMMIT
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    return snapshot


def test_a_file_in_the_cache_is_read_from_the_disk(server: Server) -> None:
    server.files = {"m.safetensors": safetensors({"a": b"1"})}
    snapshot = fill_cache(server.files)
    with open_checkpoint(f"{REPO}/m.safetensors") as found:
        (file,) = found.files
        assert isinstance(file, LocalFile)
        assert file.path == snapshot / "m.safetensors"
        assert file.label == f"{REPO}/m.safetensors"
    assert server.kinds == ["revision", "tree"]


def test_offline_only_the_cache_is_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(DIFFUSERS)
    assert tensors_of(REPO) == PIPELINE
    assert tensors_of(f"{REPO}@{COMMIT}/unet/one.safetensors") == {"a": b"unet a"}
    with pytest.raises(NetworkError) as caught:
        open_checkpoint(f"{REPO}/unet/three.safetensors")
    what = "HF_HUB_OFFLINE is set, and the local cache does not hold this"
    assert str(caught.value) == f"{REPO}/unet/three.safetensors: {what}"
    assert caught.value.hint == "unset it, or fetch first: `hf download owner/name`"
    assert server.asked == []


@pytest.mark.usefixtures("server")
def test_a_token_that_is_none_is_refused_unshown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\u202e")
    assert refusal(UsageError, locate, REPO) == f"{REPO}: HF_TOKEN holds characters that no token has"


def test_the_token_may_be_kept_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {"a.safetensors": safetensors({"a": b"1"})}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert tensors_of(REPO) == {"a": b"1"}
    assert not any("authorization" in h for _, h in server.asked)


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://host", "http://:80", "http://a b", "http://host:port"])
def test_an_endpoint_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert refusal(UsageError, locate, REPO) == f"{REPO}: HF_ENDPOINT is {endpoint!r}, expected https://host"


def test_the_environment_is_honoured_and_nothing_is_imported_early(server: Server, tmp_path: Path) -> None:
    server.files = {"m.safetensors": safetensors({"a": b"1"})}
    script = (
        "import sys, weightops.files.hub\n"
        "from weightops.files.checkpoint import open_checkpoint\n"
        "assert not {'huggingface_hub', 'httpx', 'httpx2', 'torch'} & set(sys.modules)\n"
        "print(list(open_checkpoint('hf://owner/name').tensors))\n"
        "assert 'torch' not in sys.modules\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": server.url + "/", "HF_TOKEN": "hf_mine", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['a']\n", "")
    assert {h.get("authorization") for _, h in server.asked} == {"Bearer hf_mine"}
