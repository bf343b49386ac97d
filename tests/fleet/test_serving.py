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
from adatoken3d_ros.fleet.serving import Service, read_token
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


def test_a_token_is_the_first_line_of_a_file_and_never_told(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef  \nmore\n")
    assert read_token(file) == "0123456789abcdef"
    for bad in ("", "short", "has a space in it", "0123456789abcdeé"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="the first line has to be a token of 16") as error:
            read_token(file)
        assert not bad or bad not in str(error.value)


def test_the_command_refuses_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adatoken3d_ros.fleet.cluster.require_ray", lambda: None)
    monkeypatch.setattr(serving, "running", lambda service: pytest.fail("started"))
    (tmp_path / "token").write_text("short")
    for options, said in (
        (["--host", "0.0.0.0"], "needs a token (--token-file)"),
        (["--token-file", str(tmp_path / "token")], "has to be a token"),
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
