"""Files of prompts: what they may hold, and one sentence for each mistake."""

import json

import pytest

from megapromoe.diffusion.image_grid import SampleError
from megapromoe.sampling.prompts import Prompt, digest, prompt_of, read_geneval, read_prompts


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbftwo  red\tthrees\r\n\n caf\xc3\xa9 \n")
    assert read_prompts(file) == [Prompt("two red threes"), Prompt("caf\u00e9")]


def test_json_lines_may_have_seeds_and_names_and_no_text(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a  three", "seed": 0, "id": 5}, {"prompt": ""}, {"prompt": "x", "id": "b"}]
    file.write_text("\n".join([*map(json.dumps, lines), ""]))
    assert read_prompts(file) == [Prompt("a three", 0, 5), Prompt(""), Prompt("x", None, "b")]
    assert [p.record() for p in read_prompts(file)] == [
        {"prompt": "a three", "seed": 0, "id": 5},
        {"prompt": ""},
        {"prompt": "x", "id": "b"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt; write one on each line"),
        ("p.txt", b"a\n\xff", "is not UTF-8 at byte 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{', 'line 2 is not JSON; write {"prompt": "a red three"}'),
        ("p.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("p.jsonl", b'\n{"caption": "a"}', 'line 2 has the key "caption"; use prompt, seed, id'),
        ("p.jsonl", b'{"id": "a"}', 'line 1 has no "prompt"'),
        ("p.jsonl", b'{"prompt": 3}', 'line 1: "prompt" 3 is not text'),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}', 'line 1: "seed" -1 is not a whole number, 0 or more'),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', 'line 1: "seed" True is not a whole number'),
        ("p.jsonl", b'{"prompt": "a", "id": [1]}', 'line 1: "id" .1. is neither text nor a whole number'),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1: the prompt is not valid Unicode"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SampleError, match=r"no\.txt: cannot be read \(No such file or directory\)"):
        read_prompts(tmp_path / "no.txt")


def test_geneval_keeps_each_line(tmp_path):
    file, line = tmp_path / "evaluation_metadata.jsonl", {"tag": "t", "include": [{"class": "x"}], "prompt": "a  b"}
    file.write_text(json.dumps(line) + "\n")
    (prompt,) = read_geneval(file)
    assert prompt.text == "a b" and json.loads(prompt.metadata) == line
    file.write_text(json.dumps({"prompt": "a", "include": []}))
    with pytest.raises(SampleError, match='line 1 has no "tag"; give GenEval.s evaluation_metadata.jsonl'):
        read_geneval(file)


def test_a_prompt_of_the_command_line_is_text():
    assert prompt_of("  a \n b ") == Prompt("a b") and prompt_of(" ") == Prompt("")
    with pytest.raises(SampleError, match="not valid Unicode"):
        prompt_of("\udcff")


def test_every_part_of_a_prompt_identifies_it():
    kinds = [Prompt("a"), Prompt("b"), Prompt("a", 1), Prompt("a", None, "x"), Prompt("a", None, None, "{}")]
    assert len({digest([kind]) for kind in kinds} | {digest(kinds)}) == 6
