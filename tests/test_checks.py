"""Looking at all samples: what is found, what is left out, and that every process and every resume agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from finetune.bad_samples import BAD_SAMPLES_NAME, leave_out_bad_samples
from finetune.checks import find_problems, scan, token_lengths
from finetune.dataset import SampleError, SupervisedDataset, load_samples
from finetune.errors import UserError
from finetune.trainer import EpochLengthSampler


def write(folder: Path, count: int = 20) -> Path:
    """Samples of which number 3 has no answer, 7 no file, and 11 a damaged picture that only decoding shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "good.png")
    damaged = bytearray((folder / "good.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "damaged.png").write_bytes(damaged)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Noise."}]
    samples = [{"id": f"s{n}", "image": "good.png", "conversations": turns} for n in range(count)]
    samples[3]["conversations"] = turns[:1]
    samples[7]["image"] = "gone.png"
    samples[11]["image"] = "damaged.png"
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def open_data(path: Path, **kwargs) -> SupervisedDataset:
    folder = GOLDEN["llama3"]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return SupervisedDataset.for_checkpoint(config, tokenizer, load_samples(path), **kwargs)


def test_problems_name_file_sample_and_id(tmp_path):
    path = write(tmp_path)
    dataset = open_data(path)
    assert [p.index for p in find_problems(dataset)] == [3, 7]
    found = find_problems(dataset, decode=True)
    assert [(p.file, p.number, p.id) for p in found] == [(str(path), n, f"s{n}") for n in (3, 7, 11)]
    assert str(found[1]).startswith(f"{path}: sample 7 (id 's7'): picture {tmp_path / 'gone.png'} does not exist")
    with pytest.raises(SampleError, match=r"sample 11 \(id 's11'\): picture .*damaged"):
        dataset[11]


def test_loads_are_told_without_decoding(tmp_path):
    """By the size of the pictures and the length of the text; those of samples that are left out go with them."""
    dataset = open_data(write(tmp_path))
    find_problems(dataset)
    loads = dataset.loads
    assert loads.shape == (len(dataset), 2) and not loads[[3, 7]].any()
    good = [n for n in range(len(dataset)) if n not in (3, 7)]
    for index in good:
        measured = dataset.measure(index)
        assert loads[index, 1] == sum(measured.slices)
        assert loads[index, 0] == pytest.approx(measured.tokens - measured.picture_tokens, rel=0.7)
    leave_out_bad_samples({"train": dataset}, tmp_path, 0.5, resuming=False)
    assert dataset.loads.tolist() == np.delete(loads, [3, 7, 11], axis=0).tolist()
    again = open_data(tmp_path / "train.jsonl")
    leave_out_bad_samples({"train": again}, tmp_path, 0.5, resuming=True)
    assert again.loads.tolist() == dataset.loads.tolist()


def test_loads_of_samples_that_are_cut(tmp_path):
    """What is beyond `max_length` costs nothing, and slices that it cuts off do not either."""
    Image.new("RGB", (1000, 1000)).save(tmp_path / "large.png")
    words = ("Hello?", "Hello.", "<image>" * 20, "Noise. " * 100)
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(words)]
    (tmp_path / "a.json").write_text(json.dumps([{"image": ["large.png"] * 20, "conversations": turns}]))
    dataset = open_data(tmp_path / "a.json")
    every, each = sum(dataset.measure(0).slices), dataset.query_nums
    for limit, slices in ((each * every // 2, every // 2), (each * every + 7, every)):
        dataset.max_length = limit
        assert find_problems(dataset) == []
        assert dataset.loads[0].tolist() == [limit - slices * each, slices]


def test_checks_of_many_samples_hold_no_files_open():
    """As torch does for every tensor that comes from another process."""
    program = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import numpy as np
        from finetune.checks import scan
        found = scan(100 * 512, lambda indices: np.array(indices), "counting", workers=1)
        assert np.concatenate([one for one, in found]).tolist() == list(range(100 * 512))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True)


def test_worker_errors_come_back_as_their_message(tmp_path):
    loader = torch.utils.data.DataLoader(open_data(write(tmp_path)), batch_size=None, num_workers=1)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert str(caught.value).endswith(
        "sample 3 (id 's3'): the last turn is the user's; there is no answer to learn at its end"
    )
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_is_in_order(workers):
    found = scan(1300, _squares, "test", workers)
    assert [value for (values,) in found for value in values] == [n * n for n in range(1300)]


def _squares(indices: range) -> list[int]:
    return [n * n for n in indices]


def test_bad_samples_are_left_out_and_written_down(tmp_path):
    dataset = open_data(write(tmp_path))
    ids = [sample["id"] for n, sample in enumerate(dataset.raw_data) if n not in (3, 7, 11)]
    assert leave_out_bad_samples({"train": dataset}, str(tmp_path / "out"), 0.2, resuming=False) == {"train": 3}
    assert [sample["id"] for sample in dataset.raw_data] == ids
    entries = [json.loads(line) for line in (tmp_path / "out" / BAD_SAMPLES_NAME).read_text().splitlines()]
    assert [(e["split"], e["sample"], e["index"], e["id"]) for e in entries] == [
        ("train", n, n, f"s{n}") for n in (3, 7, 11)
    ]
    assert {e["file"] for e in entries} == {str(tmp_path / "train.jsonl")}
    assert "does not exist" in entries[1]["cause"]
    assert [dataset[n]["id"] for n in (3, 16)] == [
        f"{tmp_path / 'train.jsonl'}: sample {n} (id 's{n}')" for n in (4, 19)
    ]


def test_too_many_bad_samples(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"3 of 20 samples \(15\.0%\).*--max_bad_fraction 0\.1 (?s:.*)sample 7"):
        leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 0.1, resuming=False)
    assert not (tmp_path / BAD_SAMPLES_NAME).exists()
    path.write_text("{}\n")
    with pytest.raises(UserError, match="1 of 1 samples"):
        leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 1.0, resuming=False)


def test_a_record_of_bad_samples_that_is_damaged_is_named(tmp_path):
    path = write(tmp_path)
    leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 0.2, resuming=False)
    record = tmp_path / BAD_SAMPLES_NAME
    record.write_text(record.read_text()[:-9])
    with pytest.raises(UserError, match=f"{BAD_SAMPLES_NAME} in --output_dir: JSONDecodeError"):
        leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 0.2, resuming=True)


def test_resume_leaves_out_what_the_run_left_out(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace('"s3"', '"s3\\u2028"'))  # at which splitlines() would end a line
    leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 0.2, resuming=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "gone.png")  # repaired meanwhile
    again = open_data(path)
    assert leave_out_bad_samples({"train": again}, str(tmp_path), 0.2, resuming=True) == {"train": 3}
    assert "s7" not in [sample["id"] for sample in again.raw_data]
    fresh = open_data(path)
    assert leave_out_bad_samples({"train": fresh}, str(tmp_path / "new"), 0.2, resuming=False) == {"train": 2}
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="became unusable since the run began"):
        leave_out_bad_samples({"train": open_data(path)}, str(tmp_path), 0.2, resuming=True)


def test_sample_that_learns_nothing(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    dataset = open_data(tmp_path / "a.json")
    assert (dataset[0]["labels"] == -100).all()
    assert "every answer has weight 0" in str(find_problems(dataset)[0])


@pytest.mark.parametrize(
    ("sample", "cause"),
    [
        ({"conversations": [{"role": "user", "content": "q", "weight": 0}]}, r"turn 0 \(user\) has weight 0"),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
            "0.5",
        ),
        ({"conversations": [{"role": "user", "content": "\ud800"}]}, "no valid text"),
        (
            {"conversations": [{"role": "user", "content": "see <image_00>"}, {"role": "assistant", "content": "a"}]},
            "mark",
        ),
        (
            {
                "image": {"cat": "a.png"},
                "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            },
            "<image_00>",
        ),
        (
            {
                "image": ["a.png", None],
                "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            },
            "'image' is neither",
        ),
    ],
)
def test_causes(tmp_path, sample, cause):
    (tmp_path / "a.json").write_text(json.dumps([sample]))
    dataset = open_data(tmp_path / "a.json")
    with pytest.raises(SampleError, match=cause):
        dataset[0]
    assert len(find_problems(dataset)) == 1


def test_each_file_has_its_own_folder(tmp_path):
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (56, 56), colour).save(tmp_path / name / "a.png")
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        (tmp_path / name / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    folder = GOLDEN["llama3"]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    samples = load_samples([tmp_path / "one" / "d.json", tmp_path / "two" / "d.json"])
    colours = []
    for image_folder in (None, tmp_path / "two"):
        dataset = SupervisedDataset.for_checkpoint(config, tokenizer, samples, image_folder=image_folder)
        colours.append([dataset[n]["pixel_values"][0][:, 20, 20].tolist() for n in range(2)])
    red, blue = [255, 0, 0], [0, 0, 255]
    assert colours == [[red, blue], [blue, blue]]


def test_lengths_group_batches_without_decoding(tmp_path, monkeypatch):
    words = [1 + n * 7 % 60 for n in range(512)]
    samples = [
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w " * n}]} for n in words
    ]
    Image.new("RGB", (1000, 1000)).save(tmp_path / "a.png")
    samples[5]["image"] = "a.png"
    (tmp_path / "a.json").write_text(json.dumps(samples))
    dataset = open_data(tmp_path / "a.json")
    wanted = [len(dataset[n]["input_ids"]) for n in range(512)]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    lengths = token_lengths(dataset)
    assert lengths == wanted and lengths[5] == max(lengths)

    def padding(order: list[int]) -> int:
        batches = [order[n : n + 4] for n in range(0, len(order), 4)]
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    sampler = EpochLengthSampler(4, lengths, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(512)) and first == list(sampler)
    torch.manual_seed(123)  # the order depends on seed and epoch alone
    assert first == list(EpochLengthSampler(4, lengths, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert padding(first) < padding(list(range(512))) / 3
