"""The six tasks on pictures of a run on scenes: counts, shares of the ceiling, ranks, repetition, report, refusals."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import processes
from support.sampled_runs import ALONE, as_job, saved_run, stirred_run
from support.text_folders import WordEncoder
from support.text_runs import open_words, text_run

from megapromoe.cli import main
from megapromoe.data.encode import encode
from megapromoe.data.encode_text import TextJob, encode_text
from megapromoe.data.scenes.draws import Draws
from megapromoe.data.scenes.encoding import EncodedScenes
from megapromoe.data.scenes.scenes import DigitImages
from megapromoe.evaluation import scene_scores
from megapromoe.evaluation.image_metrics import Evaluation
from megapromoe.evaluation.names import NUM_TASKS, higher_is_better
from megapromoe.evaluation.reference import EvaluationError
from megapromoe.evaluation.scene_report import COLUMNS, write_scene_report
from megapromoe.evaluation.scene_scores import evaluate_scenes, share_of_ceiling, table
from megapromoe.evaluation.scene_tasks import TASKS, prompts, prompts_in_turn, real_scene
from megapromoe.sampling import prompt_features
from megapromoe.sampling.image_sets import ImageSet
from megapromoe.sampling.request import GenerationRequest

COUNT = 36
SETTINGS = (
    "model.condition=text",
    "model.num_classes=1000",
    "model.in_channels=3",
    "model.positions=rope",
    "model.input_size=16",
)
SETTINGS = (*SETTINGS, "model.patch_size=8", "model.text_width=6", "model.text_tokens=20", "data.source=latents")
CEILING = {task: (8, 10) for task in TASKS}


class LongTexts(WordEncoder):
    """An encoder of words of texts as long as captions of scenes."""

    def __init__(self) -> None:
        super().__init__(max_tokens=20)


def scenes_run(folder: str) -> None:
    """A run directory of a tiny model of scenes, with its data in `data` within it."""
    data, source = Path(folder) / "data", EncodedScenes(16)
    encode(source, data)
    encode_text(TextJob(source.items, LongTexts(), data / "text", beside=data))
    stirred_run(folder, *SETTINGS, f"data.path={data}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    processes.run(1, scenes_run, str(folder))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(prompt_features, "open_text_encoder", lambda name, device="cpu", max_tokens=None: LongTexts())
    monkeypatch.setattr(scene_scores, "ceiling", lambda held_out: CEILING)


def request_of(folder: Path, out: Path, num: int = COUNT, **options) -> GenerationRequest:
    return GenerationRequest(folder, out, num, overrides=("sample.batch=12",), **options)


def evaluated(request: GenerationRequest, launch=ALONE, **options) -> list[dict]:
    return evaluate_scenes(Evaluation(request, None, "scenes"), launch, **options)


def evaluated_by_words(request, launch) -> list[dict]:
    """`evaluated` on a rank of a job, with what `quick` sets."""
    prompt_features.open_text_encoder = lambda name, device="cpu", max_tokens=None: LongTexts()
    scene_scores.ceiling = lambda held_out: CEILING
    return evaluated(request, launch)


def real_pictures(out: Path, held_out: bool = True, black: tuple[str, ...] = ()) -> Path:
    """A set in which every picture is a real scene of its prompt, but black for some tasks."""
    digits = DigitImages("test")
    shown = prompts_in_turn(COUNT, held_out)
    pictures = np.stack([real_scene(p.stated, digits, Draws(0, "test", i)) for i, p in enumerate(shown)])
    pictures[[p.task in black for p in shown]] = 0
    np.savez(out, arr_0=pictures)
    return out


def test_prompts_are_in_turn_over_tasks_and_over_their_prompts():
    assert len(TASKS) == NUM_TASKS
    shown, some = prompts_in_turn(56 * NUM_TASKS), prompts_in_turn(100)
    assert shown[:100] == some and Counter(p.task for p in shown) == dict.fromkeys(TASKS, 56)
    for task in TASKS:
        times = Counter(p.text for p in shown if p.task == task)
        assert len(times) == sum(p.task == task for p in prompts()) and max(times.values()) - min(times.values()) <= 1
    assert not set(prompts_in_turn(36)[1::6]) & set(prompts_in_turn(36, held_out=False)[1::6])
    digits = {p.stated.groups[0].digit for p in shown[4 : 24 * NUM_TASKS : NUM_TASKS]}
    assert len(digits) > 6, "a few prompts of a task are not those of its first digits"


def test_scores_are_shares_of_right_pictures_and_of_the_ceiling(folder, tmp_path, monkeypatch):
    place = real_pictures(tmp_path / "real.npz", black=("counting",))
    metadata = {"step": 3, "guidance": 3.0, "weights": "ema", "sample": {"method": "euler", "steps": 2}}
    sets = [(ImageSet(place), metadata | {"images": str(place)})]
    monkeypatch.setattr(scene_scores, "generate_sets_of_steps", lambda *arguments: sets)
    (record,) = evaluated(request_of(folder, tmp_path / "out"))
    figures = record["figures"]
    assert record["right"]["single object"] == (6, 6) and record["right"]["counting"] == (0, 6)
    assert figures["right pictures, single object"] == 1.0 and figures["right pictures, counting"] == 0.0
    shares = [figures[f"right pictures, {task}"] for task in TASKS]
    assert list(figures)[0] == "right pictures, overall" and all(map(higher_is_better, figures))
    assert figures["right pictures, overall"] == pytest.approx(sum(shares) / 6) and 0.7 < sum(shares) / 6 < 0.84
    assert share_of_ceiling(record, "single object") == pytest.approx(1.25)
    text = table([record])
    assert "36 pictures of step 3 (ema weights; euler, 2 steps, guidance 3), prompts of held-out combinations" in text
    assert "| single object | 6 | 6 | 100.0 | 0.0 | 80.0 | 125.0 |" in text
    assert "| counting | 6 | 0 | 0.0 | 0.0 | 80.0 | 0.0 |" in text

    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "denoising_loss": 0.5, "images_per_second": 9.0}}\n' for step in (1, 2, 3))
    )
    report = write_scene_report(folder, record, {"encoding": 1.0})
    page = (folder / "report.md").read_text()
    assert text in page and "| time of encoding | 1 s |" in page and report["scores"]["count"] == COUNT
    assert json.loads((folder / "report.json").read_text())["scores"]["figures"] == figures
    assert (folder / "samples.png").is_file() and COLUMNS * len(TASKS) == COUNT


def test_two_ranks_score_the_same_pictures_and_a_repetition_draws_none(folder, tmp_path, caplog):
    request = request_of(folder, tmp_path / "out")
    two, also = as_job(2, tmp_path, evaluated_by_words, request)
    assert isinstance(two, list), two
    with caplog.at_level("INFO", "megapromoe"):
        single = evaluated(request)
    assert "is complete already, 36 images" in caplog.text
    for records in (two, also):
        assert [record | {"time": ""} for record in records] == [record | {"time": ""} for record in single]
    (record,) = single
    assert record["count"] == COUNT and sum(total for _, total in record["right"].values()) == COUNT
    assert record["asked"] == {"reference": "scenes", "split": "train", "features": None}
    assert (record["classes"], record["only"], record["autoencoder"]) == ("balanced", None, None)
    with np.load(record["images"]) as stored:
        assert stored["prompts"].tolist() == [p.text for p in prompts_in_turn(COUNT)]
    (in_training,) = evaluated(request, held_out=False)
    assert in_training["prompts"] == "seen" and in_training["images"] != record["images"]


def test_the_command_prints_a_table_or_json_and_keeps_the_scores(folder, tmp_path, capsys):
    words = ["evaluate", "--run-dir", str(folder), "--num-images", "12", "--steps", "2", "--guidance", "1", "3"]
    words += ["--samples", str(tmp_path / "sets")]
    assert main(words) == 0
    assert capsys.readouterr().out.count("| overall | | | ") == 2
    assert main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stored = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["guidance"] for line in lines] == [1.0, 3.0] == [line["guidance"] for line in stored]
    assert lines[0]["figures"] == stored[0]["figures"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-images", "5"], "--num-images 5: is too few for 6 tasks; give more"),
        (["--num-images", "12", "--class", "1"], "--class: is for models of classes"),
        (["--num-images", "12", "--reference", "photos"], "--reference photos: is for models of classes"),
        (["--num-images", "12", "--features", "digits"], "--features: is for models of classes"),
    ],
)
def test_what_the_tasks_cannot_use_is_refused(folder, capsys, words, message):
    assert main(["evaluate", "--run-dir", str(folder), *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_other_runs_are_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "texts").mkdir()
    processes.run(1, text_run, str(tmp_path / "texts"))
    monkeypatch.setattr(prompt_features, "open_text_encoder", open_words)
    with pytest.raises(EvaluationError, match="was not trained on scenes, and this command scores texts on scenes"):
        evaluated(request_of(tmp_path / "texts", tmp_path / "out"))
    (tmp_path / "classes").mkdir()
    processes.run(1, saved_run, str(tmp_path / "classes"))
    for words in (["--seen"], ["--reference", "scenes"]):
        assert main(["evaluate", "--run-dir", str(tmp_path / "classes"), "--num-images", "12", *words]) == 2
        assert f"{' '.join(words)}: is for runs on scenes, models of texts" in capsys.readouterr().err
