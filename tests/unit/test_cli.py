"""The command line: exit codes, one line per mistake, JSON for machines, an instant --help."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from cluster import chain, cli, errors, loading, progress
from cluster.session import Session
from cluster.stages import STAGES
from tests import fakes

ROOT = Path(__file__).parents[2]
VERBS = [stage.verb for stage in STAGES if stage.enabled_by is None]
"""What `up` runs of a recipe that wants no search."""


def heliostat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[fakes.Stages]:
    @contextmanager
    def quiet(config: Any) -> Iterator[Session]:
        yield Session(ours=True, dashboard="", cpus=2, gpus=0, nodes=("here",))

    made = fakes.Stages()
    monkeypatch.setattr(chain, "session", quiet)
    # A console keeps the stdout of its making; each test has its own.
    monkeypatch.setitem(progress._state, "console", None)
    monkeypatch.setitem(progress._state, "stderr", False)
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made


def here(*arguments: str) -> int:
    """The command in this process: its exit code."""
    return cli._guarded(lambda: cli.app(list(arguments), standalone_mode=False))


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nsys.argv = ['heliostat', '--help']\nfrom cluster.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(code, *sys.modules, file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    code, *modules = answer.stderr.split()
    assert code == "0"
    assert not {"ray", "torch", "transformers", "deepspeed", "mlflow", "pandas"} & set(modules)
    assert all(word in answer.stdout for word in ["up", "tune", "config", "recipes", *VERBS])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "gpt-dmo"], "did you mean gpt-demo?"),
        (["up", "gpt-demo", "train.step=5"], "did you mean train.steps?"),
        (["up", "gpt-demo", "--from", "trian"], "no stage 'trian'"),
        (["up", "gpt-demo", "--from", "serve", "--to", "prepare"], "comes after"),
        (["up"], "Missing argument"),
        (["up", "gpt-demo", "--nope"], "No such option"),
        (["fly", "gpt-demo"], "No such command"),
        (["prepare", "gpt-demo", "--to", "serve"], "No such option"),
        (["config", "gpt-demo", "a\nb=1"], "unknown key"),
        (["pretrain", "gpt-demo", "storage.root=/proc/none"], "storage.root=PATH"),
        (["serve", "gpt-demo", "storage.root=ROOT"], "run `heliostat publish` first"),
    ],
)
def test_a_usage_mistake_is_one_line_and_exit_code_3(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stages: fakes.Stages,
) -> None:
    code = here(*[a.replace("ROOT", str(tmp_path)) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 3 and out == "" and stages.calls == []
    assert err.startswith("heliostat: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tune.space.train.lr=uniform(0, 1)", "tune.space: unknown key train.lr"),
        ("tune.space.train.learning_rate=uniform(0.2, 0.1)", "is empty: 0.2 is not below 0.1"),
        ("tune.space.train.learning_rate=loguniform(0, 0.1)", "begin above 0"),
        ("tune.objectives={accuracy: max}", "no trial reports 'accuracy': take one of"),
        ("tune.trials=0", "tune.trials"),
    ],
)
def test_a_search_that_cannot_be_is_one_line_and_exit_code_3(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = here("tune", "gpt-demo", override, f"storage.root={tmp_path}")
    out, err = capsys.readouterr()
    assert code == 3 and out == "" and list(tmp_path.iterdir()) == []
    assert err.startswith("heliostat: ") and err.count("\n") == 1 and says in err


def test_a_real_process_ends_with_the_same_codes(tmp_path: Path) -> None:
    wrong = heliostat("up", "gpt-demo", "train.workers=0")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (3, "", 1)
    assert "train.workers" in wrong.stderr
    early = heliostat("evaluate", "gpt-demo", f"storage.root={tmp_path}")
    assert early.returncode == 3 and "run `heliostat pretrain` first" in early.stderr
    assert "Traceback" not in early.stderr
    bare = heliostat()
    assert bare.returncode == 3 and "Usage" in bare.stdout + bare.stderr


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (errors.GateRefused("accuracy 0.9 is below 0.98"), 2, "accuracy 0.9 is below 0.98"),
        (errors.SourceError("a\n  b"), 3, "a b"),
        (errors.CapacityError("x"), 3, "x"),
        (errors.StorageRootError("x"), 3, "x"),
        (errors.PortError("x"), 3, "x"),
        (errors.ConfigError("x"), 3, "x"),
        (errors.ArtifactError("x"), 1, "x"),
        (errors.StorageError("x"), 1, "x"),
        (errors.TrainingError("x"), 1, "x"),
        (errors.ServingError("x"), 1, "x"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (typer.Exit(0), 0, ""),
    ],
)
def test_every_error_has_its_exit_code(
    raised: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def call() -> None:
        raise raised

    assert cli._guarded(call) == code
    out, err = capsys.readouterr()
    assert out == "" and err == (f"heliostat: {err[11:-1]}\n" if says else "") and says in err


def test_a_command_ends_with_the_code_that_it_gives() -> None:
    """As `submit` does with that of its job."""
    app = typer.Typer()

    @app.command()
    def refused() -> None:
        raise typer.Exit(2)

    assert cli._guarded(lambda: app([], standalone_mode=False)) == 2


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli._guarded(lambda: 1 / 0)


def test_config_prints_what_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert here("config", "gpt-demo", "train.steps=7", "train.warmup_steps=0") == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert loading.load(str(path)).train.steps == 7


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert here("recipes") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(loading.recipes())


def last_line(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


def test_up_ends_with_one_line_of_json(
    stages: fakes.Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("up", "gpt-demo", f"storage.root={tmp_path}", "--json")
    assert here(*arguments) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "key figure" in err
    tree = last_line(out)
    assert (tree["status"], tree["model"], tree["url"]) == (
        "done",
        "gpt-demo@1",
        "http://127.0.0.1:8000",
    )
    assert [row["stage"] for row in tree["stages"]] == VERBS
    assert tree["stages"][0]["artifact"] == "corpus/gpt-demo@1"
    assert tree["stages"][0]["metrics"] == {"figure": 1.0}
    assert here(*arguments) == 0
    again = last_line(capsys.readouterr().out)
    assert [row["status"] for row in again["stages"]] == ["skipped"] * 4 + ["done"]
    assert again["model"] == "gpt-demo@1"


def test_figures_that_are_no_numbers_stay_json(
    stages: fakes.Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stages.figure = float("nan")
    assert here("prepare", "gpt-demo", f"storage.root={tmp_path}", "--json") == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    tree = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert tree["stages"][0]["metrics"] == {"figure": None}


def test_the_table_names_what_was_made(
    stages: fakes.Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert here("up", "gpt-demo", f"storage.root={tmp_path}", "--to", "pretrain") == 0
    out = capsys.readouterr().out
    assert "corpus/gpt-demo@1" in out and "pretrain went well" in out
    assert stages.calls == ["prepare", "pretrain"]


def test_plan_says_why_and_runs_nothing(
    stages: fakes.Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["up", "gpt-demo", f"storage.root={tmp_path}", "--plan"]
    assert here(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == VERBS
    assert lines[1].split(maxsplit=2)[1:] == ["run", "after prepare"]
    assert here(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert tree["status"] == "planned" and len(err.splitlines()) == len(VERBS)
    assert tree["stages"][0] == {
        "stage": "prepare",
        "action": "run",
        "reason": "nothing made yet",
    }
    assert stages.calls == []


def test_fresh_reaches_the_stages(
    stages: fakes.Stages, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ("prepare", "gpt-demo", f"storage.root={tmp_path}", "--json")
    assert here(*arguments) == 0
    assert here(*arguments, "--fresh") == 0
    assert last_line(capsys.readouterr().out)["stages"][0]["artifact"] == "corpus/gpt-demo@2"


def test_ctrl_c_inside_a_command_is_told_and_has_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through Typer itself, which swallows the KeyboardInterrupt."""

    def interrupted() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.loading, "recipes", interrupted)
    assert cli._guarded(lambda: cli.app(["recipes"], standalone_mode=False)) == 130
    assert "stopped; the same command continues" in capsys.readouterr().err
