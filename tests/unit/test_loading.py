"""Every mistake in a recipe or an override is one clear line with the cure."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import loading
from cluster.config import RunConfig
from cluster.errors import ConfigError

RECIPE = """\
name: mine
family: causal_lm
data: {sources: [here.txt]}
"""


def refused(recipe: Path | str, *overrides: str) -> str:
    """The one line that a wrong recipe is answered with."""
    with pytest.raises(ConfigError) as caught:
        loading.load(str(recipe), overrides)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_recipe_needs_little_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    config = loading.load(str(path), ["train.steps=7", "train.warmup_steps=0", "train.steps=9"])
    assert (config.train.steps, config.data.kind, config.model.kind) == (9, "text", "llama")
    assert not config.fresh
    assert loading.load(str(path), fresh=True).fresh


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "must be a mapping"),
        ("# only a comment\n", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("42\n", "must be a mapping"),
        (RECIPE + "name: again\n", "'name' appears twice, line 4"),
        (RECIPE + "train: {steps: 1, steps: 2}\n", "'steps' appears twice"),
        (RECIPE + "train: &t {steps: 100}\n", "anchors and aliases are not supported"),
        (RECIPE + "a: &a [x]\nb: [*a, *a]\n", "write the value out, line 4"),
        (RECIPE + "train: !!python/object:os.system {}\n", "tags are not supported"),
        (RECIPE + "train: {steps: !!int '0x10'}\n", "tags are not supported"),
        (RECIPE + "train: {steps: !!binary aGk=}\n", "tags are not supported"),
        (RECIPE + "train:\n\tsteps: 1\n", "not plain YAML"),
        (RECIPE + "---\nname: second\n", "not plain YAML"),
        (RECIPE + "train: {steps: 1\n", "not plain YAML"),
        (RECIPE + "train: {steps: " + "9" * 5000 + "}\n", "not plain YAML"),
        (RECIPE + "x: " + "[" * 30_000, "levels of nesting"),
        (RECIPE + "\n".join("  " * n + "k:" for n in range(60)), "levels of nesting"),
        (RECIPE + "? {a: b}\n: c\n", "not plain YAML"),
        (RECIPE + '"\\ud800": 1\n', "surrogate"),
        (RECIPE.encode("utf-16"), "not UTF-8"),
        (RECIPE.encode("utf-16-le"), "not plain YAML"),
        (b"name: \xff\n", "not UTF-8"),
        (b"name: a\x00b\n", "not plain YAML"),
        (RECIPE + "#" + " " * loading.MAX_RECIPE_BYTES, "not a recipe"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refused(write(tmp_path, content))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trian: {steps: 1}", "unknown key trian (did you mean train?)"),
        ("train: {step: 1}", "unknown key train.step (did you mean train.steps?)"),
        ("steps: 1", "unknown key steps (did you mean train.steps?)"),
        ("<<: {seed: 1}", "unknown key <<"),
        ("train: {steps: yes}", "train.steps: input should be a valid integer, not 'yes'"),
        ("train: {steps: true}", "train.steps: input should be a valid integer, not True"),
        ("train: {steps: 010}", "train.steps: input should be a valid integer, not '010'"),
        ("train: {steps: 0x10}", "train.steps: input should be a valid integer, not '0x10'"),
        ("train: {steps: 1_000}", "train.steps: input should be a valid integer, not '1_000'"),
        ("train: {steps: 12:30}", "train.steps: input should be a valid integer, not '12:30'"),
        ("train: {steps: 1e3}", "train.steps: input should be a valid integer, not 1000.0"),
        ("train: {steps: 0}", "train.steps: input should be greater than or equal to 1, not 0"),
        ("train: {steps: 2000000000000}", "train.steps: input should be less than or equal"),
        ("train: {steps: 99999999999999999999999}", "train.steps: input should be less than"),
        ("train: {steps: 2026-01-01}", "train.steps: input should be a valid integer"),
        ("train: {learning_rate: .nan}", "train.learning_rate: input should be a valid number"),
        ("train: {learning_rate: .inf}", "train.learning_rate: input should be a valid number"),
        ("train: {learning_rate: 1e999}", "train.learning_rate: input should be"),
        ("train: {learning_rate: -0.1}", "train.learning_rate: input should be greater than 0"),
        ('train: {learning_rate: "1e-4"}', "train.learning_rate: input should be a valid number"),
        ("train: {workers: 0}", "train.workers: input should be from 1 to 100000"),
        (
            "train: {workers: 3}",
            "train.global_batch 32 does not divide by train.workers 3: take 30",
        ),
        ("train: {workers: 64}", "train.workers 64: take 64"),
        ("train: {micro_batch: 5}", "a worker's share of the batch, 16 rows, does not divide by"),
        ("train: {warmup_steps: 600}", "train.warmup_steps 600 must be below train.steps 600"),
        ("train: {zero_stage: 4}", "train.zero_stage: input should be 0, 1, 2 or 3, not 4"),
        ("train:", "train: input should be an object, not None"),
        ("train: [1]", "train: input should be an object, not [1]"),
        ("serve: {wait: no}", "serve.wait: input should be a valid boolean, not 'no'"),
        ("serve: {wait: 1}", "serve.wait: input should be a valid boolean, not 1"),
        ("serve: {port: 99999}", "serve.port: input should be less than or equal to 65535"),
        ("storage: {root: ''}", "storage.root: string should have at least 1 character"),
        ("model: {heads: 5}", "model.hidden_size 192 does not divide by model.heads 5: take 190"),
        ("model: {kv_heads: 3}", "model.heads 4 does not divide by model.kv_heads 3"),
        ("model: {depths: [1]}", "model.depths belongs to another family"),
        ("model: {kind: resnet}", "family causal_lm needs model.kind llama, not resnet"),
        ("model: {kind: gpt5}", "model"),
        ("seed: -1", "seed: input should be greater than or equal to 0"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path: Path, line: str, says: str) -> None:
    assert says in refused(write(tmp_path, RECIPE + line + "\n"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("family: causal_lm\ndata: {sources: [a]}\n", "name is missing"),
        ("name: a\ndata: {sources: [a]}\n", "family is missing"),
        ("name: a\nfamily: causal_lm\n", "data.sources is missing"),
        ("name: a\nfamily: causal_lm\ndata: {sources: []}\n", "data.sources: "),
        ("name: a\nfamily: gpt\ndata: {sources: [a]}\n", "'causal_lm' or 'image_classifier'"),
        ("name: ../up\nfamily: causal_lm\ndata: {sources: [a]}\n", "name: string should match"),
        ("name: 5\nfamily: causal_lm\ndata: {sources: [a]}\n", "name: input should be a valid s"),
    ],
)
def test_what_a_recipe_lacks_is_named(tmp_path: Path, content: str, says: str) -> None:
    assert says in refused(write(tmp_path, content))


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    said = refused(write(tmp_path, RECIPE + "sead: 1\ntrain: {steps: -1, wokers: 2}\n"))
    assert all(word in said for word in ("sead", "train.steps", "train.wokers"))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("0.5", 0.5), ("1", 1.0), ("2.5e-1", 0.25)]
)
def test_numbers_are_read_as_a_person_reads_them(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, RECIPE + f"train: {{learning_rate: {text}}}\n")
    assert loading.load(str(path)).train.learning_rate == value


def test_text_that_looks_special_stays_text(tmp_path: Path) -> None:
    """What YAML 1.1 would turn into booleans, dates or octal numbers."""
    words = ["yes", "no", "on", "010", "2026-01-01", "12:30", "0x1f", "1_000", ".inf", "=", "<<"]
    path = write(tmp_path, RECIPE.replace("here.txt", ", ".join(words)))
    assert loading.load(str(path)).data.sources == tuple(words)


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    assert loading.load(str(write(tmp_path, RECIPE.encode("utf-8-sig")))).name == "mine"


def test_other_scripts_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "食谱 一.yaml"
    path.write_text(RECIPE + 'evaluate: {prompt: "你好，\\U0001F600"}\n', encoding="utf-8")
    config = loading.load(str(path), ["description=语言模型"])
    assert (config.evaluate.prompt, config.description) == ("你好，😀", "语言模型")
    assert "语言模型" in loading.dump(config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "is not of the form section.key=value"),
        ("=5", "is not of the form section.key=value"),
        ("train..steps=5", "is not of the form section.key=value"),
        (".steps=5", "is not of the form section.key=value"),
        ("train.steps=", "train.steps: input should be a valid integer, not None"),
        ("train.steps=[1", "not plain YAML"),
        ("train.steps=" + "[" * 30_000, "levels of nesting"),
        ("train.steps=" + "9" * 5000, "not plain YAML"),
        ("train.steps=*a", "anchors"),
        ("train.steps=!!int 5", "tags are not supported"),
        ("train=5", "train: input should be an object, not 5"),
        ("train.steps.x=5", "train.steps.x: steps is a value, not a section"),
        ("name.x=5", "name.x: name is a value, not a section"),
        ("data.sources=a.txt", "data.sources: input should be a valid"),
        ("data.vocab_sise=300", "unknown key data.vocab_sise (did you mean data.vocab_size?)"),
        ("data.image_size=8", "data.image_size belongs to another family"),
        ("--steps=5", "unknown key --steps"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, says: str) -> None:
    assert says in refused("gpt-demo", override)


def test_an_override_may_switch_a_setting_off(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE + "ray: {address: auto}\n")
    assert loading.load(str(path), ["ray.address="]).ray.address is None


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "No such file" in refused(tmp_path / "no" / "such" / "parent.yaml")
    assert "is not a file" in refused(folder)
    assert "is not a file" in refused(pipe)
    assert "symbolic links" in refused(loop)
    assert "No such file" in refused("~nobody-of-this-name/recipe.yaml")
    assert "(did you mean gpt-demo?)" in refused("gpt-dmo")
    assert "see `heliostat recipes`" in refused("")


def test_a_large_recipe_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.truncate(100 * 2**20)
    tracemalloc.start()
    try:
        assert "not a recipe" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    sources=st.lists(plain_text, min_size=1, max_size=3),
    prompt=plain_text,
    description=st.sampled_from(["1e5", "yes", "0o7", "null", "~", "-1", "1_0", "=", "a: b", "#"]),
    rate=st.floats(min_value=1e-12, max_value=10, allow_nan=False),
    seed=st.integers(0, 2**31 - 1),
    wait=st.booleans(),
    address=st.none() | plain_text,
)
def test_what_is_printed_loads_as_the_same_config(
    name: str,
    sources: list[str],
    prompt: str,
    description: str,
    rate: float,
    seed: int,
    wait: bool,
    address: str | None,
) -> None:
    config = loading.validate(
        {
            "name": name,
            "description": description,
            "family": "causal_lm",
            "seed": seed,
            "data": {"sources": sources},
            "train": {"learning_rate": rate},
            "evaluate": {"prompt": prompt},
            "serve": {"wait": wait},
            "ray": {"address": address},
        }
    )
    again = loading.validate(loading._parse(loading.dump(config).encode(), "printed"))
    assert again == config
    # Any other reader of YAML agrees.
    assert RunConfig.model_validate_json(json.dumps(yaml.safe_load(loading.dump(config)))) == config


def test_another_kind_than_the_familys_is_one_mistake() -> None:
    with pytest.raises(ConfigError, match="needs data.kind text, not image"):
        loading.load("gpt-demo", ["data.kind=image"])


def test_dotted_keys_of_a_recipe_go_over_its_sections(tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(
        "train.learning_rate: 0.5\nname: best\n"
        "family: causal_lm\ndata: {sources: [docs]}\ntrain: {steps: 70, learning_rate: 0.1}\n"
    )
    config = loading.load(str(path), ["train.steps=80"])
    assert (config.train.learning_rate, config.train.steps) == (0.5, 80)
    path.write_text("family: causal_lm\ntrain..steps: 1\n")
    with pytest.raises(ConfigError, match=r"key 'train\.\.steps' is not of the form"):
        loading.load(str(path))


def test_a_changed_config_is_checked_like_any_other() -> None:
    config = loading.load("gpt-demo", [])
    assert loading.changed(config, {"train.steps": 99}).train.steps == 99
    assert config.train.steps != 99
    with pytest.raises(ConfigError, match="unknown key train.stepps .did you mean train.steps"):
        loading.changed(config, {"train.stepps": 99})
