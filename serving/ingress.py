"""The ingress tier: HTTP in, deployments of engines behind it. No torch, no model."""

from collections.abc import Mapping
from typing import Any

import ray.serve

from cluster.storage import Store
from serving.admission import Admission, Books, OwnBooks, SharedBooks
from serving.auth import Key, KeyFile, KeyRing, Quota
from serving.border import Access, Border
from serving.gateway import HandleGateway
from serving.routes import Bounds, create_app
from serving.schema import Limits, ModelCard
from serving.service import Service


@ray.serve.deployment
@ray.serve.ingress()
class Ingress:
    """See `routes.create_app`.

    Args:
        store: uri of the storage root, where the keys are.
        settings: `max_tokens`, `choices`, `deadline_seconds`, `max_body_bytes`, `max_requests`,
            `loopback` (without keys, answer this machine), `quota` (of keys that have no own).
        engines: deployment name -> its handle.
        accounts: handle of `Accounts`; None keeps them here.
    """

    def __init__(
        self,
        store: str,
        settings: Mapping[str, Any],
        engines: Mapping[str, Any],
        accounts: Any = None,
    ) -> None:
        self.gateway = HandleGateway(engines)
        bounds = Limits(settings["max_tokens"], settings["choices"])
        self.service = Service(self.gateway, bounds, settings["deadline_seconds"])
        ring = KeyRing(KeyFile(Store(store)).read)
        ring.load()  # a key file that cannot be used must keep the replica from starting
        self.access = Access(ring, loopback=settings["loopback"])
        books: Books = OwnBooks() if accounts is None else SharedBooks(accounts)
        self.admission = Admission(books, Quota(**settings["quota"]))
        self.bounds = Bounds(settings["max_body_bytes"], settings["max_requests"])

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        self.gateway.show([ModelCard(**card) for card in user_config["models"]])
        operator = user_config.get("operator")
        self.access.operator = (Key(name="operator", **operator),) if operator else ()

    def __serve_build_asgi_app__(self) -> Border:
        return create_app(self.service, self.access, self.admission, self.bounds)


@ray.serve.deployment
class Accounts(OwnBooks):
    """What keys have used, for all replicas of the ingress. One replica."""
