"""Commands for a cluster: `cluster`, `submit`, `jobs`, `why`, `doctor`, `monitor`.

They talk to Ray's dashboard, usually through the tunnel that `ray dashboard FILE.yaml` opens.
"""

import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import access, loading, progress
from cluster.access import read_token
from cluster.dashboard import Dashboard, address_of

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Of the dashboard; without it $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.",
    ),
]
Recipe = Annotated[str, typer.Argument(help="A name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes: section.key=value ...", show_default=False)
]
cluster = typer.Typer(help="A cluster's token: make it, check that it is asked for.")


def add_to(app: typer.Typer) -> None:
    """Give the `heliostat` command these verbs."""
    app.add_typer(cluster, name="cluster", no_args_is_help=True)
    app.command()(submit)
    app.command("jobs")(list_jobs)
    app.command()(why)
    app.command()(doctor)
    app.command()(monitor)


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


def submit(
    verb: Annotated[str, typer.Argument(help="`up`, a stage, or `doctor`.")],
    recipe: Annotated[str, typer.Argument(help="A name, or a file in the working directory.")],
    overrides: Overrides = None,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", metavar="DIR", help="What the job gets a copy of.")
    ] = Path("."),
    name: Annotated[str | None, typer.Option(help="Of the job; made up without it.")] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="As of `up`.", metavar="STAGE")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="As of `up`.", metavar="STAGE")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make new versions.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is taken.")] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="USD per hour of a device; else a list price.")
    ] = None,
) -> None:
    """Run a stage, or all of them, as a job of a cluster, and follow it; Ctrl-C detaches."""
    jobs: Any = import_module("cluster.jobs")
    wish = jobs.Wish(verb, recipe, overrides or [], first, last, fresh, name, price)
    wanted = jobs.order(wish, working_dir)
    client = jobs.client(address_of(address))
    progress.say(f"uploading {wanted.upload.line()}")
    jobs.submit(client, wanted)
    progress.say(f"job {wanted.name}: {wanted.command}")
    if detach:
        return
    try:
        code = jobs.follow(client, wanted.name)
    except KeyboardInterrupt:
        progress.say(
            f"detached: job {wanted.name} goes on; `heliostat jobs` lists it, "
            f"`heliostat why {wanted.name}` says what it waits for, `ray job stop {wanted.name}` "
            "ends it"
        )
        return
    raise typer.Exit(code)


def list_jobs(address: Address = None) -> None:
    """The cluster's jobs: state, stage, how far, goodput, cost of their devices so far."""
    jobs: Any = import_module("cluster.jobs")
    spending: Any = import_module("cluster.spending")
    where = address_of(address)
    client = jobs.client(where)
    now = time.time()
    rows = jobs.listing(client, spending.gather(Dashboard(where, read_token()), now), now)
    header = ("job", "state", "for", "stage", "at", "goodput", "cost")
    cells: list[tuple[str, ...]] = [
        (r.name, r.status, jobs.duration(r.age), r.stage, r.place, r.goodput, r.cost) for r in rows
    ]
    progress.table(where, header, cells)


def why(
    job: Annotated[str, typer.Argument(help="Its name, as `heliostat jobs` shows it.")],
    address: Address = None,
) -> None:
    """In a line: what a job waits for, or what it is at."""
    waiting: Any = import_module("cluster.waiting")
    where = address_of(address)
    print(waiting.explain(Dashboard(where, read_token()), job))


def doctor(recipe: Recipe, overrides: Overrides = None) -> None:
    """Examine a live cluster before a long run: versions, devices, storage, network, ports.

    On the head, or as a job: `heliostat submit doctor RECIPE`.
    """
    resolved = loading.load(recipe, overrides or [])
    import_module("cluster.doctor").run(resolved)


def monitor(
    address: Address = None,
    folder: Annotated[
        Path, typer.Option("--folder", metavar="DIR", help="For configuration and measurements.")
    ] = Path("~/heliostat-monitor"),
    prometheus_port: Annotated[int, typer.Option(min=1, max=65535)] = 9090,
    grafana_port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    mlflow: Annotated[
        str, typer.Option(metavar="URL", help="Of the registry's page, for a link to it.")
    ] = "http://127.0.0.1:5000",
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds that the cluster may take to answer.")
    ] = 0.0,
    only_write: Annotated[
        bool, typer.Option("--only-write", help="Configuration and dashboards, starting nothing.")
    ] = False,
) -> None:
    """Prometheus, and Grafana with dashboards, on the head of a cluster, until Ctrl-C."""
    watching: Any = import_module("cluster.monitor")
    where = folder.expanduser().absolute()
    place = watching.Place(where, address_of(address), prometheus_port, grafana_port, mlflow)
    watching.run(place, only_write=only_write, patience=patience)
