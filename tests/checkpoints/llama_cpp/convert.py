"""llama.cpp's convert_hf_to_gguf.py with the tokenizer's way to split a text named.

    python convert.py SOURCE_OF_LLAMA_CPP SPLIT ARGUMENTS...

The converter knows published tokenizers by a hash of what they make of one text, which no small one has. All else
that happens is the converter's own.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs it in this process, with its own gguf package."""
    source, split, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: split
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
