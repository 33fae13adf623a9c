"""Data against the original's numbers, and what a user meets first when something is wrong with it."""

from __future__ import annotations

import base64
import json
import os
import re

import pytest
import torch
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES, ROOT
from PIL import Image
from transformers import AutoTokenizer

from finetune.checks import find_problems, report_problems
from finetune.dataset import SupervisedDataset, build_transform, data_collator, load_samples, truncate
from finetune.minicpmv.conversation import encode
from finetune.minicpmv.image_slicing import fit_size, normalised_pixels, plan_slices
from finetune.pictures import load_image


@pytest.fixture(scope="module", params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(llm_type):
    return AutoTokenizer.from_pretrained(GOLDEN[llm_type])


@pytest.fixture(scope="module")
def golden(llm_type) -> dict:
    return json.loads((GOLDEN_DATA / f"expected_{GOLDEN[llm_type].name}.json").read_text())


def make_dataset(samples, tokenizer, llm_type, slices=9, query_nums=12, **kwargs) -> SupervisedDataset:
    config = {"max_slice_nums": slices, "scale_resolution": 448, "patch_size": 14}
    return SupervisedDataset(
        samples,
        build_transform(),
        tokenizer,
        config,
        llm_type=llm_type,
        query_nums=query_nums,
        batch_vision=llm_type == "llama3",
        image_folder=GOLDEN_DATA,
        **kwargs,
    )


def sample(*turns: str, **fields) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {
        "id": "x",
        **fields,
        "conversations": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)],
    }


def test_golden_samples(llm_type, tokenizer, golden):
    samples = load_samples(GOLDEN_DATA / "samples.json")
    settings = [key for key in golden if key.startswith("max_slice_nums")]
    assert len(settings) == (3 if llm_type == "llama3" else 1)
    for setting in settings:
        dataset = make_dataset(samples, tokenizer, llm_type, int(setting.split("=")[1]), golden["query_num"])
        assert len(dataset) == len(golden[setting]) == 6
        for item, expected in zip((dataset[n] for n in range(6)), golden[setting], strict=True):
            for name in {"input_ids", "labels", "position_ids", "image_bound", "tgt_sizes"} & set(expected):
                assert item[name].tolist() == expected[name], (setting, item["id"], name)
            for pixels, wanted in zip(item["pixel_values"], expected["pixel_values"], strict=True):
                assert list(pixels.shape) == wanted["shape"]
                assert pixels.dtype == torch.float32
                torch.testing.assert_close(
                    pixels.flatten()[::9973], torch.tensor(wanted["every_9973rd"]), atol=1e-4, rtol=0
                )
                assert abs(pixels.mean().item() - wanted["mean"]) < 1e-4
                assert abs(pixels.std().item() - wanted["std"]) < 1e-4


def test_slicing_geometry():
    cases = json.loads((GOLDEN_DATA / "slicing.json").read_text())
    assert len(cases) == 1140
    for width, height, most, overview, grid, cells in cases:
        planned = plan_slices((width, height), most)
        assert planned[0] == tuple(overview)
        assert planned[1] == (tuple(grid) if grid else None)
        assert planned[2] == (tuple(cells[0]) if cells else None)


def test_slicing_docstring_examples():
    assert fit_size((1000, 500), 448, 14, True) == (630, 322)
    assert plan_slices((1000, 500), 9) == ((630, 322), (2, 1), (448, 448))


def test_own_pixels_equal_torchvision():
    image = Image.open(GOLDEN_DATA / "images" / "a.png").convert("RGB")
    torch.testing.assert_close(normalised_pixels(image), build_transform()(image), atol=1e-6, rtol=0)


def supervised_text(item: dict, tokenizer) -> str:
    return tokenizer.decode(item["labels"][item["labels"] != -100])


def test_exactly_the_answers_are_supervised(llm_type, tokenizer):
    item = make_dataset([sample("one?", "First answer.", "two?", "Second.")], tokenizer, llm_type)[0]
    end = "<|eot_id|>" if llm_type == "llama3" else "</s>"
    text = supervised_text(item, tokenizer).replace(" ", "")
    assert text == f"Firstanswer.{end}Second.{end}"
    # what is asked at t stands in the input at t + 1, but for 2.0's </s> after an answer that is not the last
    asked = torch.nonzero(item["labels"][:-1] != -100).flatten()
    differs = [t for t in asked.tolist() if item["input_ids"][t + 1] != item["labels"][t]]
    assert len(differs) == (0 if llm_type == "llama3" else 1)
    assert all(item["labels"][t] == tokenizer.eos_token_id for t in differs)


@pytest.mark.parametrize(
    "answer", ["", "!", " x", "\n\nx", "<AI>", "用户 <用户> x", "12345 😀", "'s", "tab\tand\u3000wide", "a" * 300]
)
def test_training_ids_are_those_of_chat(llm_type, tokenizer, answer):
    """What chat() feeds for the last question, followed by the answer, is the training sample."""
    messages = sample("first?", "reply", "again?", answer)["conversations"]
    arguments = (tokenizer, llm_type, 12, None)
    prompt = encode(messages[:3], [], *arguments, as_strips=False, generation_prompt=True)["input_ids"]
    whole = encode(messages, [], *arguments, as_strips=False)
    assert whole["input_ids"][: len(prompt)].tolist() == prompt.tolist()
    first = torch.nonzero(whole["labels"] != -100).flatten()
    assert (first >= len(prompt) - 1).sum() == len(whole["labels"][len(prompt) - 1 :]) - 1
    if llm_type == "llama3":
        template = json.loads((GOLDEN[llm_type] / "tokenizer_config.json").read_text())["chat_template"]
        rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ids[: len(whole["input_ids"])] == whole["input_ids"].tolist()
        header = tokenizer("<|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)["input_ids"]
        assert ids[len(whole["input_ids"]) :] == header  # the hub's template always adds it


def test_minicpm_tokenizer_keeps_role_words_and_bytes():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN["minicpm"])
    ids = tokenizer("<用户>hi<AI>there", add_special_tokens=False)["input_ids"]
    assert {tokenizer.convert_tokens_to_ids(word) for word in ("<用户>", "<AI>")} <= set(ids)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    text = "snow ☃ and 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_tokenizers_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<image><unk></image><slice>\n</slice> 好的 <用户>a<AI> b"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert type(again) is type(tokenizer)


def test_raw_llama3_tokenizer_model(tmp_path):
    """A 2.5 folder with Llama 3's own `tokenizer.model` (tiktoken: base64 token and rank a line), no tokenizer.json."""
    words = [bytes([n]) for n in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor"]
    lines = [f"{base64.b64encode(word).decode()} {rank}" for rank, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    config = json.loads((GOLDEN["llama3"] / "tokenizer_config.json").read_text())
    special = [entry for _, entry in sorted(config["added_tokens_decoder"].items(), key=lambda e: int(e[0]))]
    config["added_tokens_decoder"] = {str(len(words) + n): entry for n, entry in enumerate(special)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text((GOLDEN["llama3"] / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("<|start_header_id|>hello wor<image>", add_special_tokens=False)["input_ids"]
    assert ids == [len(words) + 3, words.index(b"hello"), words.index(b" wor"), tokenizer.im_start_id]
    assert tokenizer.eot_id == len(words) + 5
    assert tokenizer.decode(ids[1:3]) == "hello wor"


def test_picture_marks(llm_type, tokenizer):
    pictures = {"a": "images/a.png", "b": "images/b.png"}

    def item(*turns, image):
        return make_dataset([sample(*turns, image=image)], tokenizer, llm_type, slices=1)[0]

    in_front = item("What?", "x", image=pictures["a"])
    marked = item("<image>\nWhat?", "x", image=pictures["a"])
    assert in_front["input_ids"].tolist() == marked["input_ids"].tolist()
    assert item("<image>\nWhat?", "x", image=[pictures["a"]])["input_ids"].tolist() == marked["input_ids"].tolist()
    two = item("<image> and", "x", "<image>?", "y", image=[pictures["a"], pictures["b"]])
    named = item(
        "<image_00> and", "x", "<image_01>?", "y", image={"<image_01>": pictures["b"], "<image_00>": pictures["a"]}
    )
    assert two["input_ids"].tolist() == named["input_ids"].tolist()
    assert all(torch.equal(a, b) for a, b in zip(two["pixel_values"], named["pixel_values"], strict=True))
    assert len(two["image_bound"]) == 2
    for wrong, image in ((("no <image>", "x"), None), (("<image> <image>", "x"), pictures["a"])):
        with pytest.raises(ValueError, match=r"id 'x'.*picture mark"):
            item(*wrong, image=image)


def test_collator(llm_type, tokenizer, golden):
    dataset = make_dataset(
        load_samples(GOLDEN_DATA / "samples.json"), tokenizer, llm_type, query_nums=golden["query_num"]
    )
    items = [dataset[1], dataset[2]]
    batch = data_collator(items, padding_value=0, max_length=2048)
    lengths = [len(item["input_ids"]) for item in items]
    for row, length in enumerate(lengths):
        assert batch["input_ids"][row, :length].tolist() == items[row]["input_ids"].tolist()
        assert batch["attention_mask"][row].tolist() == [n < length for n in range(max(lengths))]
        assert batch["labels"][row, length:].unique().tolist() in ([], [-100])
        assert batch["input_ids"][row, length:].unique().tolist() in ([], [0])
    index = batch["label_index"]
    assert index.tolist() == torch.nonzero(batch["labels"].flatten() != -100).flatten().tolist()
    assert [len(p) for p in batch["pixel_values"]] == [1, 3]


def test_truncation(llm_type, tokenizer, golden):
    dataset = make_dataset(
        load_samples(GOLDEN_DATA / "samples.json"), tokenizer, llm_type, query_nums=golden["query_num"]
    )
    refused = 0
    for number in range(6):
        item = dataset[number]
        length = len(item["input_ids"])
        for limit in range(1, length + 2):
            try:
                cut = truncate(item, limit)
            except ValueError as error:
                refused += 1
                assert f"id '{number}'" in str(error) and f"{length} tokens" in str(error)
                assert "--model_max_length" in str(error)
                assert (item["labels"][:limit] == -100).all()
                continue
            size = len(cut["input_ids"])
            assert size <= limit and (cut["labels"] != -100).any()
            assert cut["input_ids"].tolist() == item["input_ids"][:size].tolist()
            assert len(cut["image_bound"]) == len(cut["pixel_values"]) == len(cut["tgt_sizes"])
            assert (cut["image_bound"] <= size).all()
            ids = cut["input_ids"]
            for start, end in (
                (tokenizer.im_start_id, tokenizer.im_end_id),
                (tokenizer.slice_start_id, tokenizer.slice_end_id),
            ):
                assert (ids == start).sum() == (ids == end).sum()
            assert (ids == tokenizer.im_start_id).sum() == len(cut["pixel_values"])
    assert refused > 0


def test_truncation_before_a_second_picture(llm_type, tokenizer):
    turns = ("<image>\nfirst?", "A short answer.", "<image>\nsecond?", "Another.")
    item = make_dataset([sample(*turns, image=["images/a.png", "images/d.png"])], tokenizer, llm_type)[0]
    second = int(item["image_bound"][1, 0])
    cut = truncate(item, second + 3)
    assert len(cut["pixel_values"]) == 1
    assert data_collator([item], max_length=second + 3)["input_ids"].shape[1] == len(cut["input_ids"]) <= second
    asked = torch.nonzero(item["labels"][: second + 3] != -100)
    assert len(cut["input_ids"]) == int(asked[-1]) + 1


def test_picture_errors_name_sample_file_and_cause(llm_type, tokenizer, tmp_path):
    (tmp_path / "text.png").write_text("this is no picture")
    whole = (GOLDEN_DATA / "images" / "c.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(whole[: len(whole) // 3])
    for name, cause in (("none.png", "does not exist"), ("text.png", "is not a picture"), ("short.jpg", "cut off")):
        path = str(tmp_path / name)
        dataset = make_dataset([sample("q", "a"), sample("q", "a", image=path, id="seven")], tokenizer, llm_type)
        with pytest.raises(ValueError, match=cause) as caught:
            dataset[1]
        assert "sample 1 (id 'seven')" in str(caught.value) and path in str(caught.value)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[274] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(str(tmp_path / "turned.jpg")).size == (20, 40)


def test_size_from_the_header_is_upright(llm_type, tokenizer, tmp_path):
    """A tall photo stored lying: the start-up check must count the slices that training will make."""
    image = Image.new("RGB", (1600, 500), "red")
    exif = image.getexif()
    exif[274] = 8
    image.save(tmp_path / "turned.jpg", exif=exif)
    samples = [sample("q", "a", image=str(tmp_path / "turned.jpg"))]
    item = make_dataset(samples, tokenizer, llm_type)[0]
    dataset = make_dataset(samples, tokenizer, llm_type, max_length=5)
    assert f"has {len(item['input_ids'])} tokens" in str(find_problems(dataset)[0])
    assert item["tgt_sizes"][1, 0] > item["tgt_sizes"][1, 1]


def test_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "data" / "a.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    assert load_image("a.png", tmp_path / "data").size == (10, 10)
    assert load_image("b.png", tmp_path / "data").size == (20, 10)  # as the original: from the working directory
    with pytest.raises(ValueError, match=f"data{os.sep}c.png does not exist"):
        load_image("c.png", tmp_path / "data")


def test_all_problems_are_reported_together(llm_type, tokenizer, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    samples = [
        sample("q", "a", image="good.png"),
        {"id": "no-turns"},
        sample("q", "a", image="gone.png"),
        sample("q", "a", image="text.png"),
        sample("q"),
        {"id": "roles", "conversations": [{"role": "assistant", "content": "a"}]},
        {"id": "field", "conversations": [{"role": "user"}]},
        sample("<image> q", "a"),
        sample("q", "see <image>", image="good.png"),
        "no object",
        sample("q", "a", image=3),
        sample("q", "a", image=[["good.png"]]),
        sample("q", "a", image=["good.png", ""]),
        {**sample("q", "a"), "images": ["good.png"]},
    ]
    dataset = SupervisedDataset(samples, build_transform(), tokenizer, None, llm_type, image_folder=tmp_path)
    problems = [str(problem) for problem in find_problems(dataset)]
    causes = [
        "'conversations' is missing",
        "does not exist",
        "is not a picture",
        "last turn is the user's",
        "has role 'assistant', expected 'user'",
        "field 'content' is missing",
        "picture mark",
        "contains '<image>'",
        "expected an object",
        "'image' is neither",
        "'image' is neither",
        "'image' has an empty path",
        "'images' is not read",
    ]
    assert len(problems) == len(causes)
    for number, (problem, cause) in enumerate(zip(problems, causes, strict=True), start=1):
        assert problem.startswith(f"sample {number} (id ") and cause in problem
    assert report_problems(["x"] * 25).endswith("... and 5 more")


def test_lost_answers_are_found_before_training(llm_type, tokenizer, golden):
    """The start-up check, which decodes nothing, names exactly the samples that would fail later."""
    samples = load_samples(GOLDEN_DATA / "samples.json")
    dataset = make_dataset(samples, tokenizer, llm_type, query_nums=golden["query_num"])
    items = [dataset[number] for number in range(6)]
    for limit in range(1, 220, 3):
        dataset.max_length = limit
        problems = [str(problem) for problem in find_problems(dataset)]
        failures = []
        for number in range(6):
            try:
                truncate(items[number], limit)
            except ValueError as error:
                failures.append(str(error))
        assert problems == failures, limit


def test_advice_for_a_sample_that_is_too_long(llm_type, tokenizer):
    """Only what can help: no length beyond the model's, and fewer slices only of pictures that there are."""
    data = [sample("word " * 300, "a")]
    dataset = SupervisedDataset(data, None, tokenizer, None, llm_type, max_length=50, max_positions=8192)
    tokens = dataset.measure(0).tokens
    assert str(find_problems(dataset)[0]).endswith(f"model_max_length 50: raise --model_max_length to {tokens}")
    dataset.max_positions = 100
    assert str(find_problems(dataset)[0]).endswith("since the model takes 100 tokens at most")


def test_a_tokenizer_of_the_other_model_is_refused(llm_type):
    other = {"llama3": "minicpm", "minicpm": "llama3"}[llm_type]
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[other])
    with pytest.raises(ValueError, match=r"tokenizer of MiniCPM-(Llama3-V 2\.5|V 2\.0)"):
        SupervisedDataset([sample("q", "a")], None, tokenizer, None, llm_type)[0]


def test_system_turn():
    turns = [{"role": "system", "content": "Be brief."}, *sample("q", "a")["conversations"]]
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN["llama3"])
    item = make_dataset([{"id": "s", "conversations": turns}], tokenizer, "llama3")[0]
    assert "Be brief." in tokenizer.decode(item["input_ids"])
    assert "brief" not in supervised_text(item, tokenizer)
    with pytest.raises(ValueError, match=r"MiniCPM-V 2\.0 has no words for"):
        make_dataset(
            [{"id": "s", "conversations": turns}], AutoTokenizer.from_pretrained(GOLDEN["minicpm"]), "minicpm"
        )[0]


def test_every_sample_of_the_readme_trains(tmp_path):
    """The data section shows valid JSON, and each sample in it is one that 2.5 takes."""
    section = (ROOT / "README.md").read_text().partition("## Your data")[2].partition("\n## ")[0]
    blocks = re.findall(r"```json\n(.*?)```", section, re.S)
    assert len(blocks) == 2 and "```\n[" not in section
    (tmp_path / "images").mkdir()
    for name in ("desserts", "a", "b"):
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{name}.jpg")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN["llama3"])
    pictures = []
    for block in blocks:
        samples = json.loads(block)
        dataset = SupervisedDataset(
            samples, build_transform(), tokenizer, None, "llama3", query_nums=12, image_folder=tmp_path
        )
        assert find_problems(dataset) == []
        pictures += [len(dataset[n]["pixel_values"]) for n in range(len(samples))]
        answers = supervised_text(dataset[len(samples) - 1], tokenizer)
    assert pictures == [1, 2, 2, 0, 1]
    assert answers == "Cake.<|eot_id|>"
