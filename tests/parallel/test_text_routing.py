"""The routing report of runs of texts: on scenes with regions and tasks, on other captions, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import processes
from support.sampled_runs import stirred_run
from support.text_folders import WordEncoder
from support.text_runs import open_words, text_run

from megapromoe.cli import main
from megapromoe.data.encode import encode
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.data.scenes.encoding import EncodedScenes
from megapromoe.data.scenes.wording import DIGIT_WORDS
from megapromoe.data.sources import open_captions, open_dataset
from megapromoe.evaluation.scene_routing import images_of_tasks
from megapromoe.evaluation.scene_tasks import TASKS
from megapromoe.routing_analysis.captioned_images import images_of_data
from megapromoe.routing_analysis.text_routing import measure_text_routing
from megapromoe.sampling import prompt_features
from megapromoe.sampling.run_model import load_model

SETTINGS = ("model.condition=text", "model.num_classes=1000", "model.in_channels=3", "model.input_size=16")
SETTINGS = (*SETTINGS, "model.patch_size=4", "model.text_width=6", "model.text_tokens=20", "data.source=latents")
SETTINGS = (*SETTINGS, "model.positions=rope", "model.activation=swiglu", "model.num_experts=3")


class LongTexts(WordEncoder):
    """An encoder of words for texts as long as captions of scenes."""

    def __init__(self) -> None:
        super().__init__(max_tokens=20)


def scenes_run(folder: str) -> None:
    """A run directory of a tiny model of scenes, with its data in `data` within it."""
    data, source = Path(folder) / "data", EncodedScenes(24, seed=2)
    encode(source, data)
    encode_text(TextJob(source.items, LongTexts(), data / "text", beside=data))
    stirred_run(folder, *SETTINGS, f"data.path={data}")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    processes.run(1, scenes_run, str(folder))
    return folder


@pytest.fixture
def long_texts(monkeypatch):
    monkeypatch.setattr(prompt_features, "open_text_encoder", lambda name, device="cpu": LongTexts())


def test_groups_are_counted_by_token_at_each_level(scenes, long_texts):
    """Every token has one expert, so the counts at the middle level follow from its map."""
    model, config, _ = load_model(scenes)
    dataset = open_dataset(config)
    images = images_of_data(config, dataset, open_captions(config, dataset), 12)
    tasks = images_of_tasks(None)(config, "cpu", 12)
    assert len(tasks.captions) == 12 and tasks.captions[0] == "a picture of a zero"
    for some in (images, tasks):
        measured = measure_text_routing(model, config, some, (0.2, 0.4, 0.6))
        expert_LNS = measured.routing.expert_LNS
        for layer in range(len(expert_LNS)):
            for groups, counted in zip(some.groups, measured.groups, strict=True):
                for (group, expert), rows in np.ndenumerate(counted.rows_MLGE[1, layer]):
                    assert rows == ((groups.group_NS == group) & (expert_LNS[layer] == expert)).sum()
            for (image, expert), rows in np.ndenumerate(measured.rows_MLNE[1, layer]):
                assert rows == (expert_LNS[layer, image] == expert).sum()
    ink = tasks.groups[1].group_NS
    assert (ink >= 0).any(1).all() and (ink < 0).any() and (ink >= 0).sum() < (tasks.groups[0].group_NS >= 0).sum()


def test_the_report_of_scenes_has_words_digits_colours_and_tasks(scenes, long_texts, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["routing", "--run-dir", str(scenes), "--out", str(out), "--pictures", "--num-images", "24"]) == 0
    assert "digit information, bits" in capsys.readouterr().out
    numbers = json.loads((out / "routing.json").read_text())
    groups = numbers["groups"]
    assert set(groups) == {"digit", "colour", "task", "task of tokens with ink"}
    assert groups["digit"]["names"] == ["background", *DIGIT_WORDS] and groups["task"]["names"] == list(TASKS)
    assert numbers["task_images"] == 24 and groups["task"]["rows"] == [4 * 16 * 3] * 6
    assert sum(groups["digit"]["rows"]) == 24 * 16 * 3 == sum(groups["colour"]["rows"])
    for of_kind in groups.values():
        for load_GE in of_kind["load"]:
            for load_E, rows in zip(load_GE, of_kind["rows"], strict=True):
                assert sum(load_E) == pytest.approx(1 if rows else 0, abs=1e-3)
    assert {"three", "two"} <= {entry["word"] for entry in numbers["words"]}
    assert "class_information_bits" not in numbers and "subsets" not in numbers
    page = (out / "routing.html").read_text()
    assert "<th>block 1, expert 0</th>" in page and "<td>seven</td>" in page and "captioned training images" in page
    names = {"digit", "colour", "task", "task_of_tokens_with_ink", "words", "information", "load", "levels", "maps"}
    assert {path.stem for path in out.glob("*.png")} == {*names, "router", "diversity"}


@pytest.mark.full
def test_tasks_need_the_encoder_of_the_captions_and_can_be_left_out(scenes, monkeypatch, tmp_path, capsys):
    report = ["routing", "--run-dir", str(scenes), "--out", str(tmp_path / "report"), "--num-images", "12"]
    monkeypatch.setattr(prompt_features, "open_text_encoder", open_words)
    assert main([*report, "--text-encoder", "other"]) == 1
    assert "did not encode the captions of the run; give the one that did" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    assert main([*report, "--no-tasks"]) == 0
    assert set(json.loads((tmp_path / "report" / "routing.json").read_text())["groups"]) == {"digit", "colour"}


@pytest.mark.full
def test_other_captions_have_words_alone_and_options_of_classes_are_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    processes.run(1, text_run, str(folder))
    assert main(["routing", "--run-dir", str(folder)]) == 0
    numbers = json.loads((folder / "routing" / "routing.json").read_text())
    assert numbers["groups"] == {} and numbers["words"] == [] and numbers["task_images"] == 0  # all have "some"
    for options in (("--tokens", "50"), ("--subsets", "groups.yaml")):
        assert main(["routing", "--run-dir", str(folder), *options]) == 2
        assert f"{options[0]}: only for models of classes, and {folder} is one of texts" in capsys.readouterr().err
    assert main(["routing", "--run-dir", str(folder), "--no-tasks", "--text-encoder", "x"]) == 2
    assert "the encoder is for the tasks; give one of them" in capsys.readouterr().err


def test_random_captions_and_options_of_texts_are_refused(stirred, tmp_path, capsys):
    assert main(["routing", "--run-dir", str(stirred), "--no-tasks"]) == 2
    assert "--no-tasks: only for models of texts" in capsys.readouterr().err
    processes.run(1, stirred_run, str(tmp_path), *(s for s in SETTINGS if "source" not in s), "data.source=synthetic")
    assert main(["routing", "--run-dir", str(tmp_path)]) == 1
    assert "trained on random text features, which have no words; give a run on captions" in capsys.readouterr().err
