"""Do patches of the same word lie together? ``python -m lst.evaluate.word_embeddings CHECKPOINT``

Every word of a speech dataset that aligned patching makes a patch of its own gives one vector: what
the global transformer reads of it. Of the chosen words' vectors (paper, section 5 and Fig. 4)::

    within      mean cosine of two vectors of the same word
    between     mean cosine of two vectors of different words
    silhouette  mean of (b − a) / max(a, b), a and b a vector's mean cosine distance to its own
                word's other vectors and to the nearest other word's (Rousseeuw 1987)

and a t-SNE picture, coloured by category.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from lst.data.batch import PlanConfig, pack_documents
from lst.data.interleave import record_document, stable_rng
from lst.data.patching import Aligned
from lst.data.records import Dataset, Record
from lst.errors import UserError, run_command
from lst.files import Location, make_folder, replacing, write_json
from lst.model import LanguageModel
from lst.strict_json import read_json
from lst.train.checkpoint import load_model
from lst.train.corpus import made_with
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = ["CATEGORIES", "Clusters", "choose_words", "clusters", "word_embeddings"]

#: Words of the picture, where the user names no others: common ones, and some of the demo's.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "pronouns": ("he", "she", "they", "him", "her"),
    "family": ("grandmother", "grandfather", "father", "mother", "brother", "sister", "uncle"),
    "places": ("station", "harbor", "street", "river", "sea", "house", "bridge", "island"),
    "times": ("summer", "spring", "morning", "evening", "months", "week"),
    "feelings": ("proud", "sorry", "happy", "sad", "joy", "anger"),
    "voices": ("laughed", "cried", "sighed", "groaned", "cheered", "clapped"),
}
PUNCTUATION = ".,!?;:\"'()[]-"


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """How closely the vectors of each word lie together, by cosine."""

    num_words: int  # different ones
    num_vectors: int
    within: float
    between: float
    silhouette: float


def word_embeddings(
    model: LanguageModel,
    records: Iterable[Record],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    plan: PlanConfig,
    *,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, list[str]]:
    """The (n, d_global) float32 patch vectors of all aligned words, and the n words, lower case.

    Raises:
        UserError: no record has units and aligned words, or the model makes no patches.
    """
    if not plan.local:
        raise UserError("expected a model with patches, got a token-level one")
    rows: list[np.ndarray] = []
    words: list[str] = []
    read: list[torch.Tensor] = []
    # Whatever the model, what its global transformer is given is a row for every patch.
    hook = model.get_submodule("global_transformer").register_forward_pre_hook(
        lambda _, given: read.append(given[0])
    )
    try:
        for record in records:
            if record.units is None or not record.words:
                continue
            rng = stable_rng(record.id)  # asked for, and not used without noise
            document = record_document(record, vocabulary, tokenizer, rng, "speech")
            batch = pack_documents([document], vocabulary, Aligned(), plan).to(device)
            with torch.no_grad():
                model.logits(batch)
            first = document.aligned[:, 0]
            patches = batch.layout.patch_ids.cpu()[torch.from_numpy(first).long()].long()
            rows.append(read.pop().float().cpu()[patches].numpy())
            spoken = [word for word in record.words if word.start < word.stop]
            words += [word.word.lower().strip(PUNCTUATION) for word in spoken]
    finally:
        hook.remove()
    if not rows:
        raise UserError("expected speech with aligned words, got none")
    return np.concatenate(rows), words


def choose_words(
    words: Sequence[str], categories: Mapping[str, Sequence[str]], *, least: int
) -> dict[str, str]:
    """Category by word, of those that are spoken at least ``least`` times.

    Raises:
        UserError: fewer than two words are left.
    """
    counts = Counter(words)
    chosen = {
        word: category
        for category, members in categories.items()
        for word in members
        if counts[word] >= least
    }
    if len(chosen) < 2:
        raise UserError(
            f"expected two words or more that are spoken {least} times, got {len(chosen)} of "
            f"{sum(map(len, categories.values()))}; the most frequent: "
            f"{', '.join(word for word, _ in counts.most_common(10))}"
        )
    return chosen


def clusters(vectors: np.ndarray, words: Sequence[str]) -> Clusters:
    """Measure ``vectors`` (n, d), one for each of ``words``: two different ones at least, each
    spoken twice at least."""
    try:
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise UserError("scikit-learn is needed: pip install 'lst[speech]'") from None
    names, labels = np.unique(np.asarray(words), return_inverse=True)
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    # Σ of cosines over all pairs of a set is |Σ vectors|², with a 1 for each vector with itself.
    sums = np.zeros((len(names), unit.shape[1]))
    np.add.at(sums, labels, unit)
    sizes = np.bincount(labels)
    same, same_pairs = (sums**2).sum() - len(unit), (sizes * (sizes - 1)).sum()
    every, every_pairs = (sums.sum(0) ** 2).sum() - len(unit), len(unit) * (len(unit) - 1)
    return Clusters(
        num_words=len(names),
        num_vectors=len(unit),
        within=float(same / same_pairs),
        between=float((every - same) / (every_pairs - same_pairs)),
        silhouette=float(silhouette_score(unit, labels, metric="cosine")),
    )


def draw(vectors: np.ndarray, words: Sequence[str], chosen: Mapping[str, str], path: Path) -> None:
    """A t-SNE picture of ``vectors`` (n, d): a colour for each category, a name on each word."""
    try:
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError(
            "matplotlib and scikit-learn are needed: pip install 'lst[plots,speech]'"
        ) from None
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(metric="cosine", perplexity=perplexity, random_state=0).fit_transform(vectors)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots()
    spoken = np.asarray(words)
    for color, category in enumerate(dict.fromkeys(chosen.values())):
        members = [word for word in chosen if chosen[word] == category]
        at = places[np.isin(spoken, members)]
        axes.scatter(
            at[:, 0], at[:, 1], s=12, color=f"C{color}", alpha=0.6, label=category, linewidths=0
        )
        for word in members:
            axes.annotate(word, np.median(places[spoken == word], axis=0), fontsize=8, ha="center")
    axes.legend()
    axes.set(xticks=[], yticks=[], title="patch embeddings of words, t-SNE by cosine")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# --- python -m lst.evaluate.word_embeddings -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WordEmbeddingsConfig:
    """Measure and draw the patch embeddings of spoken words."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, or a pretrained folder."""
    dataset: str | None = None
    """Of speech; None: valid/speech of the corpus trained on."""
    out: Path | None = None
    """A folder for word_embeddings.json and .png; None: the checkpoint's own."""
    categories: Path | None = None
    """A file of JSON, {"category": ["word", …], …}; None: common words."""
    least: int = 4
    """Times that a word must be spoken."""
    device: str = "cpu"
    """Where the model runs."""

    def __post_init__(self) -> None:
        if self.least < 2:
            raise UserError(f"--least: expected 2 or more, got {self.least}")


def read_categories(path: Path) -> dict[str, list[str]]:
    """Raises UserError where the file is not ``{"category": ["word", …], …}``."""
    values = read_json(path)
    if not isinstance(values, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in values.values()
    ):
        raise UserError(f'{path}: expected {{"category": ["word", …], …}}, got something else')
    return {category: [word.lower() for word in words] for category, words in values.items()}


def main() -> None:
    config = tyro.cli(WordEmbeddingsConfig, prog="python -m lst.evaluate.word_embeddings")
    categories = CATEGORIES if config.categories is None else read_categories(config.categories)
    model, trained, vocabulary, tokenizer = load_model(config.checkpoint, config.device)
    corpus = Location(trained.data.corpus)
    folder = corpus / "valid" / "speech" if config.dataset is None else Location(config.dataset)
    if not folder.exists():
        raise UserError(
            f"{folder}: expected a dataset of speech, got none; --dataset names another"
        )
    dataset = Dataset.open(folder, **made_with(corpus, tokenizer))
    vectors, words = word_embeddings(
        model.eval(),
        dataset.read(),
        vocabulary,
        tokenizer,
        trained.model.plan(),
        device=config.device,
    )
    chosen = choose_words(words, categories, least=config.least)
    kept = np.array([word in chosen for word in words])
    vectors, words = vectors[kept], [word for word in words if word in chosen]
    found = clusters(vectors, words)
    out = config.out or config.checkpoint
    make_folder(out)
    write_json(out / "word_embeddings.json", {**asdict(found), "words": chosen})
    draw(vectors, words, chosen, out / "word_embeddings.png")
    print(
        f"{found.num_vectors} vectors of {found.num_words} words: cosine within a word "
        f"{found.within:.2f}, between words {found.between:.2f}, silhouette {found.silhouette:.2f}"
        f"\nwritten to {out}/word_embeddings.json and .png"
    )


if __name__ == "__main__":
    run_command(main)
