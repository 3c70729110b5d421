"""`heliostat keys`, `heliostat chat` and `heliostat serve --write-config`."""

import io
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli, progress
from cluster.errors import ConfigError, PortError, UsageError
from cluster.storage import Store
from serving import app
from serving.auth import FORMAT, KeyFile, find, new_key
from serving.engines.base import Chat, Event, Finished, GenerationRequest, Started, Tokens
from tests import fakes
from tests.ports import free_port
from tests.scripted import application, listening
from tests.strangers import odd_requests_get_nothing

SECRET, KEY = new_key("a")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(progress._state, "console", None)
    monkeypatch.setitem(progress._state, "stderr", False)
    return f"storage.root={tmp_path / 'root'}"


def here(*arguments: str) -> int:
    return cli._guarded(lambda: cli.app(list(arguments), standalone_mode=False))


def test_a_key_is_made_listed_and_revoked(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--scope", "generate", "--expires", "30d", "--requests-per-minute", "5"]
    assert here("keys", "create", "手机", root, *options) == 0
    secret = capsys.readouterr().out.strip()
    assert FORMAT.match(secret)
    keys = KeyFile(Store(str(tmp_path / "root"))).read()
    assert keys is not None and find(keys, secret) == keys[0]
    assert keys[0].quota.requests_per_minute == 5 and keys[0].scopes == ("generate",)
    assert here("keys", "list", root) == 0
    listed = capsys.readouterr().out
    assert keys[0].id in listed and "valid" in listed and "requests_per_minute=5" in listed
    assert secret not in listed and keys[0].digest not in listed
    assert here("keys", "revoke", "手机", root) == 0
    assert here("keys", "list", root) == 0
    assert "revoked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a", "--scope", "all"], "the scopes are generate, classify"),
        (["create", "a", "--expires", "soon"], "such as 30d"),
        (["create", "a", "--concurrent", "0"], "give 1 or more"),
        (["create", "a\nb"], "printable"),
        (["create", ""], "printable"),
        (["revoke", "nobody"], "no valid key is named nobody"),
    ],
)
def test_what_is_no_key_is_one_line(
    root: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    assert here("keys", *arguments, root) == 3
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
    assert not (tmp_path / "root" / "keys.json").exists()


def test_the_serve_config_can_be_written_instead_of_deployed(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "root"))
    for name in ("a", "a", "b"):
        fakes.commit(store, "model", name, detail={"family": "causal_lm", "context_length": 8})
    target = tmp_path / "serve.yaml"
    models = "serve.models=[a@1,a,b@2]"
    wrong = ["serve", "gpt-demo", root, "--write-config", str(target), models]
    assert here(*wrong) == 3 and "b has no version 2: there is b@1" in capsys.readouterr().err
    assert not target.exists()
    assert here(*[*wrong[:-1], "serve.models=[a@1,a,b]", "serve.replicas=[0,2]"]) == 0
    tree: dict[str, Any] = yaml.safe_load(target.read_text("utf-8"))
    deployments = {d["name"]: d for d in tree["applications"][0]["deployments"]}
    assert list(deployments) == ["Ingress", "Accounts", "a@1", "a", "b"]
    assert deployments["a"]["user_config"] == {"model": "model/a@2"}
    assert deployments["a"]["autoscaling_config"]["min_replicas"] == 0
    assert deployments["Ingress"]["num_replicas"] == 2
    assert all(d["max_surge_percent"] == 100 for d in deployments.values())
    cards = deployments["Ingress"]["user_config"]["models"]
    assert [(c["id"], c["artifact"]) for c in cards] == [
        ("a@1", "model/a@1"), ("a", "model/a@2"), ("b", "model/b@1"),
    ]  # fmt: skip


def test_no_serve_config_is_written_for_a_damaged_model(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fakes.commit(
        Store(str(tmp_path / "root")),
        "model",
        "a",
        detail={"family": "causal_lm", "context_length": 8},
    )
    [weights] = (tmp_path / "root").rglob("a.bin")
    weights.write_bytes(b"contend")
    target = tmp_path / "serve.yaml"
    asked = ["serve", "gpt-demo", root, "--write-config", str(target), "serve.models=[a]"]
    assert here(*asked) != 0 and found.id in capsys.readouterr().err
    assert not target.exists()


def test_a_port_in_use_is_refused_before_any_work(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = fakes.config("gpt-demo", f"serve.port={port}", root=tmp_path)
        with pytest.raises(PortError, match=f"port {port} on 127.0.0.1 is taken"):
            app.check(taken)
    app.check(taken)
    with pytest.raises(PortError, match="not an address"):
        app.check(fakes.config("gpt-demo", "serve.host=nowhere.invalid", root=tmp_path))


def test_serving_nothing_names_the_stage_to_run_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="heliostat publish"):
        app.run(fakes.config("gpt-demo", root=tmp_path))


def test_a_service_for_the_network_needs_a_key(tmp_path: Path) -> None:
    detail = {"family": "causal_lm", "context_length": 8}
    fakes.commit(Store(str(tmp_path)), "model", "gpt-demo", detail=detail)
    given = ("serve.host=0.0.0.0", f"serve.port={free_port()}")
    with pytest.raises(ConfigError, match="heliostat keys create NAME"):
        app.run(fakes.config("gpt-demo", *given, root=tmp_path))


async def parrot(request: GenerationRequest) -> AsyncIterator[Event]:
    yield Started("model/gpt@3", 1)
    prompt = request.prompt
    said = [str(m["content"]) for m in prompt.messages] if isinstance(prompt, Chat) else [prompt]
    yield Tokens(f"{len(said)}:", (1,))
    yield Tokens(str(said[-1]), (2,))
    yield Finished("stop", 2)


@pytest.fixture
def service() -> Iterator[str]:
    with listening(application(parrot, keys=[KEY])[0]) as url:
        yield url


def test_a_chat_remembers_what_was_said(
    service: str,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HELIOSTAT_API_KEY", SECRET)
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n\nand?\n/reset\n/system s\nagain\n"))
    assert here("chat", "--url", service, "--max-tokens", "20") == 0
    assert capsys.readouterr().out == "1:你好\n3:and?\n2:again\n"


def test_a_chat_without_a_key_says_what_is_missing(
    service: str, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HELIOSTAT_API_KEY", raising=False)
    assert here("chat", "--url", service) == 1
    assert "give an API key" in capsys.readouterr().err
    assert here("chat", "nobody", "--url", service, "--key", SECRET) == 3
    assert "has no model nobody: it has gpt" in capsys.readouterr().err
    assert here("chat", "--url", "http://127.0.0.1:9") == 1
    assert "does not answer" in capsys.readouterr().err


def test_raw_requests_without_a_key_get_nothing(service: str) -> None:
    """Hosts and targets that no client library would send."""
    odd_requests_get_nothing(service)
