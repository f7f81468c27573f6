"""Former spellings of options: accepted wherever options are read, with one notice for those that a user wrote."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml
from support.former_names import former_sections, rewrite_with_former_names

from megapromoe.checkpoint.manifest import MANIFEST, read_manifest, seal
from megapromoe.checkpoint.origin import Origin
from megapromoe.checkpoint.run_directory import RunDirectory
from megapromoe.config import renamed_options
from megapromoe.config.options import Config, ConfigError, to_dict
from megapromoe.config.presets import PRESETS
from megapromoe.config.renamed_options import RENAMED, RENAMED_VALUES, present_sections, present_words
from megapromoe.config.resolve import resolve
from megapromoe.conversion.state import config_from
from megapromoe.studies.comparison import compare
from megapromoe.studies.grid import expand
from megapromoe.studies.recipe import StudyError, find_recipe, make_recipe, read_recipe, recipe_dict, recipe_names
from megapromoe.studies.study import open_study, plan

OPTIONS = {f"{section}.{name}" for section, values in to_dict(Config()).items() for name in values}
ITS_TESTS = ("test_renamed_options.py", "test_former_options.py", "test_study_extension.py")
ROOT = Path(__file__).parents[2]
SAVED = {"train": {"spike": 7}, "data": {"source": "synthetic"}}

RECIPE = {
    "preset": "digits",
    "settings": {"train.spike": 7, "train.steps": 3, "train.warmup": 0},
    "axes": {"model.num_experts": [2, 4]},
    "variants": {"promoe": {}},
}


@pytest.fixture(autouse=True)
def _a_new_process():
    renamed_options._log_once.cache_clear()


@pytest.fixture
def notices(caplog):
    """A function that returns the notices logged so far."""
    caplog.set_level(logging.INFO, logger="megapromoe.config")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "megapromoe.config.renamed_options"]


def notice(former, present):
    return f"{former}: is now spelled {present}; the next release refuses the former spelling"


def test_the_table_leads_from_names_that_are_gone_to_options():
    assert not set(RENAMED) & OPTIONS
    assert set(RENAMED.values()) <= OPTIONS and len(set(RENAMED.values())) == len(RENAMED)
    for name, values in RENAMED_VALUES.items():
        assert name in OPTIONS
        for settings in values.values():
            resolve("digits", overrides=[f"{key}={value}" for key, value in settings.items()])
            assert values.keys().isdisjoint({settings.get(name)}), "a former value leads to a present one"


def test_command_line(notices):
    assert resolve("digits", overrides=["train.spike=7"]).train.spike_factor == 7
    assert notices() == [notice("train.spike", "train.spike_factor")]


def test_yaml_of_a_user_under_the_command_line(tmp_path, notices):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {spike: 7, steps: 50}\n")
    assert resolve("digits", file).train.spike_factor == 7
    assert resolve("digits", file, overrides=["train.spike_factor=8"]).train.spike_factor == 8, (
        "a later layer, no clash"
    )
    assert resolve("digits", file, overrides=["train.spike=9"]).train.spike_factor == 9
    assert notices() == [notice("train.spike", "train.spike_factor")], "once in a process"


def test_the_files_that_the_program_wrote_give_no_notice(tmp_path, notices):
    file = tmp_path / "config.yaml"
    file.write_text("train: {spike: 7}\n")
    assert resolve("digits", file, file_is_saved=True).train.spike_factor == 7
    assert resolve("digits", saved=["train.spike=7"]).train.spike_factor == 7
    assert config_from(SAVED).train.spike_factor == 7
    assert config_from(SAVED, ["train.spike_factor=8"]).train.spike_factor == 8, "no clash"
    assert present_sections({"train": {"spike": 7, "spike_factor": 8}}) == {"train": {"spike_factor": 8}}
    assert notices() == []
    assert config_from(SAVED, ["train.spike=9"]).train.spike_factor == 9
    assert notices() == [notice("train.spike", "train.spike_factor")], "that of the override"


@pytest.mark.parametrize(
    "words", [["train.spike=7", "train.spike_factor=7"], ["train.spike_factor=7", "train.spike=7"]]
)
def test_both_spellings_in_one_layer_are_refused(tmp_path, words):
    rule = "is the former spelling of train.spike_factor, and train.spike_factor is given as well; remove train.spike"
    with pytest.raises(ConfigError) as raised:
        resolve("digits", overrides=[*words, "train.steps=0"])
    assert raised.value.violations[0] == f"train.spike = '7' (command line): {rule}"
    assert len(raised.value.violations) == 2, "the other rules are checked as well"
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"train": {word.split(".")[1].split("=")[0]: 7 for word in words}}))
    with pytest.raises(ConfigError, match=re.escape(f"train.spike = 7 ({file}): {rule}")):
        resolve("digits", file)


def test_suggestions_have_only_present_names():
    with pytest.raises(ConfigError) as raised:
        resolve("digits", overrides=["train.spike_factr=7"])
    assert "did you mean spike_factor?" in str(raised.value)


def test_words_of_a_printed_command():
    assert present_words(["train.spike=7", "train.lr=1", "word"]) == ["train.spike_factor=7", "train.lr=1", "word"]


def every_former_setting():
    """Each former spelling with a valid value, and the settings that it stands for."""
    values = {"model.gate": "sigmoid", "train.spike": 7.0}
    cases = []
    for former, present in RENAMED.items():
        section, _, name = present.partition(".")
        default = to_dict(Config())[section][name]
        value = values[former] if former in values else default + 1 if type(default) is int else default / 2
        cases.append(pytest.param(former, value, {present: value}, id=former))
    for name, former_values in RENAMED_VALUES.items():
        for value, settings in former_values.items():
            cases.append(pytest.param(name, value, settings, id=f"{name}={value}"))
    return cases


@pytest.mark.parametrize("key, value, present", every_former_setting())
def test_every_former_spelling(key, value, present, tmp_path, notices):
    wanted = resolve("digits", overrides=[f"{name}={v}" for name, v in present.items()])
    assert notices() == []
    assert resolve("digits", overrides=[f"{key}={value}"]) == wanted
    (line,) = notices()
    assert line.startswith((f"{key}: is now", f"{key}={value}: is now")) and all(name in line for name in present)
    file = tmp_path / "mine.yaml"
    section, _, name = key.partition(".")
    file.write_text(yaml.safe_dump({section: {name: value}}))
    assert resolve("digits", file) == wanted
    assert present_sections({section: {name: value}}) == present_sections(_nested(present)) == _nested(present)
    recipe = make_recipe(RECIPE | {"settings": {key: value}})
    assert recipe.settings == present and {task.config for task in expand(recipe)} == {
        task.config for task in expand(make_recipe(RECIPE | {"settings": present}))
    }
    assert notices() == [line]


def _nested(settings):
    sections = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def test_a_former_value_and_the_option_that_it_sets_are_refused():
    with pytest.raises(ConfigError) as raised:
        resolve("digits", overrides=["train.optimizer=apex", "train.adamw_backend=torch"])
    assert raised.value.violations == (
        "train.optimizer = 'apex' (command line): is the former spelling of train.optimizer=adamw"
        " train.adamw_backend=apex, and train.adamw_backend is given as well; remove train.optimizer",
    )
    train = resolve("digits", overrides=["train.optimizer=adamw", "train.optimizer=apex"]).train
    assert (train.optimizer, train.adamw_backend) == ("adamw", "apex"), "the same option twice: the later one holds"


def test_the_notice_of_a_former_value_names_the_present_settings(notices):
    resolve("digits", overrides=["train.optimizer=apex"])
    assert notices() == [notice("train.optimizer=apex", "train.optimizer=adamw train.adamw_backend=apex")]


# ---- runs written before


def former_run(folder, config):
    """A run directory that took a step, as a version with the former names left it."""
    with RunDirectory.open(folder, config, 1) as run:
        run.metrics.write_text('{"step": 1}\n')
    assert yaml.safe_load(run.config_file.read_text()) == to_dict(config)
    rewrite_with_former_names(folder)
    return run


def test_a_run_with_former_names_continues_and_then_has_the_present_ones(tmp_path, notices):
    config = resolve("digits", overrides=["train.spike_factor=7"])
    run = former_run(tmp_path, config)
    assert "spike: 7.0" in run.config_file.read_text()
    assert run.stored_settings() == to_dict(config) and run.warmup() == config.train.warmup
    assert "changes" not in run.state(config)
    with RunDirectory.open(tmp_path, config, 1) as continued:
        assert continued.changed == {}
    assert yaml.safe_load(run.config_file.read_text()) == to_dict(config)
    assert [entry["changed"] for entry in json.loads(run.environment.read_text())] == [{}, {}]
    assert notices() == []


def test_a_run_with_former_names_reports_what_has_changed_by_the_present_names(tmp_path):
    run = former_run(tmp_path, resolve("digits", overrides=["train.spike_factor=7"]))
    assert "train.spike_factor: 7.0 -> 8.0" in run.state(resolve("digits", overrides=["train.spike_factor=8"]))


def test_a_manifest_with_former_names_is_read_by_the_present_ones(tmp_path):
    config = resolve("digits", overrides=["train.spike_factor=7"])
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    rank = {"file": "rank-00000.safetensors", "size": 1, "sha256": "", "parts": []}
    content = {"step": 4, "updates": 4, "shapes": {}, "ranks": [rank], "config": former_sections(config)}
    (folder / MANIFEST).write_text(seal(content))
    manifest = read_manifest(folder)
    assert manifest["config"] == to_dict(config)
    Origin("run", None, config).check(folder, manifest)


# ---- studies


def test_a_recipe_is_read_by_the_present_names(tmp_path, notices):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    recipe = read_recipe(file)
    assert recipe.settings == {"train.spike_factor": 7, "train.steps": 3, "train.warmup": 0}
    assert notices() == [notice("train.spike", "train.spike_factor")]
    study = plan(tmp_path / "study", recipe)
    assert "spike_factor" in (study.folder / "study.yaml").read_text()
    assert {task.config.train.spike_factor for task in open_study(study.folder).tasks} == {7}


@pytest.mark.parametrize(
    "part",
    [
        {"axes": {"train.spike": [7, 8]}},
        {"variants": {"a": {"settings": {"train.spike": 7}}}},
        {"axes": {"train.spike": [7]}, "variants": {"a": {"without": ["train.spike"]}}},
        {"active_parameters": {"like": {"train.spike": 7}}},
        {"seed_settings": ["train.spike"]},
    ],
    ids=["axis", "variant", "without", "like", "seed"],
)
def test_every_part_of_a_recipe_that_names_options(part, notices):
    recipe = make_recipe(RECIPE | {"settings": {}} | part)
    assert "train.spike_factor" in str(recipe_dict(recipe))
    assert not re.search(r"spike\b", str(recipe_dict(recipe)))
    assert expand(recipe)
    assert notices() == [notice("train.spike", "train.spike_factor")]


@pytest.mark.parametrize(
    "part",
    [
        {"axes": {"train.spike": [7], "train.spike_factor": [8]}},
        {"settings": {"train.spike": 7, "train.spike_factor": 8}},
        {"variants": {"a": {"settings": {"train.spike": 7, "train.spike_factor": 8}}}},
        {"active_parameters": {"like": {"train.spike": 7, "train.spike_factor": 8}}},
    ],
    ids=["axis", "settings", "variant", "like"],
)
def test_both_spellings_in_one_part_of_a_recipe_are_refused(part):
    with pytest.raises(StudyError, match=r"train\.spike\b.*former .* train\.spike_factor"):
        make_recipe(RECIPE | {"settings": {}} | part)


@pytest.mark.parametrize(
    "part", [{"axes": {1: [2]}}, {"variants": {"a": {"without": [["train.lr"]]}}}, {"seed_settings": [["train.seed"]]}]
)
def test_a_name_in_a_recipe_that_is_no_text_is_refused(part):
    with pytest.raises(StudyError, match=r"(axes|variants.a.without|seed_settings): .* must be the name of an option"):
        make_recipe(RECIPE | part)


def test_a_study_with_former_names_is_opened_with_its_folders(tmp_path, notices):
    """Folders of tasks contain the name of an axis, so that of an earlier study stays."""
    study = plan(tmp_path, make_recipe(RECIPE | {"settings": {}, "axes": {"train.spike_factor": [7, 8]}}))
    assert [task.name for task in study.tasks] == ["promoe-spike_factor7-seed0", "promoe-spike_factor8-seed0"]
    for task in study.tasks:  # as a version with the former names wrote it
        former = study.config(task).with_stem(task.name.replace("spike_factor", "spike"))
        former.write_text(yaml.safe_dump(former_sections(task.config), sort_keys=False))
        study.config(task).unlink()
    file = tmp_path / "study.yaml"
    file.write_text(file.read_text().replace("train.spike_factor", "train.spike"))
    opened = open_study(tmp_path)
    assert [task.name for task in opened.tasks] == ["promoe-spike7-seed0", "promoe-spike8-seed0"]
    assert [task.config for task in opened.tasks] == [task.config for task in study.tasks]
    assert [task.point for task in opened.tasks] == [{"train.spike_factor": 7}, {"train.spike_factor": 8}]
    assert notices() == []
    assert plan(tmp_path, study.recipe) == opened, "planned again, it is the same study"


def test_a_study_of_options_takes_former_names(notices):
    assert compare("digits", settings={"train.spike": "7"}).settings == {"train.spike_factor": 7}
    assert notices() == [notice("train.spike", "train.spike_factor")]
    with pytest.raises(StudyError, match=r"train\.spike = '7' .*remove train\.spike"):
        compare("digits", settings={"train.spike": "7", "train.spike_factor": "8"})


# ---- the text of the project


def test_no_file_uses_a_former_spelling():
    """The table and its tests have them, and the changelog lists them."""
    names = [re.escape(name) for name in RENAMED]
    names += [re.escape(name.partition(".")[2]) for name in RENAMED if "_" in name]  # so distinct that they stand alone
    values = [re.escape(f"{name}={value}") for name, values in RENAMED_VALUES.items() for value in values]
    former = re.compile(rf"\b(?:{'|'.join(names + values)})\b")
    places = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    for folder in ("docs", "launchers", "megapromoe", "tests", "tools"):
        places += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".sh", ".py", ".yaml", ".csv")]
    assert len(places) > 300
    places = [path for path in places if path.name not in {*ITS_TESTS, "renamed_options.py"}]
    assert {str(path.relative_to(ROOT)): uses for path in places if (uses := former.findall(path.read_text()))} == {}


def test_no_preset_recipe_or_file_of_the_package_gives_a_notice(notices):
    for preset in PRESETS:
        resolve(preset)
    for name in recipe_names():
        read_recipe(find_recipe(name))
    assert notices() == []


def test_the_changelog_lists_the_table():
    rows = re.findall(r"^  \| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert dict(rows) == RENAMED
