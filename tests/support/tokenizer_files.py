"""Small tokenizer.json files with special tokens."""

from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner
from tokenizers.processors import TemplateProcessing

from megatron_ray.data.tokenizer import Tokenizer


def byte_tokenizer(
    *special: str, ordinary: tuple[str, ...] = (), begin: str | None = None
) -> str:
    """Ids 0..255 are the bytes, then come the special tokens, then ordinary added ones.

    `begin` is the token that the template puts before every text.
    """
    made = Inner.from_str(Tokenizer.of_bytes().to_json())
    plain = Inner(made.model)
    plain.pre_tokenizer = made.pre_tokenizer
    plain.decoder = made.decoder
    plain.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    plain.add_tokens([AddedToken(name, normalized=False) for name in ordinary])
    if begin is not None:
        plain.post_processor = TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, plain.token_to_id(begin))],
        )
    return str(plain.to_str())
