"""`reverie push`, against a stub of the Hub that the real client talks to: what goes up, as whom, and what does not."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reverie.cli import main
from reverie.runs import write_record

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra 'models')")

# The client hands its HTTP library whole files in a way that the library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Stub:
    """A Hub that keeps what it is given.

    Args:
        repositories: Whether each is private.
        files: What they hold: name and content.
        asked: Method and path of every request.
    """

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, object]]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if token != "Bearer hf_right":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me"}
        if path == "/api/repos/create":
            made = json.loads(body)
            self.repositories[f"{made['organization']}/{made['name']}"] = made["visibility"] == "private"
            return 200, {"url": f"{self.url}/{made['organization']}/{made['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/blobs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/preupload/main"):
            listed = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            large = (".safetensors", ".onnx", ".bin", ".pt2")
            return 200, {
                "files": [
                    {"path": part["path"], "uploadMode": modes[part["path"].endswith(large)], "shouldIgnore": False}
                    for part in listed
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [{**part, "actions": {"upload": {"href": f"{self.url}/blobs/{part['oid']}"}}} for part in objects],
            }
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                part = line["value"]
                if line["key"] == "file":
                    self.files[part["path"]] = base64.b64decode(part["content"])
                elif line["key"] == "lfsFile":
                    self.files[part["path"]] = self.blobs[part["oid"]]
            return 200, {"commitUrl": f"{self.url}/me/digits/commit/{'0' * 40}", "commitOid": "0" * 40}
        name = path.removeprefix("/api/models/")
        if name in self.repositories:
            return 200, {"id": name, "private": self.repositories[name], "siblings": [], "sha": "0" * 40}
        return 404, {"error": "Repository not found"}


@pytest.fixture
def stub(monkeypatch, tmp_path) -> Iterator[Stub]:
    from huggingface_hub import constants

    found = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = found.answer(self.command, self.path, body, self.headers.get("Authorization", "Bearer hf_right"))
            text = json.dumps(value).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # Large files then go the Hub's older way, which a stub can speak.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()
    hub.close_session()


def test_a_run_goes_up_whole_and_private_and_no_image_with_it(finished, stub, capsys):
    assert main(["push", str(finished), "me/digits"]) == 0
    assert capsys.readouterr().out == f"{stub.url}/me/digits: 4 files\n"
    assert stub.repositories == {"me/digits": True}
    assert set(stub.files) == {"README.md", "network.safetensors", "network.onnx", "recipe.toml"}
    for name, content in stub.files.items():
        assert content == (finished / name).read_bytes()
    for name in ("network.safetensors", "network.onnx"):
        assert hashlib.sha256(stub.files[name]).hexdigest() in stub.blobs
    # Who one is comes first, and everything is one commit.
    assert stub.asked[0] == "GET /api/whoami-v2"
    assert sum("/commit/" in line for line in stub.asked) == 1


def test_public_is_said(finished, stub):
    assert main(["push", str(finished), "me/digits", "--public"]) == 0
    assert stub.repositories == {"me/digits": False}


def test_a_dry_run_asks_nobody(finished, stub, capsys):
    assert main(["push", str(finished), "me/digits", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["README.md", "network.safetensors", "network.onnx", "recipe.toml"]
    assert lines[-1].endswith("would go to me/digits, private")
    assert stub.asked == []


def message(capsys) -> str:
    return capsys.readouterr().err.removeprefix("reverie: ").removesuffix("\n")


def test_a_public_repository_gets_nothing_unasked(finished, stub, capsys):
    stub.repositories["me/digits"] = False
    assert main(["push", str(finished), "me/digits"]) == 1
    assert message(capsys) == (
        "me/digits: must be private without --public, got a repository that everybody may read; choose another, or say --public"
    )
    assert stub.files == {}


def test_the_token_is_looked_at_before_anything_else(finished, stub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(finished), "me/digits"]) == 1
    assert message(capsys) == "me/digits: the Hub must accept the request, got status 401; log in with `hf auth login`"
    assert stub.asked == ["GET /api/whoami-v2"]
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(finished), "me/digits"]) == 1
    assert message(capsys) == (
        "push must have a token of the Hugging Face Hub, got none; `hf auth login` stores one, or set HF_TOKEN"
    )


def test_a_name_that_is_none_is_refused(finished, stub, capsys):
    assert main(["push", str(finished), "me/a b/c"]) == 1
    assert message(capsys) == (
        "the repository must be OWNER/NAME in letters, digits, '-', '_' and '.', got 'me/a b/c'; such as me/resnet18-w4a8"
    )


def test_nobody_answers(finished, stub, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(finished), "me/digits"]) == 1
    assert message(capsys).startswith("http://127.0.0.1:9: the Hub must answer, got '")


def test_an_interrupted_run_stays(finished, stub, tmp_path, capsys):
    record = json.loads((finished / "run.json").read_text()) | {"complete": False}
    write_record(tmp_path, record)
    assert main(["push", str(tmp_path), "me/digits"]) == 1
    assert "must be a complete run, got an interrupted one" in message(capsys)
    assert stub.asked == []


def test_a_report_with_real_images_must_be_asked_for_twice(finished, stub, capsys):
    assert main(["push", str(finished), "me/digits", "--with-report"]) == 1
    assert message(capsys) == (
        f"{finished}: --with-report must be of a run without real images, got one that was given some (evaluation), which the report may "
        "show; leave it out, or say --with-real-images"
    )
    assert main(["push", str(finished), "me/digits", "--with-report", "--with-real-images", "--dry-run"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_run_without_its_card_is_refused(finished, stub, tmp_path, capsys):
    for file in finished.glob("*.*"):
        if file.name != "README.md" and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["push", str(tmp_path), "me/digits"]) == 1
    assert message(capsys) == f"{tmp_path}: must hold README.md, got none; run `reverie quantize` again with a new --output"
    assert Path(finished / "README.md").is_file()
