"""lm-eval's view of a model, with the same tokens before every input as our windows have."""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM, eval_logger
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from paredown.compress.errors import PareError
from paredown.compress.text.windows import plain_ids

if TYPE_CHECKING:
    from torch import Tensor


def rolling_likelihoods(
    model: Any, tokenizer: Any, texts: Sequence[str], prefix: Sequence[int], batch_size: int = 8
) -> list[float]:
    """The log likelihood of each text in nats, every token predicted once, as lm-eval's rolling tasks have it."""
    lm = PrefixedLM(model, deepcopy(tokenizer), batch_size, prefix)
    requests = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=i, metadata=(None, i, 1))
        for i, text in enumerate(texts)
    ]
    return [float(total) for total in lm.loglikelihood_rolling(requests, disable_tqdm=True)]


class PrefixedLM(HFLM):  # type: ignore[misc]
    """A causal model whose every input begins with `prefix`, the special tokens that its tokenizer puts before a text.

    lm-eval by itself loses them where it cuts a long context from the left and in all but the first window of a rolling
    likelihood, and there it has two of them in the first. What a tokenizer adds behind a text is left out. With an empty
    prefix, inputs are those of `HFLM` for a tokenizer without special tokens. Raises PareError for a token that the model
    has no embedding for.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, prefix: Sequence[int]) -> None:
        self.prefix = list(prefix)
        self.rows = model.get_input_embeddings().weight.shape[0]
        # backend, because lm-eval cannot guess it from the model type of a packed checkpoint
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, opened by the prefix unless `add_special_tokens` is False."""
        text = self._text(string)
        return text if add_special_tokens is False else self._opened(text, left_truncate_len)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> "tuple[Tensor, Tensor]":
        """Ids and attention mask of several texts, (texts, longest), each opened by the prefix."""
        rows = [self._opened(self._text(string), left_truncate_len) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each text, every token predicted once, in windows that all begin with the prefix."""
        if not self.prefix:
            return super().loglikelihood_rolling(requests, disable_tqdm)  # type: ignore[no-any-return]
        room = self.max_length - len(self.prefix) + 1  # tokens that one window predicts at most
        owners, windows = [], []
        for i, request in enumerate(requests):
            rolled = get_rolling_token_windows(self._text(request.args[0]), self.prefix[-1], room, 1)
            for context, continuation in map(make_disjoint_window, rolled):
                owners.append(i)
                windows.append((None, [*self.prefix, *context[1:]], continuation))
        totals = [0.0] * len(requests)
        for i, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        fitting = [(key, self._fitted(context, continuation), continuation) for key, context, continuation in requests]
        return super()._loglikelihood_tokens(fitting, disable_tqdm, override_bs)

    def _fitted(self, context: list[int], continuation: list[int]) -> list[int]:
        """The context opened by the prefix, and cut behind it where it is too long for the model."""
        if not self.prefix:
            return context
        if context == [self.prefix_token_id]:  # so lm-eval opens a continuation of nothing
            return self.prefix
        text = context[len(self.prefix) :] if context[: len(self.prefix)] == self.prefix else context
        return self._opened(text, self.max_length + 1 - len(continuation))

    def _opened(self, text: list[int], most: int | None) -> list[int]:
        """The prefix and at most so many tokens with it, the last of the text."""
        room = len(text) if most is None else max(most - len(self.prefix), 0)
        if len(text) > room:
            eval_logger.warning(
                f"A context of {len(text)} tokens exceeds what the model's maximum length ({self.max_length}) leaves for "
                f"it: {len(text) - room} tokens are cut from the left."
            )
        return [*self.prefix, *text[len(text) - min(room, len(text)) :]]

    def _text(self, string: str) -> list[int]:
        """Tokens of a text without its special tokens, also where it spells out those that the prefix has."""
        ids = plain_ids(self.tokenizer, string)
        if ids and max(ids) >= self.rows:
            raise PareError(
                f"the tokenizer gives token {max(ids)}, and the model's embedding has {self.rows} rows: they are not of the "
                "same model. Copy the tokenizer files of this model into its folder."
            )
        repeated = self.prefix and ids[: len(self.prefix)] == self.prefix
        return ids[len(self.prefix) :] if repeated else ids
