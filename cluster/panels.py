"""Dashboards for Grafana: what a person watches of training and of serving. Pure.

Names of metrics are those of `cluster.telemetry`, `serving.seen` and Ray, which exports each with
the prefix `ray_` on every node.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.telemetry import PREFIX

SOURCE = "heliostat-prometheus"
"""Uid of the data source that `heliostat monitor` provisions."""
TAG = "heliostat"
RUN = 'name=~"$name"'
MODEL = 'model=~"$model"'
WIDTH, HEIGHT, ACROSS = 8, 8, 3
"""Of a panel in Grafana's grid of 24 columns, and how many stand side by side."""


@dataclass(frozen=True)
class Query:
    text: str
    """PromQL, with the dashboard's variable in it."""
    legend: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """As Grafana names it."""
    queries: Sequence[Query]
    gpu: bool = False
    """Whether only nodes with GPUs have something to show."""


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    uid: str
    title: str
    variable: str
    """Label to choose by, such as the name of a run."""
    source: str
    """Metric whose label it is."""
    panels: Sequence[Panel]

    def queries(self, chosen: str = ".*", *, gpu: bool = True) -> Iterator[tuple[str, str]]:
        """Title and PromQL of every query, with the variable put in.

        Args:
            gpu: also of panels for which there must be GPUs.
        """
        for panel in self.panels:
            if gpu or not panel.gpu:
                for query in panel.queries:
                    yield panel.title, query.text.replace(f"${self.variable}", chosen)


def _train(title: str, unit: str, *keys: str, gpu: bool = False) -> Panel:
    """Figures of the newest step, by run."""
    queries = [
        Query(
            f"ray_{PREFIX}{key}{{{RUN}}}",
            "{{name}}" if len(keys) == 1 else f"{{{{name}}}} {key.replace('_', ' ')}",
        )
        for key in keys
    ]
    return Panel(title, unit, queries, gpu)


def _quantiles(title: str, histogram: str) -> Panel:
    bucket = f"rate(ray_heliostat_{histogram}_bucket{{{MODEL}}}[1m])"
    return Panel(
        title,
        "s",
        [
            Query(
                f"histogram_quantile({share}, sum by (model, le) ({bucket}))",
                f"{{{{model}}}} p{share * 100:g}",
            )
            for share in (0.5, 0.95, 0.99)
        ],
    )


def _serve(title: str, unit: str, gauge: str) -> Panel:
    query = f"sum by (model, version) (ray_heliostat_{gauge}{{{MODEL}}})"
    return Panel(title, unit, [Query(query, "{{model}}@{{version}}")])


def _rate(title: str, unit: str, counter: str, by: str = "model") -> Panel:
    query = f"sum by ({by}) (rate(ray_heliostat_{counter}_total{{{MODEL}}}[1m]))"
    return Panel(title, unit, [Query(query, f"{{{{{by}}}}}")])


NODES = (
    Panel("CPU in use", "percent", [Query("ray_node_cpu_utilization", "{{ip}}")]),
    Panel("Memory in use", "bytes", [Query("ray_node_mem_used", "{{ip}}")]),
    Panel("Disk free", "bytes", [Query("ray_node_disk_free", "{{ip}}")]),
    Panel(
        "Network",
        "Bps",
        [
            Query("ray_node_network_receive_speed", "{{ip}} in"),
            Query("ray_node_network_send_speed", "{{ip}} out"),
        ],
    ),
    Panel(
        "GPUs in use", "percent", [Query("ray_node_gpus_utilization", "{{ip}} {{GpuIndex}}")], True
    ),
    # Ray tells it in MiB.
    Panel(
        "GPU memory in use",
        "decmbytes",
        [Query("ray_node_gram_used * 1.048576", "{{ip}} {{GpuIndex}}")],
        True,
    ),
)
TRAINING = Board(
    "heliostat-training",
    "Heliostat: training",
    "name",
    f"ray_{PREFIX}step",
    (
        _train("Steps", "short", "step"),
        _train("Loss", "short", "loss"),
        _train("Learning rate", "sci", "learning_rate"),
        _train("Norm of the gradient", "short", "gradient_norm"),
        _train("Predictions (tokens, images) per second", "short", "predictions_per_second"),
        _train("Per device", "short", "predictions_per_second_per_device"),
        _train("Seconds of a step", "s", "step_seconds"),
        _train("Share of a step that waits for data", "percentunit", "data_wait"),
        _train("Goodput", "percentunit", "goodput"),
        _train("Seconds that the last checkpoint held training up", "s", "save_seconds"),
        _train("Largest memory of a worker", "bytes", "peak_memory_bytes"),
        _train("Skipped step, slow rank", "short", "skipped", "slow_rank"),
        _train("Model FLOP/s utilisation", "percentunit", "mfu", gpu=True),
        *NODES,
    ),
)
SERVING = Board(
    "heliostat-serving",
    "Heliostat: serving",
    "model",
    "ray_heliostat_num_requests_running",
    (
        _rate("Requests that ended, per second and reason", "reqps", "requests", "reason"),
        _serve("Requests at work", "short", "num_requests_running"),
        _serve("Requests that wait", "short", "num_requests_waiting"),
        _serve("Accepted work, in tokens", "short", "queued_tokens"),
        _quantiles("Time to the first token", "time_to_first_token_seconds"),
        _quantiles("Time per token after it", "time_per_output_token_seconds"),
        _rate("Tokens generated per second", "short", "generation_tokens"),
        _rate("Tokens of prompts per second", "short", "prompt_tokens"),
        _rate("Of them, found in the cache", "short", "prefix_cache_hit_tokens"),
        _serve("Share of the cache in use", "percentunit", "kv_cache_usage"),
        Panel(
            "Replicas that are well",
            "short",
            [Query("sum by (deployment) (ray_serve_deployment_replica_healthy)", "{{deployment}}")],
        ),
        *NODES,
    ),
)
BOARDS = (TRAINING, SERVING)


def grafana(board: Board, links: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A dashboard as Grafana reads it from a file (schema version 39, Grafana 10 or newer).

    Args:
        links: title -> address of other pages, shown at its top.
    """
    others = {"title": "Heliostat", "type": "dashboards", "tags": [TAG], "asDropdown": False}
    pages = [
        {"title": title, "type": "link", "url": url, "targetBlank": True}
        for title, url in (links or {}).items()
    ]
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": [TAG],
        "links": [others, *pages],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "editable": True,
        "templating": {"list": [_variable(board)]},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }


def _variable(board: Board) -> dict[str, Any]:
    query = f"label_values({board.source}, {board.variable})"
    return {
        "name": board.variable,
        "type": "query",
        "datasource": _source(),
        "query": {"query": query, "refId": "A"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, ACROSS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _source(),
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}
        if panel.unit in ("percent", "percentunit", "s", "reqps")
        else {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _source(),
                "expr": query.text,
                "legendFormat": query.legend,
                "editorMode": "code",
                "range": True,
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": SOURCE}
