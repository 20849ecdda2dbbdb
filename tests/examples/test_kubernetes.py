"""examples/kubernetes: the manifests agree with each other, with the gateway's configuration and with its command."""

from __future__ import annotations

import re
import shlex
from typing import Any

import anyio
import httpx
import pytest
import yaml
from typer.testing import CliRunner

from llmux_asgi import Config, LLMuxApp, ModelConfig, cli, load_config
from llmux_asgi.cli import _serve

from .hosting import EXAMPLES

FOLDER = EXAMPLES / "kubernetes"
PROBES = ("readinessProbe", "livenessProbe")
Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """All objects by kind; there is one of each."""
    found = [each for path in sorted(FOLDER.glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())]
    by_kind = {each["kind"]: each for each in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def objects() -> dict[str, Manifest]:
    return manifests()


@pytest.fixture(scope="module")
def pod(objects: dict[str, Manifest]) -> Manifest:
    spec: Manifest = objects["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def gateway(pod: Manifest) -> Manifest:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(scope="module")
def config(objects: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("config") / "llmux.yaml"
    path.write_text(objects["ConfigMap"]["data"]["llmux.yaml"])
    return load_config(path)


def test_the_command_has_these_options_and_reads_the_mounted_configuration(
    objects: dict[str, Manifest], pod: Manifest, gateway: Manifest
) -> None:
    result = CliRunner().invoke(cli.app, [*gateway["args"], "--help"])
    assert result.exit_code == 0, result.output
    mounted = {mount["name"]: mount["mountPath"] for mount in gateway["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    (name,) = objects["ConfigMap"]["data"]
    assert gateway["args"][1] == f"{mounted['config']}/{name}"
    assert gateway["args"][gateway["args"].index("--host") + 1] == "0.0.0.0"


def test_what_is_referred_to_is_there(objects: dict[str, Manifest], pod: Manifest, gateway: Manifest) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["config"]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    for variable in gateway["env"]:
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == objects["Secret"]["metadata"]["name"]
            assert reference["key"] in objects["Secret"]["stringData"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels == objects["Service"]["spec"]["selector"]


def test_ports_agree(objects: dict[str, Manifest], gateway: Manifest) -> None:
    (port,) = gateway["ports"]
    assert str(port["containerPort"]) == gateway["args"][gateway["args"].index("--port") + 1]
    (service,) = objects["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    assert {gateway[probe]["httpGet"]["port"] for probe in PROBES} == {port["name"]}


def test_the_path_of_the_probes_is_answered_while_no_server_runs(gateway: Manifest, config: Config) -> None:
    async def ask(path: str) -> int:
        llm = LLMuxApp({"models": {name: {"url": f"http://{name}.invalid:8000"} for name in config.models}})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(llm), base_url="http://gateway") as client:
            status = (await client.get(path)).status_code
        await llm.aclose()
        return status

    for probe in PROBES:
        assert anyio.run(ask, gateway[probe]["httpGet"]["path"]) == 200


def test_the_pod_ends_no_sooner_than_its_answers_and_servers(pod: Manifest, gateway: Manifest, config: Config) -> None:
    before = float(gateway["lifecycle"]["preStop"]["exec"]["command"][-1])
    ending = max(model.timeouts.stop for model in config.models.values())
    assert pod["terminationGracePeriodSeconds"] >= before + config.limits.shutdown + _serve._MARGIN + ending


def test_a_request_may_wait_until_a_server_has_started(config: Config) -> None:
    wait = config.policy.request_timeout
    assert wait is not None
    assert wait >= max(model.timeouts.start for model in config.models.values())


def test_one_gateway_at_a_time_has_the_gpu(objects: dict[str, Manifest], gateway: Manifest) -> None:
    spec = objects["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    assert gateway["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_each_model_is_served_under_its_name(config: Config) -> None:
    def option(model: ModelConfig, name: str) -> str:
        assert model.command is not None
        return model.command[model.command.index(name) + 1]

    assert len(config.models) == 2
    for name, model in config.models.items():
        assert option(model, "--served-model-name") == name
        assert option(model, "--port") == "{port}"


def test_the_image_has_the_extras_that_the_configuration_needs(gateway: Manifest, config: Config) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    (extras,) = re.findall(r"\[(\w+(?:,\w+)*)\]\"", text)
    assert {"cli"} | ({"nvml"} if config.memory.check == "nvml" else set()) == set(extras.split(","))
    (tag,) = re.findall(r"--tag (\S+)", text)
    assert tag == gateway["image"]
    (entry,) = re.findall(r"^ENTRYPOINT \[(.*)\]", text, re.MULTILINE)
    assert shlex.split(entry) == ["llmux-asgi"]
