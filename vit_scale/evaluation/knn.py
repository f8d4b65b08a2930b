"""Weighted nearest neighbours: how good features are without training anything.

Each of the k nearest training examples by cosine similarity votes for its class with the weight
exp(similarity / temperature), as in Wu et al. 2018 (arXiv 1805.01978, section 3.4) and DINO (Caron
et al. 2021, arXiv 2104.14294). Predictions are the same for every mesh and number of hosts.
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vit_scale.errors import UserError
from vit_scale.evaluation.intervals import scored
from vit_scale.evaluation.similarity import Bank

K = 20  # DINO's best
TEMPERATURE = 0.07  # Wu et al.'s


class KNN(NamedTuple):
    """The classifier's settings: neighbours, and the temperature of their weights."""

    k: int = K
    temperature: float = TEMPERATURE

    def check(self, examples: int) -> None:
        """Raise UserError where there are fewer training `examples` than neighbours."""
        if not 1 <= self.k <= examples:
            raise UserError(
                f"{self.k} neighbours of {examples:,} training images: k must be from 1 to "
                f"{examples}"
            )
        if not self.temperature > 0:
            raise UserError(f"the temperature {self.temperature} of kNN must be above 0")

    def predict(
        self,
        bank: Float[np.ndarray, "n d"],
        bank_labels: Int[np.ndarray, "n"],
        queries: Float[np.ndarray, "m d"],
        mesh: Mesh,
    ) -> Int[np.ndarray, "m"]:
        """Return the class of each query. Of classes with equal votes, the first is taken.

        Args:
          bank: the features of the training examples, whole on every host.
          bank_labels: their classes.
          queries: the features to classify, whole on every host.
          mesh: the devices, over which the bank is split.

        Raises:
          UserError: k is more than the training examples.
        """
        self.check(len(bank))
        classes = int(bank_labels.max()) + 1
        parts = [
            self._vote(similarities, bank_labels[indices], classes)
            for similarities, indices in Bank(bank, mesh).nearest(queries, self.k)
        ]
        return np.concatenate(parts)

    def _vote(
        self, similarities: Float[np.ndarray, "b k"], labels: Int[np.ndarray, "b k"], classes: int
    ) -> Int[np.ndarray, "b"]:
        # Divided by the largest weight, which at a low temperature is not a finite number.
        differences = similarities.astype(np.float64) - similarities[:, :1]
        votes = np.zeros((len(labels), classes))
        rows = np.arange(len(labels))[:, None]
        np.add.at(votes, (rows, labels), np.exp(differences / self.temperature))
        return votes.argmax(axis=1)

    def evaluate(
        self,
        bank: Float[np.ndarray, "n d"],
        bank_labels: Int[np.ndarray, "n"],
        queries: Float[np.ndarray, "m d"],
        labels: Int[np.ndarray, "m"],
        mesh: Mesh,
    ) -> dict:
        """Return {"accuracy": ..., "n": ..., "interval": ..., "k": ..., "temperature": ...}."""
        hits = int((self.predict(bank, bank_labels, queries, mesh) == labels).sum())
        return scored(hits, len(labels)) | self._asdict()
