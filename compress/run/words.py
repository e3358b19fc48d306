"""Word perplexity of the scored texts: which documents are read, and where the figures go."""

from collections.abc import Sequence
from typing import Any

from paredown.compress.numerics.word_perplexity import word_perplexity
from paredown.compress.run.whole import Answers
from paredown.compress.text.corpus import Corpus
from paredown.compress.text.windows import Windows, plain_ids


def documents_of(corpus: Corpus, cut: Windows, tokenizer: Any) -> tuple[str, ...]:
    """The first documents of a text that have together about as many tokens as its windows; none of a text without."""
    if len(corpus.documents) < 2:
        return ()
    chosen, tokens = [], 0
    for document in corpus.documents:
        if tokens >= cut.tokens:
            break
        if document.strip():
            chosen.append(document)
            tokens += len(plain_ids(tokenizer, document))
    return tuple(chosen)


def add_words(
    entries: Sequence[dict[str, Any]], documents: Sequence[Sequence[str]], ours: Answers, theirs: Answers | None
) -> None:
    """Add word perplexity to the entries of those texts whose documents were scored."""
    for i, texts in enumerate(documents):
        if texts:
            before = theirs.likelihoods[i] if theirs else None
            entries[i]["words"] = word_perplexity(ours.likelihoods[i], texts, before)
