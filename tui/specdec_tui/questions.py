"""What a page of the lesson asks in the end, and what there is to remember of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One with three answers to choose from."""

    text: str
    choices: tuple[str, str, str]
    right: int
    """Index of the right one."""
    why: str
    """Said after an answer, whichever it was."""
    recap: str
    """What to remember of the page."""


ONE_PASS = Question(
    "Why may one pass over four tokens cost far less than four passes?",
    ("four tokens need a quarter of the layers", "the weights are read once for all four", "the tokens are shorter"),
    1,
    "Reading the weights takes most of a pass's time, and one reading does for all its tokens.",
    "A pass reads all weights once, for all tokens in it.",
)
DRAFT = Question(
    "What may a draft be?",
    ("only a model with the target's weights", "only a lookup", "anything that guesses tokens"),
    2,
    "A wrong guess costs time and no more, as page 8 shows: anything may guess. A lookup names one token for sure: q is 1.",
    "A draft is anything small that guesses the next k tokens.",
)
READS = Question(
    "What does the target's pass say about three guesses?",
    ("a distribution p at each of their places, and after the last", "yes or no to all three", "only the next token"),
    0,
    "It reads all three at once, and says at each place what it would have said there itself.",
    "One pass of the target gives p at every place of the draft.",
)
KEPT = Question(
    "p is 0.6 and q is 0.3. How often is the guess rejected?",
    ("four times in ten", "half of the time", "never"),
    2,
    "p/q is 2, so min(1, p/q) is 1: it is kept for sure.",
    "p ≥ q: always kept, because the target wants it at least as often as it is guessed.",
)
THROWN = Question(
    "q is 0.8, p is 0.2, and u is 0.1. What happens?",
    ("rejected: p is below q", "kept: u is below p/q, which is 0.25", "rejected: u is below p"),
    1,
    "It is guessed four times as often as the target wants it, so one time in four it is kept.",
    "p < q: kept with chance p/q, so that it does not come too often.",
)
LEFT = Question(
    "The second of five guesses is rejected. What about the other three?",
    (
        "they are untested: dropped, and nothing is learnt of them",
        "they are tested too",
        "the next cycle begins with them",
    ),
    0,
    "They stood on a token that is not there. In its place comes one drawn from max(0, p − q).",
    "A rejection ends the cycle with a token from what is left of p; guesses after it are untested.",
)
BONUS = Question(
    "k is 3, and all three are kept. How many tokens does the cycle give?",
    ("3", "4", "6"),
    1,
    "The pass has read them all, so it says what comes after the last, too.",
    "All kept: a bonus token from the same pass, so k + 1 in all.",
)
PARTS = Question(
    "A token has q above p. How much of p must its corrections add?",
    ("nothing: kept guesses alone make p", "q − p", "half of p"),
    0,
    "It is guessed and then kept with chance q · p/q, which is p. Corrections go only where q had too little.",
    "Kept guesses give min(p, q), corrections the rest of p: together p, whatever q is.",
)
CARELESS = Question(
    "Why is drawing again from p after a rejection wrong?",
    (
        "it takes another pass",
        "p has to be warmed up",
        "kept guesses have given a part of p already, and would be counted twice",
    ),
    2,
    "What the draft likes would come too often. Only what is still missing of p may be drawn.",
    "Drawing again from p is what is easily got wrong: the text is then not the target's.",
)
BRANCHES = Question(
    "What is the second guess for a place tested against?",
    ("p, as the first was", "what the first one's rejection has left of p", "the first guess's q"),
    1,
    "Against p again it would get what the first has had its turn for: the text would not be the target's.",
    "Of guesses for one place each is tested against what is left of p.",
)
COUNTED = Question(
    "Of ten drafted tokens the fourth is rejected. Which are acceptance rate and α?",
    ("3/4 and 3/10", "3/10 and 3/4", "both 4/10"),
    1,
    "Three of ten were kept. Four were tested, and three of them kept.",
    "Acceptance rate counts all drafted tokens, α only tested ones.",
)
BEST_K = Question(
    "When is a larger k worth it?",
    ("when more guesses are kept, or guessing is cheaper", "when the text is longer", "always: more is better"),
    0,
    "One guess more brings its chance to be reached and kept, and costs a draft step and a wider pass.",
    "The best k weighs what one guess more brings against what it costs.",
)
LOSES = Question(
    "When is plain decoding best?",
    ("at temperature 0", "when the target is large", "when guesses cost more time than the kept ones save"),
    2,
    "Then k 0 is best, and specdec switches drafts off and says so.",
    "It loses where few guesses are kept, or where guesses and wider passes are dear.",
)
