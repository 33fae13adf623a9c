"""`evaluation.html`: right and wrong answers with their pictures, as evaluate.py found them.

One file without JavaScript (see `page.py`): what is shown and in which order are radio buttons and style sheet alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from finetune.errors import shown
from finetune.metrics import METRICS
from finetune.page import data_uri, shown_text, tiles, write_page

THUMBNAIL = (360, 300)  # pixels
MAX_PICTURES = 4  # of an answer
NAMES = dict(zip(METRICS, ("exact match", "ANLS", "ROUGE-L", "token F1"), strict=True))
FILTERS = {"all": "all", "wrong": "wrong", "right": "right"}
CHANGES = {"better": "better than before", "worse": "worse than before"}
ORDERS = {"data": "as in the data", "low": "lowest score first", "high": "highest score first"}


def write_evaluation(
    path: str | os.PathLike,
    summary: Mapping,
    records: Sequence[Mapping],
    shown: int,
    load_pictures: Callable[[int], list[Image.Image]],
) -> None:
    """Write the page; the same answers give the same page.

    Args:
        summary: what evaluate.py saves as `metrics.json`.
        records: what it saves as `answers.jsonl`, in the order of the data; each also with `score`, and with `before`
            where two models are compared.
        shown: most answers on the page.
        load_pictures: gives the pictures of a record, by its place.
    """
    places = choose(records, shown)
    ranks = {place: rank for rank, place in enumerate(sorted(places, key=lambda p: records[p]["score"]))}
    cards = [
        _card(number, records[place], ranks[place], len(places), load_pictures(place))
        for number, place in enumerate(places, 1)
    ]
    body = [_head(summary), _table(summary), _controls(summary, records, places), "".join(cards), "</div>"]
    write_page(path, "Right and wrong answers", STYLE, "\n".join(body))


def choose(records: Sequence[Mapping], count: int) -> list[int]:
    """Places of the answers to show, in order: the worst, where two models are compared those that changed most, and
    some of all others."""
    if len(records) <= count:
        return list(range(len(records)))
    chosen: dict[int, None] = {}

    def take(many: int, order: Sequence[int]) -> None:
        chosen.update(dict.fromkeys([place for place in order if place not in chosen][:many]))

    places = range(len(records))
    if "before" in records[0]:
        changes = [record["score"] - record["before"]["score"] for record in records]
        take(count // 4, sorted((p for p in places if changes[p] < 0), key=lambda p: changes[p]))
        take(count // 4, sorted((p for p in places if changes[p] > 0), key=lambda p: -changes[p]))
    spread = count // 4
    take(count - spread - len(chosen), sorted(places, key=lambda p: records[p]["score"]))
    others = [place for place in places if place not in chosen]
    take(spread, [others[n * len(others) // spread] for n in range(spread)])
    return sorted(chosen)


def _head(summary: Mapping) -> str:
    facts = [
        f"<code>{shown_text(summary['model'])}</code>",
        f"{summary['questions']:,} questions of {summary['samples']:,} samples",
    ]
    if "compared_with" in summary:
        facts.insert(1, f"before: <code>{shown_text(summary['compared_with']['model'])}</code>")
    files = "".join(f"<li><code>{shown_text(file)}</code></li>" for file in summary["data"])
    warnings = ""
    if summary["left_out"]:
        warnings += f'<p class="bad">Samples that could not be used and were left out: {len(summary["left_out"]):,}</p>'
    if summary["cut_answers"]:
        limit = summary["settings"]["max_new_tokens"]
        warnings += f'<p class="bad">Answers cut off at --max_new_tokens {limit}: {summary["cut_answers"]:,}</p>'
    numbers = [(NAMES[name], f"{summary['metrics'][name]:.3f}", "") for name in METRICS]
    return (
        f"<header><h1>Right and wrong answers</h1><p>{' · '.join(facts)}</p>"
        f'<ul class="files">{files}</ul></header>{tiles(numbers)}{warnings}'
    )


def _table(summary: Mapping) -> str:
    if "compared_with" not in summary:
        return ""
    rows = []
    for name in METRICS:
        change = summary["compared_with"]["difference"][name]
        low, high = change["interval_95"]
        cells = [
            f"{summary['compared_with']['metrics'][name]:.3f}",
            f"{summary['metrics'][name]:.3f}",
            f"{change['mean']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{change['better']:,}",
            f"{change['worse']:,}",
        ]
        rows.append(f"<tr><th>{NAMES[name]}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    names = ("", "before", "after", "difference", "95 % interval", "answers better", "worse")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<section class="panel"><table><tr>{head}</tr>{"".join(rows)}</table></section>'


def _controls(summary: Mapping, records: Sequence[Mapping], places: Sequence[int]) -> str:
    """Radio buttons, and the opening of the list that they act on, which must stand behind them."""
    filters = {**FILTERS, **(CHANGES if "compared_with" in summary else {})}
    buttons = [
        f'<input type="radio" name="{name}" id="{name}-{key}"{" checked" * (n == 0)}>'
        f'<label for="{name}-{key}">{label}</label>'
        for name, choices in (("show", filters), ("order", ORDERS))
        for n, (key, label) in enumerate(choices.items())
    ]
    right = sum(record["exact_match"] == 1 for record in records)
    note = f"{right:,} of {len(records):,} answers are right (exact match)."
    if len(places) < len(records):
        note += (
            f" The page shows {len(places):,} of them: those with the lowest score (mean of the four metrics), and "
            "some of the others. All are in answers.jsonl."
        )
    return f'<p>{note}</p>{"".join(buttons)}<div class="cards">'


def _card(number: int, record: Mapping, rank: int, count: int, pictures: Sequence[Image.Image]) -> str:
    right = record["exact_match"] == 1
    kinds = ["right" if right else "wrong"]
    badges = [f'<span class="badge {"fine" if right else "alarm"}">{kinds[0]}</span>']
    answers = [("reference", record["reference"], "fine")]
    if "before" in record:
        change = record["score"] - record["before"]["score"]
        if change:
            kinds.append("better" if change > 0 else "worse")
            badges.append(f'<span class="badge">{CHANGES[kinds[-1]]}</span>')
        answers.append(("before", record["before"]["answer"], "" if record["before"]["exact_match"] == 1 else "bad"))
    answers.append(("answer", record["answer"], "" if right else "bad"))
    if record["cut"]:
        badges.append('<span class="badge alarm">cut off</span>')
    place = f"{record['file']}: " if record["file"] else ""
    name = f"{place}sample {record['sample']} (id {shown(record['id'])}), turn {record['turn']}"
    rows = "".join(
        f'<dt>{title}</dt><dd class="{kind}">{shown_text(text) or "<i>nothing</i>"}</dd>'
        for title, text, kind in [("question", record["question"], ""), *answers]
    )
    facts = "".join(f"<span>{NAMES[metric]} <b>{record[metric]:.2f}</b></span>" for metric in METRICS)
    thumbnails = "".join(map(_thumbnail, pictures[:MAX_PICTURES]))
    if len(pictures) > MAX_PICTURES:
        thumbnails += f"<p>and {len(pictures) - MAX_PICTURES} more pictures</p>"
    return (
        f'<section class="card {" ".join(kinds)}" id="answer{number}" style="--low:{rank};--high:{count - rank}">'
        f'<h3>{shown_text(name)} {" ".join(badges)}</h3><p class="facts">{facts}</p>'
        f'<div class="sides"><div class="shown">{thumbnails}</div><dl>{rows}</dl></div></section>'
    )


def _thumbnail(picture: Image.Image) -> str:
    size = picture.size
    picture.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return (
        f'<img alt="picture" title="{size[0]} × {size[1]} pixels" width="{picture.width}" height="{picture.height}" '
        f'loading="lazy" src="{data_uri("jpeg", buffer.getvalue())}">'
    )


STYLE = """
.tile b { font-size: 1.6rem }
input[type=radio] { position: absolute; opacity: 0 }
label { display: inline-block; padding: .25rem .8rem; margin: .3rem .4rem .3rem 0; border: 1px solid var(--line);
  border-radius: 1rem; background: #fff; cursor: pointer; user-select: none }
input:checked + label { background: #0a5bc4; border-color: #0a5bc4; color: #fff }
input:focus-visible + label { outline: 2px solid #f08c00 }
#order-data + label { margin-left: 1.6rem }
.cards { display: flex; flex-direction: column; margin-top: .8rem }
#order-low:checked ~ .cards .card { order: var(--low) }
#order-high:checked ~ .cards .card { order: var(--high) }
#show-right:checked ~ .cards .card:not(.right), #show-wrong:checked ~ .cards .card:not(.wrong),
#show-better:checked ~ .cards .card:not(.better), #show-worse:checked ~ .cards .card:not(.worse) { display: none }
.card.wrong { border-left: 5px solid var(--bad) }
.card.right { border-left: 5px solid #3fa45b }
.badge.fine { background: #d9f2e0; color: #12602c }
.sides { display: grid; grid-template-columns: minmax(0, 380px) minmax(0, 1fr); gap: 1.2rem; align-items: start;
  margin-top: .6rem }
.sides:has(.shown:empty) { grid-template-columns: minmax(0, 1fr) }
.shown:empty { display: none }
.shown img { display: block; max-width: 100%; height: auto; margin-bottom: .5rem; outline: 1px solid #0002 }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .4rem .9rem; margin: 0 }
dt { color: #57606a; font-size: .88rem }
dd { margin: 0; white-space: pre-wrap; max-height: 20rem; overflow: auto; unicode-bidi: plaintext }
dd.bad { font-weight: 400 }
dd.fine { color: #12602c }
th:first-child { text-align: left }
@media (max-width: 800px) { .sides { grid-template-columns: minmax(0, 1fr) } body { padding: .8rem } }
"""
