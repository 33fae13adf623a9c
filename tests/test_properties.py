"""What holds for any conversation and any pictures: ids are chat()'s, labels are the answers, cuts are clean."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, LLM_TYPES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from finetune.checks import token_lengths
from finetune.dataset import SampleError, SupervisedDataset, truncate
from finetune.minicpmv.conversation import control_words, encode, encode_text, text_turns
from finetune.sample_check import is_blank

# Small slices, so that pictures of a few hundred pixels are cut into many.
SLICING = {"max_slice_nums": 9, "scale_resolution": 56, "patch_size": 14}
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 60)}


class Pictures(dict):
    """Paths of one-coloured pictures, made when asked for by (width, height, colour)."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, key):
        width, height, colour = key
        path = self.folder / f"{width}x{height}{colour}.png"
        Image.new("RGB", (width, height), COLOURS[colour]).save(path)
        self[key] = str(path)
        return self[key]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    return Pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=LLM_TYPES)
def model(request):
    model = AutoModel.from_pretrained(GOLDEN[request.param])
    model.config.slice_config = dict(SLICING)
    model.tokenizer = AutoTokenizer.from_pretrained(GOLDEN[request.param])
    return model


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not any(word in text for word in ("<", ">"))
) | st.sampled_from(
    ["", " ", "\n\n", "  two  ", "<AI>", "<用户> x", "</s><|eot_id|>", "Was ist das?", "图中有什么？", "😀" * 3]
)
ANSWER = TEXT.filter(lambda text: not is_blank(text))
SIZE = st.tuples(st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(COLOURS)))


@st.composite
def conversations(draw):
    """(turns, pictures, shape): shape says how a sample names its pictures."""
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(ANSWER)}]
    images = draw(st.lists(SIZE, max_size=3))
    shape = draw(st.sampled_from(["list", "named", "in front"]))
    for number in range(len(images)) if shape != "in front" else ():
        turn = draw(st.sampled_from(turns[::2]))
        mark = "<image>" if shape == "list" else f"<image_{number:02}>"
        cut = draw(st.integers(0, len(turn["content"])))
        # Marks keep their order: the next one goes behind all earlier ones of its turn.
        cut = max(cut, turn["content"].rfind(">") + 1)
        turn["content"] = turn["content"][:cut] + mark + turn["content"][cut:]
    return turns, images, shape


def make_dataset(model, turns, images, shape, pictures, **kwargs) -> SupervisedDataset:
    paths = [pictures[image] for image in images]
    image = {f"<image_{n:02}>": path for n, path in enumerate(paths)} if shape == "named" else paths
    dataset = SupervisedDataset.for_checkpoint(
        model.config, model.tokenizer, [{"id": "s", "image": image, "conversations": turns}], **kwargs
    )
    return dataset


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_sample_is_what_chat_feeds(model, pictures, data):
    turns, images, shape = data.draw(conversations())
    tokenizer, query_num = model.tokenizer, model.config.query_num
    dataset = make_dataset(model, turns, images, shape, pictures)
    item = dataset[0]
    ids, labels = item["input_ids"], item["labels"]

    # The prompt that chat() builds for each question is a prefix of the training sample.
    fed = []
    model.generate = lambda inputs, **_: fed.append(inputs) or torch.zeros(1, 1, dtype=torch.long)
    opened = [Image.open(pictures[image]) for image in images]
    marks = [sum(turn["content"].count("<image") for turn in turns[: n + 1]) for n in range(len(turns))]
    for number in range(0, len(turns), 2):
        taken = len(opened) if shape == "in front" else marks[number]
        if shape == "named":
            order = [c.split(">")[0] for t in turns[: number + 1] for c in t["content"].split("<image_")[1:]]
            shown = {f"<image_{n}>": opened[int(n)] for n in order}
        else:
            shown = opened[:taken]
        model.chat(shown, turns[: number + 1], tokenizer, max_inp_length=10**6)
        prompt = fed[-1]["input_ids"][0]
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        assert torch.equal(fed[-1]["image_bound"][0], item["image_bound"][: len(fed[-1]["image_bound"][0])])

    # Every placeholder is query_num tokens between its marks.
    starts = torch.nonzero(ids == tokenizer.im_start_id).flatten() + 1
    ends = torch.nonzero(ids == tokenizer.im_end_id).flatten()
    assert (ends - starts == query_num).all()
    assert torch.equal(item["image_bound"], torch.stack([starts, ends], dim=1))
    assert (ids[: len(ids)] == tokenizer.unk_id).sum() == query_num * len(item["pixel_values"])
    assert len(item["tgt_sizes"]) == len(item["pixel_values"]) == len(starts)

    # Labels are the answers, each with one end token.
    end = tokenizer.eot_id if model.config.llm_type == "llama3" else tokenizer.eos_token_id
    asked = labels[labels != -100].tolist()
    assert asked.count(end) == len(turns) // 2
    answers, answer = [], []
    for token in asked:
        if token == end:
            answers.append(tokenizer.decode(answer))
            answer = []
        else:
            answer.append(token)
    wanted = [turn["content"] for turn in turns[1::2]]
    if model.config.llm_type == "llama3":
        assert answers == [text.strip() for text in wanted]
    else:  # sentencepiece normalises blanks and widths
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wanted]
        plain = ["".join(tokenizer.decode(ids).split()) for ids in pieces]
        assert ["".join(text.split()) for text in answers] == plain

    # Lengths without decoding are those of the item.
    measure = dataset.measure(0)
    assert measure.tokens == len(ids) == token_lengths(dataset)[0]
    assert measure.supervised == len(asked)
    assert measure.picture_tokens == query_num * len(item["pixel_values"]) and len(measure.slices) == len(images)


CONTROL = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<s>", "</s>"),
    *("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<用户>", "<AI>", "<|eot_id|><|start_header_id|>system"),
]
OTHERS = ["<box>", "</box>", "<ref>", "<", ">", "|", "AI>", " ", "\n\n", "user", "x!", "é😀", "\ue000"]
PIECES = st.sampled_from([*CONTROL, *OTHERS])


@given(texts=st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join), min_size=2, max_size=6))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_stands_in_the_texts_makes_no_turn(model, texts):
    """As many turns as were given, labels that are the answers, and the prompts of chat() at their beginnings."""
    tokenizer, kind = model.tokenizer, model.config.llm_type
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts[: len(texts) // 2 * 2])
    ]
    for turn in turns[::2]:
        turn["content"] = [turn["content"]]  # in which nothing is the mark of a picture
    turns[0]["content"].insert(0, Image.new("RGB", (30, 20)))

    def encoded(count: int, **prompt) -> tuple[list[int], torch.Tensor]:
        item = encode(turns[:count], [], tokenizer, kind, 3, None, as_strips=False, **prompt)
        return item["input_ids"].tolist(), item["labels"]

    ids, labels = encoded(len(turns))
    if kind == "llama3":
        wanted = dict.fromkeys(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), len(turns))
        wanted |= {"<|begin_of_text|>": 1, "<|end_of_text|>": 0}
    else:
        wanted = {"<s>": 1, "</s>": 1, "<用户>": len(turns) // 2, "<AI>": len(turns) // 2}
    wanted |= {"<image>": 1, "</image>": 1, "<unk>": 3, "<slice>": 0, "</slice>": 0}
    assert {word: ids.count(tokenizer.convert_tokens_to_ids(word)) for word in wanted} == wanted
    end = tokenizer.eot_id if kind == "llama3" else tokenizer.eos_token_id
    answers: list[list[int]] = [[]]
    for token in labels[labels != -100].tolist():
        answers = [*answers, []] if token == end else [*answers[:-1], [*answers[-1], token]]
    said = [tokenizer.decode(answer, clean_up_tokenization_spaces=False).strip() for answer in answers]
    assert said == [*(turn["content"].strip() for turn in turns[1::2]), ""]
    for count in range(1, len(turns), 2):
        prompt, _ = encoded(count, generation_prompt=True)
        assert prompt == ids[: len(prompt)]


@given(text=st.text(max_size=20) | st.lists(st.sampled_from(OTHERS), max_size=9).map("".join))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_texts_without_control_tokens_have_the_ids_of_the_tokenizer(model, text):
    """Also where another text of the conversation has some, which takes a longer way."""
    tokenizer, kind = model.tokenizer, model.config.llm_type
    assume(not control_words([text], tokenizer, kind))
    [turn] = text_turns([{"role": "user", "content": [text]}], [], None)  # in a list nothing is the mark of a picture
    [other] = text_turns([{"role": "assistant", "content": f"a {CONTROL[3]} {CONTROL[13]} b"}], [], None)
    alone, _ = encode_text([turn], tokenizer, kind, 3)
    beside, _ = encode_text([turn, other], tokenizer, kind, 3)
    assert beside[: len(alone)].tolist() == alone.tolist()
    whole = text.strip() + "<|eot_id|>" if kind == "llama3" else f"<用户>{text}"
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert alone[-len(expected) :].tolist() == expected


@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_a_copy_of_the_model_does_not_call_special(tmp_path, special):
    """Turns of 2.5 are made by nobody else for all that; a user's own tokens stay tokens."""
    described = json.loads((GOLDEN["llama3"] / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = special
    for file in GOLDEN["llama3"].glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "added_tokens_decoder": {}}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["[LATEX]"])
    text = "hi<|eot_id|><|start_header_id|>x [LATEX] y"
    for asked in (text, "[LATEX]"):
        ids, _ = encode_text(text_turns([{"role": "user", "content": asked}], [], None), tokenizer, "llama3", 3)
        count = {word: ids.tolist().count(tokenizer.convert_tokens_to_ids(word)) for word in ("<|eot_id|>", "[LATEX]")}
        assert count == {"<|eot_id|>": 1, "[LATEX]": 1}
    assert set(control_words([text], tokenizer, "llama3")) == {"<|eot_id|>", "<|start_header_id|>"}


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_truncation_keeps_a_sample_whole(model, pictures, data):
    turns, images, shape = data.draw(conversations())
    item = make_dataset(model, turns, images, shape, pictures)[0]
    length = len(item["input_ids"])
    limit = data.draw(st.integers(1, length))
    dataset = make_dataset(model, turns, images, shape, pictures, max_length=limit)
    try:
        cut = truncate(item, limit)
    except SampleError:
        assert (item["labels"][:limit] == -100).all()
        with pytest.raises(ValueError, match="would lose its whole answer"):
            dataset.check(0)
        return
    dataset.check(0)
    size = len(cut["input_ids"])
    assert size <= limit and (cut["labels"] != -100).any()
    for name in ("input_ids", "labels", "position_ids", "attention_mask"):
        assert torch.equal(cut[name], item[name][:size])
    assert size == length or cut["labels"][-1] != -100
    kept = int((item["image_bound"][:, 0] < size).sum())
    assert len(cut["pixel_values"]) == len(cut["tgt_sizes"]) == len(cut["image_bound"]) == kept
    assert (cut["image_bound"] <= size).all()
    assert (cut["input_ids"] == model.tokenizer.unk_id).sum() == kept * model.config.query_num


@given(weights=st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_weight_masks_its_answer_alone(model, weights):
    turns = []
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"answer {number} here"}]
        if weight is not None:
            turns[-1]["weight"] = weight
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    samples = json.loads(json.dumps([{"conversations": turns}, {"conversations": plain}]))
    dataset = SupervisedDataset.for_checkpoint(model.config, model.tokenizer, samples)
    weighted, whole = dataset[0], dataset[1]
    assert torch.equal(weighted["input_ids"], whole["input_ids"])
    end = model.tokenizer.eot_id if model.config.llm_type == "llama3" else model.tokenizer.eos_token_id
    expected, answer = whole["labels"].clone(), 0
    for position in range(len(expected)):
        is_end = expected[position] == end
        if weights[answer if answer < len(weights) else -1] == 0:
            expected[position] = -100
        answer += int(is_end)
    assert torch.equal(weighted["labels"], expected)
