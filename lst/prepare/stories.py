"""Seeded five-sentence stories and balanced questions about their endings, for the demo corpus.

A story is a scene, a thing and a turn. The scene says who wishes, where, for whom and in which
words; the thing is what is wished for; the turn is good or bad. The last sentence follows from
thing and turn, and says it twice: by how the thing looks and by how somebody takes it.

    Ivan was a brave boy who lived on a green island. One day, his aunt asked him to plant a
    sunflower. So he dug a bed with striped seeds and a spade. He forgot to water the dry soil.
    In the end, the sunflower by the fence was bent in two, and he felt sad and tired.

Held-out stories come in families: one scene told four times, with two things and two turns. What
is right in one member is wrong in another, so every question has mirrors in which the same
endings stand in the same order and another one is right: who sees only the endings is at chance,
exactly. Two families with the same pronouns and different topics make a block.

    member     a0           a1           a2           a3          (b0 … b3: the other topic)
    facts   (X, good)    (Y, good)    (X, bad)     (Y, bad)       (bit 0: thing; bit 1: turn)

Training and held-out stories share names, places, things and clauses, but no scene: a combination
of topic, person, friend and place belongs to one of them for good, whatever the seed.
"""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lst.errors import UserError
from lst.prepare import story_words as words
from lst.prepare.story_words import Thing, Topic

__all__ = ["BLOCK_SIZE", "Story", "StoryQuestion", "Task", "generate_stories", "story_questions"]

Task = Literal["storycloze", "topicstorycloze", "hellaswag"]

FAMILY_SIZE = 4  # two things × two turns
BLOCK_SIZE = 2 * FAMILY_SIZE
HELD_OUT_SHARE = 10  # one scene in ten is never trained on


@dataclass(frozen=True, slots=True)
class Story:
    """Five sentences, each ending in a period, with one blank between words."""

    id: str
    sentences: tuple[str, str, str, str, str]
    topic: str

    @property
    def prompt(self) -> str:
        """The first four sentences."""
        return " ".join(self.sentences[:4])

    @property
    def ending(self) -> str:
        """The last sentence."""
        return self.sentences[4]

    @property
    def text(self) -> str:
        """All five sentences."""
        return " ".join(self.sentences)


@dataclass(frozen=True, slots=True)
class StoryQuestion:
    """Which of the endings follows from the prompt: ``endings[answer]``."""

    id: str
    task: Task
    prompt: str
    endings: tuple[str, ...]
    answer: int


def generate_stories(seed: int, count: int, *, held_out: bool = False) -> Iterator[Story]:
    """Tell ``count`` distinct stories, the same ones for the same seed on every machine.

    Args:
        seed: Another seed gives other stories, never of the other side of the split.
        count: Number of stories. Held-out stories come in whole blocks of ``BLOCK_SIZE`` = 8.
        held_out: Tell scenes that no training story tells, in the order a0 … a3, b0 … b3.

    Raises:
        UserError: ``count`` is negative, or cuts a held-out block.
    """
    if count < 0 or (held_out and count % BLOCK_SIZE):
        expected = f"a multiple of {BLOCK_SIZE}" if held_out else "0 or more"
        raise UserError(f"generate_stories: expected count to be {expected}, got {count}")
    return itertools.islice(_held_out_stories(seed) if held_out else _training_stories(seed), count)


def story_questions(stories: Iterable[Story], seed: int) -> list[StoryQuestion]:
    """Ask three questions about every held-out story.

    - ``storycloze``: the wrong ending is a relative's: the same scene with another thing, another
      turn, or both (drawn per family).
    - ``topicstorycloze``: the wrong ending is that of the same member of the block's other family.
      Endings name nobody and both families share their pronouns, so only the topic, the thing
      and the friend can tell.
    - ``hellaswag``: the four endings of the family.

    Within each task every ending is right once for every time that it is wrong (three times in
    ``hellaswag``), and the right answer stands at each position equally often.

    Raises:
        UserError: The stories are not whole blocks from ``generate_stories(held_out=True)``.
    """
    rng = random.Random(f"questions/{seed}")
    questions: list[StoryQuestion] = []
    for families in _blocks(stories):
        for family, others in zip(families, reversed(families), strict=True):
            flip = rng.choice((1, 2, 3))  # of the member's bits: thing, turn, or both
            order = rng.sample(range(FAMILY_SIZE), FAMILY_SIZE)
            for member, story in enumerate(family):
                relative, stranger = family[member ^ flip], others[member]
                questions += (
                    _question("storycloze", story, sorted((story, relative), key=_story_id)),
                    _question("topicstorycloze", story, sorted((story, stranger), key=_story_id)),
                    _question("hellaswag", story, [family[index] for index in order]),
                )
    return questions


def _question(task: Task, story: Story, options: list[Story]) -> StoryQuestion:
    return StoryQuestion(
        id=f"{task}-{story.id}",
        task=task,
        prompt=story.prompt,
        endings=tuple(option.ending for option in options),
        answer=options.index(story),
    )


def _story_id(story: Story) -> str:
    return story.id


def _blocks(stories: Iterable[Story]) -> list[tuple[list[Story], list[Story]]]:
    """Gather the two families of each block, by id."""
    members: dict[str, dict[str, Story]] = {}
    for story in stories:
        block, _, member = story.id.rpartition("-")
        members.setdefault(block, {})[member] = story
    expected = [f"{family}{member}" for family in "ab" for member in range(FAMILY_SIZE)]
    blocks = []
    for block, found in members.items():
        if sorted(found) != expected:
            raise UserError(
                f"story_questions: expected held-out stories {block}-a0 … {block}-b3, "
                f"got only {', '.join(sorted(found))}"
            )
        block_stories = [found[member] for member in expected]
        blocks.append((block_stories[:FAMILY_SIZE], block_stories[FAMILY_SIZE:]))
    return blocks


@dataclass(frozen=True, slots=True)
class _Scene:
    """All that the members of a family share. The clauses keep their fields unfilled."""

    topic: Topic
    child: str
    name: str
    friend: str
    place: str
    season: str
    weather: str
    daytime: str
    trait: str
    opening: str
    wish: str
    work: str
    turn_opener: int
    turn: int
    result: str
    reaction: int

    @property
    def held_out(self) -> bool:
        """Whether the scene belongs to the held-out side; a fact of the scene alone."""
        key = "/".join((self.topic.name, self.name, self.friend, self.place))
        digest = hashlib.sha256(key.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def _draw_scene(rng: random.Random, topic: Topic, child: str) -> _Scene:
    return _Scene(
        topic=topic,
        child=child,
        name=rng.choice(words.GIRLS if child == "girl" else words.BOYS),
        friend=rng.choice(words.FRIENDS),
        place=rng.choice(words.PLACES),
        season=rng.choice(words.SEASONS),
        weather=rng.choice(words.WEATHERS),
        daytime=rng.choice(words.DAYTIMES),
        trait=rng.choice(words.TRAITS),
        opening=rng.choice(words.OPENINGS),
        wish=rng.choice(words.WISH_OPENERS) + rng.choice(topic.wishes),
        work=rng.choice(words.WORK_OPENERS) + rng.choice(topic.works),
        turn_opener=rng.randrange(len(words.GOOD_TURN_OPENERS)),
        turn=rng.randrange(len(topic.good_turns)),
        result=rng.choice(words.ENDING_OPENERS) + rng.choice(topic.results),
        reaction=rng.randrange(len(words.GOOD_REACTIONS)),
    )


def _tell(scene: _Scene, thing: Thing, good: bool) -> tuple[str, str, str, str, str]:
    """Fill in the clauses of a scene for one thing and one turn."""
    if good:
        openers, turns = words.GOOD_TURN_OPENERS, scene.topic.good_turns
        reactions = words.GOOD_REACTIONS
    else:
        openers, turns = words.BAD_TURN_OPENERS, scene.topic.bad_turns
        reactions = words.BAD_REACTIONS
    he, him, his = ("she", "her", "her") if scene.child == "girl" else ("he", "him", "his")
    fields = {
        "name": scene.name,
        "child": scene.child,
        "he": he,
        "him": him,
        "his": his,
        "friend": f"{his} {scene.friend}",
        "thing": thing.noun,
        "a_thing": f"{'an' if thing.noun[0] in 'aeiou' else 'a'} {thing.noun}",
        "part": thing.part,
        "look": thing.good if good else thing.bad,
        "place": scene.place,
        "season": scene.season,
        "weather": scene.weather,
        "daytime": scene.daytime,
        "trait": scene.trait,
    }

    def sentence(clause: str) -> str:
        filled = clause.format_map(fields)
        return f"{filled[0].upper()}{filled[1:]}."

    return (
        sentence(scene.opening),
        sentence(scene.wish),
        sentence(scene.work),
        sentence(openers[scene.turn_opener] + turns[scene.turn]),
        sentence(f"{scene.result}, and {reactions[scene.reaction]}"),
    )


def _training_stories(seed: int) -> Iterator[Story]:
    rng = random.Random(f"training/{seed}")
    told: set[tuple[str, ...]] = set()
    while True:
        scene = _draw_scene(rng, rng.choice(words.TOPICS), rng.choice(("girl", "boy")))
        sentences = _tell(scene, rng.choice(scene.topic.things), rng.random() < 0.5)
        if scene.held_out or sentences in told:
            continue
        yield Story(f"train-{seed}-{len(told):06d}", sentences, scene.topic.name)
        told.add(sentences)


def _held_out_stories(seed: int) -> Iterator[Story]:
    rng = random.Random(f"held-out/{seed}")
    told: set[tuple[str, ...]] = set()
    num_blocks = 0
    while True:
        topics = rng.sample(words.TOPICS, len(words.TOPICS))  # each topic once per round
        for topic_a, topic_b in zip(topics[::2], topics[1::2], strict=True):
            child = "girl" if num_blocks % 2 else "boy"
            for family, topic in (("a", topic_a), ("b", topic_b)):
                for member, sentences in enumerate(_draw_family(rng, topic, child, told)):
                    story_id = f"heldout-{seed}-{num_blocks:06d}-{family}{member}"
                    yield Story(story_id, sentences, topic.name)
            num_blocks += 1


def _draw_family(
    rng: random.Random, topic: Topic, child: str, told: set[tuple[str, ...]]
) -> list[tuple[str, str, str, str, str]]:
    """Draw a held-out scene that is new and tell it four times; note what is told in ``told``."""
    while True:
        scene = _draw_scene(rng, topic, child)
        things = rng.sample(topic.things, 2)
        family = [_tell(scene, thing, good) for good in (True, False) for thing in things]
        if scene.held_out and told.isdisjoint(family):
            told.update(family)
            return family
