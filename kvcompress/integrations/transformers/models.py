"""Causal language models of transformers, with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcompress.arrays import HostArray


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    cache_dtype : {"float16", "bfloat16"}
        What an engine would hold the model's cache in.
    """

    model: Any
    tokenizer: Any
    cache_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in 16 bits."""
        count: int = sum(x.numel() for x in self.model.parameters())
        return 2 * count

    def chunks(self, text: str, length: int, /) -> HostArray:
        """Cut a text into sequences; the rest at the end is left out.

        Returns
        -------
        array ``[chunks, length]``, int64
            Token ids. Every chunk starts with the token that starts a text for this model, if any.
        """
        start = self.tokenizer("a")["input_ids"][:1]
        start = start if start and start[0] == self.tokenizer.bos_token_id else []
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = length - len(start)
        count = len(ids) // size
        chunks = np.asarray(ids[: count * size], dtype=np.int64).reshape(count, size)
        lead = np.broadcast_to(np.asarray(start, dtype=np.int64), (count, len(start)))
        return np.concatenate([lead, chunks], axis=1)


def load_model(source: str | PathLike[str], /) -> LanguageModel:
    """Load a model and its tokenizer, onto the GPU if there is one.

    Parameters
    ----------
    source : str or path
        A directory, a name on the Hugging Face hub, or a ``.gguf`` file.

    Returns
    -------
    LanguageModel
        On the CPU, and from GGUF files, the model is float32; else as it was saved. Its cache is
        bfloat16 if the model was saved in that, else float16.

    Raises
    ------
    OSError, ValueError
        From transformers, if there is no such model, or none it knows.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        where, options, saved = str(path.parent), {"gguf_file": path.name}, torch.float32
    else:
        where, options = str(source), {}
        saved = AutoConfig.from_pretrained(where).dtype
    gpu = torch.cuda.is_available()
    dtype = "auto" if gpu and not options else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    cache_dtype = "bfloat16" if saved == torch.bfloat16 else "float16"
    return LanguageModel(model.eval().to("cuda" if gpu else "cpu"), tokenizer, cache_dtype)


def token_batch(lm: LanguageModel, tokens: HostArray | Sequence[int]) -> Tensor:
    """Token ids as a batch of one, on the device of the model."""
    return torch.as_tensor(tokens, device=lm.model.device)[None]
