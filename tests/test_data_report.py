"""The page of `inspect_data.py --report`: what it shows is what the model is given, whatever the data hold."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GOLDEN_DATA, LLM_TYPES
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoTokenizer

from finetune.data_report import Card, _plot_lengths, write_report
from finetune.dataset import SupervisedDataset, truncate

HOSTILE = "</span></script><script>document.title='owned'</script><img src=https://example.com/x.png onerror=a()> & \"'"
QUERIES = 12
SPECIAL = {
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "<用户>", "<AI>"),
    *("<image>", "</image>", "<slice>", "</slice>"),
}
SPREAD = {"min": 20, "median": 90, "p95": 200, "p99": 240, "max": 250}
SUMMARY = {
    "model": "MiniCPM",
    "files": ["train.json"],
    "samples": 20,
    "with_pictures": 12,
    "text_only": 7,
    "pictures": 12,
    "problems": [{"file": None, "index": 3, "id": 3, "cause": HOSTILE}],
    "tokens": {"text": SPREAD, "picture": SPREAD, "total": SPREAD},
    "slices_per_picture": {"1": 8, "3": 4},
    "truncated_at": {"128": 5, "256": 0, "512": 0},
    "nothing_supervised": 1,
    "model_max_length": 128,
    "recommended_model_max_length": 256,
    "max_slice_nums": 9,
    "query_num": QUERIES,
}
LENGTHS = {
    "total": np.linspace(20, 250, 19, dtype=np.int64),
    "picture": np.full(19, 12),
    "text": np.linspace(20, 250, 19, dtype=np.int64) - 12,
}


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    VOID = {"meta", "img", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.elements: list[dict] = []
        self.feed(text)
        self.close()
        assert not self.open, "elements left open"

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        card = next((a["id"] for _, a in self.open if a.get("class") == "card"), None)
        self.elements.append({"tag": tag, "text": "", "card": card, "classes": attrs.get("class", "").split(), **attrs})
        if tag not in self.VOID:
            self.open.append((tag, self.elements[-1]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, element in self.open:
            element["text"] += data

    def find(self, *classes: str, tag: str | None = None, card: int | None = None) -> list[dict]:
        return [
            e
            for e in self.elements
            if set(classes) <= set(e["classes"]) and tag in (None, e["tag"]) and card in (None, _number(e["card"]))
        ]

    def tokens(self, *classes: str, card: int | None = None) -> list[dict]:
        """Spans of the cards' token streams."""
        return [e for e in self.find("t", *classes, card=card) if e["card"]]


def _number(card: str | None) -> int | None:
    return int(card.removeprefix("sample")) if card else None


@pytest.fixture(scope="module", params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(llm_type):
    return AutoTokenizer.from_pretrained(GOLDEN[llm_type])


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def dataset(tokenizer, llm_type) -> SupervisedDataset:
    """Two pictures with slices and two answers; text only; one without anything to learn."""
    samples = [
        {
            "id": 0,
            "image": ["images/e.jpg", "images/d.png"],
            "conversations": turns(
                f"<image>\n{HOSTILE} then <image>?", "图中有 龘😀👩‍👩‍👧 a\n\n\tb  c", "好的\x00\u202e。", "Yes! Done."
            ),
        },
        {
            "id": 1,
            "conversations": turns(
                "Say something long.", "It is green, and then it is blue. 😀😀😀😀 " * 4 + "The end of it."
            ),
        },
        {"id": 2, "conversations": [turns("hm")[0], {"role": "assistant", "content": "bad", "weight": 0}]},
    ]
    config = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}
    return SupervisedDataset(samples, None, tokenizer, config, llm_type, query_nums=QUERIES, image_folder=GOLDEN_DATA)


def card(dataset, index: int, kept: int | None = None, name: str = "train.json: sample") -> Card:
    item = dataset[index]
    kept = len(item["input_ids"]) if kept is None else kept
    return Card(["first samples"], name, item, dataset.grids(index), kept)


def report(folder, tokenizer, llm_type, cards, **changes) -> tuple[str, Page]:
    path = folder / "report.html"
    write_report(path, tokenizer, llm_type, {**SUMMARY, **changes}, LENGTHS, np.array([1] * 8 + [3] * 4), cards)
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def positions(spans: list[dict]) -> list[int]:
    """Positions that the titles of spans name."""
    ends = [re.search(r"positions? (\d+)(?: to (\d+))?", span["title"]).groups() for span in spans]
    return [n for first, last in ends for n in range(int(first), int(last or first) + 1)]


def test_nothing_is_loaded_and_nothing_runs(dataset, tokenizer, llm_type, tmp_path):
    bad = card(dataset, 0, name=HOSTILE)
    bad.reasons.append(HOSTILE)
    text, page = report(tmp_path, tokenizer, llm_type, [bad], files=[HOSTILE, "\udcff\x00"], model=HOSTILE)
    assert {e["tag"] for e in page.elements} & {"script", "link", "iframe", "object", "base", "form"} == set()
    assert not [name for e in page.elements for name in e if name.startswith("on")]
    assert all(e["src"].startswith("data:image/") for e in page.elements if "src" in e)
    assert all(e["href"].startswith("#") for e in page.elements if "href" in e)
    assert "url(" not in text and "@import" not in text
    policy = next(e["content"] for e in page.elements if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert text.count("https://") == text.count("&lt;img src=https://example.com/x.png onerror=a()&gt;") > 5
    # Every link leads somewhere, and no name is taken twice.
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids)) and {e["href"][1:] for e in page.elements if "href" in e} <= set(ids)


def test_all_tokens_stand_there_once_and_in_order(dataset, tokenizer, llm_type, tmp_path):
    cards = [card(dataset, n) for n in range(3)]
    _, page = report(tmp_path, tokenizer, llm_type, cards)
    for number, one in enumerate(cards, 1):
        spans = [span for span in page.tokens(card=number) if "ghost" not in span["classes"]]
        assert positions(spans) == list(range(len(one.item["input_ids"])))
        slices = page.tokens("picture", card=number)
        assert [positions([s]) for s in slices] == [list(range(*b)) for b in one.item["image_bound"].tolist()]
        tokens = tokenizer.convert_ids_to_tokens(one.item["input_ids"].tolist())
        assert [span["text"] for span in page.tokens("special", card=number)] == [t for t in tokens if t in SPECIAL]


def test_text_is_the_datas(dataset, tokenizer, llm_type, tmp_path):
    text, page = report(tmp_path, tokenizer, llm_type, [card(dataset, 0)])
    stream = "".join(span["text"] for span in page.tokens())
    for turn in dataset.raw_data[0]["conversations"]:
        for part in turn["content"].replace("\x00", "␀").split("<image>"):
            assert part.strip() in stream
    assert "\ufffd" not in text and "\\x" not in stream
    merged = [span for span in page.tokens() if span["text"] == "😀"]
    assert len(merged) == 1 and merged[0]["title"].count(",") >= 3 and "split" in merged[0]["title"]


@pytest.mark.parametrize("cut", [False, True])
def test_exactly_the_supervised_tokens_are_marked(dataset, tokenizer, llm_type, tmp_path, cut):
    for index in range(3):
        one = card(dataset, index)
        labels, ids = one.item["labels"], one.item["input_ids"]
        asked = torch.nonzero(labels != -100).flatten()
        if cut and len(asked) > 6:
            one.kept = len(truncate(one.item, int(asked[-6]))["labels"])
        labels = labels[: one.kept]
        _, page = report(tmp_path, tokenizer, llm_type, [one])
        marked = [span for span in page.tokens("learned") if "cut" not in span["classes"]]
        given = torch.nonzero(labels[: one.kept - 1] == ids[1 : one.kept]).flatten() + 1
        assert positions([span for span in marked if "ghost" not in span["classes"]]) == given.tolist()
        learned = labels[labels != -100].tolist()
        shown = "".join(span["text"] for span in marked)
        assert shown == tokenizer.decode(learned, clean_up_tokenization_spaces=False), index
        facts = page.find("facts")[0]["text"]
        of_all = f" of {len(asked)}" * (len(learned) < len(asked))
        assert f"{len(learned)}{of_all} learned" in facts
        ghosts = [span for span in marked if "ghost" in span["classes"]]
        # 2.0 asks for </s> after every answer and has it in the input after the last alone.
        expected = int(llm_type == "minicpm" and index == 0) + int(cut and index < 2)
        assert len(ghosts) == expected and all("not in the input" in ghost["title"] for ghost in ghosts)
        assert ("Nothing here is learned" in page.find("jumps")[0]["text"]) == (index == 2)


def test_turns(dataset, tokenizer, llm_type, tmp_path):
    _, page = report(tmp_path, tokenizer, llm_type, [card(dataset, 0), card(dataset, 2)])
    roles = [block["text"] for block in page.find(tag="b", card=1) if block["text"].isalpha()]
    assert roles == ["start", "user", "assistant", "user", "assistant"]
    assert ["taught" in turn["classes"] for turn in page.find("turn", card=1)] == [False, False, True, False, True]
    assert [turn["classes"] for turn in page.find("turn", card=2)] == [["turn"]] * 3
    assert "not learned" in page.find("role", card=2)[-1]["text"]


def test_pictures_are_the_items_own_pixels(dataset, tokenizer, llm_type, tmp_path):
    one = card(dataset, 0)
    assert one.grids == [(1, 3), (3, 3)]
    _, page = report(tmp_path, tokenizer, llm_type, [one])
    images = page.find(tag="img", card=1)
    sizes = one.item["tgt_sizes"].tolist()
    assert len(images) == len(one.item["pixel_values"]) == 14
    for image, pixels, (high, wide) in zip(images, one.item["pixel_values"], sizes, strict=True):
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2])))
        assert decoded.format == "JPEG" and decoded.size == tuple(pixels.shape[:0:-1])
        difference = np.asarray(decoded, dtype=int) - pixels.permute(1, 2, 0).numpy()
        assert np.abs(difference).mean() < 3
        assert f"{wide} × {high} patches" in image["title"]
    assert [image["alt"] for image in images] == [
        *("overview", "row 1, column 1", "row 2, column 1", "row 3, column 1", "overview"),
        *(f"row {row}, column {column}" for row in (1, 2, 3) for column in (1, 2, 3)),
    ]
    assert [e["style"].partition("--columns:")[2] for e in page.find("grid")] == ["1", "1", "1", "3"]


def test_what_is_cut_is_told_from_what_is_kept(dataset, tokenizer, llm_type, tmp_path):
    whole = card(dataset, 0)
    bounds, length = whole.item["image_bound"], len(whole.item["input_ids"])
    kept = int(bounds[4, 1])  # as if the second picture's slices were cut, which `truncate` never does
    cards = [card(dataset, 0, kept), whole, card(dataset, 0, 0), card(dataset, 2, 0)]
    _, page = report(tmp_path, tokenizer, llm_type, cards)
    lines = [[line["text"] for line in page.find("cutline", card=n)] for n in (1, 2, 3, 4)]
    assert lines == [
        [f"cut here: --model_max_length 128 · the {length - kept} tokens below are not seen"],
        [],
        ["refused: at --model_max_length 128 this sample would lose its whole answer"],
        ["refused: there is nothing to learn"],
    ]
    in_order = [e for e in page.elements if e["card"] == "sample1" and {"t", "cutline"} & set(e["classes"])]
    at = next(n for n, e in enumerate(in_order) if "cutline" in e["classes"])
    assert all("cut" not in e["classes"] for e in in_order[:at])
    assert all("cut" in e["classes"] for e in in_order[at + 1 :])
    gone = [["cut" in image["classes"] for image in page.find(tag="img", card=n)] for n in (1, 2, 3)]
    assert gone == [[False] * 5 + [True] * 9, [False] * 14, [True] * 14]
    assert not page.find("cut", card=2) and len(page.find("t", "cut", card=3)) == len(page.find("t", card=3))


def test_a_cut_inside_a_character(dataset, tokenizer, llm_type, tmp_path):
    _, page = report(tmp_path, tokenizer, llm_type, [card(dataset, 1)])
    last = [span for span in page.tokens() if span["text"] == "😀"][-1]
    text, page = report(tmp_path, tokenizer, llm_type, [card(dataset, 1, positions([last])[2])])
    spans = page.tokens()
    assert positions([span for span in spans if "ghost" not in span["classes"]])[-1] == len(dataset[1]["labels"]) - 1
    broken = [span for span in spans if "\\x" in span["text"]]
    assert [("ghost" in s["classes"], "cut" in s["classes"]) for s in broken][:2] == [(False, False), (True, False)]
    assert all("cut" in span["classes"] for span in broken[2:]) and "\ufffd" not in text


def test_numbers_and_problems(dataset, tokenizer, llm_type, tmp_path):
    problems = [{"file": "a.json", "index": n, "id": {"x": "<b>"}, "cause": f"cause {n}"} for n in range(57)]
    _, page = report(tmp_path, tokenizer, llm_type, [card(dataset, 1)], problems=problems)
    tiles = [tile["text"] for tile in page.find("tile")]
    assert tiles[:2] == ["20samples", "12with pictures"] and tiles[3] == "57problems"
    assert tiles[5] == "--model_max_length 256recommended"  # one blank, fit to be pasted in a shell
    assert len(page.find(tag="tr")) == 1 + 3 + 1 + 3 + 1 + 50
    body = page.elements[0]["text"]
    assert "cause 49" in body and "cause 50" not in body and "and 7 more" in body
    assert "128 chosen526.3%" in body and "256 recommended00.0%" in body
    assert len(page.find("plot")) == 2 and "alarm" in page.find("tile")[3]["classes"]
    _, page = report(tmp_path, tokenizer, llm_type, [], problems=[], model_max_length=None)
    assert not page.find("problems") and "good" in page.find("tile")[3]["classes"]


def test_very_long_samples_do_not_squeeze_the_plot(tokenizer, llm_type, tmp_path):
    total = np.array([1, 50, 60, 9000])
    lengths = {"total": total, "picture": total // 2, "text": total - total // 2}
    spread = {"min": 1, "median": 60, "p95": 9000, "p99": 9000, "max": 9000}
    summary = {**SUMMARY, "tokens": dict.fromkeys(lengths, spread), "model_max_length": 10**6}
    axes = Figure().subplots()
    _plot_lengths(axes, summary, lengths)
    assert axes.get_xscale() == "log" and axes.get_xlim()[1] < 20_000
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(4)
    assert "--model_max_length: 1,000,000 (far right)" in [line.get_label() for line in axes.lines]
    write_report(tmp_path / "report.html", tokenizer, llm_type, summary, lengths, np.array([], dtype=int), [])
    assert len(Page((tmp_path / "report.html").read_text()).find("plot")) == 1


def test_no_usable_sample(tokenizer, llm_type, tmp_path):
    none = np.array([], dtype=np.int64)
    summary = {
        **SUMMARY,
        **dict.fromkeys(("samples", "with_pictures", "text_only", "pictures", "nothing_supervised"), 0),
        **{"files": [], "problems": [], "slices_per_picture": {}, "truncated_at": {"512": 0}},
        **{"tokens": dict.fromkeys(LENGTHS), "model_max_length": None, "recommended_model_max_length": None},
    }
    write_report(tmp_path / "report.html", tokenizer, llm_type, summary, dict.fromkeys(LENGTHS, none), none, [])
    page = Page((tmp_path / "report.html").read_text())
    assert "No sample can be used" in page.elements[0]["text"] and not page.find("card") and not page.find(tag="img")


def test_browser_shows_it(dataset, tokenizer, llm_type, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    folder = tmp_path / "report"
    folder.mkdir()
    coloured = card(dataset, 0, name=HOSTILE)
    colour = torch.tensor([200, 30, 120], dtype=torch.uint8)
    coloured.item["pixel_values"] = [colour[:, None, None].expand(p.shape) for p in coloured.item["pixel_values"]]
    report(folder, tokenizer, llm_type, [coloured, card(dataset, 1)])

    def browse(*flags: str) -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,3600", *flags]
        page = (folder / "report.html").as_uri()
        return subprocess.run([*command, page], capture_output=True, text=True, timeout=120, check=True).stdout

    dom = browse("--dump-dom")
    assert dom.count('<section class="card"') == 2 and "<title>What the model sees" in dom
    screenshot = tmp_path / "page.png"
    browse(f"--screenshot={screenshot}")
    pixels = np.asarray(Image.open(screenshot).convert("RGB"), dtype=int)
    learned = (pixels == (0xC5, 0xEB, 0xCF)).all(-1).sum()
    pictures = (np.abs(pixels - colour.numpy()).max(-1) < 8).sum()
    assert learned > 1000 and pictures > 50_000, (learned, pictures)
