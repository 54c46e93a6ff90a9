"""The words of the demo stories: people, places, openings, and one table per topic.

A topic is a wish that is made real by work and decided by a turn. Its `things` are what can be
wished for; each brings its own `part` (met while working) and two looks, one for a good turn and
one for a bad one. Clauses are written in lower case without a period, and may use the fields

    {name} {child}            the person and "girl" or "boy"
    {he} {him} {his}          the person's pronouns
    {friend}                  "her aunt", "his teacher"
    {thing} {a_thing} {part}  "kite", "a kite", "thin paper and a long string"
    {look}                    how the thing ends, which follows from thing and turn
    {place} {season} {weather} {daytime} {trait}

`good_turns[i]` and `bad_turns[i]` are two answers to one question (was the oven watched?), and so
are the good and bad openers and reactions at one index: alike in length, they differ in outcome.
"""

from dataclasses import dataclass

__all__ = ["Thing", "Topic"]


@dataclass(frozen=True, slots=True)
class Thing:
    """Something to wish for, what it takes, and how it looks after a good and a bad turn."""

    noun: str
    part: str
    good: str
    bad: str


@dataclass(frozen=True, slots=True)
class Topic:
    """A kind of wish: clauses for sentences two (wishes) to five (results)."""

    name: str
    wishes: tuple[str, ...]
    works: tuple[str, ...]
    good_turns: tuple[str, ...]
    bad_turns: tuple[str, ...]
    results: tuple[str, ...]
    things: tuple[Thing, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words(
    "Anna Bella Clara Daisy Emma Flora Grace Hannah Iris Julia Kate Laura Lily Lucy Maria Mia "
    "Molly Nina Nora Olivia Paula Rosa Ruby Sally Sara Sofia Tina Vera Wendy Zoe"
)
BOYS = _words(
    "Adam Ben Carlos Daniel David Eric Felix Frank George Harry Henry Ivan Jack James Leo Luke "
    "Mark Martin Max Nick Noah Oliver Oscar Paul Peter Robert Sam Simon Thomas Victor"
)
FRIENDS = _words(
    "mother father sister brother grandmother grandfather aunt uncle cousin neighbor teacher friend"
)
SEASONS = _words("spring summer autumn winter")
WEATHERS = _words("sunny cloudy windy rainy foggy calm")
DAYTIMES = _words("morning afternoon evening day")
TRAITS = _words("brave quiet clever cheerful curious gentle shy lively")
PLACES = (
    "in a village",
    "by a wide river",
    "near a dark forest",
    "by the sea",
    "on a farm",
    "in a big city",
    "in a green valley",
    "near the harbor",
    "on a busy street",
    "in a blue house",
    "by the station",
    "on an island",
)

# An empty opener starts the sentence at once; it stands as often as all others together.
OPENINGS = (
    "{name} lived {place}",
    "{name} and {friend} lived {place}",
    "{name} spent the {season} {place}",
    "{name} was a {trait} {child} {place}",
    "a {trait} {child} named {name} lived {place}",
    "every {season}, {name} came to stay {place}",
    "it was {season}, and {name} was {place}",
    "{name} woke up to a {weather} morning {place}",
)
WISH_OPENERS = ("", "", "", "one day, ", "that week, ", "one {weather} {daytime}, ")
WORK_OPENERS = ("", "", "so ", "first, ")
GOOD_TURN_OPENERS = ("", "", "then ", "luckily, ")
BAD_TURN_OPENERS = ("", "", "then ", "sadly, ")
ENDING_OPENERS = ("", "", "at last, ", "finally, ")

GOOD_REACTIONS = (
    "{he} felt very happy",
    "{friend} clapped and cheered",
    "{he} laughed with joy",
    "{friend} was proud of {him}",
    "{he} danced all evening",
    "{friend} smiled at {him}",
)
BAD_REACTIONS = (
    "{he} felt very sad",
    "{friend} sighed and groaned",
    "{he} cried with anger",
    "{friend} was sorry for {him}",
    "{he} sulked all evening",
    "{friend} frowned at {him}",
)

TOPICS = (
    Topic(
        name="baking",
        wishes=(
            "{he} wanted to bake {a_thing} for {friend}",
            "{friend} asked {him} to make {a_thing}",
            "{he} planned to surprise {friend} with {a_thing}",
        ),
        works=(
            "{he} mixed {part} in a bowl",
            "{he} bought {part} at the shop",
            "{he} found {part} in the kitchen",
        ),
        good_turns=(
            "{he} watched the hot oven with great care",
            "{he} followed every step of the recipe",
            "{friend} called {him} when the time was up",
            "the oven kept just the right heat",
        ),
        bad_turns=(
            "{he} fell asleep beside the hot oven",
            "{he} lost the last page of the recipe",
            "{friend} called {him} away for too long",
            "the oven broke and lost its heat",
        ),
        results=(
            "the {thing} came out {look}",
            "{his} {thing} was {look}",
            "what {he} had baked was {look}",
        ),
        things=(
            Thing("honey cake", "honey and soft butter", "golden and sweet", "flat and sticky"),
            Thing("apple pie", "red apples and brown sugar", "crisp and juicy", "cold and soggy"),
            Thing("cherry tart", "ripe cherries and cream", "shiny and red", "cracked and runny"),
            Thing("cheese roll", "yellow cheese and salt", "soft and rich", "hard as a stone"),
            Thing("nut loaf", "chopped nuts and yeast", "tall and light", "heavy and raw"),
            Thing("lemon cake", "fresh lemons and eggs", "fluffy and fresh", "sour and lumpy"),
        ),
    ),
    Topic(
        name="garden",
        wishes=(
            "{he} wanted to grow {a_thing} for {friend}",
            "{friend} asked {him} to grow {a_thing}",
            "{friend} gave {him} a spot for {a_thing}",
        ),
        works=(
            "{he} dug a bed with {part}",
            "{he} brought {part} to the garden",
            "{he} borrowed {part} from the shed",
        ),
        good_turns=(
            "{he} watered the soil every single morning",
            "warm rain and bright sun came in turn",
            "{friend} pulled out all the weeds",
            "{he} kept the goats out",
        ),
        bad_turns=(
            "{he} forgot to water the dry soil",
            "hard frost and strong wind came in turn",
            "{friend} stepped on all the shoots",
            "{he} let the goats in",
        ),
        results=(
            "{his} {thing} was {look}",
            "the {thing} stood there {look}",
            "what {he} had planted was {look}",
        ),
        things=(
            Thing("rose bush", "a rake and thick gloves", "full of pink petals", "all thorns"),
            Thing("tomato plant", "a tall stick and cord", "heavy with fruit", "pale and limp"),
            Thing("pumpkin vine", "a sack of rich earth", "round and orange", "eaten by worms"),
            Thing("sunflower", "striped seeds and a spade", "taller than the roof", "bent in two"),
            Thing("bean plant", "a row of thin poles", "covered in green pods", "full of holes"),
            Thing("pear tree", "a bucket of black dung", "white with blossom", "bare and dead"),
        ),
    ),
    Topic(
        name="workshop",
        wishes=(
            "{he} wanted to build {a_thing} for {friend}",
            "{friend} asked {him} to make {a_thing}",
            "{he} decided to build {a_thing} with {friend}",
        ),
        works=(
            "{he} brought {part} into the workshop",
            "{he} got {part} from the carpenter",
            "{he} laid {part} on the workbench",
        ),
        good_turns=(
            "{he} measured every board two times",
            "{friend} held the saw very straight",
            "the glue had a full night to dry",
            "{he} hammered each nail with patience",
        ),
        bad_turns=(
            "{he} measured none of the boards",
            "{friend} dropped the saw on the floor",
            "the glue had no time at all to dry",
            "{he} hammered each nail in a hurry",
        ),
        results=(
            "the {thing} was {look}",
            "{his} {thing} was {look}",
            "what {he} had built was {look}",
        ),
        things=(
            Thing("chair", "four legs and a seat", "firm and comfortable", "wobbly on its legs"),
            Thing("book shelf", "six wide planks", "straight and strong", "leaning sideways"),
            Thing("bird house", "a small round perch", "home to two robins", "left by every bird"),
            Thing("toy boat", "a mast and a sail", "floating on the pond", "sunk in the mud"),
            Thing("sled", "two smooth runners", "quick on the snow", "stuck in the snow"),
            Thing("wagon", "two axles and some wheels", "rolling down the lane", "without a wheel"),
        ),
    ),
    Topic(
        name="music",
        wishes=(
            "{he} wanted to play the {thing} for {friend}",
            "{friend} asked {him} to learn the {thing}",
            "{he} hoped to play the {thing} like {friend}",
        ),
        works=(
            "{he} began to practice with {part}",
            "{he} borrowed {part} from the school",
            "{he} spent {his} coins on {part}",
        ),
        good_turns=(
            "{he} practiced the tune every night",
            "the crowd sat still and listened",
            "{friend} counted the beat for {him}",
            "{he} knew all of the notes by heart",
        ),
        bad_turns=(
            "{he} skipped the tune every night",
            "the crowd got up and left",
            "{friend} mixed up the beat for {him}",
            "{he} could not read any of the notes",
        ),
        results=(
            "the {thing} sounded {look}",
            "the song of the {thing} was {look}",
            "{his} music sounded {look}",
        ),
        things=(
            Thing("violin", "a thin bow and four strings", "tender and pure", "scratchy and thin"),
            Thing("drum", "two wooden sticks", "steady as thunder", "like falling pots"),
            Thing("flute", "a silver tube", "clear as a bird", "like a kettle"),
            Thing("piano", "black and white keys", "smooth and grand", "jumbled and wrong"),
            Thing("trumpet", "a brass horn and a cloth", "bold and bright", "like a sick goose"),
            Thing("guitar", "a strap and a wooden neck", "warm and mellow", "dull and slack"),
        ),
    ),
    Topic(
        name="lost pet",
        wishes=(
            "{he} looked for the lost {thing} of {friend}",
            "{friend} said that the {thing} had run away",
            "the {thing} of {friend} was missing",
        ),
        works=(
            "{he} went to look with {part}",
            "{he} put {part} by the open door",
            "{he} walked around with {part}",
        ),
        good_turns=(
            "{he} heard a soft sound behind the barn",
            "fresh tracks led {him} along the path",
            "{friend} saw two eyes shine in the dark",
            "a farmer pointed to a warm corner",
        ),
        bad_turns=(
            "{he} heard no sound behind the barn",
            "heavy rain washed the tracks off the path",
            "{friend} saw nothing at all in the dark",
            "a farmer pointed to a cold corner",
        ),
        results=(
            "the {thing} was {look}",
            "they saw the {thing} {look}",
            "the animal was {look}",
        ),
        things=(
            Thing("kitten", "a saucer of milk", "purring on a pillow", "up on a far roof"),
            Thing("puppy", "a leash and a bone", "wagging its tail", "barking far away"),
            Thing("parrot", "seeds and an empty cage", "talking in its cage", "gone over the sea"),
            Thing("rabbit", "a carrot and some hay", "hopping in its hutch", "deep in a burrow"),
            Thing("pony", "a rope and a saddle", "back in its stable", "across the wild hills"),
            Thing("turtle", "fresh lettuce in a box", "asleep in its shell", "lost in the swamp"),
        ),
    ),
    Topic(
        name="journey",
        wishes=(
            "{he} wanted to visit the {thing} with {friend}",
            "{friend} invited {him} to see the {thing}",
            "{he} asked {friend} for a trip to the {thing}",
        ),
        works=(
            "{he} packed {part} for the trip",
            "{he} filled {his} bag with {part}",
            "{he} made sure to bring {part}",
        ),
        good_turns=(
            "the bus came early and drove fast",
            "{he} read the map the right way",
            "{friend} bought two tickets in time",
            "the road was dry and easy to walk",
        ),
        bad_turns=(
            "the bus came late and broke down",
            "{he} read the map the wrong way",
            "{friend} left both tickets at home",
            "the road was wet and hard to walk",
        ),
        results=(
            "the {thing} was {look}",
            "they found the {thing} {look}",
            "the place was {look}",
        ),
        things=(
            Thing("castle", "a book about kings", "open to guests", "locked for the night"),
            Thing("beach", "towels and a ball", "bright with waves", "under a grey tide"),
            Thing("zoo", "peanuts for the monkeys", "alive with lions", "empty of animals"),
            Thing("museum", "paper and a pencil", "full of old statues", "shut for repairs"),
            Thing("waterfall", "boots and a coat", "roaring over the rocks", "behind thick mist"),
            Thing("fair", "a purse of pennies", "loud with games and rides", "already taken down"),
        ),
    ),
    Topic(
        name="sewing",
        wishes=(
            "{he} wanted to sew {a_thing} for {friend}",
            "{friend} needed {a_thing} for the cold months",
            "{he} offered to make {a_thing} for {friend}",
        ),
        works=(
            "{he} chose {part} at the market",
            "{he} took {part} out of a basket",
            "{he} cut and folded {part}",
        ),
        good_turns=(
            "{he} made each stitch small and neat",
            "the needle moved in a straight line",
            "{friend} stood still for the tape",
            "{he} worked slowly under a good lamp",
        ),
        bad_turns=(
            "{he} made each stitch loose and long",
            "the needle snapped in the first line",
            "{friend} would not wait for the tape",
            "{he} worked too fast in the dim light",
        ),
        results=(
            "the {thing} turned out {look}",
            "{his} {thing} was {look}",
            "what {he} had sewn was {look}",
        ),
        things=(
            Thing("coat", "thick wool and buttons", "cozy in the frost", "open at the seams"),
            Thing("cloak", "blue silk and lace", "pretty and flowing", "torn at the hem"),
            Thing("scarf", "two balls of yarn", "long and striped", "tangled in knots"),
            Thing("hat", "green felt and a feather", "stylish and round", "big as a barrel"),
            Thing("quilt", "many little squares", "large and colorful", "missing a corner"),
            Thing("shirt", "white cotton and cuffs", "clean and well cut", "short in the sleeves"),
        ),
    ),
    Topic(
        name="painting",
        wishes=(
            "{he} wanted to paint {a_thing} for {friend}",
            "{friend} asked {him} to draw {a_thing}",
            "{he} tried to paint {a_thing} like {friend}",
        ),
        works=(
            "{he} prepared {part} and a canvas",
            "{he} looked for {part} in the drawer",
            "{he} started with {part}",
        ),
        good_turns=(
            "{he} took {his} time with every brush",
            "the colors dried well in the sun",
            "{friend} lent {him} a fine new brush",
            "{his} hand stayed calm and sure",
        ),
        bad_turns=(
            "{he} spilled water over every brush",
            "the colors ran together in the rain",
            "{friend} bumped against {his} elbow",
            "{his} hand began to shake and slip",
        ),
        results=(
            "the painted {thing} looked {look}",
            "{his} {thing} looked {look}",
            "{his} picture looked {look}",
        ),
        things=(
            Thing("horse", "a pot of chestnut paint", "ready to gallop", "like a fat cow"),
            Thing("ship", "navy ink and chalk", "strong on the ocean", "about to sink"),
            Thing("mountain", "grey and purple paint", "high and majestic", "like a potato"),
            Thing("tiger", "orange and black crayons", "fierce and striped", "like a house cat"),
            Thing("swan", "white chalk and dark ink", "slender and graceful", "like a wet duck"),
            Thing("bridge", "a ruler and brown paint", "arched and solid", "ready to collapse"),
        ),
    ),
    Topic(
        name="saving",
        wishes=(
            "{he} wanted to buy {a_thing} for {friend}",
            "{he} saw {a_thing} in a shop with {friend}",
            "{friend} wished for {a_thing} from the store",
        ),
        works=(
            "{he} worked and dreamed of {part}",
            "{he} asked the seller about {part}",
            "{he} learned all about {part}",
        ),
        good_turns=(
            "{he} put every penny into a jar",
            "the price in the window went down",
            "{friend} paid the other half of the sum",
            "the seller was honest and kind",
        ),
        bad_turns=(
            "{he} spent every penny on candy",
            "the price in the window went up",
            "{friend} lost the other half of the sum",
            "the seller was greedy and sly",
        ),
        results=(
            "the {thing} was {look}",
            "they found the {thing} {look}",
            "what they wished for was {look}",
        ),
        things=(
            Thing("bicycle", "pedals and a bell", "racing along the street", "rusting in a yard"),
            Thing("telescope", "lenses and planets", "aimed at the stars", "blind in the dark"),
            Thing("watch", "gold hands and a chain", "ticking on a wrist", "stopped at noon"),
            Thing("radio", "an antenna and a dial", "playing the evening news", "silent and dusty"),
            Thing("tent", "ropes and iron pegs", "up in the meadow", "leaking in the woods"),
            Thing("lamp", "oil and a glass shade", "glowing on the desk", "smashed to bits"),
        ),
    ),
    Topic(
        name="contest",
        wishes=(
            "{he} wanted to win the {thing} against {friend}",
            "{friend} urged {him} to enter the {thing}",
            "{he} joined the {thing} because of {friend}",
        ),
        works=(
            "{he} trained hard with {part}",
            "{he} thought of nothing but {part}",
            "{he} spent two months on {part}",
        ),
        good_turns=(
            "{he} slept well before the big event",
            "{friend} shouted a useful hint",
            "{he} stayed ahead from the very start",
            "the judges gave {him} ten points",
        ),
        bad_turns=(
            "{he} caught a fever before the big event",
            "{friend} shouted and confused {him}",
            "{he} fell behind from the very start",
            "the judges took away ten points",
        ),
        results=(
            "the {thing} ended with {look}",
            "{he} left the {thing} with {look}",
            "{he} went home with {look}",
        ),
        things=(
            Thing("running race", "shoes and a steep track", "a gold medal", "a twisted ankle"),
            Thing("chess match", "pawns and queens", "a swift checkmate", "a captured queen"),
            Thing("swimming race", "goggles and a pool", "a new record", "a mouth full of water"),
            Thing("spelling test", "long lists of letters", "no mistake", "a dozen mistakes"),
            Thing("archery cup", "arrows and a target", "a perfect shot", "an arrow in a bush"),
            Thing("ski race", "poles and icy slopes", "a jump over the line", "a crash in a drift"),
        ),
    ),
    Topic(
        name="repair",
        wishes=(
            "{he} wanted to repair the {thing} of {friend}",
            "{friend} asked {him} to mend the {thing}",
            "the {thing} of {friend} did not work",
        ),
        works=(
            "{he} went and fetched {part}",
            "{he} looked over {part}",
            "{he} ordered {part} from a catalog",
        ),
        good_turns=(
            "{he} turned every screw with care",
            "the right tool lay in the top drawer",
            "{friend} explained how it was made",
            "{he} stopped to think before each step",
        ),
        bad_turns=(
            "{he} dropped every screw down a drain",
            "the right tool was nowhere in the drawer",
            "{friend} pulled the wrong lever",
            "{he} lost {his} temper and kicked it",
        ),
        results=(
            "the {thing} was {look}",
            "the old {thing} was {look}",
            "after all that it was {look}",
        ),
        things=(
            Thing("clock", "a spring and two gears", "telling the right hour", "ten minutes slow"),
            Thing("boiler", "a valve and copper pipes", "heating the rooms", "puffing out smoke"),
            Thing("tractor", "a tire and an engine belt", "plowing the field", "dead in a ditch"),
            Thing("doorbell", "wires and a button", "ringing for visitors", "mute at the door"),
            Thing("camera", "film and a shutter", "taking sharp photos", "taking blurred photos"),
            Thing("fountain", "a pump and a hose", "splashing in the park", "choked with leaves"),
        ),
    ),
    Topic(
        name="wildlife",
        wishes=(
            "{he} wanted to see {a_thing} with {friend}",
            "{friend} promised to show {him} {a_thing}",
            "{he} went to look for {a_thing} with {friend}",
        ),
        works=(
            "{he} crept out toward {part}",
            "{he} chose a spot close to {part}",
            "{he} waited for hours beside {part}",
        ),
        good_turns=(
            "{he} kept as still as a stone",
            "{friend} whispered and pointed ahead",
            "the wind blew softly into {his} face",
            "not a twig cracked under {his} feet",
        ),
        bad_turns=(
            "{he} sneezed as loud as a cannon",
            "{friend} yelled and waved ahead",
            "the wind carried {his} smell ahead",
            "a dry twig cracked under {his} feet",
        ),
        results=(
            "the {thing} was {look}",
            "they saw the {thing} {look}",
            "the wild creature was {look}",
        ),
        things=(
            Thing("fox", "a den under the roots", "playing with its cubs", "off through the ferns"),
            Thing("owl", "a hollow oak", "staring from a branch", "away on silent wings"),
            Thing("deer", "a clearing in the pines", "grazing in the grass", "gone into the trees"),
            Thing("whale", "a cliff above the bay", "blowing out water", "diving to the deep"),
            Thing("beaver", "a dam of mud", "gnawing at a log", "hidden in its lodge"),
            Thing("eagle", "a nest on the peak", "feeding its chicks", "a speck in the clouds"),
        ),
    ),
)
