"""Our model code for MiniCPM-Llama3-V 2.5 and MiniCPM-V 2.0.

Importing this package registers `MiniCPMVConfig`, `MiniCPMV` and both tokenizers with transformers' Auto classes, so
that `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` load either checkpoint as downloaded, without running any
code that lies in the checkpoint. The other files of this folder are flat and import each other relatively: they travel
inside every checkpoint that is saved.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_minicpm import LLM_TYPES, MiniCPMVConfig
from .modeling_minicpmv import MiniCPMV
from .tokenization_minicpmv import MiniCPMVTokenizer, MiniCPMVTokenizerFast


class _TokenizerKey(MiniCPMVConfig):
    """Registers the tokenizers by name only. Registered for MiniCPMVConfig itself, they would lose against a
    checkpoint's own tokenizer code under `trust_remote_code=True` (AutoTokenizer, transformers 5.23)."""


AutoConfig.register("minicpmv", MiniCPMVConfig, exist_ok=True)
AutoModel.register(MiniCPMVConfig, MiniCPMV, exist_ok=True)
AutoModelForCausalLM.register(MiniCPMVConfig, MiniCPMV, exist_ok=True)
AutoTokenizer.register(_TokenizerKey, tokenizer_class=MiniCPMVTokenizer, exist_ok=True)

__all__ = ["LLM_TYPES", "MiniCPMV", "MiniCPMVConfig", "MiniCPMVTokenizer", "MiniCPMVTokenizerFast"]
