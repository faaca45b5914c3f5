"""What llama.cpp's own code makes of texts and chats: text.tar.xz. Plain module; make.py calls it.

`SPLIT.gguf` of each known way to split a text: one small byte-level vocabulary, written by the converter. It was
learnt of the very texts without any split, so that long runs of them are single tokens wherever a split does not cut.
`tokens.json`: the ids that `llama-tokenize` gives for each text, by split. llama.cpp only comes near to `gpt-4o` and
`kimi-k2` where letters carry marks, so theirs are tiktoken's, which these models' publishers use, with their own
patterns. `chats.json`: what llama.cpp's engine for templates writes, by family and chat. Most texts are those that
llama.cpp's vocabularies are tested with (models/*.inp; MIT License, Copyright (c) 2023-2026 The ggml authors).
"""

import json
from pathlib import Path
from typing import Any

SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "deepseek-v3", "kimi-k2", "glm4")
VOCABULARY = 1200
BEGINNING, ENDING = "<|begin|>", "<|end_of_text|>"
TEXTS = (
    "I'VE seen 'em; WE'll go, they'D stay. Don't SHOUT!",
    "HTTPServer camelCase snake_case XMLHttpRequest iPhone13 v2.0.1-rc3",
    "for (int i = 0; i < 10; ++i) {\n\tx[i] += 0x1F;\n}\n\n\n// end\r\n\r\n",
    "  leading and trailing  \n  ",
    "Ünïcödé ÉCOLE élève İstanbul ǅungla ﬁn Ⅷ ½ ² ٣٤٥ १२३४",
    "东京2024年の夏は、とても暑かった。한국어 텍스트 ไทย हिन्दी की मात्राएँ עברית العَرَبِيَّة",
    "混合English和中文words, ABC汉字DEF カタカナtext",
    "e\u0301te\u0301 n\u0303 Z\u0351\u036b\u0343 a\u200db\u00a0c\u3000d",
    "$1,234,567.89 + 50% = ~$1.85M; (555) 010-9999 @ user@example.com #tag /a/b/c",
    f"The end{ENDING} is near.{ENDING}",
    "<think>\nLet me see...\n</think>\n\n**Answer:** $x^2$ `code`",
)
# moonshotai/Kimi-K2-Instruct, tokenization_kimi.py
_KIMI = (
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
    r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""",
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
    r"""\s*[\r\n]+""",
    r"""\s+(?!\S)""",
    r"""\s+""",
)
_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Its name"},
                "days": {"type": "integer"},
            },
            "required": ["town"],
        },
    },
}
_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\nSay 'yes' or \"no\"."},
    {"role": "user", "content": "Is 7 < 8 & 8 > 7?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "  Und auf Deutsch: schön? 東京 🦙  "},
]
_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "How is Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdef123",
                "type": "function",
                "function": {"name": "weather", "arguments": {"town": "Köln", "days": 2}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "grey"}'},
]
# A chat and what else a template may be given.
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "question": ([{"role": "user", "content": "Hi"}], {}),
    "talk": (_TALK, {}),
    "tools": ([{"role": "user", "content": "How is Köln?"}], {"tools": [_WEATHER]}),
    "call": (_CALL, {"tools": [_WEATHER]}),
    "no thinking": (_TALK, {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}),
    "thinking": (_TALK, {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    "thought": (
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "reasoning_content": "Two twos.", "thinking": "Two twos.", "content": "4"},
            {"role": "user", "content": "3 + 3?"},
        ],
        {},
    ),
}


def make(source: Path, programs: dict[str, Path], folder: Path, tools: Any) -> None:
    """The archive; `tools` is make.py."""
    out, checkpoint = folder / "out", folder / "checkpoint"
    out.mkdir()
    texts = [*_theirs(source), *TEXTS]
    _save(texts, checkpoint, tools.models)
    ids: dict[str, list[list[int]]] = {}
    for split in SPLITS:
        path = out / f"{split}.gguf"
        tools.convert(source, split, checkpoint, path, "--vocab-only")
        if split in ("gpt-4o", "kimi-k2"):
            encoding = _tiktoken(split, path)
            ids[split] = [encoding.encode(text, allowed_special="all") for text in texts]
            continue
        ids[split] = []
        for text in texts:
            (folder / "text").write_text(text, encoding="utf-8", newline="")
            ids[split].append(tools.tokens(programs["llama-tokenize"], path, "-f", folder / "text"))
    (out / "tokens.json").write_text(json.dumps({"texts": texts, "ids": ids}))
    chats = {
        family: {
            name: _written(programs["test-chat-template"], source, family, name, folder, tools) for name in CHATS
        }
        for family in tools.OF_FAMILY
    }
    (out / "chats.json").write_text(json.dumps(chats))
    tools.write_archive(out, "text")


def _theirs(source: Path) -> list[str]:
    listed = (source / "models" / "ggml-vocab-qwen35.gguf.inp").read_text(encoding="utf-8")
    return [text for text in listed.split("\n__ggml_vocab_test__\n") if text]


def _save(texts: list[str], folder: Path, models: Any) -> None:
    """Tokenizer and config, no weights."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([BEGINNING, ENDING])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGINNING, eos_token=ENDING).save_pretrained(folder)
    values = models.COMMON | models.FAMILIES["qwen3_moe"] | {"vocab_size": tokenizer.get_vocab_size()}
    config = CONFIG_MAPPING["qwen3_moe"](**values, architectures=["Qwen3MoeForCausalLM"])
    config.save_pretrained(folder)


def _tiktoken(split: str, path: Path) -> Any:
    """tiktoken's encoding with the vocabulary in `path`."""
    import gguf
    import tiktoken  # type: ignore[import-not-found]
    from tiktoken_ext import openai_public  # type: ignore[import-not-found]

    openai_public.load_tiktoken_bpe = lambda *_, **__: {}  # no download: the pattern alone is wanted
    pattern = "|".join(_KIMI) if split == "kimi-k2" else openai_public.o200k_base()["pat_str"]
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    special = {token: tokens.index(token) for token in (BEGINNING, ENDING)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {
        bytes(bytes_of[letter] for letter in token): number
        for number, token in enumerate(tokens)
        if token not in special and not token.startswith("[PAD")
    }
    return tiktoken.Encoding(split, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _written(program: Path, source: Path, family: str, chat: str, folder: Path, tools: Any) -> str:
    """What llama.cpp makes of a chat with the family's template."""
    messages, values = CHATS[chat]
    beginning, ending = tools.models.specials(family)
    values = values | {"eos_token": ending} | ({"bos_token": beginning} if beginning else {})
    given, written = folder / "chat.json", folder / "written"
    given.write_text(json.dumps({"messages": messages, "add_generation_prompt": True} | values))
    template = source / "models" / "templates" / f"{tools.models.TEMPLATE[family]}.jinja"
    tools.run(program, "--no-common", "--json", given, "--output", written, template)
    return written.read_bytes().decode()
