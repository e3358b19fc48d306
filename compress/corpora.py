"""The former address of `paredown.compress.text.corpora`, kept for scripts."""

from paredown.compress.text.corpora import load_corpus

__all__ = ["load_corpus"]
