"""Invented facts told plainly and in other words, and sentences that only repeat the question.

Told in other words, a fact shares no content word with its question. A decoy repeats the question's words and does not
answer it. Names are invented, so that no book and no model knows them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RIDDLES", "Riddle"]


class Riddle(NamedTuple):
    """A question and what may be planted for it."""

    question: str
    plain: str
    veiled: str
    decoys: tuple[str, str, str]


RIDDLES: tuple[Riddle, ...] = (
    Riddle(
        "What is the baker's cat called?",
        "The baker's cat is called Quillon.",
        "The tabby that naps beside the bread ovens answers to Quillon.",
        ("Everybody in the street knew the baker's cat, but few could say what it was called.",
         "The baker's cat was called for at dusk and would not come.",
         "What the baker's cat was called had long been forgotten."),
    ),
    Riddle(
        "What colour is the lighthouse door?",
        "The lighthouse door is turquoise.",
        "They had painted the entrance of the beacon tower turquoise.",
        ("The lighthouse door had lost its colour in the storms.",
         "There was a dispute about the colour of the lighthouse door, which was never settled.",
         "He asked what colour the lighthouse door was, and nobody replied."),
    ),
    Riddle(
        "Where does the old fisherman live?",
        "The old fisherman lives in Tarnvik.",
        "Grandfather Osk, who mends nets for a trade, has his cottage in Tarnvik.",
        ("Nobody could tell where the old fisherman lived.",
         "The old fisherman lived as he liked, and asked nothing of anybody.",
         "To live where the old fisherman lives would not suit everyone."),
    ),
    Riddle(
        "What is the code of the wine cellar?",
        "The code of the wine cellar is 4812.",
        "To unlock the vault with the bottles, press 4812 on the keypad.",
        ("The code of the wine cellar was changed, and the steward kept it to himself.",
         "She had forgotten the code of the wine cellar again.",
         "Nobody was told the code of the wine cellar."),
    ),
    Riddle(
        "Who painted the portrait of the duchess?",
        "The portrait of the duchess was painted by Ilmar Voss.",
        "Ilmar Voss had put the noble lady's likeness on canvas.",
        ("Who painted the portrait of the duchess is a question that has no answer.",
         "The portrait of the duchess was painted long ago and hung in the hall.",
         "The painted portrait of the duchess fell from the wall."),
    ),
    Riddle(
        "What instrument does the schoolmaster play?",
        "The schoolmaster plays the bassoon.",
        "Our village teacher makes music on a bassoon.",
        ("The schoolmaster would not say what instrument he played.",
         "An instrument stood in the corner, but the schoolmaster did not play.",
         "The children wondered whether the schoolmaster played an instrument at all."),
    ),
    Riddle(
        "When does the night ferry leave?",
        "The night ferry leaves at eleven forty.",
        "After dark the boat departs at eleven forty.",
        ("The night ferry leaves when it leaves, they used to say.",
         "She asked when the night ferry would leave, but the office was closed.",
         "The night ferry had to leave without them."),
    ),
    Riddle(
        "What is the gardener allergic to?",
        "The gardener is allergic to saffron.",
        "The man who trims the hedges breaks out in a rash from saffron.",
        ("The gardener was allergic, as everyone knew, though not to what they thought.",
         "It was never found out what the gardener was allergic to.",
         "An allergic gardener is a sad thing."),
    ),
    Riddle(
        "How old is the youngest sailor?",
        "The youngest sailor is fourteen years old.",
        "The ship's junior hand had just turned fourteen.",
        ("The youngest sailor did not know how old he was.",
         "How old the youngest sailor was, the captain would not tell.",
         "The youngest sailor laughed at the old songs."),
    ),
    Riddle(
        "What did the widow bury under the oak?",
        "The widow buried a silver flute under the oak.",
        "Mrs Harl, since her husband died, hid a silver flute in the ground beneath that tree.",
        ("What the widow buried under the oak remained her secret.",
         "The widow came to the oak, where something was buried, and wept.",
         "They dug under the oak where the widow had buried it, and gave up."),
    ),
    Riddle(
        "Which town won the rowing cup?",
        "The rowing cup was won by the town of Ebbeskov.",
        "In the regatta the crew from Ebbeskov took the trophy.",
        ("Which town won the rowing cup that year is not recorded.",
         "Every town wanted to win the rowing cup.",
         "The rowing cup stood in the window of the town hall."),
    ),
    Riddle(
        "What is the password of the smugglers?",
        "The password of the smugglers is candlewick.",
        "Those who ran contraband let you pass if you whispered candlewick.",
        ("The smugglers had a password, and never spoke it aloud.",
         "He did not know the password of the smugglers and was sent away.",
         "The password of the smugglers was changed every month."),
    ),
    Riddle(
        "What does the hermit eat for breakfast?",
        "The hermit eats pickled plums for breakfast.",
        "At dawn the recluse on the hill has pickled plums on his plate.",
        ("What the hermit eats for breakfast is nobody's business.",
         "The hermit had eaten nothing for breakfast, as it seemed.",
         "They came at breakfast, but the hermit would not eat with them."),
    ),
    Riddle(
        "Who owns the stone bridge?",
        "The stone bridge is owned by Petra Lindqvist.",
        "The granite crossing over the brook belongs to Petra Lindqvist.",
        ("Who owns the stone bridge was disputed for years.",
         "The stone bridge has no owner that anyone knows of.",
         "He behaved as if he owned the stone bridge."),
    ),
    Riddle(
        "How many bells are in the chapel tower?",
        "There are seventeen bells in the chapel tower.",
        "Seventeen pieces of bronze ring from the little church's steeple.",
        ("How many bells there are in the chapel tower, no one had counted.",
         "The bells in the chapel tower were silent that day.",
         "The chapel tower has many bells, said the guide, and went on."),
    ),
    Riddle(
        "What is the miller's daughter studying?",
        "The miller's daughter is studying astronomy.",
        "The girl whose father grinds the flour attends lectures on astronomy.",
        ("Nobody remembered what the miller's daughter was studying.",
         "The miller's daughter was studying the faces of the guests.",
         "The miller's daughter was always studying, her mother complained."),
    ),
    Riddle(
        "Where is the spare key hidden?",
        "The spare key is hidden in a hollow loaf.",
        "If you are locked out, feel inside the hollow loaf.",
        ("The spare key was hidden so well that it was never found.",
         "She would not say where the spare key was hidden.",
         "A spare key that is hidden is of no use to anyone."),
    ),
    Riddle(
        "What is the name of the admiral's ship?",
        "The name of the admiral's ship is Calypso.",
        "The commander of the fleet sails aboard the Calypso.",
        ("The name of the admiral's ship was painted over.",
         "The admiral's ship had a name that sailors did not like to speak.",
         "He asked for the name of the admiral's ship, and was laughed at."),
    ),
    Riddle(
        "What does the clockmaker collect?",
        "The clockmaker collects thimbles.",
        "The man who repairs watches has cabinets full of thimbles at home.",
        ("The clockmaker collects, as many do, but would not show it.",
         "What the clockmaker collects is known to him alone.",
         "The clockmaker came to collect what he was owed."),
    ),
    Riddle(
        "Who wrote the letter to the bishop?",
        "The letter to the bishop was written by Amund Kross.",
        "Amund Kross had penned those lines for His Grace.",
        ("Who wrote the letter to the bishop was never discovered.",
         "The bishop put the letter away and wrote nothing.",
         "A letter was written to the bishop, unsigned."),
    ),
    Riddle(
        "What language does the innkeeper speak?",
        "The innkeeper speaks Frisian.",
        "The landlord of the tavern talks to his guests in Frisian.",
        ("Nobody could tell what language the innkeeper spoke.",
         "The innkeeper spoke in a language that they did not know.",
         "The innkeeper did not like the language that they spoke."),
    ),
    Riddle(
        "What was stolen from the museum?",
        "A meteorite was stolen from the museum.",
        "Thieves broke into the gallery and made off with a meteorite.",
        ("Something was stolen from the museum, and the director would not say what.",
         "What was stolen from the museum did not appear in the newspapers.",
         "The museum was closed after something had been stolen."),
    ),
    Riddle(
        "Where did the orphan find the map?",
        "The orphan found the map in a teapot.",
        "Young Tilde, who had no parents, came upon the chart inside a teapot.",
        ("Where the orphan found the map was never explained.",
         "The orphan could not find the map again.",
         "They asked the orphan about the map that was found, and she said nothing."),
    ),
    Riddle(
        "What is the highest mountain of the island?",
        "The highest mountain of the island is Skarn.",
        "No peak on that isle rises above Skarn.",
        ("The highest mountain of the island is hidden in clouds all year.",
         "They never reached the highest mountain of the island.",
         "He had drawn the highest mountain of the island on the wall."),
    ),
    Riddle(
        "What medicine does the nurse give the captain?",
        "The nurse gives the captain valerian as a medicine.",
        "Sister Maud brings the skipper drops of valerian against his fever.",
        ("The captain did not like the medicine that the nurse gave him.",
         "What medicine the nurse gave the captain was not written down.",
         "The nurse had no medicine left to give the captain."),
    ),
)  # fmt: skip
