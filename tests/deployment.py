"""The manifests of ``config/deploy``, decoded strictly: a key that isn't one is an error.

The structs have what the manifests use, under the names of the Compose Specification and of
Kubernetes' API (1.30 and newer). References between objects are checked here as well, which those
specifications can't do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

DEPLOY = Path(__file__).parents[1] / "config" / "deploy"

Text = Annotated[str, msgspec.Meta(min_length=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Duration = Annotated[str, msgspec.Meta(pattern=r"^\d+(ms|s|m|h)$")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^\d+(m|Ki|Mi|Gi)?$")]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Camel(_Strict, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    pass


# -- Compose


class Healthcheck(_Strict, frozen=True, kw_only=True):
    """The container is healthy if the command succeeds."""

    test: tuple[str, ...]
    interval: Duration
    timeout: Duration
    start_period: Duration


class ComposeService(_Strict, frozen=True, kw_only=True):
    """A container of a Compose file."""

    image: Text
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    volumes: tuple[Annotated[str, msgspec.Meta(pattern=r"^\./[^:]+:/[^:]+:ro$")], ...] = ()
    ports: tuple[Annotated[str, msgspec.Meta(pattern=r"^\d+:\d+$")], ...] = ()
    healthcheck: Healthcheck | None = None
    depends_on: tuple[str, ...] = ()
    read_only: bool = False
    restart: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    stop_grace_period: Duration = "10s"
    ulimits: dict[Literal["nofile"], int] = {}


class _ComposeFile(_Strict, frozen=True, kw_only=True):
    services: dict[Name, ComposeService]


# -- Kubernetes


class Metadata(_Camel, frozen=True, kw_only=True):
    """Name and labels of an object."""

    name: Name = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Selector(_Camel, frozen=True, kw_only=True):
    match_labels: dict[str, str]


class _KeyRef(_Camel, frozen=True, kw_only=True):
    name: Name
    key: Text


class _ValueFrom(_Camel, frozen=True, kw_only=True):
    secret_key_ref: _KeyRef


class _Variable(_Camel, frozen=True, kw_only=True):
    name: Text
    value: str | None = None
    value_from: _ValueFrom | None = None


class _NameRef(_Camel, frozen=True, kw_only=True):
    name: Name


class _EnvFrom(_Camel, frozen=True, kw_only=True):
    secret_ref: _NameRef


class _ContainerPort(_Camel, frozen=True, kw_only=True):
    name: Name
    container_port: Port


class _Mount(_Camel, frozen=True, kw_only=True):
    name: Name
    mount_path: Text
    read_only: bool = False


class _HttpGet(_Camel, frozen=True, kw_only=True):
    path: Text
    port: Name


class Probe(_Camel, frozen=True, kw_only=True):
    """A request that has to succeed."""

    http_get: _HttpGet
    period_seconds: int
    timeout_seconds: int = 1
    failure_threshold: int = 3


class _Sleep(_Camel, frozen=True, kw_only=True):
    seconds: int


class _PreStop(_Camel, frozen=True, kw_only=True):
    sleep: _Sleep


class _Lifecycle(_Camel, frozen=True, kw_only=True):
    pre_stop: _PreStop


class _Resources(_Camel, frozen=True, kw_only=True):
    requests: dict[Literal["cpu", "memory"], Quantity]
    limits: dict[Literal["cpu", "memory"], Quantity]


class _Capabilities(_Camel, frozen=True, kw_only=True):
    drop: tuple[str, ...]


class _SecurityContext(_Camel, frozen=True, kw_only=True):
    run_as_non_root: bool
    read_only_root_filesystem: bool
    allow_privilege_escalation: bool
    capabilities: _Capabilities


class KubernetesContainer(_Camel, frozen=True, kw_only=True):
    """A container of a pod."""

    name: Name
    image: Text
    args: tuple[str, ...] = ()
    env: tuple[_Variable, ...] = ()
    env_from: tuple[_EnvFrom, ...] = ()
    ports: tuple[_ContainerPort, ...] = ()
    volume_mounts: tuple[_Mount, ...] = ()
    startup_probe: Probe | None = None
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    lifecycle: _Lifecycle | None = None
    resources: _Resources | None = None
    security_context: _SecurityContext | None = None


class _Volume(_Camel, frozen=True, kw_only=True):
    name: Name
    config_map: _NameRef


class _Spread(_Camel, frozen=True, kw_only=True):
    max_skew: int
    topology_key: Text
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    label_selector: _Selector


class _PodSpec(_Camel, frozen=True, kw_only=True):
    termination_grace_period_seconds: int = 30
    topology_spread_constraints: tuple[_Spread, ...] = ()
    containers: tuple[KubernetesContainer, ...]
    volumes: tuple[_Volume, ...] = ()


class _PodTemplate(_Camel, frozen=True, kw_only=True):
    metadata: Metadata
    spec: _PodSpec


class _RollingUpdate(_Camel, frozen=True, kw_only=True):
    max_surge: int
    max_unavailable: int


class _Strategy(_Camel, frozen=True, kw_only=True):
    rolling_update: _RollingUpdate


class _DeploymentSpec(_Camel, frozen=True, kw_only=True):
    replicas: int
    strategy: _Strategy | None = None
    selector: _Selector
    template: _PodTemplate


class _Object(_Camel, frozen=True, kw_only=True, tag_field="kind"):
    metadata: Metadata


class Secret(_Object, frozen=True, kw_only=True, tag="Secret"):
    """Values that are secret."""

    api_version: Literal["v1"]
    string_data: dict[str, str]


class ConfigMap(_Object, frozen=True, kw_only=True, tag="ConfigMap"):
    """Files."""

    api_version: Literal["v1"]
    data: dict[str, str]


class Deployment(_Object, frozen=True, kw_only=True, tag="Deployment"):
    """Pods that are alike."""

    api_version: Literal["apps/v1"]
    spec: _DeploymentSpec


class _BudgetSpec(_Camel, frozen=True, kw_only=True):
    max_unavailable: int
    selector: _Selector


class PodDisruptionBudget(_Object, frozen=True, kw_only=True, tag="PodDisruptionBudget"):
    """How many pods may be away on purpose."""

    api_version: Literal["policy/v1"]
    spec: _BudgetSpec


class _ServicePort(_Camel, frozen=True, kw_only=True):
    name: Name
    port: Port
    target_port: Name


class _ServiceSpec(_Camel, frozen=True, kw_only=True):
    selector: dict[str, str]
    ports: tuple[_ServicePort, ...]


class ClusterService(_Object, frozen=True, kw_only=True, tag="Service"):
    """An address for pods. Without ``sessionAffinity``, which is not to be needed."""

    api_version: Literal["v1"]
    spec: _ServiceSpec


class _PortRef(_Camel, frozen=True, kw_only=True):
    name: Name


class _BackendService(_Camel, frozen=True, kw_only=True):
    name: Name
    port: _PortRef


class _Backend(_Camel, frozen=True, kw_only=True):
    service: _BackendService


class _HttpPath(_Camel, frozen=True, kw_only=True):
    path: Text
    path_type: Literal["Exact", "Prefix", "ImplementationSpecific"]
    backend: _Backend


class _Http(_Camel, frozen=True, kw_only=True):
    paths: tuple[_HttpPath, ...]


class _Rule(_Camel, frozen=True, kw_only=True):
    host: Text
    http: _Http


class _IngressSpec(_Camel, frozen=True, kw_only=True):
    ingress_class_name: Name
    rules: tuple[_Rule, ...]


class Ingress(_Object, frozen=True, kw_only=True, tag="Ingress"):
    """What the load balancer passes on."""

    api_version: Literal["networking.k8s.io/v1"]
    spec: _IngressSpec


KubernetesObject = Secret | ConfigMap | Deployment | PodDisruptionBudget | ClusterService | Ingress


# -- what is run


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container as its orchestrator would start it."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    """Values as in the file; secrets are those of a test."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Path in the container -> the file that is there."""
    probe_paths: Sequence[str] = ()
    healthcheck: Sequence[str] = ()


def read_compose(
    path: Path, environ: Mapping[str, str], *, image: str = "pgrealtime"
) -> list[Container]:
    """Return the containers of an image in a Compose file.

    Raises:
        msgspec.ValidationError: A key is unknown, or a value isn't one.
        ValueError: A reference leads nowhere, or a variable isn't in ``environ``.
    """
    tree = yaml.safe_load(path.read_text())
    tree = {key: value for key, value in tree.items() if not key.startswith("x-")}
    services = msgspec.convert(tree, _ComposeFile).services
    for service in services.values():
        _require(set(service.depends_on) <= services.keys(), "depends_on")
        _require(not service.read_only or bool(service.volumes), "no configuration")
        for volume in service.volumes:
            _require((path.parent / volume.split(":")[0]).is_file(), volume)
    return [
        Container(
            name=name,
            arguments=service.command,
            environment={k: _expand(v, environ) for k, v in service.environment.items()},
            files={v.split(":")[1]: path.parent / v.split(":")[0] for v in service.volumes},
            healthcheck=service.healthcheck.test if service.healthcheck else (),
        )
        for name, service in services.items()
        if service.image == image
    ]


def _expand(text: str, environ: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, operator = match[1], match[2]
        if name not in environ and operator != ":-":
            raise ValueError(f"{name} isn't set")
        return environ.get(name, "")

    return re.sub(r"\$\{(\w+)(:-|:\?)?\}", value, text)


def read_kubernetes(
    path: Path, secrets: Mapping[str, str], directory: Path, *, image: str = "pgrealtime"
) -> list[Container]:
    """Return the containers of an image in a manifest; their files are written to ``directory``.

    Raises:
        msgspec.ValidationError: A key is unknown, or a value isn't one.
        ValueError: A reference leads nowhere.
    """
    objects = [
        msgspec.convert(tree, KubernetesObject) for tree in yaml.safe_load_all(path.read_text())
    ]
    by_name = {(type(one), one.metadata.name): one for one in objects}
    _require(len(by_name) == len(objects), "two objects of one name")
    for one in objects:
        match one:
            case Deployment():
                _check_deployment(one, by_name)
            case PodDisruptionBudget():
                _pods(one.spec.selector.match_labels, objects)
            case ClusterService():
                pods = _pods(one.spec.selector, objects)
                ports = {p.name for c in pods.containers for p in c.ports}
                _require({p.target_port for p in one.spec.ports} <= ports, "targetPort")
            case Ingress():
                for rule in one.spec.rules:
                    for http_path in rule.http.paths:
                        target = http_path.backend.service
                        served = by_name.get((ClusterService, target.name))
                        names = {p.name for p in served.spec.ports} if served else set()
                        _require(target.port.name in names, target.port.name)
            case _:
                pass
    return list(_containers(objects, by_name, secrets, directory, image))


_ByName = Mapping[tuple[type, str], Any]


def _check_deployment(one: Deployment, by_name: _ByName) -> None:
    template = one.spec.template
    labels = template.metadata.labels.items()
    _require(one.spec.selector.match_labels.items() <= labels, "selector")
    volumes = {volume.name for volume in template.spec.volumes}
    for volume in template.spec.volumes:
        _require((ConfigMap, volume.config_map.name) in by_name, volume.name)
    for container in template.spec.containers:
        ports = {port.name for port in container.ports}
        probes = (container.startup_probe, container.liveness_probe, container.readiness_probe)
        _require({p.http_get.port for p in probes if p} <= ports, "a probe's port")
        _require({mount.name for mount in container.volume_mounts} <= volumes, "volumeMounts")
        if container.lifecycle is not None:
            grace = template.spec.termination_grace_period_seconds
            _require(grace > 25 + container.lifecycle.pre_stop.sleep.seconds, "grace period")


def _pods(labels: Mapping[str, str], objects: Sequence[KubernetesObject]) -> _PodSpec:
    for one in objects:
        if isinstance(one, Deployment):
            template = one.spec.template
            if labels.items() <= template.metadata.labels.items():
                return template.spec
    raise ValueError(f"no pods have {labels}")


def _containers(
    objects: Sequence[KubernetesObject],
    by_name: _ByName,
    secrets: Mapping[str, str],
    directory: Path,
    image: str,
) -> Iterator[Container]:
    for one in objects:
        if not isinstance(one, Deployment):
            continue
        spec = one.spec.template.spec
        maps = {volume.name: by_name[ConfigMap, volume.config_map.name] for volume in spec.volumes}
        for container in spec.containers:
            if container.image != image:
                continue
            files = {}
            for mount in container.volume_mounts:
                for name, text in maps[mount.name].data.items():
                    file = directory / name
                    file.write_text(text)
                    files[f"{mount.mount_path}/{name}"] = file
            yield Container(
                name=container.name,
                arguments=container.args,
                environment=dict(_environment(container, by_name, secrets)),
                files=files,
                probe_paths=[
                    probe.http_get.path
                    for probe in (container.liveness_probe, container.readiness_probe)
                    if probe is not None
                ],
            )


def _environment(
    container: KubernetesContainer, by_name: _ByName, secrets: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    for source in container.env_from:
        for name in by_name[Secret, source.secret_ref.name].string_data:
            yield name, secrets[name]
    for variable in container.env:
        if variable.value_from is None:
            yield variable.name, variable.value or ""
        else:
            reference = variable.value_from.secret_key_ref
            held = by_name[Secret, reference.name].string_data
            _require(reference.key in held, reference.key)
            yield variable.name, secrets[reference.key]


def _require(condition: bool, what: str) -> None:  # noqa: FBT001 (an assertion of its own error)
    if not condition:
        raise ValueError(what)
