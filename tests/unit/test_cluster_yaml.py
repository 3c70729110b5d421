"""cluster.yaml is what Ray's launcher takes, and opens nothing to the network."""

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launcher() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))
    return tree


def schema() -> Any:
    return json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())


def workers(launcher: dict[str, Any]) -> dict[str, Any]:
    kinds = launcher["available_node_types"]
    return {name: kind for name, kind in kinds.items() if name != launcher["head_node_type"]}


def test_ray_accepts_it(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(launcher, schema())
    validate_config(prepare_config(copy.deepcopy(launcher)))


@pytest.mark.parametrize("wrong", [{"max_workres": 2}, {"max_workers": "2"}, {"provider": {}}])
def test_the_schema_would_refuse_a_mistake(launcher: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(launcher | wrong, schema())


def test_nothing_runs_or_costs_before_it_is_needed(launcher: dict[str, Any]) -> None:
    assert launcher["idle_timeout_minutes"] > 0
    assert len(workers(launcher)) == 3
    for kind in workers(launcher).values():
        assert kind["min_workers"] == 0 < kind["max_workers"] <= launcher["max_workers"]
    markets = [
        kind["node_config"].get("InstanceMarketOptions") for kind in workers(launcher).values()
    ]
    assert {"MarketType": "spot"} in markets and None in markets


def test_the_head_takes_no_work(launcher: dict[str, Any]) -> None:
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_starts_with_its_token_and_on_loopback(launcher: dict[str, Any], kind: str) -> None:
    starts = [c for c in launcher[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 1
    before, _, after = starts[0].partition("ray start")
    assert "export RAY_AUTH_MODE=token;" in before
    if kind == "head":
        assert "--dashboard-host=127.0.0.1" in after and "--autoscaling-config=" in after
    assert "0.0.0.0" not in starts[0]


def test_the_token_is_mounted_and_not_written_here(launcher: dict[str, Any]) -> None:
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in launcher["setup_commands"][0]
    text = (ROOT / "cluster.yaml").read_text("utf-8")
    assert "RAY_AUTH_TOKEN=" not in text and "heliostat cluster token" in text


def test_torch_comes_first_and_the_rest_is_pinned(launcher: dict[str, Any]) -> None:
    installs = [
        c for c in launcher["setup_commands"] if "pip install" in c and "--no-deps" not in c
    ]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert installs[0].endswith(f"pip install torch=={pins['torch']}")
    rest = installs[1:] + [c for c in launcher["head_setup_commands"] if "pip install" in c]
    assert rest and all("-c ~/heliostat-install/constraints.txt" in c for c in rest)
    assert launcher["file_mounts"]["~/heliostat-install/constraints.txt"] == "constraints.txt"
    assert {"boto3", "ray", "deepspeed", "transformers"} <= pins.keys()


def test_storage_is_remote_because_nodes_share_no_disk() -> None:
    assert "storage.root=s3://" in (ROOT / "cluster.yaml").read_text("utf-8")
