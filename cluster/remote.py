"""Commands for a cluster that runs elsewhere: its token, and whether it is asked for.

They talk to Ray's dashboard, usually through the tunnel that `ray dashboard FILE.yaml` opens.
"""

from typing import Annotated

import typer

from cluster import access, progress
from cluster.dashboard import address_of

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Of the dashboard; without it $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.",
    ),
]
cluster = typer.Typer(help="A cluster's token: make it, check that it is asked for.")


def add_to(app: typer.Typer) -> None:
    """Give the `heliostat` command these verbs."""
    app.add_typer(cluster, name="cluster", no_args_is_help=True)


@cluster.command("token")
def make_token() -> None:
    """Make the token that opens a cluster, for your eyes only; it is never printed."""
    new = access.make_token()
    path = access.token_path()
    access.check_own(path)
    progress.say(f"{path}: {'made' if new else 'is there already'}, readable by its owner alone")


@cluster.command("check")
def check_cluster(address: Address = None) -> None:
    """That the cluster answers who has the token and nobody else; it fails where it does not."""
    where = address_of(address)
    count = access.check_closed(where)
    progress.say(f"{where} is closed: 401 without the token, {count} jobs with it")
