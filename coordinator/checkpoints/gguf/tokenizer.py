"""The tokenizer and chat template that a GGUF carries, as transformers' own fast tokenizer.

Two kinds: `gpt2`, byte-level BPE with one of llama.cpp's named ways to split a text beforehand (src/llama-vocab.cpp,
`llm_tokenizer_bpe`), and `llama`, sentencepiece. Tokens of type 3 (control) are special, those of type 4 (user
defined) are found before anything else is split.
"""

from typing import Any

from ...types import CoordinatorError
from .file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _SPACES,
)
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]*"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
)
# `tokenizer.ggml.pre` → the patterns that a text is split by, one after the other.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "gpt-4o": (_GPT4O,),
    "deepseek-v3": _DEEPSEEK3,
    "kimi-k2": (_KIMI,),
}
# What src/llama-vocab.cpp sets by the name of the split: whole words are taken as they are (ignore_merges), a text
# begins with its token unless the file says otherwise (add_bos).
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "glm4")
_BEGUN = ("llama-bpe", "llama3", "llama-v3")
# Control tokens that end an answer whatever the metadata says (src/llama-vocab.cpp, special_eog_ids).
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|eom_id|>", "</s>"),
    *("<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]"),
)


def load_tokenizer(file: GgufFile) -> tuple[Any, frozenset[int]]:
    """transformers' tokenizer, None when the file has none, and the ids that end a text.

    Raises CoordinatorError for a kind of tokenizer that is not known, or lists that do not fit together.
    """
    values = {
        key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")
    }
    tokens, kinds = values.get("ggml.tokens"), values.get("ggml.token_type")
    if not tokens:
        return None, _stops(values, [], [])
    kinds = kinds if isinstance(kinds, list) else [1] * len(tokens)
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens) or len(kinds) != len(tokens):
        raise CoordinatorError(f"{file.path} holds a list of tokens that is not whole; download it again.")
    model = values.get("ggml.model")
    try:
        if model == "gpt2":
            tokenizer = _byte_level(file, values, tokens)
        elif model == "llama":
            tokenizer = _sentencepiece(values, tokens)
        else:
            raise CoordinatorError(f"{file.path} has a tokenizer of the kind {model!r}, which is not supported.")
        return _wrapped(tokenizer, values, tokens, kinds), _stops(values, tokens, kinds)
    except CoordinatorError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception for lists that do not fit
        raise CoordinatorError(
            f"The tokenizer in {file.path} can't be read ({type(error).__name__}: {error}); convert the model again."
        ) from error


def _byte_level(file: GgufFile, values: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = values.get("ggml.pre", "gpt-2")
    patterns = _SPLITS.get(name)
    if patterns is None:
        raise CoordinatorError(
            f"{file.path} splits its text as {name!r}, which is not known; known are {', '.join(_SPLITS)}."
        )
    whole = name in _WHOLE_WORDS
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in values.get("ggml.merges", [])]
    # llama.cpp passes over a merge of what is no token; the tokenizers library would refuse the file.
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False, ignore_merges=whole))
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(values: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = values.get("ggml.scores") or [0.0] * len(tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[values.get("ggml.unknown_token_id", 0)]
    model = models.BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix: list[Any] = [normalizers.Prepend("\u2581")] if values.get("ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that sentencepiece's scores stand for: the better the merged token, the earlier."""
    merges = [
        (scores[number], left, right)
        for token, number in vocabulary.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in vocabulary and (right := token[cut:]) in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], vocabulary[merge[1]], vocabulary[merge[2]]))
    return [(left, right) for _, left, right in merges]


def _wrapped(tokenizer: Any, values: dict[str, Any], tokens: list[str], kinds: list[int]) -> Any:
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)

    def named(key: str) -> str | None:
        number = values.get(f"ggml.{key}_token_id")
        return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None

    beginning, ending = named("bos"), named("eos")
    begun = values.get("ggml.model") == "llama" or values.get("ggml.pre") in _BEGUN
    first = values.get("ggml.add_bos_token", begun) and beginning is not None
    last = values.get("ggml.add_eos_token", False) and ending is not None
    if first or last:
        shape = [*([beginning] if first else []), "$A", *([ending] if last else [])]
        specials = [(token, tokens.index(token)) for token in {beginning, ending} - {None}]  # type: ignore[arg-type]
        tokenizer.post_processor = processors.TemplateProcessing(single=shape, special_tokens=specials)
    names = {
        "bos_token": beginning,
        "eos_token": ending,
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
    }
    template = values.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template if isinstance(template, str) and template else None,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def _stops(values: dict[str, Any], tokens: list[str], kinds: list[int]) -> frozenset[int]:
    ids = [values.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = {number for number in ids if isinstance(number, int)}
    found = {token: n for n, token in enumerate(tokens) if kinds[n] == _CONTROL and token in _ENDS}
    if "<|return|>" in found and "<|call|>" in found:
        found.pop("<|end|>", None)  # there it ends a message, not the answer; llama.cpp takes it out too
    return frozenset({*ends, *found.values()})
