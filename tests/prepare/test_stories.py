"""The demo stories: an ending follows from its story, and alone gives nothing away."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from lst.errors import UserError
from lst.prepare import story_words
from lst.prepare.stories import (
    Story,
    StoryQuestion,
    generate_stories,
    story_questions,
)

TASKS = {"storycloze": 2, "topicstorycloze": 2, "hellaswag": 4}  # number of endings
NUM_TESTED = 1600  # held-out stories whose questions are tried


@pytest.fixture(scope="module")
def training() -> list[Story]:
    return list(generate_stories(0, 20_000))


@pytest.fixture(scope="module")
def held_out() -> list[Story]:
    return list(generate_stories(0, 3 * NUM_TESTED, held_out=True))


@pytest.fixture(scope="module")
def questions(held_out: list[Story]) -> list[StoryQuestion]:
    return story_questions(held_out, seed=0)


def of_task(questions: list[StoryQuestion], task: str) -> list[StoryQuestion]:
    return [question for question in questions if question.task == task]


def words_of(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


# What a story looks like


def test_a_story_is_five_sentences_of_plain_words_one_blank_apart(training, held_out):
    sentence = re.compile(r"[A-Z][a-z]*(,? [A-Za-z]+)*\.")
    for story in training + held_out:
        assert len(story.sentences) == 5
        for text in story.sentences:
            assert sentence.fullmatch(text), text


def test_prompt_and_ending_make_the_text(training):
    for story in training[:100]:
        assert f"{story.prompt} {story.ending}" == story.text
        assert story.text.count(".") == 5


def test_stories_are_short(training):
    lengths = [len(story.text.split()) for story in training]
    assert min(lengths) >= 30
    assert max(lengths) <= 60
    assert 40 <= sum(lengths) / len(lengths) <= 50


def test_the_vocabulary_is_small_and_in_full_use(training):
    vocabulary = Counter(word for story in training for word in words_of(story.text))
    assert 700 <= len(vocabulary) <= 1500
    assert min(vocabulary.values()) >= 30


def test_pronouns_articles_and_people_agree(training):
    for story in training:
        found = set(words_of(story.text))
        girls = found & {name.lower() for name in story_words.GIRLS}
        boys = found & {name.lower() for name in story_words.BOYS}
        others = {"he", "him", "his", "boy"} if girls else {"she", "her", "girl"}
        assert len(girls) + len(boys) == 1, story.text
        assert not found & others, story.text
        assert len(found & set(story_words.FRIENDS)) == 1, story.text
        assert not re.search(r"\b(a [aeio]|an [^aeio])", story.text), story.text


@pytest.mark.parametrize("topic", story_words.TOPICS, ids=lambda topic: topic.name)
def test_good_and_bad_turns_come_in_pairs(topic):
    assert len(topic.good_turns) == len(topic.bad_turns)
    assert len({thing.noun for thing in topic.things}) == len(topic.things) >= 2
    assert all(thing.good != thing.bad for thing in topic.things)


def test_openers_and_reactions_come_in_pairs():
    assert len(story_words.GOOD_TURN_OPENERS) == len(story_words.BAD_TURN_OPENERS)
    assert len(story_words.GOOD_REACTIONS) == len(story_words.BAD_REACTIONS)


# How many there are, and which


def test_a_hundred_thousand_stories_are_distinct():
    assert len({story.text for story in generate_stories(3, 100_000)}) == 100_000


def test_ids_are_unique(training, held_out):
    stories = training + held_out
    assert len({story.id for story in stories}) == len(stories)


def test_stories_are_the_same_in_every_process():
    program = (
        "import json; from lst.prepare.stories import *;"
        "held_out = list(generate_stories(5, 16, held_out=True));"
        "print(json.dumps([[s.id, s.text] for s in [*generate_stories(5, 50), *held_out]]"
        " + [[q.id, q.prompt, q.endings, q.answer] for q in story_questions(held_out, 5)]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())) == 50 + 16 + 3 * 16


def test_a_longer_run_begins_with_a_shorter_one():
    for held_out in (False, True):
        longer = list(generate_stories(1, 48, held_out=held_out))
        assert longer[:16] == list(generate_stories(1, 16, held_out=held_out))


def test_another_seed_tells_other_stories(training):
    other = {story.text for story in generate_stories(1, len(training))}
    assert len(other & {story.text for story in training}) < len(training) / 1000


def test_held_out_stories_are_never_trained_on_whatever_the_seed(held_out):
    texts = {story.text for story in held_out}
    people_and_places = {story.prompt.partition(".")[0] for story in held_out}
    shared_openings = 0
    for seed in range(3):
        for story in generate_stories(seed, 20_000):
            assert story.text not in texts
            shared_openings += story.prompt.partition(".")[0] in people_and_places
    assert shared_openings > 0  # the scene is what is kept apart, not its words


def test_held_out_stories_come_in_whole_blocks():
    with pytest.raises(UserError, match="expected count to be a multiple of 8, got 12"):
        generate_stories(0, 12, held_out=True)
    with pytest.raises(UserError, match="expected count to be 0 or more, got -1"):
        generate_stories(0, -1)
    with pytest.raises(UserError, match=r"expected held-out stories .* got only a0, a1"):
        story_questions(list(generate_stories(0, 8, held_out=True))[:2], seed=0)
    with pytest.raises(UserError, match="expected held-out stories"):
        story_questions(generate_stories(0, 8), seed=0)


# Balance: an ending alone gives nothing away


@pytest.mark.parametrize("task", TASKS)
def test_every_held_out_story_is_asked_about(task, held_out, questions):
    asked = of_task(questions, task)
    for story, question in zip(held_out, asked, strict=True):
        assert question.prompt == story.prompt
        assert question.endings[question.answer] == story.ending
        assert len(set(question.endings)) == TASKS[task]


@pytest.mark.parametrize("task", TASKS)
def test_each_list_of_endings_is_asked_once_for_every_answer(task, questions):
    answers: dict[tuple[str, ...], Counter[int]] = {}
    for question in of_task(questions, task):
        answers.setdefault(question.endings, Counter())[question.answer] += 1
    for counts in answers.values():
        assert len(counts) == TASKS[task]
        assert len(set(counts.values())) == 1


def test_wrong_endings_of_the_same_topic_stay_in_the_scene(held_out, questions):
    by_ending = {(story.id[:-1], story.ending): story for story in held_out}
    for question in of_task(questions, "storycloze") + of_task(questions, "hellaswag"):
        family = question.id.partition("-")[2][:-1]
        assert all((family, ending) in by_ending for ending in question.endings)


def test_wrong_endings_of_another_topic_fit_the_pronouns(held_out, questions):
    topics = {story.ending: story.topic for story in held_out}
    for question in of_task(questions, "topicstorycloze"):
        right, wrong = question.endings[question.answer], question.endings[1 - question.answer]
        assert topics[right] != topics[wrong]
        female = {"she", "her"} & set(words_of(question.prompt))
        assert not set(words_of(wrong)) & ({"he", "him", "his"} if female else {"she", "her"})


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_that_reads_only_endings_is_at_chance(task, questions):
    """Bags of words and bigrams, logistic regression, blocks split into training and test."""
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    asked = of_task(questions, task)
    trained, tested = asked[NUM_TESTED:], asked[:NUM_TESTED]
    bags = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\S+")
    features = bags.fit_transform([ending for q in trained for ending in q.endings])
    labels = [number == q.answer for q in trained for number in range(len(q.endings))]
    classifier = LogisticRegression(max_iter=200).fit(features, labels)

    scores = classifier.decision_function(bags.transform([e for q in tested for e in q.endings]))
    choices = scores.reshape(len(tested), -1).argmax(axis=1)
    accuracy = sum(int(c) == q.answer for c, q in zip(choices, tested, strict=True)) / len(tested)
    chance = 1 / TASKS[task]
    assert abs(accuracy - chance) <= 1.96 * math.sqrt(chance * (1 - chance) / NUM_TESTED) + 0.01


@pytest.mark.parametrize("task", TASKS)
def test_neither_the_longest_nor_the_shortest_ending_is_right_more_often(task, questions):
    asked = of_task(questions, task)
    for measure in (len, lambda ending: -len(ending)):
        right = sum(max(q.endings, key=measure) == q.endings[q.answer] for q in asked)
        assert right == len(asked) / TASKS[task]


# The ending follows from the story


@pytest.fixture(scope="module")
def counter(training: list[Story]) -> Callable[[StoryQuestion], int]:
    """Answers by how the words of an ending have followed the words of a prompt in training.

    An ending's score is the sum over all its pairs with the prompt, of words and bigrams, of their
    pointwise mutual information, counted over the training stories: no order and no learning.
    """
    import numpy as np

    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer

    cues, effects = (
        CountVectorizer(ngram_range=(1, 2), binary=True, min_df=20, token_pattern=r"[a-z]+")
        for _ in range(2)
    )
    prompts = cues.fit_transform([story.prompt for story in training])
    endings = effects.fit_transform([story.ending for story in training])
    together = (prompts.T @ endings).toarray()
    expected = np.outer(prompts.sum(axis=0), endings.sum(axis=0)) / len(training)
    information = np.log((together + 1) / (expected + 1))

    def answer(question: StoryQuestion) -> int:
        weights = (cues.transform([question.prompt]) @ information)[0]
        return int(np.argmax(effects.transform(question.endings) @ weights))

    return answer


@pytest.mark.parametrize("task", TASKS)
def test_a_counter_that_reads_prompt_and_ending_is_nearly_always_right(task, counter, questions):
    asked = of_task(questions, task)[:NUM_TESTED]
    right = sum(counter(question) == question.answer for question in asked)
    assert right / len(asked) > 0.9
