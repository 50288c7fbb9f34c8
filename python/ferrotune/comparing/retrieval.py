"""What needs no language model: BM25 over the training records, and TF-IDF with a regression."""

import pickle
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .prompts import Record, answer, question


def libraries() -> tuple[Any, Any, Any]:
    """bm25s, and scikit-learn's TfidfVectorizer and LogisticRegression. Raises ImportError."""
    try:
        import bm25s
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ImportError(f"compare needs {error.name}: pip install 'ferrotune[compare]'") from None
    return bm25s, TfidfVectorizer, LogisticRegression


class Neighbours:
    """BM25 (Robertson and Zaragoza, 2009; bm25s' defaults) over the training records."""

    def __init__(self, train: Sequence[Record]) -> None:
        self._bm25s = libraries()[0]
        self._train = train
        texts = [question(one) for one in train]
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens(texts), show_progress=False)
        self.bytes = len(pickle.dumps((self._index.scores, texts)))

    def _tokens(self, texts: list[str]) -> Any:
        # Without stop words: the texts need not be English.
        return self._bm25s.tokenize(texts, stopwords=None, show_progress=False)

    def nearest(self, records: Sequence[Record], count: int) -> list[list[Record]]:
        """Of each record, the `count` training records that score highest, best first."""
        count = min(count, len(self._train))
        vocabulary = set(self._index.vocab_dict)
        known = self._bm25s.tokenize(
            [question(one) for one in records],
            stopwords=None,
            return_ids=False,
            show_progress=False,
        )
        found: list[list[Record]] = [list(self._train[:count]) for _ in records]
        # A text without a known word is like none of them: it gets the first ones.
        asked = [at for at, words in enumerate(known) if vocabulary.intersection(words)]
        if asked:
            places, _ = self._index.retrieve(
                [known[at] for at in asked], k=count, show_progress=False
            )
            for at, own in zip(asked, places, strict=True):
                found[at] = [self._train[place] for place in own]
        return found


def vote(neighbours: Sequence[Record]) -> str:
    """The commonest label, of equally common ones that of the nearest."""
    counts = Counter(answer(one) for one in neighbours)
    most = max(counts.values())
    return next(answer(one) for one in neighbours if counts[answer(one)] == most)


def regression(
    train: Sequence[Record], test: Sequence[Record], seed: int
) -> tuple[list[str], float, int]:
    """TF-IDF of words with logistic regression: predictions, their seconds, and bytes."""
    _, vectorizer, classifier = libraries()
    words = vectorizer(sublinear_tf=True)
    model = classifier(max_iter=1000, random_state=seed)
    model.fit(words.fit_transform([question(one) for one in train]), [answer(one) for one in train])
    begin = time.perf_counter()
    predicted = model.predict(words.transform([question(one) for one in test]))
    seconds = time.perf_counter() - begin
    return [str(label) for label in predicted], seconds, len(pickle.dumps((words, model)))
