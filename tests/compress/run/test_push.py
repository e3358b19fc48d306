"""A checkpoint goes to the Hub: everything is checked before work begins, and a failed upload loses nothing."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
from typer.testing import CliRunner

from paredown.commands.app import app
from paredown.compress.errors import PareError
from paredown.compress.run.push import check_push, push

ANN = {"name": "ann", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that says who a token is of: `hub(answer, status)`."""
    servers = []

    def serve(answer=ANN, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{servers[-1].server_port}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_name_that_is_the_users_or_an_organisations_is_welcome(hub):
    hub()
    check_push("org/small")
    check_push("ann/small")


@pytest.mark.parametrize(
    ("name", "told"),
    [("small", "wanted ORG/NAME"), ("org/--bad--", "--bad--"), ("other/small", "who may write to ann, org")],
)
def test_a_name_that_cannot_be_written_is_refused(hub, name, told):
    hub()
    with pytest.raises(PareError, match=told):
        check_push(name)


def test_a_token_that_is_missing_unknown_or_only_reads_is_refused(hub, monkeypatch, tmp_path):
    hub({"error": "Invalid username or password."}, 401)
    with pytest.raises(PareError, match="does not accept the token"):
        check_push("org/small")
    hub({**ANN, "auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(PareError, match="only reads"):
        check_push("org/small")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PareError, match="hf auth login"):
        check_push("org/small")


def test_a_hub_that_is_not_there_is_told(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PareError, match="cannot be reached"):
        check_push("org/small")


@pytest.fixture
def uploads(monkeypatch):
    """What would be sent to the Hub: repositories that are made, and the card of each folder that is uploaded."""
    made, sent = [], {}
    monkeypatch.setattr("paredown.compress.run.push.HfApi.whoami", lambda self: ANN)

    def create_repo(self, repo_id, private, exist_ok):
        made.append((repo_id, private, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr("paredown.compress.run.push.HfApi.create_repo", create_repo)
    monkeypatch.setattr("paredown.compress.run.push.HfApi.upload_folder", upload_folder)
    return made, sent


def test_export_pushes_a_checkpoint_whose_card_names_the_repository(tiny_model, prune, tmp_path, uploads):
    prune(tiny_model, tmp_path / "packed")
    command = ["export", str(tmp_path / "packed"), "-o", str(tmp_path / "out"), "--push", "org/small", "--private"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made, sent = uploads
    assert made == [("org/small", True, True)]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= sent["org/small"].keys()
    assert b'from_pretrained("org/small")' in sent["org/small"]["README.md"]
    assert sent["org/small"]["README.md"] == (tmp_path / "out/README.md").read_bytes()


def test_compress_asks_the_hub_before_it_begins(tiny_model, tmp_path, uploads):
    command = ["compress", str(tiny_model), "-r", "magnitude-50", "-o", str(tmp_path / "out"), "--push", "other/small"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, PareError) and "who may write to ann, org" in str(done.exception)
    assert not (tmp_path / "out").exists() and uploads == ([], {})


def test_an_upload_that_fails_leaves_the_folder_and_says_what_to_type(tmp_path, uploads, monkeypatch):
    def fail(self, **arguments):
        raise ConnectionError("the line broke")

    monkeypatch.setattr("paredown.compress.run.push.HfApi.upload_folder", fail)
    (tmp_path / "README.md").write_text('from_pretrained(".")')
    with pytest.raises(PareError, match=f"is whole.*the line broke.*hf upload org/small {tmp_path}"):
        push(tmp_path, "org/small")
