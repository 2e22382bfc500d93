"""Load a model's tokenizer, or rebuild it from the metadata of a GGUF file.

It owns finding and rebuilding it; the tokenizers library encodes and decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError, ModelError, ModelNotFound, UnsupportedModel
from longspan.weights.gguf import GGUFCheckpoint
from longspan.weights.json_file import check_size, read_object
from longspan.weights.source import SMALL_FILES, ModelSource, tokenizer_folder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# pre-tokenisation patterns by their name in GGUF files (`tokenizer.ggml.pre`); None is GPT-2's own
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SINGLE_DIGITS = frozenset({"smollm"})
_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3"})  # these add a BOS token unless the file says otherwise


def load_tokenizer(source: ModelSource) -> Any:
    """A transformers fast tokenizer, or None if the model has none.

    Raises `ModelError` for a damaged one, `UnsupportedModel` for a kind that is not known.
    """
    with _naming_files_of(source):
        return _load(source)


def check_template(tokenizer: Any, source: ModelSource) -> None:
    """Raise `ModelError` for a chat template of a tokenizer, or None, that is no Jinja."""
    given = getattr(tokenizer, "chat_template", None)
    for template in given.values() if isinstance(given, dict) else (given,):
        problem = None if template is None else template_problem(template)
        if problem:
            raise ModelError(
                f"{tokenizer_folder(source)}: chat_template={template!r:.80} is no Jinja ({problem}); "
                "correct it, or download the model again"
            )


def template_problem(template: object) -> str | None:
    """Why a text is no chat template; None if it is one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles it, and renders no conversation
    except Exception as error:  # the compiler's exception for what is no text depends on what it is
        line = getattr(error, "lineno", None)
        return f"{type(error).__name__}{f' in line {line}' if line else ''}: {' '.join(str(error).split()):.200}"
    return None


def load_serialised(source: ModelSource) -> str | None:
    """The tokenizer as JSON of the tokenizers library, or None if the model has none. Raises as `load_tokenizer`.

    transformers, whose import takes seconds, is only imported if the model's files need it.
    """
    with _naming_files_of(source):
        return _serialised(source)


@contextmanager
def _naming_files_of(source: ModelSource) -> Iterator[None]:
    """An error of a library within this context becomes a `ModelError` that names the tokenizer's files."""
    try:
        yield
    except (LongspanError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the files are damaged, or need packages; a panic of tokenizers is no `Exception`
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{tokenizer_folder(source)}: its tokenizer cannot be loaded ({said:.300}); "
            "download it again, or use a model whose tokenizer transformers has"
        ) from error


def _serialised(source: ModelSource) -> str | None:
    from tokenizers import Tokenizer

    if isinstance(source.checkpoint, GGUFCheckpoint) and source.tokenizer is None:
        built = _built_from_gguf(source.checkpoint)
    else:
        folder = tokenizer_folder(source)
        if _is_complete(folder):
            built = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            loaded = _load(source)
            built = None if loaded is None else loaded.backend_tokenizer
    if built is None:
        return None
    built.no_padding()
    built.no_truncation()
    return str(built.to_str())


def _is_complete(folder: Path) -> bool:
    """Whether tokenizer.json has every token of the model: tokens can be added in tokenizer_config.json alone."""
    if not (folder / "tokenizer.json").exists():
        return False
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.exists() else {}
    listed = {token["id"] for token in read_object(folder / "tokenizer.json").get("added_tokens", [])}
    return {int(number) for number in config.get("added_tokens_decoder", {})} <= listed


def _load(source: ModelSource) -> Any:
    if isinstance(source.checkpoint, GGUFCheckpoint) and source.tokenizer is None:
        return _from_gguf(source.checkpoint)
    folder = tokenizer_folder(source)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        if source.tokenizer is not None:
            raise ModelNotFound(f"tokenizer={source.tokenizer}: {folder} has no tokenizer; give a folder that has one")
        return None
    for pattern in SMALL_FILES:  # transformers would read a file of any size
        for path in folder.glob(pattern):
            check_size(path)
    from transformers import AutoTokenizer, logging  # importing takes seconds

    logging.set_verbosity_error()  # its warnings advise callers of transformers, as on prompts it takes for too long
    # without an answer transformers asks at the terminal whether it may run code that comes with the model
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _built_from_gguf(file: GGUFCheckpoint) -> Any:
    """A tokenizer of the tokenizers library, or None if the file has none."""
    kind = file.metadata("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"tokenizer.ggml.model={kind} is not supported; supported are gpt2 and llama")
    tokens = file.metadata("tokenizer.ggml.tokens")
    built = _byte_level(file, tokens) if kind == "gpt2" else _sentence_piece(file, tokens)
    kinds = file.metadata("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    _add_control_tokens(built, tokens, kinds)
    return built


def _from_gguf(file: GGUFCheckpoint) -> Any:
    built = _built_from_gguf(file)
    if built is None:
        return None
    from transformers import PreTrainedTokenizerFast

    tokens = file.metadata("tokenizer.ggml.tokens")

    def token(name: str) -> str | None:
        number = file.metadata(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else tokens[number]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = file.metadata("tokenizer.chat_template")
    return tokenizer


def _add_control_tokens(built: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    marked = zip(tokens, kinds, strict=True)
    added = [
        AddedToken(t, special=k == _CONTROL, normalized=False) for t, k in marked if k in (_CONTROL, _USER_DEFINED)
    ]
    built.add_special_tokens([token for token in added if token.special])
    built.add_tokens([token for token in added if not token.special])


def _byte_level(file: GGUFCheckpoint, tokens: list[str]) -> Any:
    """GPT-2's byte-level BPE, with the pre-tokenisation that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    cut = file.metadata("tokenizer.ggml.pre", "default")
    if cut not in _SPLITS:
        raise UnsupportedModel(f"tokenizer.ggml.pre={cut} is not supported; supported are {', '.join(_SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata("tokenizer.ggml.merges", [])]
    built = Tokenizer(models.BPE(_ids(tokens), merges, ignore_merges=cut in _LLAMA3))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut in _SINGLE_DIGITS else []
    pattern = _SPLITS[cut]
    if pattern:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    built.pre_tokenizer = pre_tokenizers.Sequence(steps)
    built.decoder = decoders.ByteLevel()
    bos = file.metadata("tokenizer.ggml.bos_token_id")
    if bos is not None and file.metadata("tokenizer.ggml.add_bos_token", cut in _LLAMA3):
        built.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", None, [(tokens[bos], bos)])
    return built


def _sentence_piece(file: GGUFCheckpoint, tokens: list[str]) -> Any:
    """SentencePiece BPE with byte fallback. Merges are ranked by the scores of the tokens that they produce."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    unknown = file.metadata("tokenizer.ggml.unknown_token_id", 0)
    ids = _ids(tokens)
    merges = _merges_by_score(ids, file.metadata("tokenizer.ggml.scores"))
    built = Tokenizer(models.BPE(ids, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if file.metadata("tokenizer.ggml.add_space_prefix", True) else []
    built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if file.metadata("tokenizer.ggml.add_bos_token", True):
        bos = file.metadata("tokenizer.ggml.bos_token_id", 1)
        built.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", None, [(tokens[bos], bos)])
    return built


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _merges_by_score(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    merges = [
        (scores[number], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, number in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return [(left, right) for *_, left, right in merges]
