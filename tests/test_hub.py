"""Models from the hub, against a small HTTP server that plays it: what is fetched, resumed, refused, and told."""

import hashlib
import http.server
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import are_progress_bars_disabled

from lowrank_align import hub, loading
from lowrank_align.errors import (
    EXIT_DATA_OR_CONFIG,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_RESUMABLE,
    EnvironmentProblem,
    Stopped,
    UserError,
)

NAME = "someone/some-model"
COMMIT = "c" * 40
TOKEN = "hf_" + "Tt0" * 12
WEIGHTS = bytes(range(256)) * 400  # 102,400 bytes
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"t h",
    "model.safetensors": WEIGHTS,
}
UNREAD = {
    "README.md": b"# a model",
    "pytorch_model.bin": b"pickled",
    "model.gguf": b"quantised",
    "consolidated.safetensors": b"twice",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"thrice",
    "modeling_own.py": b"import os",
}


class Request(NamedTuple):
    """What the server was asked."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class FakeHub(http.server.ThreadingHTTPServer):
    """Lists and hands out `files` of one model. `refuse` gives (status, headers) for a path, or None to go on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = FILES | UNREAD
        self.commit = COMMIT  # where the branch is
        self.requests: list[Request] = []
        self.breaks: list[int] = []  # after how many bytes the next answers with weights break off
        self.refuse: Callable[[Request], tuple[int, dict[str, str]] | None] = lambda request: None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, file: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith("/" + file)]

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        found = [re.fullmatch(rf"/{NAME}/resolve/\w+/(.+)", r.path) for r in self.requests if r.method == "GET"]
        return {match[1] for match in found if match}


class Answers(http.server.BaseHTTPRequestHandler):
    """The three addresses that a download needs: the model, its tree, its files."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        request = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        self.server.requests.append(request)
        if refused := self.server.refuse(request):
            self._send(refused[0], b"", refused[1])
        elif match := re.fullmatch(rf"/api/models/{NAME}(?:/revision/(\w+))?", path):
            commit = match[1] if match[1] == COMMIT else self.server.commit
            self._send_json({"id": NAME, "sha": commit, "siblings": [self._sibling(n) for n in self.server.files]})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self._send_json([self._leaf(name) for name in self.server.files])
        elif match := re.fullmatch(rf"/{NAME}/resolve/(\w+)/(.+)", path):
            self._send_file(match[2], match[1] if match[1] == COMMIT else self.server.commit)
        else:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, name: str, commit: str) -> None:
        content = self.server.files[name]
        head = {"X-Repo-Commit": commit, "ETag": f'"{etag(name, content)}"', "Accept-Ranges": "bytes"}
        start = 0
        if asked := self.headers["Range"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        whole = content[start:]
        cut = (
            self.server.breaks.pop(0)
            if name.endswith(".safetensors") and self.server.breaks and self._gives()
            else None
        )
        self._send(206 if asked else 200, whole, head, cut)

    def _gives(self) -> bool:
        return self.command == "GET"

    def _sibling(self, name: str) -> dict[str, Any]:
        leaf = self._leaf(name)
        lfs = {"sha256": leaf["lfs"]["oid"], "size": leaf["size"], "pointerSize": 134} if "lfs" in leaf else None
        return {"rfilename": name, "size": leaf["size"], "blobId": leaf["oid"]} | ({"lfs": lfs} if lfs else {})

    def _leaf(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        leaf: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
        if name.endswith((".safetensors", ".bin", ".gguf")):
            leaf["lfs"] = {"oid": etag(name, content), "size": len(content), "pointerSize": 134}
        return leaf

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, head: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | head).items():
            self.send_header(key, value)
        self.end_headers()
        if self._gives():
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def etag(name: str, content: bytes) -> str:
    """Of large files the SHA-256, of others 40 digits, as git's."""
    digest = hashlib.sha256(content).hexdigest()
    return digest if name.endswith((".safetensors", ".bin", ".gguf")) else digest[:40]


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture(autouse=True)
def online(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's library as a user has it, but for the address and an empty cache; the cache's folder.

    It waits a second before it takes up a broken connection; not here.
    """
    store = tmp_path / "hub"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(store),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "DOWNLOAD_CHUNK_SIZE": 10_000,  # of a broken answer, what is no whole chunk is lost
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    hub.fetch.cache_clear()
    yield store
    hub.fetch.cache_clear()


def refused(**options: Any) -> UserError:
    """The one line that it ends with."""
    hub.fetch.cache_clear()
    with pytest.raises(UserError) as error:
        hub.fetch(NAME, **options)
    assert "\n" not in str(error.value)
    return error.value


def again(**options: Any) -> Path:
    """As a command that is run once more."""
    hub.fetch.cache_clear()
    return hub.fetch(NAME, **options)


def partials(store: Path) -> list[int]:
    return [file.stat().st_size for file in store.rglob("*.incomplete")]


# ---- what is fetched


def test_only_what_is_read_is_fetched(server: FakeHub, online: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No pickles, no GGUF, no folder with the same model in another format, no second copy of the weights."""
    caplog.set_level(logging.INFO, logger="lowrank_align")
    folder = hub.fetch(NAME)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert server.fetched() == set(FILES)
    assert folder == online / "models--someone--some-model" / "snapshots" / COMMIT
    size = sum(map(len, FILES.values()))
    assert caplog.messages == [f"{NAME}: downloading 5 files, {size / 1e6:.1f} MB, to {online}"]
    assert partials(online) == []


def test_what_is_there_is_not_fetched_again(server: FakeHub) -> None:
    """A second run asks once which commit is the newest; the same process not even that."""
    folder = hub.fetch(NAME)
    server.requests.clear()
    assert hub.fetch(NAME) == folder
    assert server.requests == []
    assert again() == folder
    assert [request.path for request in server.requests] == [f"/api/models/{NAME}"]


def test_other_libraries_find_it(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where the hub's own library looks, also offline."""
    folder = hub.fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.hf_hub_download(NAME, "model.safetensors") == str(folder / "model.safetensors")
    assert huggingface_hub.snapshot_download(NAME, allow_patterns=list(FILES)) == str(folder)


def test_a_branch_that_moves_during_the_download(
    server: FakeHub, online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was listed is what comes, and what is found without a network."""

    def listed(request: Request) -> None:
        if len(server.requests) > 1:
            server.commit = "d" * 40

    server.refuse = listed
    folder = hub.fetch(NAME)
    assert folder == online / "models--someone--some-model" / "snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert again() == folder


def test_a_settings_file_that_is_not_found_after_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the current folder."""
    monkeypatch.setattr(hub, "_download", lambda *_: None)
    assert str(refused()).startswith(f"{NAME}: config.json is not in ")


def test_an_index_nested_deep(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {"config.json": b"{}", "model.safetensors.index.json": b"[" * 100_000, "model.safetensors": WEIGHTS}
    hub.fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(refused()).startswith(f"{NAME}: model.safetensors.index.json is not in the hub's cache")


def test_rows_and_plans_need_no_weights(server: FakeHub) -> None:
    folder = loading.model_folder(NAME, weights=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(FILES) - {"model.safetensors"})
    assert loading.model_folder(NAME) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_shards_and_additional_templates(server: FakeHub) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": WEIGHTS[i:] for i in (1, 2)}
    index = json.dumps({"weight_map": dict.fromkeys("ab", "model-00001-of-00002.safetensors")}).encode()
    more = {"model.safetensors.index.json": index, "additional_chat_templates/tool_use.jinja": b"{}"}
    server.files = {"config.json": b"{}"} | shards | more
    folder = hub.fetch(NAME)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == server.files


def test_bars_are_shown_on_a_terminal_and_not_in_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert not are_progress_bars_disabled()
    hub.fetch(NAME)
    assert capfd.readouterr() == ("", "")  # no terminal here
    assert not are_progress_bars_disabled()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with hub._Bar(total=2, desc="files", file=Terminal(), ncols=60) as bar:
        assert "files:   0%" in bar.fp.getvalue()


# ---- interruptions


def test_a_broken_connection_is_taken_up_again(server: FakeHub) -> None:
    """After 30,000 bytes, and after 20,000 more; then the rest comes, and the whole is right."""
    server.breaks = [30_000, 20_000]
    assert (hub.fetch(NAME) / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in server.gets("model.safetensors")] == [None, "bytes=30000-", "bytes=50000-"]


def test_a_download_that_broke_off_goes_on_in_the_next_run(
    server: FakeHub, online: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The hub breaks off after 30,000 bytes and is then out of order; the next command asks for what is missing."""
    server.breaks = [30_000]
    server.refuse = lambda r: (500, {}) if r.range else None
    error = refused()
    assert (error.exit_code, str(error)) == (
        EXIT_ENVIRONMENT,
        f"{NAME}: the hub answered with error 500; try later",
    )
    assert partials(online) == [30_000]
    server.refuse = lambda r: None
    server.requests.clear()
    caplog.set_level(logging.INFO, logger="lowrank_align")
    caplog.clear()
    assert (again() / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in server.gets("model.safetensors")] == ["bytes=30000-"]
    assert caplog.messages == [
        f"{NAME}: downloading 1 files, {(len(WEIGHTS) - 30_000) / 1e6:.1f} MB, 0.0 MB more are there from before, "
        f"to {online}"
    ]
    assert partials(online) == []


def test_a_network_that_stays_away_midway(server: FakeHub, online: Path) -> None:
    """Six attempts of the library's own, none of which brings a byte."""
    server.breaks = [30_000] + [0] * 6
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert re.fullmatch(
        f"{NAME}: the download broke off \\(.+\\); the same command goes on where it stopped", str(error)
    )
    assert partials(online) == [30_000]


def test_ctrl_c_while_downloading(server: FakeHub, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the first bytes of the weights; what has come is kept."""
    original = file_download.http_get

    def interrupted(url: str, target: Any, **options: Any) -> None:
        if options["resume_size"]:
            return original(url, target, **options)
        target.write(WEIGHTS[:1234])
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "http_get", interrupted)
    error = refused()
    assert isinstance(error, Stopped)
    assert error.exit_code == EXIT_RESUMABLE
    assert str(error) == f"{NAME}: download interrupted; the same command goes on where it stopped"
    assert partials(online) == [1234]
    assert (again() / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in server.gets("model.safetensors")] == ["bytes=1234-"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_process_loses_nothing(server: FakeHub, online: Path, tmp_path: Path) -> None:
    """The child is killed when the hub has sent 60,000 bytes and gone silent."""
    arrived, held = threading.Event(), threading.Event()
    server.files["model.safetensors"] = WEIGHTS * 300  # 30 MB, as the library writes 10 MB at a time
    code = f"from lowrank_align import hub; hub.fetch({NAME!r})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(online), "HF_HUB_DISABLE_XET": "1"}

    def stall(self: Answers, *args: Any) -> None:
        self.wfile.write(server.files["model.safetensors"][:25_000_000])
        self.wfile.flush()
        arrived.set()
        held.wait()

    original = Answers._send

    def send(self: Answers, status: int, content: bytes, head: dict[str, str], cut: int | None = None) -> None:
        if not (self._gives() and self.path.endswith("model.safetensors")):
            return original(self, status, content, head, cut)
        original(self, status, content, head, 0)
        stall(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "_send", send)
        with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as child:
            assert arrived.wait(60)
            blobs = online / "models--someone--some-model" / "blobs"
            while not any(size >= 10_000_000 for size in partials(blobs)):
                assert child.poll() is None
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        held.set()
    (kept,) = partials(online)
    server.requests.clear()
    assert (again() / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert [r.range for r in server.gets("model.safetensors")] == [f"bytes={kept}-"]


def test_damage_is_noticed(server: FakeHub, online: Path) -> None:
    """What lay there from before is not the beginning of this file: the SHA-256 says so, and nothing of it stays."""
    folder = online / "models--someone--some-model" / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{etag('model.safetensors', WEIGHTS)}{hub.PARTIAL}").write_bytes(b"?" * 1000)
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == f"{NAME}: model.safetensors arrived damaged and was removed; run the same command again"
    assert partials(online) == []
    assert (again() / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.range for r in server.gets("model.safetensors")] == ["bytes=1000-", None]


# ---- logins and licences


def gated(request: Request) -> tuple[int, dict[str, str]] | None:
    """The listing is public; the files are for those who have accepted."""
    if "/resolve/" not in request.path:
        return None
    return 403 if request.authorization else 401, {"X-Error-Code": "GatedRepo"}


def test_a_gated_model_without_login(server: FakeHub) -> None:
    server.refuse = gated
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == (
        f"{NAME}: gated; accept its licence on {server.address}/{NAME}, then log in with `hf auth login`"
    )
    assert server.gets("model.safetensors") == []  # known before gigabytes are asked for


def test_a_login_that_has_not_accepted(server: FakeHub, tmp_path: Path) -> None:
    server.refuse = gated
    (tmp_path / "token").write_text(TOKEN)
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == (
        f"{NAME}: gated, and this login has no access yet; accept its licence on {server.address}/{NAME} "
        "(some are granted by hand)"
    )


def test_the_login_is_the_hubs_own(
    server: FakeHub, online: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every request bears the token that `hf auth login` left; nothing that we print or write has it."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "token").write_text(TOKEN)
    server.breaks = [30_000]
    hub.fetch(NAME)
    assert len(server.gets("model.safetensors")) == 2
    assert {r.authorization for r in server.requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capfd.readouterr())
    assert not [file for file in online.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def test_a_login_that_the_hub_does_not_know(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    server.refuse = lambda r: (401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == f"{NAME}: the hub does not know this login (expired?); renew it: `hf auth login`"


def test_a_login_without_the_right(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    server.refuse = lambda r: (403, {"X-Error-Message": "No access to gated repositories"})
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == f"{NAME}: this login may not read it (No access to gated repositories)"


def test_a_model_that_is_not_there(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a login the hub says the same of a private model."""
    near = tmp_path / "other" / "model"
    near.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        loading.model_folder("other/modle")
    assert error.value.exit_code == EXIT_DATA_OR_CONFIG
    assert str(error.value) == (
        "other/modle: neither a folder here (did you mean other/model?) nor a model on the hub; a private one needs "
        "`hf auth login`"
    )
    (tmp_path / "token").write_text(TOKEN)
    hub.fetch.cache_clear()
    with pytest.raises(UserError, match="nor a model on the hub$"):
        loading.model_folder("other/modle")


def test_a_name_that_the_hub_does_not_allow(server: FakeHub) -> None:
    with pytest.raises(UserError) as error:
        loading.model_folder("some one/model")
    assert error.value.exit_code == EXIT_DATA_OR_CONFIG
    assert str(error.value) == "some one/model: no such folder, and no name that the hub allows"
    assert server.requests == []


# ---- repositories that do not do


def test_pickled_weights_alone(server: FakeHub) -> None:
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    error = refused()
    assert error.exit_code == EXIT_DATA_OR_CONFIG
    assert str(error) == (
        f"{NAME}: its repository has no safetensors (only pytorch_model.bin and its like); other weights are not "
        "read, choose another"
    )
    assert server.fetched() == set()
    assert (again(weights=False) / "config.json").is_file()


def test_no_model_at_all(server: FakeHub) -> None:
    server.files = {"model.safetensors": WEIGHTS}
    error = refused()
    assert error.exit_code == EXIT_DATA_OR_CONFIG
    assert str(error) == f"{NAME}: its repository has no config.json, so no model that transformers reads"


# ---- the disk


def test_a_disk_without_room(server: FakeHub, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """102,442 bytes are to come, and 64 MiB must be left: 67,108,864 + 102,442 - 1 is too little by a byte."""
    size = sum(map(len, FILES.values()))
    assert size == 102_442
    usage = type("Usage", (), {"free": 67_108_864 + size - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == (
        f"{NAME}: 0.1 MB to download, but {online} has 67.2 MB free; make room, or name another folder with "
        "HF_HUB_CACHE"
    )
    assert server.fetched() == set()
    usage.free += 1  # type: ignore[attr-defined]
    assert (again() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_that_fills_up(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, target: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "http_get", full)
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == (
        f"{online}: No space left on device while downloading {NAME}; HF_HUB_CACHE names another folder"
    )


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/there/models--x")

    monkeypatch.setattr(hub, "snapshot_download", denied)
    error = refused()
    assert error.exit_code == EXIT_ENVIRONMENT
    assert str(error) == (
        f"/there/models--x: Permission denied while downloading {NAME}; HF_HUB_CACHE names another folder"
    )


# ---- without a network


def test_offline_with_a_whole_copy(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hub.fetch(NAME)
    server.requests.clear()
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert again() == folder
    assert (server.requests, caplog.messages) == ([], [])


def test_offline_with_a_file_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.fetch(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert again(weights=False) == folder
    error = refused()
    assert isinstance(error, EnvironmentProblem)
    assert str(error) == (
        f"{NAME}: model.safetensors is not in the hub's cache, and the hub cannot be reached (HF_HUB_OFFLINE is set); "
        "run the same command with a network once"
    )


def test_offline_with_a_shard_missing(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    server.files = {"config.json": b"{}", "model.safetensors.index.json": index} | {s: WEIGHTS for s in shards}
    folder = hub.fetch(NAME)
    (folder / shards[1]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(refused()).startswith(f"{NAME}: {shards[1]} is not in the hub's cache")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert str(refused()).startswith(f"{NAME}: model.safetensors.index.json is not in the hub's cache")


def test_a_network_that_is_away(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole copy does, and it is said; without one it is the user's word against nothing."""
    folder = hub.fetch(NAME)
    caplog.clear()
    server.refuse = lambda r: (503, {})
    assert again() == folder
    assert caplog.messages == [
        f"{NAME}: taken from the hub's cache ({NAME}: the hub answered with error 503; try later)"
    ]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    caplog.clear()
    assert again() == folder
    assert caplog.messages == [f"{NAME}: taken from the hub's cache (the hub cannot be reached)"]
    with pytest.raises(UserError) as error:
        loading.model_folder("other/model")
    assert error.value.exit_code == EXIT_DATA_OR_CONFIG
    assert str(error.value) == "other/model: no such folder, and the hub cannot be reached for it"


def test_a_page_in_between(server: FakeHub) -> None:
    """A hotel's login page answers 200 with HTML, whatever is asked."""
    server.refuse = lambda r: (200, {"Content-Type": "text/html"})
    assert str(refused()) == f"{NAME}: no such folder, and the hub cannot be reached for it"


# ---- the command


def test_a_command_with_a_hub_model(
    server: FakeHub, tiny_llama: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """Rows are shown before any weights come; then generating fetches them. stdout is the command's own."""
    server.files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ("--model", NAME, "--max-length", 64)
    shown = command("show", *argv, "--data", "rows.jsonl")
    assert shown.code == EXIT_DONE
    assert server.gets("model.safetensors") == []
    out = tmp_path / "out.jsonl"
    generate = ("generate", *argv, "--quantize", "none", "--prompts", "rows.jsonl", "--out", out)
    outcome = command(*generate, "--max-new-tokens", 2)
    assert (outcome.code, outcome.out) == (EXIT_DONE, f"{out}: 1 lines\n")
    assert len(server.gets("model.safetensors")) == 1
    server.refuse = lambda r: (401, {"X-Error-Code": "RepoNotFound"})
    outcome = command("show", "--model", "no/model", "--data", "rows.jsonl")
    assert outcome.code == EXIT_DATA_OR_CONFIG
    assert outcome.err == (
        "error: no/model: neither a folder here nor a model on the hub; a private one needs `hf auth login`\n"
    )
