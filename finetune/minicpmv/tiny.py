"""Tiny random checkpoints in the hub's layout, for machines without weights: tests, trials, the quickstart.

    python -m finetune.minicpmv.tiny --model minicpm-llama3-v-2_5 --output tiny-2_5

The tokenizer is trained on the spot, on a few built-in sentences and on `--text` files. The folder is complete:
configuration, safetensors weights, tokenizer and model code, a few MB.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from . import MiniCPMV, MiniCPMVConfig, MiniCPMVTokenizer, MiniCPMVTokenizerFast

logger = logging.getLogger("tiny")

MODELS = ("minicpm-llama3-v-2_5", "minicpm-v-2")
VOCAB_SIZE = 704
LM_HEAD_SCALE = 5.0
PICTURE_TOKENS = [f"<{end}{name}>" for name in ("image", "ref", "box", "quad", "point", "slice") for end in ("", "/")]
LLAMA3_TOKENS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *PICTURE_TOKENS,
]
# Llama 3's pre-tokenizer pattern, from the tokenizer.json of the checkpoint
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = (
    "user assistant system What is in the picture? What colour is the shape? Which word is on the sign?",
    "There is a red circle, a green square, a blue triangle and a yellow star on a white table.",
    "The sign says EXIT. The sign says OPEN. The sign says STOP. The sign says SALE. 0123456789",
    "How many desserts are on the white plate? There are three desserts on the white plate.",
    "这张图片里有什么？图中有一个红色的圆形和一个蓝色的方块。好的。",
    "The quick brown fox jumps over the lazy dog, and then it looks at the picture once more.",
)
SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "dtype": "float32",
}


def write_checkpoint(model: str, output: str | Path, text: Iterable[str] = (), seed: int = 0) -> Path:
    """Write a tiny random checkpoint.

    Args:
        model: `minicpm-llama3-v-2_5` or `minicpm-v-2`.
        output: folder, made if need be.
        text: further sentences for the tokenizer.
        seed: of the weights.

    Raises:
        ValueError: for another model name, or when `output` is a file or already holds files.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}, expected one of {', '.join(MODELS)}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder, new or empty")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; nothing is overwritten, name another folder")
    output.mkdir(parents=True, exist_ok=True)
    sentences = [*SENTENCES, *text]
    if model == MODELS[0]:
        tokenizer = _llama3_tokenizer(sentences)
        config = MiniCPMVConfig(
            **SHARED,
            version="2.5",
            num_key_value_heads=2,
            rope_theta=500000.0,
            query_num=12,
            batch_vision_input=True,
            drop_vision_last_layer=False,
            slice_config={"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 112, "model_type": "minicpmv"},
            vision_config={
                "hidden_size": 64,
                "image_size": 980,
                "intermediate_size": 128,
                "model_type": "idefics2",
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "patch_size": 14,
            },
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    else:
        tokenizer = _sentencepiece_tokenizer(sentences, output)
        config = MiniCPMVConfig(
            **SHARED,
            rope_theta=10000.0,
            query_num=16,
            drop_vision_last_layer=True,
            vision_encoder="test_vit.r160_in1k",
            patch_size=16,
            max_slice_nums=9,
            scale_resolution=128,
            scale_emb=12,
            scale_depth=1.4,
            dim_model_base=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    torch.manual_seed(seed)
    network = MiniCPMV(config)
    with torch.no_grad():
        # LoRA keeps lm_head frozen; at its initial scale no hidden state could be sure of a token.
        network.llm.lm_head.weight *= LM_HEAD_SCALE
    network.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def _llama3_tokenizer(sentences: list[str]) -> MiniCPMVTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(LLAMA3_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA3_TOKENS])
    return MiniCPMVTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        unk_token="<unk>",
        pad_token="!",
    )


def _sentencepiece_tokenizer(sentences: list[str], folder: Path) -> MiniCPMVTokenizer:
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*PICTURE_TOKENS, "<用户>", "<AI>"],
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    return MiniCPMVTokenizer(
        str(prefix.with_suffix(".model")),
        pad_token="<unk>",
        extra_special_tokens=PICTURE_TOKENS,
    )


def _turns(path: str) -> list[str]:
    """The text of all turns in a JSON file of samples."""
    try:
        samples = json.loads(Path(path).read_text(encoding="utf-8"))
        return [turn["content"] for sample in samples for turn in sample["conversations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--text {path}: is no JSON list of samples with conversations ({error!r})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # DeepSpeed, which accelerate imports whenever a model is saved, would look for a GPU, and warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parser = argparse.ArgumentParser(description="Write a tiny random checkpoint.")
    parser.add_argument("--model", choices=MODELS, required=True, help="which of the two models")
    parser.add_argument("--output", required=True, help="folder to write, new or empty")
    parser.add_argument("--text", nargs="*", default=[], help="JSON files of samples whose words the tokenizer learns")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args(argv)
    try:
        text = [turn for path in arguments.text for turn in _turns(path)]
        output = Path(arguments.output).expanduser()
        folder = write_checkpoint(arguments.model, output, text, arguments.seed)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: `~` of nobody
        parser.exit(1, f"tiny: {error}\n")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    logger.info("wrote a random %s to %s (%.1f MB)", arguments.model, folder, size)


if __name__ == "__main__":
    main()
