"""The manifests of ``config/deploy`` are valid, and hold together."""

from __future__ import annotations

import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import msgspec
import pytest
import yaml

from pgrealtime.cli.report import EXIT_CONFIGURATION, EXIT_NOT_PERMITTED, EXIT_SETUP
from tests.config_values import parse_config
from tests.deployment import DEPLOY, ConfigMap, KubernetesObject, read_compose, read_kubernetes

_NAMES = (
    *("DATABASE_URL", "QUERY_URL", "APP_JWT_SECRET", "CLUSTER_SECRET", "ADMIN_TOKEN"),
    *("NATS_URL", "NATS_PASSWORD"),
)
SECRETS = dict.fromkeys(_NAMES, "x" * 32)
FORMS = sorted(path.parent.name for path in DEPLOY.glob("*/compose.yaml"))


@pytest.mark.parametrize("form", FORMS)
def test_the_manifests_are_valid(form: str, tmp_path: Path) -> None:
    """Each form has one for Compose and one for Kubernetes."""
    environ = SECRETS | {"APP_DATABASE_URL": "x"}
    composed = read_compose(DEPLOY / form / "compose.yaml", environ)
    (pod,) = read_kubernetes(DEPLOY / form / "kubernetes.yaml", SECRETS, tmp_path)
    for container in (*composed, pod):
        assert container.arguments[:2] == ("run", "-c")
        assert container.arguments[2] in container.files
    assert composed
    assert pod.probe_paths == ["/live", "/ready"]


@pytest.mark.parametrize("form", FORMS)
def test_the_configuration_within_is_the_one_beside(form: str) -> None:
    """Kubernetes has it in a ConfigMap, Compose as a file."""
    trees = yaml.safe_load_all((DEPLOY / form / "kubernetes.yaml").read_text())
    objects = [msgspec.convert(tree, KubernetesObject) for tree in trees]
    held = {
        name: text
        for one in objects
        if isinstance(one, ConfigMap)
        for name, text in one.data.items()
    }
    assert "pgrealtime.yaml" in held
    assert held == {name: (DEPLOY / form / name).read_text() for name in held}


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("replicas: 3", "replicaCount: 3"),
        ("replicas: 3", "replicas: three"),
        ("kind: Deployment", "kind: Deploymint"),
        ("apiVersion: apps/v1", "apiVersion: apps/v1beta1"),
        ("path: /ready, port: admin", "path: /ready, port: adnim"),
        ("configMap: {name: pgrealtime}", "configMap: {name: other}"),
        ("targetPort: realtime", "targetPort: http"),
        ("secretKeyRef: {name: pgrealtime, key: ADMIN_TOKEN}", "secretKeyRef: {name: x, key: X}"),
        ("service: {name: pgrealtime", "service: {name: other"),
        ("  selector: {app: pgrealtime}", "  selector: {app: other}"),
        ("Seconds: 35", "Seconds: 30"),
    ],
)
def test_a_fault_in_a_manifest_is_found(text: str, changed: str, tmp_path: Path) -> None:
    """Else the tests above would say nothing."""
    manifest = (DEPLOY / "replicas" / "kubernetes.yaml").read_text()
    assert text in manifest
    (tmp_path / "kubernetes.yaml").write_text(manifest.replace(text, changed, 1))
    with pytest.raises((msgspec.ValidationError, ValueError, KeyError)):
        read_kubernetes(tmp_path / "kubernetes.yaml", SECRETS, tmp_path)


def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    """It is parsed here, and where systemd is installed it is verified by that."""
    text = (DEPLOY / "systemd" / "pgrealtime.service").read_text(encoding="utf-8")
    unit = ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    grace = parse_config({}).server.shutdown_grace

    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    assert service["ExecStart"].split()[1:] == ["run", "-c", "/etc/pgrealtime/pgrealtime.yaml"]
    assert service["ExecReload"] == "kill -HUP $MAINPID"
    assert int(service["TimeoutStopSec"]) > grace
    assert int(service["LimitNOFILE"]) > parse_config({}).realtime.max_connections
    unmended = {EXIT_SETUP, EXIT_NOT_PERMITTED, EXIT_CONFIGURATION}
    assert set(map(int, service["RestartPreventExitStatus"].split())) == unmended
    if (verifier := shutil.which("systemd-analyze")) is None:
        return
    program = service["ExecStart"].split()[0]
    (tmp_path / "pgrealtime.service").write_text(text.replace(program, "/usr/bin/true"))
    command = [verifier, "verify", "--man=no", str(tmp_path / "pgrealtime.service")]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    # It names unknown keys, and exits with 0.
    complaints = verified.stdout + verified.stderr
    assert (verified.returncode, "pgrealtime.service" in complaints) == (0, False), complaints
