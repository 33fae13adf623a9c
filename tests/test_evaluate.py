"""Generated answers, in evaluate.py and while training: the same in any batch, scored, saved, compared and shown."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DATA, LLM_TYPES, ROOT, launch, losses, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_report import HOSTILE, Page

import finetune.evaluate as program
from finetune import arguments as arguments_module
from finetune.arguments import TrainingArguments, check_arguments, load_config, parse_arguments
from finetune.dataset import SupervisedDataset, data_collator, load_samples
from finetune.evaluation_page import choose, write_evaluation
from finetune.generation import (
    Answer,
    Answered,
    Predictor,
    Question,
    deal,
    find_questions,
    generate_answers,
    prompt_collator,
)
from finetune.loading import load_finetuned, load_tokenizer
from finetune.metrics import METRICS, score
from finetune.trainer import CPMTrainer, answers_table

NEW_TOKENS = 8


@pytest.fixture(params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def mixed_samples() -> list[dict]:
    """Pictures of several sizes, several pictures in several turns, and none; prompts of all lengths."""
    picture = str(GOLDEN_DATA / "images" / "{}").format
    samples = [
        {"id": "text", "conversations": turns("Say it.", "Red.")},
        {"id": "picture", "image": picture("a.png"), "conversations": turns("<image>\nWhat is it?", "A shape.")},
        {
            "id": "turns",
            "image": [picture("d.png"), picture("e.jpg")],
            "conversations": turns("<image>\nWhat?", "One.", "And <image>?", "Two.", "Sure? " * 20, "Yes."),
        },
        {"id": "sliced", "image": picture("f.png"), "conversations": turns("How many desserts?", "Three.")},
    ]
    samples[2]["conversations"][3]["weight"] = 0
    return samples


@pytest.fixture(scope="module")
def loaded(tiny):
    """(model, data set) of each type, made once."""
    made = {}

    def make(llm_type: str):
        if llm_type not in made:
            model, tokenizer = load_finetuned(tiny[llm_type], device_map=None, dtype=torch.float32)
            made[llm_type] = model, SupervisedDataset.for_checkpoint(model.config, tokenizer, mixed_samples())
        return made[llm_type]

    return make


def test_questions(loaded, llm_type):
    """Each answer with a weight is one; its prompt ends where the answer begins, with the pictures up to there."""
    _, dataset = loaded(llm_type)
    questions, problems = find_questions(dataset)
    assert [(q.index, q.turn) for q in questions] == [(0, 1), (1, 1), (2, 1), (2, 5), (3, 1)] and problems == []
    for question in questions:
        prompt, whole = dataset.prompt(question.index, question.turn), dataset[question.index]
        length = question.tokens
        assert len(prompt["input_ids"]) == length
        if llm_type == "llama3" or question.turn > 1:  # 2.0's answers are tokenized together with their role word
            assert torch.equal(prompt["input_ids"], whole["input_ids"][:length])
        assert len(prompt["pixel_values"]) == len(prompt["image_bound"]) == len(prompt["tgt_sizes"])
    first, last = dataset.prompt(2, 1), dataset.prompt(2, 5)
    assert 0 < len(first["pixel_values"]) < len(last["pixel_values"]) == len(dataset[2]["pixel_values"])


def test_samples_that_cannot_be_asked(loaded, llm_type):
    _, dataset = loaded(llm_type)
    samples = mixed_samples()
    samples[0]["conversations"][1]["weight"] = 0
    samples[1]["image"] = "gone.png"
    bad = SupervisedDataset.for_checkpoint(loaded(llm_type)[0].config, dataset.tokenizer, samples)
    questions, problems = find_questions(bad)
    assert [problem.index for problem in problems] == [0, 1] and {q.index for q in questions} == {2, 3}
    assert "weight 0" in problems[0].cause and "gone.png does not exist" in problems[1].cause


def test_batches_are_padded_on_the_left(loaded, llm_type):
    _, dataset = loaded(llm_type)
    items = [dataset.prompt(0, 1), dataset.prompt(2, 5), dataset.prompt(1, 1)]
    batch = prompt_collator(items, padding_value=7)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)
    for row, item in enumerate(items):
        ids = batch["input_ids"][row]
        assert torch.equal(ids[batch["attention_mask"][row]], item["input_ids"])
        assert (ids[~batch["attention_mask"][row]] == 7).all() and batch["attention_mask"][row, -1]
        for begin, end in batch["image_bound"][row].tolist():
            assert (ids[begin:end] == dataset.tokenizer.unk_id).all() and end - begin == dataset.query_nums
            assert ids[begin - 1] == dataset.tokenizer.im_start_id and ids[end] == dataset.tokenizer.im_end_id
    assert batch["independent_samples"] is True


def answers_of(loaded, llm_type: str, batches, **more) -> dict:
    model, dataset = loaded(llm_type)
    questions, _ = find_questions(dataset)
    parts = generate_answers(model, dataset, questions, batches(questions), max_new_tokens=NEW_TOKENS, **more)
    return {place: answer for part in parts for place, answer in part.items()}


def test_a_batch_changes_no_answer(loaded, llm_type):
    """Alone, in twos, all at once, by loader processes: the same, and what `chat` says."""
    alone = answers_of(loaded, llm_type, lambda questions: [[place] for place in range(len(questions))])
    assert len({answer.text for answer in alone.values()}) > 2
    for size in (2, 5):
        assert answers_of(loaded, llm_type, partial(deal, batch_size=size)) == alone
    assert answers_of(loaded, llm_type, partial(deal, batch_size=3), workers=1) == alone
    assert answers_of(loaded, llm_type, lambda _: [[4, 0], [3, 1, 2]]) == alone

    model, dataset = loaded(llm_type)
    questions, _ = find_questions(dataset)
    for place, question in enumerate(questions):
        sample = dataset.raw_data[question.index]
        paths = sample.get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        if (question.index, question.turn) == (2, 1):
            paths = paths[:1]
        said = model.chat(
            [Image.open(path) for path in paths],
            sample["conversations"][: question.turn],
            dataset.tokenizer,
            sampling=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=NEW_TOKENS,
        )
        assert alone[place].text == said


def test_pictures_of_a_batch_are_encoded_each_sample_alone(loaded, llm_type):
    """Which the answers of a random model hardly show: 2.5's features depend on the longest slice encoded with them."""
    model, dataset = loaded(llm_type)
    items = [dataset.prompt(question.index, question.turn) for question in find_questions(dataset)[0]]
    with torch.inference_mode():
        batch = prompt_collator(items, 0)
        embeds, _ = model.get_vllm_embedding(batch)
        for row, item in enumerate(items):
            alone, _ = model.get_vllm_embedding(prompt_collator([item], 0))
            torch.testing.assert_close(embeds[row][batch["attention_mask"][row]], alone[0], atol=1e-5, rtol=0)


def test_answers_that_are_cut_off(loaded, llm_type, monkeypatch):
    model, dataset = loaded(llm_type)
    stop = model.chat_settings(dataset.tokenizer)["eos_token_id"][-1]
    said = torch.tensor([[5, 6, 7], [5, stop, 0]])
    monkeypatch.setattr(model, "generate", lambda **_: said)
    found = answers_of(loaded, llm_type, lambda _: [[0, 1]])
    assert [found[place].cut for place in (0, 1)] == [True, False]


def test_a_repetition_penalty_counts_the_answer_alone(loaded, llm_type, recwarn):
    """In a batch as alone: transformers (5.24) would leave out as many tokens as a prompt has padding in front."""
    model, dataset = loaded(llm_type)
    questions, _ = find_questions(dataset)
    said = {}
    for batches in ([[place] for place in range(len(questions))], [list(range(len(questions)))]):
        settings = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 0.1}  # repeats what it can
        answers = generate_answers(model, dataset, questions, batches, **settings)
        said[len(batches)] = {place: answer for of_batch in answers for place, answer in of_batch.items()}
    assert len({question.tokens for question in questions}) > 1
    assert said[1] == said[len(questions)]
    plain = generate_answers(model, dataset, questions, batches, max_new_tokens=NEW_TOKENS)
    assert next(plain) != said[1]
    assert not [warning for warning in recwarn if "repetition_penalty" in str(warning.message)]


def test_answers_in_training_keep_to_the_positions_of_the_model(loaded, llm_type, monkeypatch, caplog):
    _, dataset = loaded(llm_type)
    longest = max(question.tokens for question in find_questions(dataset)[0])
    monkeypatch.setattr(dataset, "max_positions", longest + 3)
    assert Predictor(dataset, 4, 2, 9).max_new_tokens == 3 and "can have 3 tokens" in caplog.text
    monkeypatch.setattr(dataset, "max_positions", longest)
    assert Predictor(dataset, 4, 2, 9).left_out == 1


def test_generation_leaves_no_trace(loaded, llm_type):
    """Mode, random states and the caller's gradients are as they were."""
    model, dataset = loaded(llm_type)
    model.train()
    predictor = Predictor(dataset, 2, 2, NEW_TOKENS)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    modes = []
    handle = model.llm.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
        answered = predictor(model)
    finally:
        handle.remove()
    assert not any(modes) and model.training and model.llm.training
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert [one.reference for one in answered] == ["Red.", "One.", "Yes."]  # samples 0 and 2 of four
    loss = model(data=data_collator([dataset[0]])).logits.sum()
    loss.backward()
    model.zero_grad()
    model.eval()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 5))
def test_questions_are_dealt_to_all_processes(lengths, batch_size, processes):
    questions = [Question(n, 1, length) for n, length in enumerate(lengths)]
    parts = [deal(questions, batch_size, rank, processes) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1  # what ZeRO-3 needs
    batches = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert {place for batch in batches for place in batch} == set(range(len(questions)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    first = batches[: -(-len(questions) // max(map(len, batches)))]
    ordered = [lengths[place] for batch in first for place in batch]
    assert ordered == sorted(lengths, reverse=True)


# evaluate.py


@pytest.fixture(scope="module")
def eval_file(tiny, tmp_path_factory) -> Path:
    """The mixed samples in a file. The 2.5 model's own answers are the references of the first two: it is right there
    and, but by a miracle, nowhere else."""
    samples = mixed_samples()
    model, tokenizer = load_finetuned(tiny["llama3"], device_map=None, dtype=torch.float32)
    dataset = SupervisedDataset.for_checkpoint(model.config, tokenizer, samples)
    said = next(generate_answers(model, dataset, [Question(0, 1, 9), Question(1, 1, 9)], [[0, 1]], max_new_tokens=8))
    for index, answer in said.items():
        samples[index]["conversations"][1]["content"] = answer.text
    path = tmp_path_factory.mktemp("evaluation") / "eval.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture
def call(tiny, eval_file, tmp_path, capsys, monkeypatch):
    """evaluate.py in this process; flags given later win. (exit status, stdout, stderr)."""

    def run(*flags, model="llama3", output="out"):
        words = ["--model", tiny[model], "--data_path", eval_file, "--output", tmp_path / output, "--max_new_tokens", 8]
        words += ["--num_workers", 0, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        status = 0
        capsys.readouterr()
        try:
            program.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            said = "" if isinstance(end.code, int) else str(end.code)
        else:
            said = ""
        out, err = capsys.readouterr()
        return status, out, err + said

    return run


def read(folder: Path) -> tuple[dict, list[dict], Page]:
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "evaluation.html", "metrics.json"]
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return json.loads((folder / "metrics.json").read_text()), records, Page((folder / "evaluation.html").read_text())


def test_an_evaluation(call, tmp_path, eval_file):
    status, out, _ = call()
    assert status == 0
    metrics, records, page = read(tmp_path / "out")
    assert [(r["id"], r["turn"]) for r in records] == [
        ("text", 1), ("picture", 1), ("turns", 1), ("turns", 5), ("sliced", 1)
    ]  # fmt: skip
    samples = json.loads(eval_file.read_text())
    for record in records:
        conversation = samples[record["sample"]]["conversations"]
        assert record["reference"] == conversation[record["turn"]]["content"]
        assert record["question"] == conversation[record["turn"] - 1]["content"].strip()
        expected = score(record["answer"], record["reference"])
        assert [record[name] for name in METRICS] == list(expected)
    assert [len(r["image"]) for r in records] == [0, 1, 1, 2, 1]
    assert all(Path(path).is_file() for r in records for path in r["image"])
    assert [r["exact_match"] for r in records] == [1, 1, 0, 0, 0]
    for name in METRICS:
        mean = sum(r[name] for r in records) / 5
        assert metrics["metrics"][name] == pytest.approx(mean) and f"{name:<12}{mean:>8.3f}" in out
    assert (metrics["samples"], metrics["questions"], metrics["left_out"]) == (4, 5, [])
    assert metrics["settings"]["dtype"] == "float32" and metrics["versions"]["torch"]
    assert len(page.find("card", "right")) == 2 and len(page.find("card", "wrong")) == 3
    assert len([e for e in page.elements if e["tag"] == "img"]) == 5
    assert not (tmp_path / "out.incomplete").exists()

    status, _, err = call()  # nothing is overwritten
    assert status == 2 and "is not empty" in err


def test_as_a_user_calls_it(tiny, eval_file, tmp_path):
    """From inside finetune/, with the other model; --limit is said."""
    command = [sys.executable, "evaluate.py", "--model", tiny["minicpm"], "--data_path", eval_file]
    flags = ["--output", tmp_path / "out", "--limit", "2", "--batch_size", "2", "--max_new_tokens", "3"]
    result = subprocess.run(
        [str(word) for word in (*command, *flags)],
        cwd=ROOT / "finetune",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    metrics, records, _ = read(tmp_path / "out")
    assert len(records) == 2 and "MiniCPM-V 2.0" in metrics["kind"]
    assert "the first 2 of 4 samples" in result.stdout and "the first 2 of 4" in metrics["limited"]
    assert "Warning" not in result.stderr and "wrote" in result.stderr


def test_wrong_calls_are_reported_together(call, tmp_path):
    flags = ("--model", "./none", "--data_path", "none.json", "--batch_size", 0, "--top_p", 2, "--image_folder", "no")
    status, out, err = call(*flags, "--temperature", 0.5, "--num_beams", 2, "--compare", "neither")
    assert status == 2 and out == ""
    for word in (
        "./none",
        "none.json",
        "--batch_size 0",
        "--top_p 2",
        "--image_folder no",
        "--num_beams",
        "--compare neither",
    ):
        assert word in err
    status, _, err = call("--max_new_tokens", 100000)
    assert status == 2 and "--max_new_tokens 100000" in err
    assert list(tmp_path.iterdir()) == []


def test_bad_samples(call, tmp_path, eval_file):
    samples = json.loads(eval_file.read_text())
    damaged = bytearray((GOLDEN_DATA / "images" / "a.png").read_bytes())
    damaged[60:120] = bytes(60)
    (tmp_path / "damaged.png").write_bytes(damaged)
    samples[1]["image"] = "damaged.png"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(samples))
    flags = ("--data_path", path, "--max_inp_length", 100)
    status, out, err = call(*flags)
    assert status == 1 and out == "" and "damaged.png" in err and "sample 3 (id 'sliced')" in err
    assert "--max_inp_length 100" in err and not (tmp_path / "out").exists()
    status, out, _ = call(*flags, "--bad_samples", "skip")
    metrics, records, _ = read(tmp_path / "out")
    assert status == 0 and "left out" in out
    assert [entry["id"] for entry in metrics["left_out"]] == ["picture", "turns", "sliced"] and len(records) == 1


def test_embedded_pictures_system_texts_and_remarks(call, tmp_path, eval_file, caplog):
    """Records say `embedded` and no base64, turns are those of the data, and unknown fields are told of once."""
    one = json.loads(eval_file.read_text())[2]
    one["image"] = [f"data:image/png;base64,{base64.b64encode(Path(one['image'][0]).read_bytes()).decode()}"] * 2
    one["system"], one["source"], one["id"] = "Be brief.", "web", float("nan")
    del one["conversations"][3]["weight"]
    one["conversations"][3]["loss"] = False
    path = tmp_path / "one.json"
    path.write_text(json.dumps([one]))
    status, _, _ = call("--data_path", path)
    assert status == 0
    _, records, page = read(tmp_path / "out")
    assert [(record["turn"], record["image"]) for record in records] == [(1, ["embedded"]), (5, ["embedded"] * 2)]
    for record in records:
        assert record["reference"] == one["conversations"][record["turn"]]["content"] and record["id"] is None
    assert len([element for element in page.elements if element["tag"] == "img"]) == 3
    (said,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert said.startswith("1 sample(s) have fields that are not read: 'source' (1)") and said.count("\n") == 1
    status, _, err = call("--data_path", path, "--max_inp_length", 30, output="other")
    assert status == 1 and "turn 5 has a prompt" in err


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (ConnectionResetError("Connection reset by peer"), "a loader process died .*Killed.*--num_workers"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory .of the host: Unable.*--batch_size, which is 8"),
    ],
)
def test_what_breaks_off_an_evaluation_is_named(call, monkeypatch, first, words):
    """What a dying loader process was sending breaks off first; PyTorch's own error comes a moment later."""

    def death(_number, _frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def breaks(*_args, **_settings):
        signal.setitimer(signal.ITIMER_REAL, 0.2 if isinstance(first, OSError) else 0)
        raise first
        yield

    monkeypatch.setattr(program, "generate_answers", breaks)
    before = signal.signal(signal.SIGALRM, death)
    try:
        status, _, err = call()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert status == 1 and re.search(words, err) and "goes on from there" in err


def test_a_stopped_evaluation_goes_on(call, tmp_path, monkeypatch):
    whole = call(output="whole")
    asked = []

    def stops(model, dataset, questions, batches, *rest, **more):
        asked.append(len(questions))
        for number, answers in enumerate(generate_answers(model, dataset, questions, batches, *rest, **more)):
            yield answers
            if number == 0 and len(asked) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(program, "generate_answers", stops)
    handlers = [signal.getsignal(number) for number in program.SIGNALS]
    status, out, err = call("--batch_size", 2)
    assert status == 128 + signal.SIGTERM and out == ""
    assert str(tmp_path / "out.incomplete") in err and "goes on" in err
    assert [signal.getsignal(number) for number in program.SIGNALS] == handlers
    part = tmp_path / "out.incomplete" / "after-0.jsonl"
    assert len(part.read_text().splitlines()) == 2
    with part.open("a") as file:
        file.write('{"key": [3, 1], "answer": "cut o')  # as kill -9 may leave it
    status, _, err = call("--batch_size", 2, "--max_new_tokens", 7)
    assert status == 1 and "answers of another call" in err
    status, out, _ = call("--batch_size", 2)
    assert status == 0 and asked == [5, 3] and out.splitlines()[2:] == whole[1].splitlines()[2:]
    assert (tmp_path / "out" / "answers.jsonl").read_text() == (tmp_path / "whole" / "answers.jsonl").read_text()


def test_before_and_after(call, tiny, tmp_path):
    status, out, _ = call("--compare", tiny["minicpm"])
    assert status == 0
    metrics, records, page = read(tmp_path / "out")
    compared = metrics["compared_with"]
    differences = [r["exact_match"] - r["before"]["exact_match"] for r in records]
    assert compared["difference"]["exact_match"]["mean"] == pytest.approx(sum(differences) / 5)
    assert compared["difference"]["exact_match"]["better"] == differences.count(1) == 2
    low, high = compared["difference"]["exact_match"]["interval_95"]
    assert 0 <= low < 0.4 < high <= 1
    row = next(line for line in out.splitlines() if line.startswith("exact_match"))
    assert row.split()[1:4] == ["0.000", "0.400", "+0.400"] and row.split()[-2:] == ["2", "0"]
    assert len(page.find("card", "better")) >= 2 and len(page.find("card")) == 5
    assert page.find("card", card=None)[0]["text"].count("before") >= 1

    # the other way round, with the answers of the first evaluation
    status, again, _ = call("--compare", tmp_path / "out", model="minicpm", output="back")
    assert status == 0
    row = next(line for line in again.splitlines() if line.startswith("exact_match"))
    assert row.split()[1:4] == ["0.400", "0.000", "-0.400"] and row.split()[-2:] == ["0", "2"]

    status, _, err = call("--compare", tmp_path / "out", "--limit", 2, output="fewer")
    assert status == 1 and "other questions" in err and not (tmp_path / "fewer.incomplete").exists()
    (tmp_path / "out" / "answers.jsonl").write_text('{"answer": "x"}\n')
    status, _, err = call("--compare", tmp_path / "out", output="broken")
    assert status == 2 and "answers.jsonl, line 1" in err


SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x1csix"


def test_line_separators_in_texts(call, tmp_path, eval_file, monkeypatch):
    """An evaluation whose questions and answers have them goes on after a stop, and can be compared with."""
    samples = json.loads(eval_file.read_text())[:2]
    for sample in samples:
        sample["conversations"][0]["content"] += SEPARATORS
        sample["conversations"][1]["content"] += SEPARATORS
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(samples))
    with monkeypatch.context() as patch:
        patch.setattr(program, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        status, _, err = call("--data_path", path)
        assert status == 1 and "disk full" in err
    monkeypatch.setattr(program, "load_model", lambda *_: pytest.fail("all answers are there already"))
    assert call("--data_path", path)[0] == 0
    monkeypatch.undo()
    records = program.read_answers(tmp_path / "out")
    assert [SEPARATORS in record["question"] for record in records] == [True, True]
    assert call("--data_path", path, "--compare", tmp_path / "out", output="again")[0] == 0


def test_files_of_the_same_name_are_told_apart(call, tmp_path):
    """Also where they have moved together; answers that are there twice are refused."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        sample = {"id": name, "conversations": turns("What?", "Yes.")}
        (tmp_path / "data" / name / "eval.json").write_text(json.dumps([sample]))
    files = [tmp_path / "data" / name / "eval.json" for name in ("a", "b")]
    assert call("--data_path", *files)[0] == 0
    answers = tmp_path / "out" / "answers.jsonl"
    records = [json.loads(line) | {"answer": said} for line, said in zip(answers.open(), "AB", strict=True)]
    answers.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    files = [moved / name / "eval.json" for name in ("b", "a")]
    assert call("--data_path", *files, "--compare", tmp_path / "out", output="again")[0] == 0
    found = [(record["id"], record["before"]["answer"]) for record in read(tmp_path / "again")[1]]
    assert found == [("b", "B"), ("a", "A")]

    answers.write_text("".join(f"{json.dumps(record)}\n" for record in [*records, records[0]]))
    status, _, err = call("--data_path", *files, "--compare", tmp_path / "out", output="no")
    assert status == 1 and "1 answers have the same file" in err and not (tmp_path / "no.incomplete").exists()


def test_the_base_of_a_compared_adapter(call, tiny, tmp_path):
    """--base is for each model of the call that is an adapter."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        write_adapter(tiny["llama3"], folder, "--lora_r", 2, seed=seed)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "/gone/base"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    given = ("--limit", 1, "--max_new_tokens", 2)
    status, _, err = call(*given, "--compare", folders[1])
    assert status == 2 and f"--compare {folders[1]}" in err and "--base DIR" in err
    for number, model in enumerate((folders[0], tiny["llama3"])):
        flags = ("--model", model, "--base", tiny["llama3"], "--compare", folders[1])
        assert call(*given, *flags, output=str(number))[0] == 0
    status, _, err = call(*given, "--base", tiny["llama3"], "--compare", tiny["minicpm"], output="no")
    assert status == 2 and "leave --base out" in err


def test_where_the_result_cannot_go(call, tmp_path, monkeypatch):
    """A file, and the folder that a disk is mounted at, which cannot be replaced when all is done."""
    (tmp_path / "file").write_text("x")
    status, _, err = call(output="file")
    assert status == 2 and "is a file" in err and "not empty" not in err
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == disk)
    status, _, err = call(output="disk")
    assert status == 2 and "name a folder within it" in err and sorted(tmp_path.iterdir()) == [disk, tmp_path / "file"]
    assert call("--limit", 1, output="disk/within")[0] == 0


def test_a_model_that_does_not_fit_its_configuration(call, tiny, tmp_path):
    """No traceback; nothing is said of how transformers could ignore it."""
    folder = shutil.copytree(tiny["llama3"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 9999}))
    status, out, err = call("--model", folder)
    assert status == 1 and out == "" and f"evaluate.py: the model {folder} cannot be loaded" in err


def test_the_dtype_is_the_one_that_chat_takes(loaded, monkeypatch):
    """As the model was trained, else as its files are."""
    monkeypatch.setattr(arguments_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments_module, "found_precision", lambda use_cpu: (True, False))
    config = copy.copy(loaded("llama3")[0].config)
    config.dtype = torch.float16
    for trained, device, expected in (
        (None, "auto", "float16"),
        ("bfloat16", "cuda", "bfloat16"),
        ("float32", "auto", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
        (None, "cpu", "bfloat16"),
    ):
        task = program.Task(arguments_module.FoundModel("base checkpoint", "x", "x", config, trained), None, [], [])
        arguments = program.build_parser().parse_args(
            ["--model", "x", "--data_path", "x", "--output", "x", "--device", device]
        )
        assert program.chosen_dtype(task, arguments)[0] == expected


def test_sampling_draws_from_as_many_tokens_as_chat(call, tmp_path):
    assert call("--limit", 1, "--temperature", 1)[0] == 0
    assert read(tmp_path / "out")[0]["settings"]["top_k"] == 100
    assert call("--limit", 1, "--temperature", 1, "--top_k", 1, output="likeliest")[0] == 0
    assert call("--limit", 1, output="greedy")[0] == 0
    (metrics, likeliest, _), (_, greedy, _) = read(tmp_path / "likeliest"), read(tmp_path / "greedy")
    assert metrics["settings"]["top_k"] == 1 and likeliest[0]["answer"] == greedy[0]["answer"]
    status, _, err = call("--top_k", 3, "--top_p", 0.5, output="no")
    assert status == 2 and "--top_k 3: only with sampling" in err and "--top_p 0.5: only with" in err


def test_sampling_follows_the_seed(call, tmp_path):
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        assert call("--temperature", 1.5, "--top_p", 1, "--seed", seed, output=str(number))[0] == 0
        texts.append([record["answer"] for record in read(tmp_path / str(number))[1]])
    assert texts[0] == texts[1] != texts[2]


# the page


def record(number: int, value: float, text: str = "x", **more) -> dict:
    scores = dict.fromkeys(METRICS, value)
    base = {"file": f"{text}.json", "sample": number, "id": number, "turn": 1, "image": [], "cut": False}
    return {**base, "question": text, "answer": text, "reference": text, **scores, "score": value, **more}


def summary(**more) -> dict:
    base = {"model": "m", "data": ["d"], "metrics": dict.fromkeys(METRICS, 0.5), "samples": 1, "questions": 1}
    return {**base, "left_out": [], "cut_answers": 0, "settings": {"max_new_tokens": 1}, **more}


def test_the_page_runs_nothing(tmp_path):
    path = tmp_path / "evaluation.html"
    before = {"answer": HOSTILE, "score": 0.0, **dict.fromkeys(METRICS, 0.0)}
    difference = {"mean": 0.1, "interval_95": [0, 1], "better": 1, "worse": 0}
    compared = {
        "model": HOSTILE,
        "metrics": dict.fromkeys(METRICS, 0.1),
        "difference": dict.fromkeys(METRICS, difference),
    }
    records = [record(0, 1.0, HOSTILE + "\x00\udcff", before=before), record(1, 0.0, before=before)]
    about = summary(model=HOSTILE, data=[HOSTILE], compared_with=compared)
    write_evaluation(path, about, records, 10, lambda place: [Image.new("RGB", (900, 400), "red")] * 6 * (not place))
    text = path.read_text()
    page = Page(text)
    assert {e["tag"] for e in page.elements} & {"script", "link", "iframe", "object", "base", "form"} == set()
    assert not [name for e in page.elements for name in e if name.startswith("on")]
    pictures = [e for e in page.elements if e["tag"] == "img"]
    assert all(e["src"].startswith("data:image/jpeg") for e in pictures) and len(pictures) == 4
    assert "and 2 more pictures" in text and "url(" not in text
    assert text.count("https://") == text.count("&lt;img src=https://example.com/x.png onerror=a()&gt;") > 5
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids)) and {e["for"] for e in page.elements if "for" in e} <= set(ids)


def test_which_answers_are_shown():
    records = [record(n, (n % 10) / 10) for n in range(100)]
    assert choose(records, 100) == list(range(100))
    places = choose(records, 20)
    assert len(places) == len(set(places)) == 20 and places == sorted(places)
    values = [records[place]["score"] for place in places]
    assert values.count(0.0) >= 10 and len(set(values)) > 3
    for one in records:
        one["before"] = {"score": 1.0 if one["sample"] == 99 else 0.0 if one["sample"] == 98 else one["score"]}
    assert {98, 99} <= set(choose(records, 20))
    assert choose(records, 0) == [] and len(choose(records, 1)) == 1


# while training


@pytest.fixture
def trained(tiny, tmp_path, eval_file):
    """A trainer of the tiny 2.5 model whose evaluation answers all of the evaluation file."""

    def make(**arguments) -> CPMTrainer:
        model, tokenizer = load_finetuned(tiny["llama3"], device_map=None, dtype=torch.float32)
        dataset = SupervisedDataset.for_checkpoint(model.config, tokenizer, load_samples(eval_file), 2048)
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            eval_strategy="steps",
            predict_with_generate=True,
            predict_max_new_tokens=NEW_TOKENS,
            per_device_eval_batch_size=3,
            dataloader_num_workers=0,
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        )
        return CPMTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=data_collator,
            processing_class=tokenizer,
        )

    return make


def test_evaluation_while_training(trained, tmp_path):
    trainer = trained(max_steps=2, eval_steps=1, logging_steps=1, learning_rate=1e-9, save_strategy="no")
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and found[0]["eval_exact_match"] == pytest.approx(2 / 5)
    assert {f"eval_{name}" for name in METRICS} <= set(found[0])
    assert {f"test_{name}" for name in METRICS} <= set(trainer.evaluate(metric_key_prefix="test"))
    assert "eval_anls" not in trainer.evaluate(copy.copy(trainer.eval_dataset))  # other data than what is answered
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "run" / "runs").iterdir())))
    events.Reload()
    assert events.Scalars("eval/anls")[0].value == pytest.approx(found[0]["eval_anls"], abs=1e-6)
    text = events.Tensors("eval/answers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "How many desserts?" in text and "Three\\." in text


def test_answers_in_tensorboard_are_shown_as_they_are():
    hostile = "a | b\n# <script>alert(1)</script> **c** [d](http://e) `f` & 'g'"
    one = Answered(hostile, Answer(hostile * 99, True), "", score("", ""))
    head, line, row = answers_table([one]).splitlines()
    assert head == "| question | answer | reference | ANLS |" and line == "|---|---|---|---|"
    assert len(re.findall(r"(?<!\\)\|", row)) == 5 and not re.search(r"<|(?<!\\)[*`\[#]", row)
    assert row.startswith(r"| a \| b \# &lt;script&gt;alert\(1\)") and len(row) < 1500


@pytest.fixture
def checked(tiny, data_file, tmp_path):
    def check(*flags):
        needed = ["--model_name_or_path", tiny["llama3"], "--data_path", data_file, "--output_dir", tmp_path / "out"]
        parsed = parse_arguments([str(word) for word in [*needed, *flags]])
        return parsed[2], check_arguments(*parsed, load_config(parsed[0].model_name_or_path))

    return check


def test_flags(checked, data_file):
    good = ("--eval_data_path", data_file, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2)
    best = ("--metric_for_best_model", "exact_match", "--load_best_model_at_end", "true")
    args, problems = checked(*good, *best, "--predict_with_generate", "true", "--predict_samples", 3)
    assert problems == [] and args.greater_is_better is True and args.predict_samples == 3
    assert checked(*good, "--load_best_model_at_end", "true")[0].greater_is_better is False
    for flags, words in [
        (("--predict_with_generate", "true"), "--predict_with_generate true needs --eval_data_path"),
        ((*good[:2], "--predict_with_generate", "true"), "--eval_strategy steps or epoch"),
        ((*good, *best), "--metric_for_best_model exact_match needs --predict_with_generate true"),
        ((*good, "--metric_for_best_model", "eval_anls"), "eval_anls needs --predict_with_generate"),
        ((*good, "--metric_for_best_model", "accuracy"), "expected loss, exact_match, anls, rouge_l or token_f1"),
        ((*good, "--predict_samples", 3), "--predict_samples only with --predict_with_generate true"),
        ((*good, "--predict_with_generate", "true", "--predict_samples", 0), "--predict_samples 0"),
        ((*good, "--predict_with_generate", "true", "--predict_max_new_tokens", 0), "--predict_max_new_tokens 0"),
    ]:
        _, problems = checked(*flags)
        assert len(problems) == 1 and words in problems[0], (flags, problems)


PREDICTING = (
    *("--predict_with_generate", "true", "--predict_samples", 9, "--predict_max_new_tokens", NEW_TOKENS),
    *("--metric_for_best_model", "token_f1", "--load_best_model_at_end", "true"),
)


def test_the_best_model_by_its_answers(tiny, data_file, tmp_path):
    """Through the launcher: the checkpoint whose answers were best is the result."""
    launch(
        "finetune_lora.sh",
        *("--max_steps", 24, "--batch_size", 4, "--logging_steps", 1, "--learning_rate", 4e-3, "--lora_r", 8),
        *("--dataloader_num_workers", 0, "--eval_steps", 8, "--lora_dropout", 0.1, *PREDICTING),
        MODEL=tiny["llama3"],
        DATA=data_file,
        EVAL_DATA=data_file,
        OUTPUT_DIR=tmp_path,
        GPUS_PER_NODE=1,
        DS_CONFIG="",
        SAVE_STEPS=8,
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    scored = {entry["step"]: entry["eval_token_f1"] for entry in state["log_history"] if "eval_token_f1" in entry}
    assert list(scored) == [8, 16, 24] and max(scored.values()) > 0
    assert state["best_metric"] == max(scored.values())
    assert scored[int(state["best_model_checkpoint"].rpartition("-")[2])] == max(scored.values())


LAYOUTS = {
    "ddp": (),
    "zero2": ("--deepspeed", "ds_config_zero2.json"),
    "zero3": ("--deepspeed", "zero3_partitioned.json"),
}
PROGRAM = """
import gc, json, os, sys
from finetune.finetune import train
for flags in json.load(open(sys.argv[1])):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    train(flags)
    gc.collect()
"""


@pytest.mark.slow
def test_layouts_give_the_same_answers(tiny, data_file, tmp_path):
    """Two processes, an odd number of questions, text alone in some batches: no layout hangs, answers are the same,
    and training goes on as it would without them."""
    zero3 = json.loads((ROOT / "finetune" / "ds_config_zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every tensor, however small, is divided
    (tmp_path / "zero3_partitioned.json").write_text(json.dumps(zero3))
    calls = []
    for (name, layout), predicting in itertools.product(LAYOUTS.items(), (True, False)):
        folder = tmp_path if "zero3" in name else ROOT / "finetune"
        flags = [
            *("--model_name_or_path", tiny["minicpm"], "--data_path", data_file, "--eval_data_path", data_file),
            *(
                "--output_dir",
                tmp_path / f"{name}-{predicting}",
                "--max_steps",
                6,
                "--batch_size",
                2,
                "--eval_steps",
                2,
            ),
            *("--eval_strategy", "steps", "--save_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3),
            *("--dataloader_num_workers", 0, "--gradient_checkpointing", "true", "--report_to", "none"),
            *(str(folder / word) if word.endswith(".json") else word for word in layout),
            *(PREDICTING if predicting else ()),
        ]
        calls.append(list(map(str, flags)))
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "calls.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found = {}
    for name in LAYOUTS:
        predicting, plain = (tmp_path / f"{name}-{which}" for which in (True, False))
        assert losses(predicting) == losses(plain), name
        history = json.loads((predicting / "trainer_state.json").read_text())["log_history"]
        found[name] = [[e[f"eval_{m}"] for m in METRICS] for e in history if "eval_anls" in e]
        assert len(found[name]) == 3
    for name in LAYOUTS:
        for one, other in zip(found[name], found["ddp"], strict=True):
            assert one == pytest.approx(other, abs=1e-6), name


@pytest.fixture
def short(tiny, tmp_path):
    """Makes a copy of a checkpoint whose language model has so many positions."""

    def make(positions: int, llm_type: str = "llama3") -> Path:
        model = shutil.copytree(tiny[llm_type], tmp_path / f"{llm_type}-{positions}")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        return model

    return make


def evaluated(capsys, *flags: object) -> tuple[int, str]:
    """evaluate.py with its own defaults: exit status, stderr."""
    try:
        program.main([*map(str, flags), "--num_workers", "0", "--device", "cpu"])
    except SystemExit as end:
        said = end.code if isinstance(end.code, str) else ""
        return (1 if said else end.code), capsys.readouterr().err + said
    return 0, capsys.readouterr().err


@pytest.mark.parametrize("positions", [256, 512, 1024, 4096])
@pytest.mark.parametrize("llm_type", LLM_TYPES)
def test_defaults_fit_the_model(short, eval_file, tmp_path, capsys, llm_type, positions):
    """Only what is given can be too much."""
    flags = ("--model", short(positions, llm_type), "--data_path", eval_file, "--limit", 2)
    status, err = evaluated(capsys, *flags, "--output", tmp_path / "out")
    assert status == 0, err
    settings = read(tmp_path / "out")[0]["settings"]
    assert settings["max_new_tokens"] == min(256, positions // 4)
    assert settings["max_inp_length"] == positions - settings["max_new_tokens"]
    for flag, value in (("--max_new_tokens", positions), ("--max_inp_length", positions + 1)):
        status, err = evaluated(capsys, *flags, "--output", tmp_path / "no", flag, value)
        assert status == 2 and f"{flag} {value}: " in err and err.count(f" {positions} tokens") == 1, err


def test_a_long_prompt_shortens_answers_by_default(short, tmp_path, capsys):
    """Where the length of answers was not given; no sample is refused for it."""
    turns = [{"role": "user", "content": "number " * 30}, {"role": "assistant", "content": "yes"}]
    data = tmp_path / "long.json"
    model = short(256)
    tokenizer = load_tokenizer(model)
    for words in range(30, 100):  # to a prompt of more than three quarters of the model
        turns[0]["content"] = "number " * words
        if len(tokenizer(turns[0]["content"])["input_ids"]) > 215:
            break
    data.write_text(json.dumps([{"id": "long", "conversations": turns}]))
    flags = ("--model", model, "--data_path", data)
    status, err = evaluated(capsys, *flags, "--output", tmp_path / "out")
    assert status == 0, err
    assert 1 <= read(tmp_path / "out")[0]["settings"]["max_new_tokens"] < 64
    status, err = evaluated(capsys, *flags, "--output", tmp_path / "no", "--max_new_tokens", 64)
    assert status == 1 and "that --max_new_tokens leaves" in err, err


def test_models_that_are_compared_have_the_same_room(short, tiny, eval_file, tmp_path, capsys):
    flags = ("--model", tiny["llama3"], "--compare", short(512), "--data_path", eval_file, "--limit", 1)
    status, err = evaluated(capsys, *flags, "--output", tmp_path / "out")
    assert status == 0, err
    assert read(tmp_path / "out")[0]["settings"]["max_new_tokens"] == 128


def test_an_evaluation_without_answers_is_begun_anew(call, tiny, tmp_path):
    """A model that could not be loaded leaves nothing that stands in the way of one that can."""
    folder = shutil.copytree(tiny["llama3"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    status, _, err = call("--model", folder, "--limit", 1)
    assert status == 1 and "holds no weights" in err
    shutil.copy(tiny["llama3"] / "model.safetensors", folder)
    assert call("--model", folder, "--limit", 1)[0] == 0
