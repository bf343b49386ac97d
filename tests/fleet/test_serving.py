# SPDX-License-Identifier: Apache-2.0
"""What a service may be: who is let in only with a token, TLS, bounds, tokens from files."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.fleet import metrics, serving
from adatoken3d_ros.fleet.door import DoorConfig
from adatoken3d_ros.fleet.loading import token_of
from adatoken3d_ros.fleet.serving import Service
from adatoken3d_ros.fleet.tokens import read_token, read_tokens
from tests.fleet.test_fleet_metrics import EXPORTED


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "robots.example"])
def test_other_machines_come_in_with_a_token_alone(host: str) -> None:
    with pytest.raises(ValueError, match="lets other machines in: that needs a token"):
        Service(host=host)
    assert Service(host=host, door=DoorConfig(token="x" * 16)).url.startswith("http://")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert Service(host=host).host == host


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 0}, "replicas 0 is out of range"),
        ({"max_scenes": 0}, "max-scenes 0 is out of range"),
        ({"max_mb": float("nan")}, "max-mb nan is out of range"),
        ({"port": 65536}, "port 65536 is out of range"),
        ({"certificate": Path(__file__)}, "TLS needs both a certificate and its key"),
        ({"certificate": Path("/no/c"), "key": Path("/no/k")}, "/no/c is no file"),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        Service(**given)


def test_urls() -> None:
    files = {"certificate": Path(__file__), "key": Path(__file__)}
    assert Service(host="::1", port=8443, **files).url == "https://[::1]:8443"  # type: ignore[arg-type]
    assert Service().url == "http://127.0.0.1:8000"
    everywhere = Service(host="0.0.0.0", door=DoorConfig(token="x" * 16))
    assert everywhere.url == f"http://{socket.gethostname()}:8000"


ODD = (
    ("", "has 16 to 512 letters, this one 0"),
    ("short", "has 16 to 512 letters, this one 5"),
    ("x" * 513, "has 16 to 512 letters, this one 513"),
    ("has a space in it", "letter 4 of the token is a space"),
    ("0123456789abcdef\u00e9", "letter 17 of the token is no ASCII"),
    ("0123456789abcdef\x07", "letter 17 of the token is a control character"),
)


@pytest.mark.parametrize(("token", "said"), ODD)
def test_odd_tokens_are_refused_in_words_and_never_told(token: str, said: str, tmp_path: Path) -> None:
    """Those of the service, for all robots or for one, and those that a robot has; there a short one may be."""
    file = tmp_path / "token"
    file.write_text(token, encoding="utf-8")
    named = tmp_path / "tokens"
    named.write_text(f"# robots\n\narm: {'y' * 16}\nleg: {token}\n", encoding="utf-8")
    cases = [(lambda: read_token(file), f"{file}, line 1"), (lambda: read_tokens(named), f"{named}, line 4")]
    if token != "short":
        said_there = said.replace("16 to", "1 to")
        cases += [(lambda: token_of(str(file)), f"{file}, line 1")]
        cases += [(lambda: token_of(token), "engine.token")] if token else []
    else:
        assert token_of(token) == token_of(str(file)) == "short"
    for number, (read, where) in enumerate(cases):
        with pytest.raises(ValueError) as error:
            read()
        assert where in str(error.value) and (said if number < 2 else said_there) in str(error.value)
        assert not token or token not in str(error.value)


def test_tokens_of_robots(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    a, b = "a" * 16, "b:" * 20
    file.write_text(f"# those in the hall\narm : {a}\n\nleg:{b}\n")
    assert read_tokens(file) == {"arm": a, "leg": b}
    for text, said in (
        ("", "names no robot"),
        (a, "line 1: NAME: TOKEN is expected"),
        (f"ar m: {a}", "line 1: NAME: TOKEN is expected"),
        (f"arm: {a}\narm: {b}", "line 2: arm has a token already"),
        (f"arm: {a}\nleg: {a}", "line 2: another robot has this token"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_tokens(file)
    with pytest.raises(ValueError, match="no token can be read: .*none"):
        read_tokens(tmp_path / "none")
    file.write_text(f"{a}  \nmore\n")
    assert read_token(file) == token_of(str(file)) == token_of(a) == a and token_of("") == ""


def test_what_this_machine_does_not_give_is_named_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adatoken3d_ros.fleet.cluster.require_ray", lambda: None)
    monkeypatch.setattr(serving, "connected", lambda *given, **named: pytest.fail("started"))
    with socket.socket() as taken, socket.socket() as other:
        for one in (taken, other):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        token = tmp_path / "token"
        token.write_text("x" * 16)
        for options, said in (
            (["--port", str(port), "--metrics-port", str(free)], f"--port {port} is taken on 127.0.0.1: name another"),
            (["--port", str(free), "--metrics-port", str(port)], f"--metrics-port {port} is taken on 127.0.0.1"),
            (["--port", str(free), "--metrics-port", str(free)], f"port and metrics-port are both {free}"),
            (["--host", "192.0.2.7", "--token-file", str(token)], "--host '192.0.2.7' is no address of this machine"),
            (
                ["--tls-cert", str(token), "--tls-key", str(token)],
                f"--tls-cert {token} and --tls-key {token} are of",
            ),
        ):
            assert main(["serve", *options]) == 2
            assert said in capsys.readouterr().err


def test_the_command_refuses_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adatoken3d_ros.fleet.cluster.require_ray", lambda: None)
    monkeypatch.setattr(serving, "running", lambda service: pytest.fail("started"))
    (tmp_path / "token").write_text("short")
    for options, said in (
        (["--host", "0.0.0.0"], "needs a token (--token-file, or --tokens-file)"),
        (["--token-file", str(tmp_path / "token")], "has 16 to 512 letters, this one 5"),
        (["--token-file", str(tmp_path / "none")], "No such file"),
        (["--tls-key", str(tmp_path / "token")], "TLS needs both"),
        (["--model", "/no/model"], "/no/model is no directory"),
        (["--rate", "0"], "rate 0.0 must be positive"),
    ):
        assert main(["serve", *options]) == 2
        assert said in capsys.readouterr().err


def test_status_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(metrics, "fetch", lambda address: asked.append(address) or EXPORTED)
    assert main(["serve", "--status"]) == 0
    assert asked == ["http://127.0.0.1:8001/metrics"] and "r1" in capsys.readouterr().out
