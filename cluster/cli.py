"""The `heliostat` command: a table of verbs; parse, load the config, import the stage, run it.

Heavy imports (ray, torch, transformers) come after parsing, so that `--help` answers at once.
Exit codes: 0 done, 1 fault, 2 a gate refused, 3 usage.
"""

import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import loading, progress, remote
from cluster.durable import storage_errors
from cluster.errors import ConfigError, HeliostatError, UsageError
from cluster.remote import Overrides
from cluster.stages import BY_VERB, STAGES

app = typer.Typer(
    name="heliostat",
    help="Raw data in, your own large model out, served: on a laptop or on a Ray cluster of GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT_RECIPE = "gpt-demo"
"""Gives the storage root where a command names no recipe."""
Recipe = Annotated[str, typer.Argument(help="A name from `heliostat recipes`, or a YAML file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make new versions of finished artifacts.")]
Plan = Annotated[bool, typer.Option("--plan", help="Say which stages would run, and why.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]
First = Annotated[str | None, typer.Option("--from", help="First stage.", metavar="STAGE")]
Last = Annotated[str | None, typer.Option("--to", help="Last stage.", metavar="STAGE")]


@app.command()
def up(
    recipe: Recipe,
    overrides: Overrides = None,
    first: First = None,
    last: Last = None,
    fresh: Fresh = False,
    plan: Plan = False,
    as_json: Json = False,
) -> None:
    """All stages in order, from raw files to a served model; finished ones are skipped."""
    _run(recipe, overrides or [], first, last, fresh=fresh, plan_only=plan, as_json=as_json)


def _stage_command(verb: str, help_text: str) -> None:
    def command(
        recipe: Recipe,
        overrides: Overrides = None,
        fresh: Fresh = False,
        plan: Plan = False,
        as_json: Json = False,
    ) -> None:
        _run(recipe, overrides or [], verb, verb, fresh=fresh, plan_only=plan, as_json=as_json)

    app.command(verb, help=help_text)(command)


for _stage in STAGES:
    if _stage.verb != "serve":  # it has an option of its own
        _stage_command(_stage.verb, _stage.help)


@app.command(help=BY_VERB["serve"].help)
def serve(
    recipe: Recipe,
    overrides: Overrides = None,
    fresh: Fresh = False,
    plan: Plan = False,
    as_json: Json = False,
    write_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only write the Serve YAML, for `serve deploy FILE`."),
    ] = None,
) -> None:
    if write_config is None:
        _run(
            recipe, overrides or [], "serve", "serve", fresh=fresh, plan_only=plan, as_json=as_json
        )
        return
    text = _top(BY_VERB["serve"].module).write_config(loading.load(recipe, overrides or []))
    with storage_errors(f"write {write_config}"):
        write_config.write_text(text, encoding="utf-8")
    progress.say(f"serve: {write_config} is for `serve deploy {write_config}` on the cluster")


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved config: defaults, recipe, overrides."""
    print(loading.dump(loading.load(recipe, overrides or [])), end="")


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[
        str | None,
        typer.Option(help="Such as 4xH200:8, or a cluster launcher's file; else what is there."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="USD per hour of a device; else a list price.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What training a recipe needs of each device: does it fit, how long, what does it cost."""
    if as_json:
        progress.to_stderr()
    made = _top("pipelines.plan").run(loading.load(recipe, overrides or []), nodes, price)
    for line in made.lines():
        progress.say(line)
    if as_json:
        progress.write_json_line(json.dumps({"status": "planned"} | made.tree()))


@app.command()
def recipes() -> None:
    """List the recipes that come with Heliostat."""
    for name, description in loading.recipes().items():
        print(f"{name:<16} {description}")


@app.command()
def journal(
    run: Annotated[str, typer.Argument(help="A recipe, for its newest run, or the id of a run.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per event.")] = False,
) -> None:
    """What happened to a training run: starts, skips, leaps, losses of workers, fallbacks."""
    for event in _journal_of(run, overrides or []).events():
        print(event.json() if as_json else event.line())


@app.command()
def deidentify(
    source: Annotated[Path, typer.Argument(help="JSON lines with a field `text`.")],
    target: Annotated[Path, typer.Argument(help="Where they go, with `spans` of what was found.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes: data.privacy.key=value ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace personal data in a file by typed surrogates, by the rules that `prepare` has."""
    if stranger := next((o for o in overrides or [] if not o.startswith("data.privacy.")), None):
        raise UsageError(f"deidentify takes changes of data.privacy only, not {stranger}")
    settings: Any = loading.load(DEFAULT_RECIPE, overrides or []).data
    tally = import_module("pipelines.deidentify").run(source, target, settings.privacy)
    _print_tally(tally, target, as_json=as_json)


def _print_tally(tally: Any, target: Path, *, as_json: bool) -> None:
    for line in tally.first_rejects:
        print(f"heliostat: rejected {line}", file=sys.stderr)
    if tally.rejected:
        print(f"heliostat: {tally.rejected} rejected lines: {target}.rejects", file=sys.stderr)
    if as_json:
        fields = ("rows", "changed", "overwritten", "rejected", "types")
        print(json.dumps({"status": "done"} | {name: getattr(tally, name) for name in fields}))
        return
    found = ", ".join(f"{count} {name}" for name, count in sorted(tally.types.items()))
    print(f"{target}: {tally.rows} rows, {tally.changed} changed: {found or 'nothing found'}")
    if tally.overwritten:
        print(f"{tally.overwritten} rows had a field `spans` of their own, which is replaced")


keys = typer.Typer(help="API keys of the service: create, list, revoke.", no_args_is_help=True)
app.add_typer(keys, name="keys")
ForRecipe = Annotated[
    str, typer.Option("--recipe", help="Whose storage root holds the keys.", metavar="RECIPE")
]


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Who or what will use it.")],
    overrides: Overrides = None,
    recipe: ForRecipe = DEFAULT_RECIPE,
    scope: Annotated[
        list[str] | None, typer.Option(help="generate, classify; both without it.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="Such as 30d, 12h or 15m.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
    tokens_per_minute: Annotated[int | None, typer.Option()] = None,
    concurrent: Annotated[int | None, typer.Option(help="Calls open at once.")] = None,
) -> None:
    """Make a key; it is printed this once, on stdout."""
    progress.to_stderr()
    quota = (requests_per_minute, tokens_per_minute, concurrent)
    config = loading.load(recipe, overrides or [])
    print(_top("serving.keys").create(config, name, scope or [], expires, *quota))


@keys.command("list")
def keys_list(overrides: Overrides = None, recipe: ForRecipe = DEFAULT_RECIPE) -> None:
    """Ids, states, scopes, names and limits."""
    for line in _top("serving.keys").listing(loading.load(recipe, overrides or [])):
        print(line)


@keys.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Its id, or a name that only it has.")],
    overrides: Overrides = None,
    recipe: ForRecipe = DEFAULT_RECIPE,
) -> None:
    """End a key; running services refuse it within 10 seconds."""
    _top("serving.keys").revoke(loading.load(recipe, overrides or []), key)


registry = typer.Typer(help="MLflow, the index of published models.", no_args_is_help=True)
app.add_typer(registry, name="registry")


@registry.command("rebuild")
def registry_rebuild(overrides: Overrides = None, recipe: ForRecipe = DEFAULT_RECIPE) -> None:
    """Make its entries again from the manifests of a storage root, which are the truth."""
    for line in _top("pipelines.publish").rebuild(loading.load(recipe, overrides or [])):
        print(line)


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A served model; the first without it.")
    ] = None,
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(help="API key; better in $HELIOSTAT_API_KEY.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Talk with a served model in the terminal; a base model continues what you write."""
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    _top("serving.chat").talk(url, model, key, options)


remote.add_to(app)


def _top(module: str) -> Any:
    """A module of a package above, imported when its command runs."""
    return import_module(module)


def _journal_of(run: str, overrides: list[str]) -> Any:
    from cluster.journal import Journal, newest_run, runs
    from cluster.storage import Store

    try:
        config = loading.load(run, overrides)
    except ConfigError:
        store = Store(loading.load(DEFAULT_RECIPE, overrides).storage.root)
        if run not in runs(store):
            raise
        return Journal(store, run)
    store = Store(config.storage.root)
    newest = newest_run(store, config.name)
    if newest is None:
        known = ", ".join(runs(store)[-5:]) or "none"
        raise UsageError(
            f"no run of {config.name} has a journal in {store.uri}; runs that have one: {known}"
        )
    return Journal(store, newest)


def _run(
    recipe: str,
    overrides: list[str],
    first: str | None,
    last: str | None,
    *,
    fresh: bool,
    plan_only: bool,
    as_json: bool,
) -> None:
    if as_json:
        progress.to_stderr()
    resolved = loading.load(recipe, overrides, fresh=fresh)
    from cluster import chain

    stages = chain.between(first, last)
    if plan_only:
        _print_plan(chain, stages, resolved, as_json=as_json)
        return
    chain.execute(
        stages, resolved, lambda rows: _print_summary(rows, resolved.name, as_json=as_json)
    )


def _print_plan(chain: Any, stages: Any, resolved: Any, *, as_json: bool) -> None:
    from cluster.session import open_store

    planned = chain.plan(stages, resolved, open_store(resolved))
    for verb, decision in planned:
        progress.say(f"{verb:<10} {decision.action:<7} {decision.reason}")
    if as_json:
        tree = [{"stage": v, "action": d.action, "reason": d.reason} for v, d in planned]
        progress.write_json_line(json.dumps({"status": "planned", "stages": tree}))


def _print_summary(rows: list[Any], name: str, *, as_json: bool) -> None:
    cells: list[tuple[str, ...]] = [
        (
            r.stage,
            "skipped" if r.status == "skipped" else f"{r.seconds:.1f} s",
            r.artifact or "",
            r.headline,
        )
        for r in rows
    ]
    progress.table(name, ("stage", "time", "artifact", "key figure"), cells)
    if not as_json:
        return
    model = next((r.artifact for r in rows if r.stage == "publish"), None)
    tree = {
        "status": "done",
        "stages": [
            {
                "stage": r.stage,
                "status": r.status,
                "seconds": round(r.seconds, 3),
                "artifact": r.artifact,
                # NaN and infinity are not JSON.
                "metrics": {k: v if math.isfinite(v) else None for k, v in r.metrics.items()},
            }
            for r in rows
        ],
        "model": model.removeprefix("model/") if model else None,
        "url": next((r.url for r in rows if r.url), None),
    }
    progress.write_json_line(json.dumps(tree))


# Typer carries its own copy of click, whose usage error is the base of the one that it exports.
_PARSING_ERROR: Any = typer.BadParameter.__base__


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""


def main() -> None:
    """Console entry point."""
    sys.exit(_guarded(lambda: app(standalone_mode=False)))


def _guarded(call: Callable[[], Any]) -> int:
    """Run, and turn what can go wrong into one line and an exit code."""
    try:
        # Outside of its standalone mode Typer returns codes: of `typer.Exit`, and of a Ctrl-C.
        code = call()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if isinstance(code, int):
            return code
    except typer.Exit as stop:
        return stop.exit_code
    except _PARSING_ERROR as error:
        print(f"heliostat: {error.format_message()} (see heliostat --help)", file=sys.stderr)
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("heliostat: stopped; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except HeliostatError as error:
        print(f"heliostat: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()
