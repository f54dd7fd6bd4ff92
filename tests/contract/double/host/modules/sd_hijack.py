"""What the host adds to the model's own text encoder: embeddings that prompts name, and comments."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Embedding:
    """Vectors that stand for one word of a prompt."""

    name: str
    vectors: Tensor
    loaded: bool | None = None

    @property
    def shape(self) -> int:
        return self.vectors.shape[-1]


class EmbeddingDatabase:
    def __init__(self):
        self.word_embeddings: dict[str, Embedding] = {}
        self.expected_shape = -1

    def register_embedding(self, embedding: Embedding, model: Any) -> None:
        self.register_embedding_by_name(embedding, model, embedding.name)

    def register_embedding_by_name(self, embedding: Embedding | None, model: Any, name: str) -> None:
        """Let ``name`` stand for the embedding; for None, take it out."""
        if embedding is None:
            self.word_embeddings.pop(name, None)
        else:
            self.word_embeddings[name] = embedding


class ModelHijack:
    def __init__(self):
        self.embedding_db = EmbeddingDatabase()
        self.comments: list[str] = []


model_hijack = ModelHijack()
