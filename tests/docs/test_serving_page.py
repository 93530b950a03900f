"""docs/serving.md and the files of deployment: their commands, paths, settings and metrics are those of the server."""

from __future__ import annotations

import re
import shlex

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT
from support.running_server import serving, user
from support.scripted_model import picture
from typer.main import get_command

import relook
from relook.cli.app import app
from relook.integrations.ray_serve import RaySettings
from relook.perceive.local import LocalEngine

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def understood(arguments: list[str]) -> dict:
    """The options of a `relook serve` command, as the command line reads them."""
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return command.make_context("serve", list(arguments)).params


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Names at /metrics after one answer."""
    engine = LocalEngine(relook.load("cards-tiny"))
    try:
        with serving(engine) as served:
            served.ask([user(picture(), "What is the code in the red box?")], max_tokens=4)
            text = httpx2.get(f"{served.url}/metrics").text
    finally:
        engine.close()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_metrics_of_the_page_exist(metrics):
    table = PAGE.split("## Metrics")[1].split("\n## ")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    told.remove("relook_engine_asked_again_total")  # Ray Serve's: test_ray_serve.py reads it
    assert len(told) >= 11
    for name in told:
        assert {name, f"{name}_bucket"} & metrics, name
    own = {n for n in metrics if n.startswith("relook_") and not n.endswith(("_bucket", "_sum", "_count", "_created"))}
    assert own - told <= {
        f"relook_engine_{n}_total" for n in ("requests", "generated_tokens", "cached_tokens", "looks")
    }


def test_serve_commands_and_options_of_the_page_are_understood():
    commands = re.findall(r"^    relook (serve|bench) (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) >= 2
    for name, rest in commands:
        if name == "serve":
            understood(shlex.split(rest))
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        help_text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
        assert option in help_text or option == "--build-arg", option


def test_the_image_starts_the_server_and_asks_its_health():
    entry, command = (yaml.safe_load(re.search(rf"^{word} (\[.*\])", DOCKERFILE, re.MULTILINE)[1])
                      for word in ("ENTRYPOINT", "CMD"))  # fmt: skip
    assert entry[:2] == ["relook", "serve"]
    options = understood([*entry[2:], *command])
    assert options["host"] == "0.0.0.0" and f"EXPOSE {options['port']}" in DOCKERFILE
    check = re.search(r"http://127.0.0.1:(\d+)(/\S+?)'", DOCKERFILE)
    assert int(check[1]) == options["port"] and check[2] == "/health/ready"
    assert re.search(r"^USER 10001$", DOCKERFILE, re.MULTILINE)
    for name in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for path in name.split():
            assert (ROOT / path).exists() and f"!{path}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_prometheus_reads_the_server_with_its_key():
    service, prometheus = COMPOSE["services"]["relook"], COMPOSE["services"]["prometheus"]
    assert str(understood(service["command"])["keys"]) == "/run/secrets/relook.keys"
    mounted = prometheus["volumes"][0].split(":")[0]
    (job,) = yaml.safe_load((ROOT / mounted).read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["relook:8000"]}] and job["metrics_path"] == "/metrics"
    assert job["authorization"] == {"credentials_file": "/run/secrets/relook.keys"}
    assert service["secrets"] == prometheus["secrets"] == list(COMPOSE["secrets"])
    assert "relook.keys" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_ray_deployment_has_settings_that_exist():
    (found,) = yaml.safe_load((ROOT / "examples/ray-serve.yaml").read_text())["applications"]
    settings = RaySettings.model_validate(found["args"])
    assert settings.max_replicas >= settings.replicas and found["import_path"] == "relook.integrations.ray_serve:build"
    for name, value in re.findall(r"(\w+)=(\S+)", re.search(r"ray_serve:build (.*)", PAGE)[1]):
        RaySettings.model_validate({"model": "m", name: value})
