"""chat.py as a user calls it, and the stream of an answer beneath it."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import LLM_TYPES, ROOT, write_adapter
from PIL import Image

from finetune import arguments, chat
from finetune.dataset import SupervisedDataset, load_samples
from finetune.generation import Predictor
from finetune.loading import load_extra_tensors, load_finetuned, load_tokenizer
from finetune.minicpmv import MiniCPMV
from finetune.minicpmv.conversation import encode_text, text_turns
from finetune.minicpmv.streaming import AnswerStream, answer_text

GREEDY = ("--sampling", "false", "--num_beams", 1)
QUESTION = "What colour is it?"


@pytest.fixture(scope="module", params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(llm_type, tiny):
    return load_finetuned(tiny[llm_type])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, whose names have spaces, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("chat")
    Image.linear_gradient("L").resize((300, 200)).save(folder / "a picture.png")
    Image.new("RGB", (120, 90), "red").save(folder / "red.png")
    lying = Image.radial_gradient("L").resize((200, 100))
    exif = lying.getexif()
    exif[274] = 6
    lying.save(folder / "turned.jpg", exif=exif)
    (folder / "no picture.png").write_text("text")
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    return write_adapter(tiny["llama3"], folder, "--lora_r", 4, "--max_slice_nums", 2)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def run(capsys, *flags: object, stdin: str | None = None, monkeypatch=None) -> tuple[int, str, str]:
    """chat.py in this process: exit status, stdout, stderr."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as end:
        chat.main([*map(str, flags)])
    out, err = capsys.readouterr()
    status = end.value.code
    return (1, out, err + status) if isinstance(status, str) else (status or 0, out, err)


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What chat.py says on stderr through its logger, whose handler is that of the first test to run."""
    lines: list[str] = []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(chat.logger, level, lambda text, *values: lines.append(text % values if values else text))
    return lines


# ---- the stream


TEXTS = (
    "three desserts",
    "  spaces in front, \n\n lines \n and behind \n ",
    "图中有一个红色的圆形。 好的 . Yes , it 's .",
    "emoji 😀😀 and é, ü, \u3000wide",
    "\n",
    "",
)


def test_pieces_of_a_stream_are_the_answer(tiny, llm_type):
    """Any tokens, in one piece for each at most; characters of several tokens never in part."""
    tokenizer = load_tokenizer(tiny[llm_type])
    draw = random.Random(0)
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    answers += [draw.choices(range(len(tokenizer)), k=draw.randrange(30)) for _ in range(200)]
    for ids in answers:

        def generate(streamer, ids=ids, **_):
            streamer.put(torch.empty(1, 0, dtype=torch.long))  # the prompt, as embeddings
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()

        pieces = list(stream := AnswerStream(generate, tokenizer))
        assert "".join(pieces) == answer_text(ids, tokenizer) and stream.token_ids == list(ids)
        assert all(pieces) and len(pieces) <= len(ids) + 1  # what is no character comes at the end
    whole = tokenizer("红色😀", add_special_tokens=False)["input_ids"]
    pieces = list(AnswerStream(lambda streamer, **_: [streamer.put(torch.tensor([i])) for i in whole], tokenizer))
    assert len(whole) > len(pieces) > 1 and not any("\ufffd" in piece for piece in pieces)


def test_a_stream_raises_behind_what_was_said(tiny, llm_type):
    tokenizer = load_tokenizer(tiny[llm_type])

    def generate(streamer, **_):
        streamer.put(torch.tensor(tokenizer("three desserts", add_special_tokens=False)["input_ids"]))
        raise RuntimeError("broken")

    said, stream = [], AnswerStream(generate, tokenizer)
    with pytest.raises(RuntimeError, match="broken"):
        for piece in stream:
            said.append(piece)
    assert "".join(said).startswith("three") and list(stream) == []


@pytest.mark.parametrize("sampling", [True, False])
def test_streamed_and_whole_answers_are_the_same(loaded, sampling):
    model, tokenizer = loaded
    settings = {"sampling": sampling, "max_new_tokens": 40, "num_beams": 1}
    answers = []
    for stream in (False, True):
        torch.manual_seed(7)
        answer = model.chat(Image.new("RGB", (200, 90)), [user(QUESTION)], tokenizer, stream=stream, **settings)
        answers.append("".join(answer))
    assert answers[0] == answers[1] != ""


SAID = (
    "<ref>shape</ref><box>10 20 30 40</box>",
    "STOP! Do not enter!",
    "x != 1",
    "!",
    "a <quad>1</quad> b </s> <unk> <image> c <|eot_id|> d <AI>",
    "红色 😀!",
)


@pytest.fixture
def parrot(monkeypatch, loaded, llm_type):
    """Makes the model say a text, or token ids, whatever it is asked, with its stop token behind unless it is cut."""
    model, tokenizer = loaded

    def make(said: str | list[int], cut: bool = False) -> list[int]:
        ids = said
        if isinstance(said, str):
            turns = text_turns([{"role": "assistant", "content": said}], [], None)
            _, labels = encode_text(turns, tokenizer, llm_type, 1)
            ids = labels[labels != -100].tolist()[:-1]
        ids = [*ids, *([] if cut else [model.chat_settings(tokenizer)["eos_token_id"][-1]])]

        def generate(inputs=None, data=None, streamer=None, **settings):
            rows = len((data or inputs)["input_ids"])
            for id_ in ids if streamer else ():
                streamer.put(torch.tensor([id_]))
            longer = [] if cut else [settings["pad_token_id"]]  # another one of the batch is
            return torch.tensor([[*ids, *longer]] * rows)

        monkeypatch.setattr(MiniCPMV, "generate", lambda self, *args, **kwargs: generate(*args, **kwargs))
        return ids

    return make


@pytest.mark.parametrize("said", SAID)
def test_everything_that_the_model_says_is_shown(loaded, llm_type, tiny, parrot, said, data_file, capsys):
    """Grounding tags, "!" (the pad token of 2.5) and words that look like control tokens, everywhere the same."""
    model, tokenizer = loaded
    parrot(said)
    assert model.chat(None, [user(QUESTION)], tokenizer) == said
    assert "".join(model.chat(None, [user(QUESTION)], tokenizer, stream=True)) == said
    call = ("--model", tiny[llm_type], "--question", QUESTION)
    for flags in ((), ("--sampling", "false")):
        assert run(capsys, *call, *flags)[:2] == (0, said + "\n")
        status, out, _ = run(capsys, *call, *flags, "--json")
        assert status == 0 and json.loads(out)["answer"] == said
    conversation = chat.Conversation(chat.Asker(model, tokenizer))
    for _ in range(2):  # the answer is part of the next prompt
        assert conversation.ask(QUESTION, lambda _: None).text == said
    dataset = SupervisedDataset.for_checkpoint(model.config, tokenizer, load_samples(data_file))
    assert {one.answer.text for one in Predictor(dataset, 4, 3, 8)(model)} == {said}


def test_only_the_stop_token_that_ended_an_answer_is_taken_off(loaded, parrot):
    """Control tokens that the model itself says are shown; an answer that was cut off loses nothing."""
    model, tokenizer = loaded
    first, second = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("three", "!"))
    for stream in (False, True):
        parrot([*first, tokenizer.im_end_id, tokenizer.bos_token_id, *second])
        said = "".join(model.chat(None, [user(QUESTION)], tokenizer, stream=stream))
        assert said == f"three</image>{tokenizer.bos_token}!"
        parrot([*first, *second], cut=True)
        said = "".join(model.chat(None, [user(QUESTION)], tokenizer, stream=stream))
        assert said.replace(" ", "") == "three!"


def test_closing_a_stream_ends_the_generation(loaded):
    model, tokenizer = loaded
    settings = {"sampling": True, "max_new_tokens": 100_000, "eos_token_id": None}
    stream = model.chat(None, [user(QUESTION)], tokenizer, stream=True, **settings)
    said = next(stream)
    stream.close()
    assert not stream._thread.is_alive() and len(stream.token_ids) < 50_000
    assert answer_text(stream.token_ids, tokenizer) == said + "".join(stream)


# ---- the command line


def test_one_answer(llm_type, loaded, tiny, place, capsys, told):
    """stdout has the answer of chat() and nothing else: pictures by mark and in front, beams, samples with a seed."""
    model, tokenizer = loaded
    pictures = [chat.open_picture(str(place / name)) for name in ("turned.jpg", "a picture.png")]
    assert pictures[0].size == (100, 200)
    call = ("--model", tiny[llm_type], "--image", place / "turned.jpg", "--image", place / "a picture.png")
    marked = "Is <image_01> larger than <image_00>?"
    for question, flags, settings in (
        (QUESTION, GREEDY, {"sampling": False, "num_beams": 1}),
        (marked, ("--sampling", "false"), {"sampling": False}),
        (QUESTION, ("--seed", 5), {}),
        (QUESTION, ("--seed", 5, "--temperature", 2, "--top_k", 0), {"temperature": 2.0, "top_k": 0}),
        (QUESTION, (*GREEDY, "--max_slice_nums", 1), {"sampling": False, "num_beams": 1, "max_slice_nums": 1}),
    ):
        torch.manual_seed(5)
        expected = model.chat(pictures, [user(question)], tokenizer, max_new_tokens=12, **settings)
        status, out, _ = run(capsys, *call, "--question", question, "--max_new_tokens", 12, *flags)
        assert (status, out) == (0, expected + "\n")
    assert told[0].startswith(f"base checkpoint {tiny[llm_type]}: MiniCPM") and "float32 on the" in told[0]


def test_adapters_and_full_checkpoints_are_told_apart(adapter, tiny, place, tmp_path, capsys, told):
    """The adapter's extra tensors and its number of slices are used; its base may have moved."""
    picture = chat.open_picture(str(place / "a picture.png"))
    expected, greedy = {}, {"sampling": False, "num_beams": 1}
    for folder in (adapter, tiny["llama3"]):
        model, tokenizer = load_finetuned(folder)
        expected[folder] = model.chat(picture, [user(QUESTION)], tokenizer, max_new_tokens=9, **greedy)
    assert expected[adapter] != expected[tiny["llama3"]]
    call = ("--image", place / "a picture.png", "--question", QUESTION, *GREEDY, "--max_new_tokens", 9)
    assert run(capsys, "--model", adapter, *call)[:2] == (0, expected[adapter] + "\n")
    assert told[0].startswith(f"adapter {adapter} of {tiny['llama3']}: ")

    moved, base = shutil.copytree(adapter, tmp_path / "moved"), shutil.copytree(tiny["llama3"], tmp_path / "base")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    status, out, err = run(capsys, "--model", moved, *call)
    assert status == 2 and not out and "/gone/base" in err and "--base DIR" in err
    assert run(capsys, "--model", moved, "--base", base, *call)[:2] == (0, expected[adapter] + "\n")
    status, _, err = run(capsys, "--model", moved, "--base", tiny["minicpm"], *call)
    assert status == 1 and "does not fit its base model" in err and len(err.splitlines()) < 5
    shutil.copy(adapter / "training_settings.json", base)
    told.clear()
    assert run(capsys, "--model", base, *call)[:2] == (0, expected[tiny["llama3"]] + "\n")
    assert told[0].startswith("full checkpoint")


def test_bin_checkpoints_that_lack_a_tensor_or_all(tiny, tmp_path, capsys):
    """A checkpoint is answered with whole or not at all."""
    model, _ = load_finetuned(tiny["minicpm"])
    folder = shutil.copytree(tiny["minicpm"], tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    call = ("--model", folder, "--question", QUESTION, *GREEDY, "--max_new_tokens", 3)
    status, _, err = run(capsys, *call)
    assert status == 1 and "cannot be loaded" in err and "Traceback" not in err
    weights = model.state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    assert run(capsys, *call)[0] == 0
    del weights["resampler.query"]
    torch.save(weights, folder / "pytorch_model.bin")
    status, out, err = run(capsys, *call)
    assert status == 1 and not out and "resampler.query" in err


def test_extra_tensors_need_a_place(adapter):
    """A model that device_map has put outside the GPU in part would take them without keeping them."""
    model, _ = load_finetuned(adapter)
    model.get_base_model().resampler.to("meta")
    with pytest.raises(ValueError, match="resampler"):
        load_extra_tensors(model, adapter)


def test_wrong_calls_are_reported_together(tiny, place, tmp_path, capsys, monkeypatch):
    """Before any weight is loaded."""
    monkeypatch.setattr(chat, "load_found", lambda *a, **k: pytest.fail("weights were loaded"))
    call = ("--model", tiny["minicpm"], "--question", QUESTION)
    wrong = (
        *("--sampling", "false", "--temperature", 1, "--top_k", 3, "--top_p", 0, "--num_beams", 0, "--seed", -1),
        *("--max_new_tokens", 0, "--max_inp_length", 9999, "--max_slice_nums", 0, "--repetition_penalty", "nan"),
        *("--system_prompt", "Be short.", "--image", "gone.png", place / "no picture.png"),
    )
    status, out, err = run(capsys, *call, *wrong)
    assert status == 2 and out == "" and all(line.startswith("chat.py: ") for line in err.splitlines())
    for word in (*wrong[2:-5:2], "only with --sampling true", "gone.png does not exist", "no picture.png is not a"):
        assert str(word) in err, word
    more = ("--num_beams", 2, "--json", "--device", "cuda", "--base", "somewhere")
    status, out, err = run(capsys, *call[:2], "--question", " ", *more)
    assert status == 2 and "--base somewhere" in err
    assert "--question is empty" in err and "--num_beams 2: only with --sampling false" in err
    assert set(json.loads(out)) == {"error"} and "--num_beams" in out
    status, _, err = run(capsys, "--model", tiny["minicpm"], "--json", "--image", place / "red.png")
    assert status == 2 and "each line from stdin" in err
    status, _, err = run(capsys, *call, "--max_new_tokens", 2048)
    assert status == 2 and "--max_new_tokens 2048" in err and "question and answer together" in err

    runs = tmp_path / "output"
    (runs / "checkpoint-20").mkdir(parents=True)
    shutil.copytree(tiny["minicpm"], runs / "checkpoint-10")
    (runs / "checkpoint-10" / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path, message in (
        ("output", f"newest is {Path('output', 'checkpoint-10')}"),
        ("output/lora", "no such folder (nor is it taken for a hub name, since output is a folder here)"),
        ("./output/lora", "no such folder"),
        ("nothing", "no such folder"),
        ("output/checkpoint-20", "neither config.json"),
        ("output/checkpoint-10/config.json", "is a file"),
        ("owner/model", "owner/model"),
        ("~nosuch/x", "--model ~nosuch/x: there is no such folder"),
    ):
        status, out, err = run(capsys, "--model", path, "--question", QUESTION)
        assert status == 2 and out == "" and message in err and "Traceback" not in err, (path, err)


def test_a_mistyped_base_is_no_hub_name(adapter, tiny, tmp_path, capsys, monkeypatch):
    """In --base, and in what an adapter names; `~` is the home in both --model and --base."""
    (tmp_path / "models").mkdir()
    (tmp_path / "base").symlink_to(tiny["llama3"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    call = ("--question", QUESTION, *GREEDY, "--max_new_tokens", 2)
    status, _, err = run(capsys, "--model", adapter, "--base", "models/x", *call)
    assert (
        status == 2 and err.startswith("chat.py: --base models/x: there is no such folder (nor") and "hub name" in err
    )
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/x"}))
    status, _, err = run(capsys, "--model", moved, *call)
    assert status == 2 and "its base models/x: there is no such folder" in err and "--base DIR" in err
    assert run(capsys, "--model", "~/moved", "--base", "~/base", *call)[0] == 0
    assert "no such folder" in arguments.load_config("models/x")
    assert arguments.ModelArguments("~/base").model_name_or_path == str(tmp_path / "base")
    monkeypatch.setattr(arguments.PreTrainedConfig, "get_config_dict", lambda path, **_: [{"model_type": path}])
    assert "is a 'owner/model' model" in arguments.load_config("owner/model")  # there is no folder owner


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError, torch.OutOfMemoryError])
def test_a_model_that_cannot_be_loaded(tiny, capsys, monkeypatch, error):
    def fails(*_, **__):
        raise error("wrong\nshapes")

    monkeypatch.setattr(arguments, "load_finetuned", fails)
    status, out, err = run(capsys, "--model", tiny["minicpm"], "--question", QUESTION)
    assert status == 1 and out == ""
    [line] = [line for line in err.splitlines() if line.startswith("chat.py: ")]
    assert f"the model {tiny['minicpm']} cannot be loaded: " in line and "wrong" in line


def test_prompts_that_are_too_long(llm_type, loaded, capsys, tiny, told, monkeypatch):
    """Messages name flags; a conversation can be forgotten; an answer has no more tokens than there is room for."""
    call = ("--model", tiny[llm_type], *GREEDY, "--max_new_tokens", 3)
    status, _, err = run(capsys, *call, "--max_inp_length", 5, "--question", QUESTION)
    assert status == 1 and "--max_inp_length 5; raise it" in err and "/reset" not in err
    lines = "word " * 80 + "\n" + QUESTION + "\n" + "word " * 80
    status, _, _ = run(capsys, *call, "--max_inp_length", 80, stdin=lines, monkeypatch=monkeypatch)
    assert status == 1
    errors = [line for line in told if "--max_inp_length 80" in line]
    assert [line.endswith("or forget the conversation with /reset") for line in errors] == [False, True]

    model, tokenizer = loaded
    prompt = model.chat_inputs(None, [user(QUESTION)], tokenizer)["input_ids"].shape[1]
    asker = chat.Asker(model, tokenizer, False, {"num_beams": 1, "max_new_tokens": 9, "eos_token_id": None})
    told.clear()
    for room in (9, 4, 0):
        monkeypatch.setattr(model.config, "max_position_embeddings", prompt + room)
        if room:
            assert asker.answer([user(QUESTION)], []).answer_tokens == room
        else:
            with pytest.raises(chat.PromptTooLong, match=f"the model takes {prompt}"):
                asker.answer([user(QUESTION)], [])
    assert [re.findall(r"\d+", line) for line in told] == [["4", "9", str(prompt + 4)]]


@pytest.mark.parametrize(
    ("asked", "stored", "trained", "gpu", "chosen"),
    [
        ("auto", "float16", None, False, "bfloat16"),
        ("auto", "float16", None, True, "float16"),
        ("auto", "float16", "float32", False, "float32"),
        ("auto", "float16", "bfloat16", False, "bfloat16"),
        ("auto", "bfloat16", None, True, "float16"),  # the GPU of this test does not have it
        ("float16", "float32", None, False, "float16"),
    ],
)
def test_dtype(asked, stored, trained, gpu, chosen, monkeypatch):
    config = chat.MiniCPMVConfig(dtype=stored)
    found = chat.FoundModel("base checkpoint", "x", "x", config, trained)
    monkeypatch.setattr(arguments, "found_precision", lambda use_cpu: (False, True))
    name, remark = arguments.choose_dtype(asked, found, gpu)
    expected = trained or stored if asked == "auto" else "float32"  # of which nothing need be said
    assert name == chosen and (remark is not None) == (chosen != expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_answers_on_cpus(llm_type, tiny, place, dtype, capsys):
    call = ("--model", tiny[llm_type], "--question", QUESTION, "--image", place / "red.png", "--device", "cpu")
    status, out, _ = run(capsys, *call, "--dtype", dtype, "--max_new_tokens", 3, "--json")
    assert status == 0 and json.loads(out)["settings"]["dtype"] == dtype


# ---- conversations


def test_a_conversation_from_a_pipe(llm_type, loaded, tiny, place, capsys, told, monkeypatch):
    """Pictures in several turns, several at once, forgotten ones, errors that change nothing."""
    model, tokenizer = loaded
    first, second, third = (chat.open_picture(str(place / name)) for name in ("red.png", "turned.jpg", "a picture.png"))
    settings = {"sampling": False, "num_beams": 1, "max_new_tokens": 8}

    def answer(messages: list) -> str:
        return model.chat(None, messages, tokenizer, **settings)

    one = [{"role": "user", "content": [first, "What is it?"]}]
    one.append({"role": "assistant", "content": answer(one)})
    two = [*one, {"role": "user", "content": [second, third, "And these?"]}]
    two.append({"role": "assistant", "content": answer(two)})
    three = [*two, user("Sure?")]
    anew = [user("Hello?")]
    marked = [*anew, {"role": "assistant", "content": answer(anew)}, user("b <image> a <image>.")]
    marked_answer = model.chat([third, second], marked, tokenizer, **settings)
    expected = [one[-1]["content"], two[-1]["content"], answer(three), answer(anew), marked_answer]
    lines = (
        f"/image {place}/gone.png",
        f"/image {place}/no picture.png",
        "What is it?",
        f"/image '{place}/turned.jpg' \"{place}/a picture.png\"",
        "too long " * 900,
        "  ",
        "Is this <image> a mark too few?",
        "And these?",
        "/nothing",
        "/image",
        "Sure?",
        f"/image {place}/red.png",
        "/reset",
        "Hello?",
        f"/image {place}/a picture.png",
        f"/image {place}/turned.jpg",
        "b <image_00> a <image_01>.",
        "/quit",
        "after the end",
    )
    call = ("--model", tiny[llm_type], "--image", place / "red.png", "--max_new_tokens", 8, *GREEDY)
    monkeypatch.setenv("HOME", str(place))
    status, out, _ = run(capsys, *call, stdin="\n".join(lines), monkeypatch=monkeypatch)
    assert out == "".join(text + "\n" for text in expected)
    assert status == 1
    errors = [line for line in told if re.search("does not exist|not a picture|tokens, more|mark|no such|name a", line)]
    assert len(errors) == 6 and all("\n" not in line for line in errors)
    assert sum("goes with the next message" in line for line in told) == 5
    assert not (place / ".finetune_chat_history").exists()
    status, out, _ = run(capsys, *call, stdin="What is it?", monkeypatch=monkeypatch)
    assert (status, out) == (0, expected[0] + "\n")


def test_beams_and_failures_in_a_conversation(tiny, capsys, told, monkeypatch):
    model, tokenizer = load_finetuned(tiny["minicpm"])
    expected = model.chat(None, [user("Hello?")], tokenizer, sampling=False, max_new_tokens=8)
    original, calls = chat.MiniCPMV.generate, []

    def generate(*args, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **settings)

    monkeypatch.setattr(chat.MiniCPMV, "generate", generate)
    call = ("--model", tiny["minicpm"], "--sampling", "false", "--max_new_tokens", 8)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    status, out, _ = run(capsys, *call, stdin="Hello?\nHello?\nHello?", monkeypatch=monkeypatch)
    assert status == 130  # Ctrl-C, where nobody sits at the prompt
    status, out, _ = run(capsys, *call, stdin="Hello?", monkeypatch=monkeypatch)
    assert (status, out) == (0, expected + "\n")
    assert any("num_beams 1" in line for line in told) and any("out of GPU memory" in line for line in told)


def test_files_named_in_a_conversation(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    for text, paths in (
        ("a picture.png", ["a picture.png"]),
        ("~/a picture.png", ["~/a picture.png"]),
        ("'a picture.png' red.png", ["a picture.png", "red.png"]),
        (r"a\ picture.png", ["a picture.png"]),
        ("red.png gone.png", ["red.png", "gone.png"]),
        ("it's gone.png", ["it's gone.png"]),
        ("x" * 5000, ["x" * 5000]),
    ):
        assert chat.named_files(text) == paths
    assert chat.open_picture("~/red.png").size == (120, 90)
    found = lambda line: [text for n in range(9) if (text := chat._completion(line, n))]  # noqa: E731
    assert found("/im") == ["/image "] and found("") == [] and found("What") == []
    assert found("/image a") == ["/image a picture.png"] and found("/image gone/") == []
    assert found("/image ~/re") == ["/image ~/red.png"]


# ---- for programs


def test_json(llm_type, loaded, tiny, place, capsys, monkeypatch):
    model, tokenizer = loaded
    call = ("--model", tiny[llm_type], "--json", "--max_new_tokens", 9, "--seed", 3)
    picture = str(place / "red.png")
    status, out, _ = run(capsys, *call, "--image", picture, "--question", QUESTION)
    torch.manual_seed(3)
    expected = model.chat(chat.open_picture(picture), [user(QUESTION)], tokenizer, max_new_tokens=9)
    whole = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert (whole["question"], whole["images"], whole["answer"]) == (QUESTION, [picture], expected)
    assert whole["model"] == str(tiny[llm_type]) and whole["kind"] == "base checkpoint" and whole["seconds"] > 0
    prompt = model.chat_inputs(chat.open_picture(picture), [user(QUESTION)], tokenizer)
    assert whole["prompt_tokens"] == prompt["input_ids"].shape[1] and 1 <= whole["answer_tokens"] <= 9
    assert whole["settings"]["temperature"] == 0.7 and whole["settings"]["top_k"] == 100
    assert whole["settings"]["seed"] == 3 and "num_beams" not in whole["settings"]

    lines = (
        json.dumps({"question": QUESTION, "image": picture, "id": 17}),
        "",
        QUESTION,
        json.dumps({"question": "<b> or <a>?", "image": {"<a>": picture, "<b>": str(place / "turned.jpg")}}),
        json.dumps({"question": QUESTION, "image": [picture, "gone.png"]}),
        json.dumps({"question": QUESTION, "images": picture}),
        json.dumps({"question": QUESTION, "image": 3}),
        json.dumps({"image": picture}),
        '{"question": ',
        json.dumps({"question": "lone \ud800 surrogate"}),
        json.dumps({"question": "<image> without a picture"}),
    )
    status, out, _ = run(capsys, *call, stdin="\n".join(lines), monkeypatch=monkeypatch)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and [answer["line"] for answer in answers] == [1, *range(3, 12)]
    assert answers[0]["id"] == 17 and answers[0]["answer"] == expected
    torch.manual_seed(3)
    assert answers[1]["answer"] == model.chat(None, [user(QUESTION)], tokenizer, max_new_tokens=9)
    assert answers[2]["images"] == [picture, str(place / "turned.jpg")] and "answer" in answers[2]
    assert all("error" in answer and "answer" not in answer for answer in answers[3:])
    for answer, word in zip(answers[3:], ("gone.png", "images", "3", "question", "", "", "mark"), strict=True):
        assert word in answer["error"] and "\n" not in answer["error"]


def test_embedded_pictures_and_long_values(llm_type, tiny, place, capsys, told, monkeypatch):
    """A data URI is a picture, and nobody is shown all of its base64, nor of any other long value."""
    call = ("--model", tiny[llm_type], "--max_new_tokens", 5, "--seed", 3)
    picture = str(place / "red.png")
    uri = f"data:image/png;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
    long = "x" * 5000
    lines = (
        json.dumps({"question": QUESTION, "image": picture}),
        json.dumps({"question": QUESTION, "image": uri}),
        json.dumps({"question": "<a>?", "image": {"<a>": uri}}),
        json.dumps({"question": QUESTION, "image": f"data:image/png;base64,{long}"}),
        json.dumps({"question": QUESTION, "image": "https://x.org/a.png"}),
        json.dumps({"question": QUESTION, "image": [long, 3]}),
        json.dumps({"question": QUESTION, long: 3}),
        json.dumps({"question": [long]}),
        json.dumps({"question": QUESTION, "image": long}),
        '{"question": "Hello?", "image": NaN}',
    )
    status, out, _ = run(capsys, *call, "--json", stdin="\n".join(lines), monkeypatch=monkeypatch)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and answers[1]["answer"] == answers[0]["answer"]
    assert answers[0]["images"] == [picture] and answers[1]["images"] == answers[2]["images"] == ["embedded"]
    assert "a run downloads nothing" in answers[4]["error"]
    for answer in answers[3:]:
        assert "answer" not in answer and len(answer["error"]) < 300 and "x" * 120 not in answer["error"]

    status, out, _ = run(capsys, *call, "--json", "--image", uri, "--question", QUESTION)
    assert status == 0 and json.loads(out)["images"] == ["embedded"]
    run(capsys, *call, stdin=f"/image {uri}\n/image {picture}\n{QUESTION}", monkeypatch=monkeypatch)
    assert any(line.startswith("data:image") and "goes with the next message" in line for line in told)
    assert any(line.startswith(picture) for line in told) and all(uri[60:200] not in line for line in told)


def test_a_mark_in_front_of_the_lines(tiny, capsys, monkeypatch):
    """Some editors begin a file with a byte order mark."""
    call = ("--model", tiny["minicpm"], *GREEDY, "--max_new_tokens", 2)
    line = "\ufeff" + json.dumps({"question": "hi \ufeff", "id": 1})
    status, out, _ = run(capsys, *call, "--json", stdin=line, monkeypatch=monkeypatch)
    assert status == 0 and json.loads(out)["question"] == "hi \ufeff" and json.loads(out)["id"] == 1


def test_no_warnings_of_libraries(adapter, capsys):
    """What libraries tell their own developers is nothing for those who ask a question: nothing asks for a warning,
    so that nothing needs to hide one."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", FutureWarning)
        warnings.simplefilter("always", UserWarning)
        for flags in (GREEDY, ("--sampling", "false"), ("--seed", 0)):
            run(capsys, "--model", adapter, "--question", QUESTION, *flags, "--max_new_tokens", 2)
        assert warnings.filters[:2] == [
            ("always", None, UserWarning, None, 0),
            ("always", None, FutureWarning, None, 0),
        ]
    assert [str(warning.message) for warning in heard] == []


# ---- the program itself


def test_the_program(adapter, place):
    """Inside finetune/: stdout is the answers, stderr all else, the status tells of errors."""
    typed = f'/image "{place}/red.png"\nWhat?\n/image gone.png\n/reset\nWhat?\n'.encode() + b"What \xff?\n"
    command = [sys.executable, "chat.py", "--model", str(adapter), *map(str, GREEDY), "--max_new_tokens", "6"]
    result = subprocess.run(command, cwd=ROOT / "finetune", input=typed, capture_output=True, timeout=200)
    out, err = result.stdout.decode(), result.stderr.decode()
    model, tokenizer = load_finetuned(adapter)
    settings = {"sampling": False, "num_beams": 1, "max_new_tokens": 6}
    answers = [
        model.chat(image, [user("What?")], tokenizer, **settings)
        for image in (chat.open_picture(str(place / "red.png")), None)
    ]
    assert out == "".join(answer + "\n" for answer in answers) and result.returncode == 1
    assert "gone.png does not exist" in err and "no UTF-8 text" in err and "Traceback" not in err
    assert f"adapter {adapter} of " in err


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *flags: object, home: Path, cwd: Path):
        self.pid, self.fd = pty.fork()
        self.seen = ""
        if self.pid == 0:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell runs in the background
            environment = {**os.environ, "HOME": str(home), "TERM": "dumb"}
            environment.pop("XDG_STATE_HOME", None)
            command = [sys.executable, str(ROOT / "finetune" / "chat.py"), *map(str, flags)]
            os.execve(sys.executable, command, environment)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str) -> str:
        """What appears up to this pattern."""
        end = time.monotonic() + 120
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready and time.monotonic() < end, f"waited for {pattern!r}, saw {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError as error:  # Linux says so when the program has ended
                raise AssertionError(f"ended before {pattern!r}: {self.seen[-2000:]!r}") from error
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def status(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


@pytest.fixture
def terminal(tiny, place, tmp_path):
    model = shutil.copytree(tiny["minicpm"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    endless = {"suppress_tokens": [load_tokenizer(model).eos_token_id]}  # only Ctrl-C ends an answer
    (model / "generation_config.json").write_text(json.dumps(endless))
    started = []

    def start(*flags: object) -> Terminal:
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
        started.append(Terminal("--model", model, *flags, home=tmp_path, cwd=place))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_at_a_terminal(terminal, tmp_path):
    """Streamed answers, Ctrl-C that stops one, completion, history in a file, Ctrl-D."""
    (tmp_path / ".finetune_chat_history").write_text("an older question\n")
    at = terminal("--seed", 1, "--max_new_tokens", 100_000)
    at.until(r"\n> ")
    at.type("/image red\t\n")
    assert "/image red.png" in at.until(r"120 x 90.*\n\[1 picture\] > ")
    at.type("Tell me more!\n")
    at.until(r"more!\r\n[^\n]{20}")  # it has begun
    at.type("\x03")
    at.until(r"\(stopped\)\r\n> ")
    at.type("\x1b[A\x1b[A\x1b[A")  # up: the line from the file
    at.until("an older question")
    at.type("\n")
    at.until(r"\n[^\n]{20}")
    at.type("\x03")
    at.until(r"\(stopped\)\r\n> ")
    at.type("\x04")
    assert at.status() == 0
    history = (tmp_path / ".finetune_chat_history").read_text().splitlines()
    assert history == ["an older question", "/image red.png", "Tell me more!", "an older question"]


@pytest.mark.parametrize("state", ["folder", "file", "nowhere"])
def test_a_history_that_cannot_be_kept(tmp_path, monkeypatch, state):
    """A folder in its place, a home that is a file, no home: nothing is said, the conversation goes on."""
    readline = pytest.importorskip("readline")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if state == "folder":
        (tmp_path / ".finetune_chat_history").mkdir()
    elif state == "file":
        (tmp_path / "state").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    else:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with chat._line_editing() as remember:
        readline.add_history("What?")
        remember()
    readline.clear_history()
    assert (tmp_path / ".finetune_chat_history").is_dir() == (state == "folder")


def test_the_history_has_a_place_of_its_own_where_that_is_named(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for number in range(2):
        with chat._line_editing() as remember:
            readline.add_history(f"question {number}")
            remember()
            remember()  # an empty line adds nothing
        readline.clear_history()
    file = tmp_path / "state" / "finetune_chat_history"
    assert file.read_text() == "question 0\nquestion 1\n" and file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("positions", [256, 512, 1024, 4096])
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_defaults_fit_the_model(tiny, place, tmp_path, capsys, llm_type, positions):
    """Only what is given can be too much."""
    model = shutil.copytree(tiny[llm_type], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    call = ("--model", model, "--question", QUESTION, "--image", place / "red.png", "--json", *GREEDY)
    status, out, err = run(capsys, *call)
    settings = json.loads(out)["settings"]
    assert status == 0 and json.loads(out)["answer_tokens"] > 0 and "in place of" not in err
    assert settings["max_inp_length"] == min(2048, positions)
    assert settings["max_new_tokens"] == min(1024, positions // 2)
    status, _, err = run(capsys, *call, "--max_inp_length", positions + 1)
    assert status == 2 and f"--max_inp_length {positions + 1}: " in err and "--max_new_tokens" not in err
    status, _, err = run(capsys, *call, "--max_new_tokens", positions)
    assert status == 2 and f"--max_new_tokens {positions}: " in err and "--max_inp_length" not in err


def test_a_prompt_that_is_more_than_the_model_takes(tiny, tmp_path, capsys):
    """Nothing is said of a flag that could not help."""
    model = shutil.copytree(tiny["llama3"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    status, _, err = run(capsys, "--model", model, "--question", "What? " * 200, *GREEDY)
    assert status == 1 and "tokens, more than --max_inp_length 256; lower" in err and "raise it" not in err
