"""Model code against the original's numbers, and the promises that training and inference lean on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, LLM_TYPES, ROOT, TESTS, golden_batch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from finetune.minicpmv import MiniCPMV, MiniCPMVConfig, language
from finetune.minicpmv.packing import Packing, packed_attention
from finetune.minicpmv.streaming import answer_text
from finetune.minicpmv.vision import patch_grid, strip_position_ids, to_patches, to_strip

HUB = {"llama3": "minicpm_llama3_v2_5", "minicpm": "minicpm_v2"}


@pytest.fixture(scope="module", params=LLM_TYPES)
def llm_type(request) -> str:
    return request.param


@pytest.fixture
def model(llm_type) -> MiniCPMV:
    return AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(llm_type) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN[llm_type] / "expected.safetensors")


def one_sample(llm_type: str, sample: int) -> dict:
    data = golden_batch(llm_type)
    return {name: value[sample : sample + 1] for name, value in data.items()}


def test_embeddings_and_features(model, llm_type, expected):
    data = golden_batch(llm_type)
    embeds, features = model.get_vllm_embedding(data)
    real = data["attention_mask"]
    torch.testing.assert_close(embeds[real], expected["inputs_embeds"][real], atol=1e-4, rtol=0)
    for sample in range(2):
        torch.testing.assert_close(features[sample], expected[f"vision_hidden_states.{sample}"], atol=1e-4, rtol=0)
    assert len(features[2]) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_loss_and_gradients(model, llm_type, expected, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    data = golden_batch(llm_type)
    labels = data.pop("labels")
    logits = model(data=data, use_cache=False).logits
    real = data["attention_mask"]
    torch.testing.assert_close(logits[real], expected["logits"][real], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected["loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name.removeprefix("grad_norm."): value[0] for name, value in expected.items() if "grad_norm." in name}
    assert set(norms) == set(wanted)
    for name, norm in norms.items():
        # Key biases shift all scores of a query alike: their gradient is zero but for rounding (1e-10 in the files).
        torch.testing.assert_close(norm, wanted[name], rtol=1e-3, atol=1e-8, msg=name)


def test_checkpointing_really_recomputes(model, llm_type):
    model.train()
    model.gradient_checkpointing_enable()
    runs = []
    layer = model.vpm.encoder.layers[0].mlp if llm_type == "llama3" else model.vpm.blocks[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    model(data=golden_batch(llm_type), use_cache=False).logits.sum().backward()
    assert len(runs) == 2


def test_weight_names_at_real_size(llm_type):
    config = AutoConfig.from_pretrained(TESTS / "hub" / f"{HUB[llm_type]}_config.json")
    with torch.device("meta"):
        names = set(MiniCPMV(config).state_dict())
    assert names == set((TESTS / "hub" / f"{HUB[llm_type]}_weight_names.txt").read_text().split())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="none of the supported models"):
        MiniCPMV(MiniCPMVConfig(version="2.6", vision_config={"model_type": "siglip_vision_model"}))


def test_slices_are_encoded_together(model, llm_type):
    batches, data = [], golden_batch(llm_type)
    model.vpm.register_forward_hook(lambda *call: batches.append(call[2].shape[0]))
    model(data=data)
    assert batches == [sum(int(high * wide) for sizes in data["tgt_sizes"] for high, wide in sizes.view(-1, 2))]


def test_attention_is_fused(model, llm_type, monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    model(data=golden_batch(llm_type))
    vision_layers = 2 if llm_type == "llama3" else 5
    assert len(calls) == 4 * (vision_layers + 1) + 2  # 4 slices in vision tower and resampler; language model


def test_samples_do_not_depend_on_their_batch_where_asked(model, llm_type):
    """2.5 in the original: a picture's features change with the longest picture of the batch; training must not."""
    data = {**golden_batch(llm_type), "independent_samples": True}
    together = model(data=data).logits
    for sample in range(3):
        alone = {**one_sample(llm_type, sample), "independent_samples": True}
        length = int(alone["attention_mask"].sum())
        torch.testing.assert_close(together[sample, :length], model(data=alone).logits[0, :length], atol=2e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_its_padding_gives_the_same(model, llm_type, checkpointing, monkeypatch):
    """Logits, loss and gradients of the packed computation are those of the padded one with its mask."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    # the shortest first, so that no sample with a picture stands where it stood
    padded = {
        name: value[::-1] if isinstance(value, list) else value.flip(0)
        for name, value in golden_batch(llm_type).items()
    }
    real, labels = padded["attention_mask"], padded["labels"].flatten()
    packed = {**padded, "lengths": real.sum(1).tolist(), "token_index": torch.nonzero(real.flatten()).flatten()}
    assert packed["lengths"][0] < packed["lengths"][-1] and len(padded["pixel_values"][-1]) > 1
    index = torch.nonzero(labels != -100).flatten()
    widths, results = [], []
    model.llm.model.register_forward_hook(lambda *call: widths.append(call[2].last_hidden_state.shape[:2]))
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 7 * 704)  # chunks of 7 positions
    for data in (padded, packed):
        model.zero_grad()
        logits = model(data=data, use_cache=False).logits[real]
        loss = model(data=data, logits_index=index, targets=labels[index], use_cache=False).loss
        loss.backward()
        results.append((logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert widths == [real.shape] * 2 + [(1, real.sum())] * 2
    (logits, loss, grads), (packed_logits, packed_loss, packed_grads) = results
    torch.testing.assert_close(packed_logits, logits, atol=2e-6, rtol=0)
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=1e-6)
    full = F.cross_entropy(model(data=padded, use_cache=False).logits.flatten(0, 1)[index], labels[index])
    torch.testing.assert_close(packed_loss / len(index), full, atol=1e-5, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(packed_grads[name], grad, atol=1e-4, rtol=1e-4, msg=name)


def test_packed_batches_of_other_attention_keep_their_padding(llm_type):
    """`eager` knows nothing of packing; the same batch runs with its mask."""
    data = golden_batch(llm_type)
    real = data["attention_mask"]
    data.update(lengths=real.sum(1).tolist(), token_index=torch.nonzero(real.flatten()).flatten())
    logits, widths = [], []
    for attention in ("sdpa", "eager"):
        model = AutoModel.from_pretrained(GOLDEN[llm_type], dtype=torch.float32, attn_implementation=attention)
        model.llm.model.register_forward_hook(lambda *call: widths.append(call[2].last_hidden_state.shape[:2]))
        logits.append(model(data=data).logits[real])
    assert widths == [(1, real.sum()), real.shape]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 72), (8, 2, 128)])
def test_packed_attention_is_attention_within_each_sequence(device, causal, heads, kv_heads, width):
    dtype, tolerance = (torch.float64, 1e-9) if device == "cpu" else (torch.bfloat16, 2e-2)
    lengths, total = [5, 1, 130, 64], 200
    torch.manual_seed(0)
    shapes = (total, heads, width), (total, kv_heads, width), (total, kv_heads, width)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    packing = Packing.of(lengths, torch.device(device))
    sequence, place = packing.places()
    assert sequence.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert place.tolist() == [n for length in lengths for n in range(length)]
    mask = sequence[:, None] == sequence
    if causal:
        mask = mask & (place[:, None] >= place)
    wide = [x.double().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*(x[None] for x in wide), attn_mask=mask[None])[0].transpose(0, 1)
    out = packed_attention(q, k, v, packing, causal=causal)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v), retain_graph=True)
    grads = torch.autograd.grad((out.double() * weights).sum(), (q, k, v))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), wanted.double(), atol=5 * tolerance, rtol=5 * tolerance)
    queries = Packing.of([2] * 4, torch.device(device))  # as the resampler's
    crossed = packed_attention(q[:8], k, v, queries, packing)
    allowed = queries.places()[0][:, None] == sequence
    expected = F.scaled_dot_product_attention(wide[0][None, :, :8], *(x[None] for x in wide[1:]), attn_mask=allowed)
    torch.testing.assert_close(crossed.double(), expected[0].transpose(0, 1), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2)])
def test_loss_of_the_output_layer_in_chunks(dtype, tolerance, monkeypatch):
    """The same loss and gradients, and never more logits than asked for."""
    torch.manual_seed(0)
    head = language.LMHead(16, 50, bias=False, dtype=dtype)
    hidden, targets = torch.randn(23, 16, dtype=dtype, requires_grad=True), torch.randint(50, (23,))
    whole = F.cross_entropy(head(hidden).float() / 3, targets, reduction="sum")
    expected = torch.autograd.grad(whole, (hidden, head.weight))
    sizes = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: sizes.append(len(a[0])) or linear(*a))
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 5 * 50 + 3)
    loss = head(hidden, targets, 3.0)
    grads = torch.autograd.grad(loss, (hidden, head.weight))
    assert loss.dtype == torch.float32 and max(sizes) == 5 and len(sizes) == 10  # five chunks, there and back
    torch.testing.assert_close(loss, whole, atol=1e-3, rtol=1e-5)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=tolerance, rtol=tolerance)


def test_logits_at_given_positions(model, llm_type):
    data = golden_batch(llm_type)
    index = torch.nonzero(data["labels"].flatten() != -100).flatten()
    some = model(data=data, logits_index=index).logits
    torch.testing.assert_close(some, model(data=data).logits.flatten(0, 1)[index], atol=1e-6, rtol=0)


def test_text_only_batch_touches_vision(model, llm_type):
    data = one_sample(llm_type, 2)
    plain = model(data=data).logits
    model.train()
    logits = model(data=data, use_cache=False).logits
    torch.testing.assert_close(logits, plain)
    logits.sum().backward()
    for name, parameter in [*model.vpm.named_parameters(), *model.resampler.named_parameters()]:
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_frozen_embeddings_survive_the_merge(model, llm_type):
    """The original's in-place write fails on embeddings that are a leaf."""
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    model(data=golden_batch(llm_type), use_cache=False).logits.sum().backward()
    assert model.resampler.query.grad.abs().sum() > 0


def test_greedy_generation_with_and_without_cache(model, llm_type):
    data = one_sample(llm_type, 0)
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(data, use_cache=True, **settings)
    assert with_cache.shape == (1, 12)
    assert torch.equal(with_cache, model.generate(data, use_cache=False, **settings))
    # by hand, with forward() alone
    ids, expected = data["input_ids"], []
    for _ in range(12):
        logits = model(data={**data, "input_ids": ids, "position_ids": None, "attention_mask": None}).logits
        expected.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert with_cache[0].tolist() == expected


def test_generation_of_a_left_padded_batch(model, llm_type):
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    data = one_sample(llm_type, 1)
    length = int(data["attention_mask"].sum())
    data["input_ids"] = data["input_ids"][:, :length]
    data["attention_mask"] = data["attention_mask"][:, :length]
    padded = {
        **data,
        "input_ids": F.pad(data["input_ids"], (5, 0)),
        "attention_mask": F.pad(data["attention_mask"], (5, 0)),
        "image_bound": [data["image_bound"][0] + 5],
    }
    assert torch.equal(model.generate(data, **settings), model.generate(padded, **settings))


def test_arguments_of_the_original_faq(llm_type):
    """Its snippet passes `output`, which says nothing about loading."""
    path = GOLDEN[llm_type]
    AutoModelForCausalLM.from_pretrained(
        path, output="output/minicpmv2_lora", device_map="auto", trust_remote_code=True
    )


def test_chat(model, llm_type):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    picture = Image.new("RGB", (900, 500), "red")
    settings = {"sampling": False, "num_beams": 1, "max_new_tokens": 8}
    question = [{"role": "user", "content": "What colour is it?"}]
    answer = model.chat(picture, question, tokenizer, **settings)
    assert isinstance(answer, str)
    assert "".join(model.chat(picture, question, tokenizer, stream=True, **settings)).strip() == answer
    follow_up = [*question, {"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]
    assert isinstance(model.chat(picture, follow_up, tokenizer, **settings), str)
    assert isinstance(model.chat(None, question, tokenizer, sampling=True, max_new_tokens=4), str)
    with pytest.raises(ValueError, match="must end with a user message"):
        model.chat(None, follow_up[:2], tokenizer)
    with pytest.raises(ValueError, match="max_inp_length=10"):
        model.chat(picture, question, tokenizer, max_inp_length=10)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_keeps_to_the_positions_of_the_model(model, llm_type, stream, monkeypatch, caplog):
    """A history that leaves no room is refused, however long a prompt may be; an answer ends where they end."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    turns = [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": "Red."}]
    history = [*turns, *turns, turns[0]]
    prompt = model.chat_inputs(None, history, tokenizer)["input_ids"].shape[1]
    settings = {"sampling": False, "num_beams": 1, "eos_token_id": None, "stream": stream}
    made = []
    generate = model.llm.generate
    monkeypatch.setattr(model.llm, "generate", lambda **kwargs: (made.append(generate(**kwargs)), made[-1])[1])
    for room in (9, 4, 0, -1):
        monkeypatch.setattr(model.config, "max_position_embeddings", prompt + room)
        if room > 0:
            "".join(model.chat(None, history, tokenizer, max_new_tokens=9, **settings))
        else:
            with pytest.raises(ValueError, match=f"has {prompt} tokens, and the model takes {prompt + room}, prompt"):
                model.chat(None, history, tokenizer, max_inp_length=10**6, max_new_tokens=9, **settings)
    assert [said.shape[1] for said in made] == [9, 4]
    assert [record.args for record in caplog.records] == [(4, 9)]
    with pytest.raises(ValueError) as error:
        model.chat(None, history, tokenizer, max_inp_length=prompt - 1)
    assert "raise it" not in str(error.value)  # which would not help


def test_ids_beyond_the_vocabulary_have_no_text(llm_type):
    """An embedding may be longer than the vocabulary, and sampling may pick any of its rows."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    beyond = AutoConfig.from_pretrained(GOLDEN[llm_type]).vocab_size - 1
    assert beyond not in tokenizer.get_vocab().values()
    answer = tokenizer("a red car", add_special_tokens=False).input_ids
    assert answer_text([beyond, *answer[:1], beyond, *answer[1:], beyond], tokenizer) == "a red car"
    assert answer_text([beyond], tokenizer) == ""


def test_chat_sees_pictures_as_training_does(model, llm_type, tmp_path):
    """Turned by EXIF, from files of any mode, in front of a question given as a list."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    lying = Image.new("RGB", (300, 150), "red")
    exif = lying.getexif()
    exif[274] = 6
    lying.save(tmp_path / "turned.jpg", exif=exif)
    seen = []
    encode = model.get_vision_embedding
    model.get_vision_embedding = lambda *call: seen.append([tuple(p.shape[1:]) for p in call[0]]) or encode(*call)
    settings = {"sampling": False, "num_beams": 1, "max_new_tokens": 1, "max_slice_nums": 1}
    question = [{"role": "user", "content": "What?"}]
    model.chat(lying.rotate(270, expand=True), question, tokenizer, **settings)
    with Image.open(tmp_path / "turned.jpg") as turned:
        model.chat(turned, question, tokenizer, **settings)
        model.chat(turned, [{"role": "user", "content": ["What?"]}], tokenizer, **settings)
    model.chat(
        None,
        [{"role": "user", "content": [lying.convert("LA").rotate(90, expand=True), "What?"]}],
        tokenizer,
        **settings,
    )
    assert len(seen) == 4 and len({tuple(shapes) for shapes in seen}) == 1
    assert seen[0][0][0] > seen[0][0][1]


def test_a_stream_raises_what_generation_raises(model, llm_type):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN[llm_type])
    model.generate = lambda *call, **settings: (_ for _ in ()).throw(RuntimeError("out of memory"))
    pieces = model.chat(None, [{"role": "user", "content": "hello"}], tokenizer, stream=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pieces)
    assert list(pieces) == []


def test_loading_bin_and_shards(llm_type, tmp_path, model):
    """Checkpoints come as safetensors or .bin, whole or in shards."""
    weights = load_file(GOLDEN[llm_type] / "model.safetensors")
    names = sorted(weights)
    for form in ("bin", "shards"):
        folder = tmp_path / form
        folder.mkdir()
        (folder / "config.json").write_text((GOLDEN[llm_type] / "config.json").read_text())
        if form == "bin":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            model.save_pretrained(folder, max_shard_size="500KB")
            assert len(list(folder.glob("model-*.safetensors"))) > 2
        loaded = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert sorted(loaded) == names
        assert all(torch.equal(loaded[name], weights[name].float()) for name in names)


def test_no_code_of_a_checkpoint_runs(tiny, tmp_path, llm_type):
    """Registered classes win, even with trust_remote_code=True, over code that lies in the checkpoint."""
    for file in tiny[llm_type].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("*.py"):
        file.write_text("raise SystemExit('code from the checkpoint ran')")
    for trust in (None, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is MiniCPMV
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(tokenizer).__module__.startswith("finetune.")


def test_saved_checkpoint_loads_without_the_toolkit(tiny, llm_type, tmp_path):
    model = AutoModel.from_pretrained(tiny[llm_type])
    data = {"input_ids": torch.arange(20)[None]}
    save_file({"logits": model(data=data).logits.detach()}, tmp_path / "here.safetensors")
    program = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
folder = {str(tiny[llm_type])!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "finetune" not in sys.modules
assert tokenizer.im_start_id == tokenizer("<image>", add_special_tokens=False)["input_ids"][0]
there = model(data={{"input_ids": torch.arange(20)[None]}}).logits
torch.testing.assert_close(there, load_file({str(tmp_path / "here.safetensors")!r})["logits"])
print(model.chat(None, [{{"role": "user", "content": "hello"}}], tokenizer, max_new_tokens=3))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_position_ids_of_a_strip():
    ids = strip_position_ids(48, 70)
    assert ids[:8].tolist() == [0, 1, 2, 4, 5, 7, 8, 10]
    assert ids[-1] == 68 and len(ids) == 48


def test_strip_layout():
    picture = torch.arange(3 * 28 * 42).float().view(3, 28, 42)
    strip = to_strip(picture, 14)
    assert patch_grid(picture, 14) == (2, 3) and strip.shape == (3, 14, 84)
    assert torch.equal(strip[:, :, 56:70], picture[:, 14:28, 14:28])  # patch 4 is row 1, column 1
    assert to_strip(strip, 14) is strip
    patches = to_patches(picture, 14)
    assert torch.equal(patches, to_patches(strip, 14)) and patches.shape == (6, 588)
    assert torch.equal(patches[4].view(3, 14, 14), picture[:, 14:28, 14:28])
    assert patch_grid(picture[:, 1:, 1:], 14) == (2, 3) and to_strip(picture[:, 1:, 1:], 14).shape == (3, 14, 84)


def test_model_folder_is_flat():
    """The files travel in checkpoints; transformers copies flat relative imports only."""
    for file in (ROOT / "finetune" / "minicpmv").glob("*.py"):
        assert "from .." not in file.read_text() and "from finetune" not in file.read_text(), file.name
