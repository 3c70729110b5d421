"""How many replicas the load asks for; Serve's own config and context, no cluster."""

from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster import loading
from serving import deploy
from serving.scaling import QUEUED_TOKENS, ByLoad


def context(replicas: int, requests: float, tokens: list[float], target: int = 1) -> Any:
    unused: dict[str, Any] = dict.fromkeys(
        (
            "deployment_id", "deployment_name", "app_name", "running_replicas", "raw_metrics",
            "policy_state", "last_scale_up_time", "last_scale_down_time", "current_time",
        )
    )  # fmt: skip
    told: Any = {QUEUED_TOKENS: dict(enumerate(tokens))} if tokens else {}
    return AutoscalingContext(
        **unused,
        current_num_replicas=replicas,
        target_num_replicas=target,
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics=told,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        config=AutoscalingConfig(max_replicas=9, target_ongoing_requests=4),
    )


@pytest.mark.parametrize(
    ("replicas", "requests", "tokens", "wanted"),
    [
        (1, 2, [100], 0.5),
        (1, 2, [2500], 2.5),
        (2, 16, [100, 300], 4),
        (2, 1, [1000, 2000], 3),
        (1, 4, [], 1),  # a replica that has reported nothing yet
        (2, 0, [0, 0], 0),
    ],
)
def test_the_larger_of_two_needs_decides(
    replicas: int, requests: float, tokens: list[float], wanted: float
) -> None:
    found, state = ByLoad(target_tokens=1000)(context(replicas, requests, tokens))
    assert found == pytest.approx(wanted) and state == {}


def test_what_is_starting_is_left_to_start() -> None:
    assert ByLoad(1000)(context(0, 0, [], target=1))[0] == 1


def test_serve_takes_the_policy_by_its_name() -> None:
    overrides = ["serve.replicas=[1,3]", "serve.target_tokens=900"]
    told = deploy._replicas(loading.load("gpt-demo", overrides).serve)["autoscaling_config"]
    policy = AutoscalingConfig(**told).policy
    assert policy.get_policy()(**policy.policy_kwargs)(context(1, 0, [1800]))[0] == 2
