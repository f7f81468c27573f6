"""Text features for tests: an encoder without transformers, small encoders of transformers, captioned images."""

import hashlib
import json
import tarfile
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from megapromoe.data.captions import CaptionedItem
from megapromoe.data.encode_text import TextJob, encode_text

CAPTIONS = [f"{'a very ' * (i % 4)}small picture {i % 7}" for i in range(20)]  # some are equal


class WordEncoder:
    """A feature for each word of a caption, drawn from the word; `batches` has the captions of each call."""

    def __init__(self, width: int = 6, max_tokens: int = 8, sha256: str = "ab" * 32):
        self.width, self.max_tokens = width, max_tokens
        self.identity = {"name": "words", "kind": "WordEncoder", "sha256": sha256, "tokenizer_sha256": "cd" * 32}
        self.batches: list[list[str]] = []

    def feature(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return np.random.default_rng(seed).standard_normal(self.width).astype(np.float32)

    def token_counts(self, captions) -> list[int]:
        return [len(caption.split()) for caption in captions]

    def encode(self, captions):
        self.batches.append(list(captions))
        words = [caption.split() for caption in captions]
        features = [np.stack([self.feature(w) for w in some[: self.max_tokens]]) for some in words]
        return features, [len(some) > self.max_tokens for some in words]


def items(captions=CAPTIONS) -> tuple[CaptionedItem, ...]:
    return tuple(CaptionedItem(f"im{i:03d}.png", 0, caption) for i, caption in enumerate(captions))


def write_text(folder: Path, captions=CAPTIONS, encoder=None, world=1, shard_size=8, **options) -> Path:
    """Writes text features on `world` ranks, which are threads."""
    problems = []

    def rank(number):
        try:
            job = TextJob(items(captions), encoder or WordEncoder(), folder, shard_size=shard_size, **options)
            encode_text(job, number, world)
        except Exception as error:
            problems.append(error)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    if problems:
        raise problems[0]
    return folder


def png(number: int, side: int = 20) -> bytes:
    """The content of an image file."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def write_captioned(folder: Path, form: str) -> Path:
    """Five images, one of them broken, with captions as "jsonl", "txt" or "tar"; returns what --captions is given."""
    folder.mkdir(parents=True)
    contents = {f"im{i}": png(i) if i != 2 else b"no image" for i in range(5)}
    captions = {name: f"picture number {name[2:]}, in  many\ncolours \u00e9" for name in contents}
    if form == "tar":
        return write_tars(folder, contents, captions)
    for name, content in contents.items():
        (folder / f"{name}.PNG").write_bytes(content)
        if form == "txt":
            (folder / f"{name}.txt").write_text(captions[name], encoding="utf-8")
    if form == "txt":
        return folder
    lines = [json.dumps({"image": f"{name}.PNG", "caption": captions[name]}) for name in contents]
    (folder / "all.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder / "all.jsonl"


def write_tars(folder: Path, contents: dict[str, bytes], captions: dict[str, str]) -> Path:
    """Two tars of WebDataset: one with .txt files, one with .json files."""
    names = sorted(contents)
    for number, some in enumerate((names[:3], names[3:])):
        with tarfile.open(folder / f"part-{number}.tar", "w") as file:
            for name in some:
                text = captions[name].encode() if number == 0 else json.dumps({"caption": captions[name]}).encode()
                for ending, content in (("png", contents[name]), ("txt" if number == 0 else "json", text)):
                    entry = tarfile.TarInfo(f"dir/{name}.{ending}")
                    entry.size = len(content)
                    file.addfile(entry, BytesIO(content))
    return folder


def write_text_encoders(folder: Path) -> Path:
    """Folders of small random text encoders with a tokenizer of words, as transformers saves them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *"a red blue three seven above and picture of two very small".split()]  # noqa: SIM905
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    size = len(words)
    few = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=size)
    ends = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1)
    t5 = transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    clip = transformers.CLIPConfig(
        text_config={**few, **ends, "max_position_embeddings": 12},
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=8, patch_size=4),
    )  # fmt: skip
    vision_language = transformers.Qwen2_5_VLConfig(
        text_config={
            **few,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config=dict(depth=1, hidden_size=16, out_hidden_size=16, intermediate_size=16, num_heads=2),
        **{name: 3 for name in ("image_token_id", "video_token_id", "vision_start_token_id")},
    )
    models_by_name = {
        "qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(vision_language),
        "t5": lambda: transformers.T5ForConditionalGeneration(t5),
        "clip": lambda: transformers.CLIPModel(clip),
        "clip_text": lambda: transformers.CLIPTextModel(clip.text_config),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**few, num_key_value_heads=1, max_position_embeddings=64)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**few, max_position_embeddings=10)),
    }
    for name, make in models_by_name.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder
