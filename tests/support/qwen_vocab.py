"""The real Qwen2-VL tokenizer, built from the BPE ranks in the PyPI package `dashscope`.

No test downloads a model: resources/qwen.tiktoken holds the 151,643 byte-level tokens in rank order. Merges follow from
the ranks alone: the pair that makes a token is what remains of it after merging with only the lower ranks. The package
is located without importing it, which is slow.
"""

import base64
import importlib.util
import json
from pathlib import Path

# ids from 151643 on, in this order
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]


def ranks_file() -> Path | None:
    """Path of qwen.tiktoken, or None without dashscope."""
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    return None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Map token bytes to ranks."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`: its bytes merged by lower ranks until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= limit:
            raise ValueError(f"{token!r} is not reachable by merges")
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """GPT-2's printable character for each byte, as in byte-level BPE files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters


def byte_tokenizer():
    """A small Qwen2 tokenizer with one token per byte, followed by the special tokens."""
    from transformers import AddedToken, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab={letter: byte for byte, letter in sorted(byte_letters().items())},
        merges=[],
        eos_token="<|im_end|>",
        padding_side="left",
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True)
    return tokenizer


def write_folder(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json as in Qwen2-VL's hub folder."""
    path = ranks_file()
    if path is None:
        raise FileNotFoundError("qwen.tiktoken: install dashscope (in the dev extra)")
    ranks = read_ranks(path)
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {spell(token): rank for token, rank in ranks.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "".join(f"{spell(left)} {spell(right)}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")
    added = {
        str(len(ranks) + i): {
            **{"content": token, "special": True},
            **{"lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
        "padding_side": "left",
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
