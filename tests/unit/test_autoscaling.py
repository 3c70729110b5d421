"""How large a cluster may grow, by the file that `ray up` leaves on its head."""

from pathlib import Path

import pytest
import yaml

from cluster import autoscaling, loading, session
from cluster.autoscaling import Growth, Kind, growth_of, reachable

ROOT = Path(__file__).parents[2]
HEAD = {"CPU": 0.0, "memory": 1e9}
L4 = {"CPU": 48.0, "GPU": 4.0, "accelerator_type:L4": 1.0}
DATA = {"CPU": 16.0}


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster/launchers/gcp.yaml"])
def test_our_clouds_grow_to_their_gpus(name: str) -> None:
    """AWS says by the instance alone what a node has, Google by its resources too."""
    may = growth_of(yaml.safe_load((ROOT / name).read_text("utf-8")))
    # 16 nodes in all, of which four may be on demand: the file allows no more.
    assert may.limits()["GPU"] == 64
    nodes = reachable([HEAD], may)
    assert len(nodes) == 16 and all(node["GPU"] == 4 for node in nodes)
    assert all("accelerator_type:L4" in node and node["memory"] == 192 << 30 for node in nodes)


def test_own_hosts_do_not_grow() -> None:
    """`ray up` gives all of them one type, which says nothing of them."""
    tree = {"max_workers": 2, "head_node_type": "local.cluster.node"}
    tree["available_node_types"] = {"local.cluster.node": {"resources": {}, "max_workers": 2}}
    may = growth_of(tree)
    assert may.limits() == {} and reachable([HEAD, DATA], may) == [HEAD, DATA]
    assert growth_of({"cluster_name": "x"}) == Growth([], 0)


def test_limits_are_what_all_nodes_of_a_kind_come_to() -> None:
    may = Growth([Kind(L4, 2), Kind({"CPU": 12.0, "GPU": 1.0}, 9), Kind(DATA, 8)], 8)
    assert may.limits() == {"CPU": 2 * 48 + 6 * 16, "GPU": 2 * 4 + 6, "accelerator_type:L4": 2}


def test_what_is_there_counts_where_it_is_more() -> None:
    may = Growth([Kind(L4, 2), Kind(DATA, 8)], 8)
    assert reachable([HEAD, L4], may) == [L4, L4]
    assert reachable([HEAD, L4, L4, L4], may) == [HEAD, L4, L4, L4]
    assert reachable([HEAD], Growth([Kind(DATA, 8)], 8)) == [DATA] * 8
    assert reachable([HEAD], Growth()) == [HEAD]


def test_only_the_head_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.state

    told = "get_max_resources_from_cluster_config"
    monkeypatch.setattr(ray._private.state.state, told, lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autoscaling.growth() == Growth()
    config = loading.load("gpt-demo", ["ray.grows_to={GPU: 8}"])
    assert session._limits(config) == {"GPU": 8}
    text = (ROOT / "cluster.yaml").read_text("utf-8")
    (tmp_path / Path(autoscaling.LAUNCHED_WITH).name).write_text(text, "utf-8")
    assert session._limits(config)["GPU"] == 64
