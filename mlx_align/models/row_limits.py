"""What a model can compute of tokenised rows: ids that it embeds, lengths that are exact.

mlx reads beyond the end of an embedding without an error, so ids are checked before they reach a
model: once per dataset for training, once per call where rows are scored or completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlx_align.errors import DataError
from mlx_align.models.loading import ModelFolder
from mlx_align.models.model_config import length_limits
from mlx_align.types import TokenIds, TokenizedGroup

# Names of tokens in an error.
_SHOWN = 3


def check_rows(
    folder: ModelFolder, groups: Sequence[TokenizedGroup], extra: int = 0, *, source: str = ""
) -> list[str]:
    """Check that the model embeds every token of some groups and can compute their lengths.

    Args:
        folder: The model.
        groups: The groups.
        extra: Tokens that are sampled after each.
        source: What the longest row is, for an error.

    Returns:
        For each length limit that some rows exceed, a sentence for the user.

    Raises:
        DataError: A token isn't embedded, or a row is longer than the model can be computed.
    """
    check_token_ids(folder, groups)
    return check_lengths(folder, row_lengths(groups, extra), source=source or "the longest row")


def check_token_ids(folder: ModelFolder, groups: Iterable[TokenizedGroup]) -> None:
    """Check that the model embeds every token of some groups.

    Raises:
        DataError: It doesn't; the text names the token, the row and the sizes.
    """
    size = folder.vocab_size
    if not size:  # a multimodal configuration that doesn't say
        return
    for group in groups:
        for ids in (group.prompt, *group.completions):
            if len(ids) and not (ids.min() >= 0 and ids.max() < size):
                raise DataError(f"{group.source}: {_outside(folder, ids, size)}")


def check_lengths(
    folder: ModelFolder, lengths: Sequence[int], *, source: str = "the longest row"
) -> list[str]:
    """Check that rows are within the lengths up to which the model is exact.

    Args:
        folder: The model.
        lengths: Tokens of each row's prompt and longest completion together.
        source: What the rows are, for an error.

    Returns:
        For each limit that some rows exceed, a sentence for the user.

    Raises:
        DataError: A row is longer than the model can be computed.
    """
    remarks: list[str] = []
    for limit in length_limits(folder.config):
        longer = [length for length in lengths if length > limit.tokens]
        if not longer:
            continue
        if limit.refused:
            raise DataError(
                f"{source}: {max(longer)} tokens, {folder.name} can be used up to {limit.tokens}: "
                f"{limit.reason}; lower --max-seq-length"
            )
        remarks.append(
            f"{len(longer):,} of {len(lengths):,} rows are longer than {limit.tokens:,} tokens "
            f"(longest {max(longer):,}): {limit.reason}"
        )
    return remarks


def row_lengths(groups: Iterable[TokenizedGroup], extra: int = 0) -> list[int]:
    """Tokens of each group's prompt and longest completion together, and `extra` more."""
    return [
        len(group.prompt) + max(map(len, group.completions), default=0) + extra for group in groups
    ]


def _outside(folder: ModelFolder, ids: TokenIds, size: int) -> str:
    found = int(ids.min()) if ids.min() < 0 else int(ids.max())
    rows = f"the embedding of {folder.name} has {size:,} rows (ids 0 to {size - 1:,})"
    names = {}
    if folder.tokenizer is not None:
        vocabulary = folder.tokenizer.get_vocab()
        names = {index: token for token, index in vocabulary.items() if index >= size}
    if found not in names:
        return f"token id {found}, but {rows}"
    shown = sorted(names)[:_SHOWN]
    listed = ", ".join(f"{names[index]!r} ({index})" for index in shown)
    more = ", …" if len(names) > len(shown) else ""
    return (
        f"token {names[found]!r} has id {found}, but {rows}; {len(names)} of the tokenizer's "
        f"{len(vocabulary):,} tokens are outside of it ({listed}{more}): use the tokenizer that "
        f"belongs to the model, or resize its embedding (in transformers, "
        f"model.resize_token_embeddings({max(names) + 1}))"
    )
