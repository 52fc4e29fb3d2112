"""SentencePiece models as fast tokenizers with the same ids.

The general converters in transformers assume one normalisation for all models (runs of blanks become one, no leading
blank is added), which changes ids for models trained otherwise. Here the model's own normaliser specification is
followed, and the result is compared with the sentencepiece library on real text before it is used. What has no fast
form is refused: models of words or characters, and user-defined symbols together with an added leading blank, because
a fast tokenizer normalises the text between such symbols part by part.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from modelmill.components.core.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # sentencepiece_model.proto, SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_BLANK = "▁"
# Where conversions go wrong: blanks at the edges and in runs, line ends, rare signs, text that looks like a control.
_PROBES = (
    " ",
    " a",
    "a ",
    "  two  blanks  ",
    "tab\tline\n\nend\n",
    "naïve cafe\u0301 ﬁne Ⅷ",
    "日本語 テスト",
    "👩‍👩‍👧 \u00a0\u2009",
    "</s> <s> <unk>",
    "▁",
)


def convert_sentencepiece(path: Path, texts: Iterable[str]) -> tuple[Tokenizer, dict[str, str | None]]:
    """Fast tokenizer of a `.model` file, and its bos, eos, pad and unk tokens (None where it has none).

    Args:
        path: a SentencePiece model of type BPE or unigram.
        texts: texts on which ids must agree, beside built-in hard cases.

    Raises:
        UserError: not a SentencePiece model, a kind that has no fast form, or ids would differ.
    """
    import sentencepiece

    proto, processor = _read(path), sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    tokenizer = Tokenizer(_model(proto, path))
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer.normalizer = _normalizer(proto)
    # Found in the normalised text, where blanks look as they do in the pieces.
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in user_defined])
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.decoder = _decoder(proto)
    probes = [*_PROBES, *(f"a {piece} b" for piece in user_defined), *texts]
    if proto.trainer_spec.model_type == _UNIGRAM:  # its fast form reads control tokens out of a text that spells them
        probes = [text for text in probes if not any(piece in text for piece in special)]
    _compare(tokenizer, processor, path, probes)
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    return tokenizer, {name: processor.IdToPiece(number) if number >= 0 else None for name, number in ids.items()}


def _read(path: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError

        # The copy in the sentencepiece wheel refuses every protobuf older than the one it was generated with.
        from transformers.utils import sentencepiece_model_pb2_new as schema
    except ImportError:
        raise UserError(f"tokenizer.path: reading {path} needs protobuf; pip install protobuf") from None
    proto: Any = schema.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"tokenizer.path: {path} is not a SentencePiece model; give its tokenizer.json instead")
    return proto


def _model(proto: Any, path: Path) -> models.Model:
    trainer = proto.trainer_spec
    if trainer.treat_whitespace_as_suffix or trainer.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"tokenizer.path: {path} is neither BPE nor unigram with leading blanks; give another model")
    if trainer.model_type == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocabulary,
        _merges(proto, vocabulary),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order SentencePiece applies them: the pair whose union has the best score first."""
    ranked = []
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(proto: Any) -> normalizers.Normalizer:
    """The steps of `normalizer.cc` in their order; blanks are " " only, so `Strip` would take too much."""
    spec, replace = proto.normalizer_spec, normalizers.Replace
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [replace(Regex(r"\A +"), ""), replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_BLANK))
    steps.append(replace(" ", _BLANK))
    if spec.remove_extra_whitespaces:
        steps.append(replace(Regex(rf"{_BLANK}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Decoder:
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _compare(tokenizer: Tokenizer, processor: Any, path: Path, texts: Iterable[str]) -> None:
    tokenizer.encode_special_tokens = True  # SentencePiece reads no control token out of a text
    for text in texts:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, processor.EncodeAsIds(text)
        if ours != theirs:
            first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            shown = processor.IdToPiece(theirs[first]) if first < len(theirs) else "the end"
            problem = f"has no fast form with the same ids (first difference at token {first}, {shown!r})"
            raise UserError(f"tokenizer.path: {path} {problem}; give the tokenizer.json it is published with")
    tokenizer.encode_special_tokens = False
