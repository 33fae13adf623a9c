"""Tokenizers of both models: sentencepiece for MiniCPM-V 2.0, Llama 3 byte-level BPE for MiniCPM-Llama3-V 2.5."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

HUB_ARGUMENTS = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")


class SpecialTokens:
    """Names and ids of the tokens that picture placeholders are made of. The processor code of the checkpoints on the
    hub reads them here, also those that nothing in this package needs (`bos_id`, `eos_id`, the slices')."""

    im_start, im_end = "<image>", "</image>"
    slice_start, slice_end = "<slice>", "</slice>"
    unk = "<unk>"

    @property
    def im_start_id(self) -> int:
        return self.convert_tokens_to_ids(self.im_start)

    @property
    def im_end_id(self) -> int:
        return self.convert_tokens_to_ids(self.im_end)

    @property
    def slice_start_id(self) -> int:
        return self.convert_tokens_to_ids(self.slice_start)

    @property
    def slice_end_id(self) -> int:
        return self.convert_tokens_to_ids(self.slice_end)

    @property
    def eos_id(self) -> int:
        return self.eos_token_id

    @property
    def bos_id(self) -> int:
        return self.bos_token_id

    @property
    def unk_id(self) -> int:
        return self.convert_tokens_to_ids(self.unk)  # early copies of 2.5 have the token, but do not say that it is it


class MiniCPMVTokenizerFast(SpecialTokens, PreTrainedTokenizerFast):
    """Reads `tokenizer.json`, or, where there is none, Llama 3's own `tokenizer.model` (tiktoken format), whose
    special tokens then come from `added_tokens_decoder` in `tokenizer_config.json`."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

    @property
    def eot_token(self) -> str:
        return "<|eot_id|>"

    @property
    def eot_id(self) -> int:
        return self.convert_tokens_to_ids(self.eot_token)


class MiniCPMVTokenizer(SpecialTokens, SentencePieceBackend):
    """Splits text at the special tokens and encodes every piece between them with sentencepiece, each with its own
    dummy prefix; BOS once in front. `<用户>` and `<AI>` stay whole, being user-defined pieces of the sentencepiece
    model. (transformers 5's LlamaTokenizer rebuilds the vocabulary without user-defined pieces and breaks them up.)
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, add_bos_token: bool = True, add_eos_token: bool = False, **kwargs):
        kwargs.setdefault("unk_token", "<unk>")
        kwargs.setdefault("bos_token", "<s>")
        kwargs.setdefault("eos_token", "</s>")
        kwargs["legacy"] = True  # the dummy prefix of every piece, as the checkpoint was trained
        patterns = {(False, False): "none", (True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}
        kwargs["special_tokens_pattern"] = patterns[bool(add_bos_token), bool(add_eos_token)]
        kwargs.setdefault("token_type_ids_pattern", "all_zeros")
        super().__init__(vocab_file=vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """AutoTokenizer cuts `Fast` off 2.5's class name before it looks the class up (transformers 5), so its call
        for either tokenizer lands here; tokenizer_config.json says which one is meant."""
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        named = get_tokenizer_config(pretrained_model_name_or_path, **hub).get("tokenizer_class")
        if named == MiniCPMVTokenizerFast.__name__:
            return MiniCPMVTokenizerFast.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        """Ids between the end of the vocabulary and that of a padded embedding, which sentencepiece refuses, have no
        text, as in a fast tokenizer."""
        return super()._convert_id_to_token(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces with sentencepiece itself, so that byte pieces (`<0xF0>`...) become characters again; special
        tokens, which sentencepiece would drop, stand between as they are."""
        special = set(self.all_special_tokens)
        text, pieces = "", []
        for token in [*tokens, None]:
            if token is None or token in special:
                text += self.sp_model.decode_pieces(pieces) + (token or "")
                pieces = []
            elif token:
                pieces.append(token)
        return text


MiniCPMVTokenizer.register_for_auto_class()
MiniCPMVTokenizerFast.register_for_auto_class()
