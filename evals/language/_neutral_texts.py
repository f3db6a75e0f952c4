"""Paragraphs about nothing in particular, in many kinds of prose, written for this library."""

from __future__ import annotations

from concept_erasure.evals.texts import NEUTRAL_SENTENCES

__all__ = ["PARAGRAPHS", "neutral_texts"]

PARAGRAPHS: tuple[str, ...] = (
    "To make the soup, cut two onions and a leek into thin rings and let them soften in butter over a low flame. Add "
    "the potatoes, cover everything with water, and leave the pot alone for half an hour. Salt comes last, because "
    "the stock is salty already.",
    "Dear Martha, thank you for the parcel. The jam arrived whole and the scarf fits. We have had rain for nine days, "
    "so the children play in the attic and the dog sleeps under the stove. Write soon and tell us how the new roof is "
    "coming along. Yours, Paul",
    "The function takes a list of numbers and returns the largest difference between two neighbours. If the list has "
    "fewer than two entries, it returns zero. Sorting is not needed, one pass is enough, and the list itself is left "
    "unchanged.",
    "Minutes of the meeting of 4 March. Present: the chair, the treasurer and six members. The accounts for last year "
    "were read and approved. It was agreed that the hall will be painted before summer and that two quotes are to be "
    "obtained. The next meeting takes place on 8 April.",
    "Granite forms when molten rock cools slowly, deep below the surface, so that its crystals have time to grow. Lava "
    "that reaches the air cools quickly and has grains too small to be seen. The same material can therefore look "
    "quite different, depending on where it became solid.",
    "'Is this seat taken?' she asked. The old man moved his hat and shook his head. For a while they watched the "
    "fields go by. 'My brother lives out here,' he said at last. 'Forty cows and no telephone.' She laughed, and "
    "offered him half of her sandwich.",
    "Before you drill, make sure that no pipe or cable runs behind the wall. Mark the height with a pencil, check it "
    "with a level, and start with a thin bit. Blow the dust out of the hole, push the plug in until it is flush, and "
    "turn the screw by hand for the last part.",
    "Unemployment fell slightly in the third quarter, the statistics office said on Tuesday. Most new jobs were in "
    "transport and in health care, while building firms took on fewer people than a year ago. Economists had expected "
    "no change. The figures for the whole year are due in January.",
    "A lease should say who pays for repairs. As a rule the tenant looks after small things, such as a dripping tap, "
    "and the owner after the roof, the walls and the heating. Where the contract is silent, the law of the country "
    "decides, and it is worth asking before signing.",
    "The match was decided in the last ten minutes. The home side had hit the post twice before a long throw found "
    "the captain alone in front of the goal. The visitors protested, but the referee pointed to the centre. With this "
    "win the club moves up to fourth place in the table.",
    "Sleep comes in cycles of about ninety minutes. In the first part of the night the deep phases are long, later "
    "they become shorter and dreams take up more of the time. People who are woken from a deep phase feel dull for a "
    "while, even if they have slept for hours.",
    "My grandmother kept her buttons in a biscuit tin. There were hundreds of them: pearl, brass, horn and glass, and "
    "one as large as a plum that had belonged to a coat nobody remembered. On wet afternoons we sorted them by colour, "
    "and by evening they were all mixed again.",
    "An algorithm that halves the search range at every step needs twenty steps for a million entries. One that looks "
    "at each entry in turn needs half a million on average. For a dozen entries the difference does not matter, and "
    "the simpler one is often faster.",
    "Turn left at the chapel and follow the stream uphill for about two kilometres. After the second wooden bridge "
    "the path divides; keep to the right, where the marks are yellow. The hut is open from June to September and "
    "sells tea, bread and cheese. Allow three hours for the way back.",
    "In 1869 a canal was opened that shortened the sea route between Europe and Asia by thousands of miles. Ships no "
    "longer had to sail around Africa. Ports on the old route lost their trade within a few years, while towns along "
    "the new one grew quickly.",
    "Question: why does bread rise? Answer: yeast feeds on the sugars in the dough and gives off gas. The gas is "
    "caught in a net of gluten, which forms when flour is kneaded with water. In the oven the bubbles grow a little "
    "more, the net sets, and the yeast dies.",
    "Thank you for calling the city library. Our opening hours are ten to six on weekdays and ten to two on Saturdays. "
    "To renew a book, please have your card number ready. For events and readings, press two. To speak to a member of "
    "staff, stay on the line.",
    "The violin has four strings, tuned in fifths, and no frets, so the player has to find every note by ear and by "
    "touch. The bow is strung with horsehair and rubbed with resin. Most of what we hear is not the string itself but "
    "the wooden body, which it sets in motion.",
    "Name: oak table. Age: about sixty years. Size: 180 by 90 centimetres, 76 high. Condition: good, with a few "
    "scratches and one dark ring from a flower pot. The top comes off for transport. To be collected by the end of the "
    "month; price to be agreed.",
    "If x plus three equals ten, then x equals seven, because taking three from both sides leaves them equal. The "
    "same rule holds for products: if four times y equals twenty, then y equals five. What is done to one side has to "
    "be done to the other.",
    "Ants leave a trail of scent when they have found food. Others follow it and add to it on their way home, so the "
    "shortest path, which is walked most often, smells the strongest. When the food is gone nobody renews the trail, "
    "and within minutes it has faded.",
    "The patient, a man of 54, came with a cough that had lasted three weeks. He had no fever and did not smoke. The "
    "chest was clear, and an X-ray showed nothing unusual. He was asked to drink plenty and to come back in a "
    "fortnight if the cough had not gone.",
    "Once there was a miller who owned nothing but a windmill and a grey cat. When the wind dropped for a whole "
    "summer, he sat on the steps and counted his last coins. 'Go down to the river,' said the cat, who had never "
    "spoken before, 'and ask the water.'",
    "We tested four paints on a south-facing wall for two years. The cheapest one had faded after the first summer. "
    "Two of the others kept their colour but began to peel at the edges. Only the lime wash looked as it had on the "
    "first day, although it had to be applied in three coats.",
)


def neutral_texts() -> tuple[str, ...]:
    """Return sentences and paragraphs that belong to no concept of this library, 84 in all."""
    return (*NEUTRAL_SENTENCES, *PARAGRAPHS)
