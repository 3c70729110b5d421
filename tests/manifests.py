"""The fields of Kubernetes and KubeRay manifests that ours use, strictly: a misspelt one fails.

After the API references of KubeRay 1.6 (ray.io/v1), Kubernetes (core/v1, apps/v1,
networking.k8s.io/v1) and the Prometheus Operator (monitoring.coreos.com/v1).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
Labels = dict[str, str]


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: Labels = {}


class SecretKeyRef(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKeyRef


class EnvVar(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Port(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,15}$")]
    containerPort: PortNumber


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Container(Strict):
    name: Name
    image: str
    env: list[EnvVar] = []
    ports: list[Port] = []
    resources: Resources


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class PodSpec(Strict):
    serviceAccountName: Name
    nodeSelector: Labels = {}
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    labels: Labels
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec

    @property
    def cluster(self) -> RayClusterSpec:
        return self.spec


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    backoffLimit: Count
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec

    @property
    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterSpec


class RayServiceSpec(Strict):
    excludeHeadPodFromServeSvc: bool
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec

    @property
    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterConfig


class Expression(Strict):
    key: str
    operator: Literal["Exists", "DoesNotExist"]


class Selector(Strict):
    matchLabels: Labels = {}
    matchExpressions: list[Expression] = []


class Peer(Strict):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class PolicyPort(Strict):
    protocol: Literal["TCP", "UDP"]
    port: PortNumber


class Ingress(Strict):
    from_: Annotated[list[Peer], Field(alias="from", min_length=1)]
    ports: list[PolicyPort] = []


class PolicySpec(Strict):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]


class NetworkPolicy(Strict):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


class MetricsEndpoint(Strict):
    port: str
    interval: Annotated[str, Field(pattern=r"^\d+(ms|s|m|h)$")]


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: Annotated[list[MetricsEndpoint], Field(min_length=1)]


class PodMonitor(Strict):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]


class Socket(Strict):
    port: PortNumber


class Probe(Strict):
    tcpSocket: Socket
    periodSeconds: Count


class Server(Container):
    """A container of a Deployment."""

    command: Annotated[list[str], Field(min_length=1)]
    readinessProbe: Probe
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim


class Security(Strict):
    fsGroup: Count


class ServerPod(Strict):
    securityContext: Security
    containers: Annotated[list[Server], Field(min_length=1)]
    volumes: list[Volume]


class LabelsOnly(Strict):
    labels: Annotated[Labels, Field(min_length=1)]


class ServerTemplate(Strict):
    metadata: LabelsOnly
    spec: ServerPod


class Strategy(Strict):
    type: Literal["Recreate", "RollingUpdate"]


class MatchLabels(Strict):
    matchLabels: Annotated[Labels, Field(min_length=1)]


class DeploymentSpec(Strict):
    replicas: Count
    strategy: Strategy
    selector: MatchLabels
    template: ServerTemplate


class Deployment(Strict):
    apiVersion: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Metadata
    spec: DeploymentSpec


class Storage(Strict):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Strict):
    accessModes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]]
    resources: Storage


class PersistentVolumeClaim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class ServicePort(Strict):
    name: Name
    port: PortNumber
    targetPort: PortNumber


class ServiceSpec(Strict):
    selector: Annotated[Labels, Field(min_length=1)]
    ports: Annotated[list[ServicePort], Field(min_length=1)]


class Service(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Metadata
    spec: ServiceSpec


class ConfigMap(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


Rays = RayCluster | RayJob | RayService
Others = PodMonitor | ConfigMap | Deployment | PersistentVolumeClaim | Service
Manifest = Rays | NetworkPolicy | Others
_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


def read(tree: Any) -> Manifest:
    """
    Raises:
        pydantic.ValidationError: for a field that is unknown, missing or of another type.
    """
    return _ADAPTER.validate_python(tree)
