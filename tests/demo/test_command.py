"""``python -m lst.demo``: what cannot be done is said in a line before a page is there."""

import socket
import sys

import pytest

from lst.demo.__main__ import DemoConfig, serve
from lst.demo.page import import_gradio
from lst.errors import UserError
from lst.pretrained import save_pretrained


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The command sets these for Gradio; afterwards they are as they were."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "--port: expected a port up to 65535, got 65536"),
        ({"max_seconds": 0.0}, "--max-seconds: expected more than 0, got 0.0"),
        ({"max_tokens": -1}, "--max-tokens: expected 1 or more, got -1"),
        ({"max_megabytes": 1e20}, r"--max-megabytes: expected at most 1,000,000, got 1e\+20"),
        ({"time_limit": float("nan")}, "--time-limit: expected more than 0, got nan"),
    ],
)
def test_an_option_that_makes_no_sense_is_said(options, message):
    with pytest.raises(UserError, match=message):
        DemoConfig(checkpoint="runs/demo", **options)


def test_the_extra_is_named_where_gradio_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'lst\[demo\]'"):
        import_gradio()


def test_a_port_that_is_taken_is_said(make_trained, tmp_path):
    pytest.importorskip("gradio", reason="lst[demo] is not installed")
    save_pretrained(make_trained(), tmp_path / "tiny")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = DemoConfig(checkpoint=str(tmp_path / "tiny"), port=port)
        with pytest.raises(UserError, match=f"address that is free here, got 127.0.0.1:{port}"):
            serve(config)


@pytest.mark.parametrize("host", ["\udcff", "x" * 70, "256.0.0.1.x"])
def test_a_host_that_is_no_address_is_said_before_the_model_is_read(host):
    with pytest.raises(UserError, match="--host: expected an address of this machine, got"):
        serve(DemoConfig(checkpoint="none", host=host))
