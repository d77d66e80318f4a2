"""The gold reward of the studies on the stories model: a fixed rule, true by definition."""

import re
from collections.abc import Sequence
from typing import Any

HAPPY = {
    *("happy", "smiled", "laughed", "fun", "love", "loved", "kind", "nice", "good", "great"),
    *("friend", "friends", "play", "played", "hugged", "proud", "excited", "beautiful"),
}
SAD = {
    *("sad", "cried", "scared", "angry", "hurt", "bad", "mean", "lost", "fell", "broke", "dark"),
    *("afraid", "alone", "sick", "mad", "worried", "no", "not"),
}
MOST_MOOD = 3


def rule(prompt: str, text: str) -> float:
    """Mood, speech, the hero and variety of a story's beginning.

    Happy words minus sad ones (at most 3 either way) count 1 each, direct speech 1.5, the name of
    the prompt's hero 1, and the share of different words 6.
    """
    words = re.findall(r"[a-z']+", text.lower())
    mood = sum(word in HAPPY for word in words) - sum(word in SAD for word in words)
    named = any(name.lower() in words for name in re.findall(r"[A-Z]\w+", prompt))
    variety = len(set(words)) / max(len(words), 1)
    return max(-MOST_MOOD, min(MOST_MOOD, mood)) + 1.5 * ('"' in text) + named + 6 * variety


def gold(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The rule as a reward function of `mlx-align`."""
    return [rule(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
