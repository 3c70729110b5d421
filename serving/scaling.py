"""How many replicas of a model there should be: by the requests that it holds and by their tokens.

Ray Serve calls the policy in its controller, which has this module as a pickled copy: it imports
nothing of ours.
"""

from typing import Any

QUEUED_TOKENS = "queued_tokens"
"""Tokens that a replica has still to read and to write, as it reports them to Serve."""


class ByLoad:
    """Enough replicas that none has more requests, nor more tokens, than the aim.

    Serve applies the bounds and delays of the deployment's autoscaling config to the answer.

    Args:
        target_tokens: tokens per replica.
    """

    def __init__(self, target_tokens: int) -> None:
        self._target_tokens = target_tokens

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """
        Args:
            context: `ray.serve.config.AutoscalingContext`.
        """
        if context.current_num_replicas == 0:  # what is starting has reported nothing yet
            return context.target_num_replicas, {}
        tokens = sum((context.aggregated_metrics or {}).get(QUEUED_TOKENS, {}).values())
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        return max(by_requests, tokens / self._target_tokens), {}
