"""The words of the synthetic corpus: nouns by kind, verbs with their forms, adjectives, adverbs.

Held-out sets: ``HELD_OUT_GIFTS`` are things that never are given in a document of the indirect-
object task, ``HELD_OUT_SUBJECTS`` are nouns that never are the subject of a verb; both occur in
other sentences.
"""

import re

GIFTS = (
    "drink book ring letter basket apple hat map key lamp cup coin flower toy cake shirt scarf "
    "watch bottle pencil ticket ball kite drum cookie card painting bracelet necklace towel "
    "blanket pillow jacket glove belt sandwich pear peach lemon melon muffin pie cheese egg spoon "
    "fork plate bowl mug jar box bag purse wallet notebook magazine newspaper picture photo "
    "mirror comb brush candle lantern torch rope hammer saw nail wrench bucket broom shovel rake "
    "seed rose tulip violin flute guitar trumpet whistle bell doll puppet puzzle marble mask "
    "crown feather shell stone pebble stick ornament figurine bouquet souvenir token medallion "
    "locket brooch bead tie vest coat cloak dress skirt mitten slipper sandal cushion quilt "
    "napkin tray saucer pitcher vase pan pot ladle knife grater funnel chisel file drill spade "
    "hoe sickle axe chain hook nut screw bolt magnet lens clip folder binder novel atlas calendar "
    "poster statuette chessboard domino yoyo balloon banjo cello harp piccolo tambourine walnut "
    "almond plum apricot mango coconut turnip carrot onion potato cabbage pumpkin biscuit bagel "
    "present parcel envelope stamp postcard pen ruler eraser crayon sticker button ribbon thread "
    "needle"
).split()
HELD_OUT_GIFTS = (
    "snack bone banana pancake umbrella helmet medal trophy camera radio telescope compass teapot "
    "kettle diary sweater sock boot orange cherry"
).split()
THINGS = (
    "table chair desk bench shelf cabinet drawer window door wall roof floor carpet curtain clock "
    "engine wheel bicycle boat ship train bus truck car wagon cart plane rocket tractor ladder "
    "fence gate tower statue fountain bridge tunnel road path sign post barrel crate chest trunk "
    "suitcase phone computer screen keyboard machine robot battery cable switch oven stove fridge "
    "sink bathtub lever gear motor furnace boiler radiator fan heater generator antenna satellite "
    "telegraph printer copier scanner elevator escalator staircase corridor balcony porch veranda "
    "gazebo greenhouse shed hut cottage cabin mansion palace temple chapel cathedral monument "
    "obelisk windmill lighthouse dam canal trench hedge archway doorbell doormat wardrobe "
    "bookcase dresser stool armchair hammock mattress canoe raft ferry yacht submarine helicopter "
    "glider tram carriage sled scooter motorcycle van sofa bed cradle tent flag banner sword "
    "shield arrow bow anchor net oar sail mast pump pipe chimney"
).split()
ANIMALS = (
    "dog cat horse cow pig sheep goat hen duck goose rabbit mouse rat fox wolf bear lion tiger "
    "elephant monkey zebra giraffe camel deer squirrel hedgehog beaver otter seal whale dolphin "
    "shark frog toad snake lizard turtle crocodile eagle owl hawk crow robin sparrow parrot "
    "penguin swan pigeon raven magpie heron pelican peacock ostrich vulture falcon woodpecker "
    "nightingale badger weasel mole raccoon skunk bison buffalo moose antelope gazelle leopard "
    "panther cheetah jackal hyena rhinoceros gorilla baboon koala sloth walrus octopus lobster "
    "crab shrimp salmon trout herring cricket grasshopper dragonfly moth wasp caterpillar newt "
    "stork bee ant spider butterfly beetle snail worm kangaroo donkey pony kitten puppy lamb"
).split()
JOBS = (
    "baker teacher doctor nurse farmer sailor soldier painter writer singer dancer driver pilot "
    "carpenter plumber gardener butcher tailor lawyer judge banker waiter cook hunter fisher "
    "miner inventor architect surgeon professor principal editor reporter detective magician "
    "clown acrobat juggler conductor composer violinist pianist sculptor jeweler watchmaker "
    "locksmith cobbler tanner brewer milkman postman grocer florist janitor porter coachman "
    "ferryman diver climber runner wrestler boxer builder engineer scientist librarian mechanic "
    "firefighter captain clerk dentist barber potter weaver shepherd blacksmith musician actor "
    "guard guide merchant student poet photographer chemist"
).split()
PLACES = (
    "store park school garden kitchen library market museum beach station office church hospital "
    "bakery farm forest river lake castle theater restaurant cafe hotel bank gym stadium zoo "
    "airport harbor village factory bookshop playground barn cave island mountain meadow valley "
    "field yard cellar attic hall pool pond cinema pharmacy workshop courtyard"
).split()
NATURE = (
    "tree leaf branch flower bush hill rock cloud star moon storm wind river wave field mountain "
    "forest snowflake puddle rainbow"
).split()
KIN = (
    "brother sister mother father uncle aunt cousin friend neighbor grandmother grandfather".split()
)
HELD_OUT_SUBJECTS = (
    "lamp cabinet wheel wagon statue barrel machine sword candle bucket guitar tower pilot "
    "gardener dentist poet parrot beaver camel sparrow notebook mirror crate banner"
).split()
ABSTRACT = (
    "idea plan story song game question answer problem secret lesson dream rumor speech joke "
    "promise message poem recipe rule trick"
).split()
EVENTS = (
    "war siege reign voyage drought festival strike trial journey project expedition exhibition "
    "contract campaign rebellion plague"
).split()
HELD_OUT_EVENTS = "famine dispute blockade crusade marriage partnership".split()

COLORS = "red blue green yellow black white brown pink purple gray golden silver".split()
ADJECTIVES = (
    "big small old new young tall short long heavy light bright dark clean dirty warm cold soft "
    "hard round square sharp smooth rough empty full cheap expensive pretty ugly strange famous "
    "broken colorful striped dotted faded polished scratched cracked crooked straight flat curved "
    "hollow solid loose tight slippery sticky fluffy fuzzy silky crisp tender bitter sour sweet "
    "salty spicy stale fresh ripe rotten frozen melted steep endless distant familiar ordinary "
    "perfect terrible awful splendid magnificent marvelous delicate clumsy graceful noisy silent "
    "peaceful dangerous safe secure mysterious strong weak fast slow loud quiet wet dry thin "
    "thick wide narrow deep shallow rare common simple wooden shiny tiny huge ancient modern "
    "fragile sturdy lovely plain fancy useful rusty dusty"
).split()
MOODS = (
    "happy sad tired angry hungry thirsty bored proud afraid excited nervous curious lonely busy "
    "calm sick relieved amazed confused annoyed furious hopeful hopeless content delighted "
    "disappointed embarrassed frightened impatient patient miserable satisfied serious stubborn "
    "thoughtful generous greedy humble worried surprised cheerful grateful jealous sleepy clever "
    "brave kind honest polite lazy shy"
).split()
ADVERBS = (
    "quickly slowly quietly loudly carefully happily sadly gently suddenly proudly eagerly calmly "
    "politely bravely patiently secretly finally soon often always sometimes rarely never usually"
).split()
MANNER = ADVERBS[:15]
FOODS = (
    "bread soup rice pasta salad cheese fish chicken beef fruit cake honey butter jam porridge "
    "stew pizza chocolate pudding popcorn bacon ham sausage turkey oatmeal yogurt cream sugar "
    "salt pepper garlic ginger cinnamon parsley spinach celery corn wheat barley broth gravy "
    "mustard toast syrup"
).split()
DRINKS = "water milk tea coffee juice lemonade cider cocoa".split()
WEATHER = "sunny rainy windy cloudy stormy foggy snowy chilly".split()
MATERIALS = "wood stone glass paper leather wool silk copper iron clay straw rubber".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
SEASONS = "spring summer autumn winter".split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()

IRREGULAR_PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "wolf": "wolves",
    "shelf": "shelves",
    "leaf": "leaves",
    "knife": "knives",
    "potato": "potatoes",
    "mango": "mangoes",
    "domino": "dominoes",
    "buffalo": "buffaloes",
    "bison": "bison",
    "moose": "moose",
    "salmon": "salmon",
    "trout": "trout",
    "shrimp": "shrimp",
}

# Base form, third person, past, -ing form; first those that take no object, then those that do.
INTRANSITIVE = {
    "sing": "sings sang singing",
    "dance": "dances danced dancing",
    "sleep": "sleeps slept sleeping",
    "laugh": "laughs laughed laughing",
    "work": "works worked working",
    "run": "runs ran running",
    "jump": "jumps jumped jumping",
    "wait": "waits waited waiting",
    "smile": "smiles smiled smiling",
    "rest": "rests rested resting",
    "play": "plays played playing",
    "cry": "cries cried crying",
    "swim": "swims swam swimming",
    "shout": "shouts shouted shouting",
    "travel": "travels traveled traveling",
    "whisper": "whispers whispered whispering",
    "listen": "listens listened listening",
    "wander": "wanders wandered wandering",
    "cough": "coughs coughed coughing",
    "study": "studies studied studying",
    "yawn": "yawns yawned yawning",
    "sneeze": "sneezes sneezed sneezing",
    "giggle": "giggles giggled giggling",
    "march": "marches marched marching",
    "kneel": "kneels knelt kneeling",
    "shiver": "shivers shivered shivering",
    "tremble": "trembles trembled trembling",
    "wave": "waves waved waving",
    "climb": "climbs climbed climbing",
    "stumble": "stumbles stumbled stumbling",
    "whistle": "whistles whistled whistling",
    "complain": "complains complained complaining",
    "argue": "argues argued arguing",
    "pray": "prays prayed praying",
    "snore": "snores snored snoring",
    "hurry": "hurries hurried hurrying",
}
TRANSITIVE = {
    "like": "likes liked liking",
    "see": "sees saw seeing",
    "watch": "watches watched watching",
    "follow": "follows followed following",
    "help": "helps helped helping",
    "love": "loves loved loving",
    "know": "knows knew knowing",
    "admire": "admires admired admiring",
    "visit": "visits visited visiting",
    "remember": "remembers remembered remembering",
    "hear": "hears heard hearing",
    "find": "finds found finding",
    "call": "calls called calling",
    "greet": "greets greeted greeting",
    "trust": "trusts trusted trusting",
    "fear": "fears feared fearing",
    "miss": "misses missed missing",
    "thank": "thanks thanked thanking",
    "praise": "praises praised praising",
    "blame": "blames blamed blaming",
    "avoid": "avoids avoided avoiding",
    "invite": "invites invited inviting",
    "teach": "teaches taught teaching",
    "ignore": "ignores ignored ignoring",
    "respect": "respects respected respecting",
    "notice": "notices noticed noticing",
    "protect": "protects protected protecting",
    "annoy": "annoys annoyed annoying",
    "recognize": "recognizes recognized recognizing",
    "surprise": "surprises surprised surprising",
}
HANDLING = {
    "clean": "cleans cleaned cleaning",
    "break": "breaks broke breaking",
    "carry": "carries carried carrying",
    "hide": "hides hid hiding",
    "paint": "paints painted painting",
    "repair": "repairs repaired repairing",
    "sell": "sells sold selling",
    "buy": "buys bought buying",
    "drop": "drops dropped dropping",
    "wash": "washes washed washing",
    "lift": "lifts lifted lifting",
    "open": "opens opened opening",
    "push": "pushes pushed pushing",
    "pull": "pulls pulled pulling",
    "keep": "keeps kept keeping",
    "lose": "loses lost losing",
    "make": "makes made making",
    "borrow": "borrows borrowed borrowing",
    "hold": "holds held holding",
    "throw": "throws threw throwing",
    "bring": "brings brought bringing",
    "take": "takes took taking",
    "pack": "packs packed packing",
    "measure": "measures measured measuring",
    "draw": "draws drew drawing",
    "choose": "chooses chose choosing",
    "polish": "polishes polished polishing",
    "inspect": "inspects inspected inspecting",
    "decorate": "decorates decorated decorating",
    "collect": "collects collected collecting",
    "build": "builds built building",
    "assemble": "assembles assembled assembling",
    "cover": "covers covered covering",
    "store": "stores stored storing",
    "weigh": "weighs weighed weighing",
    "deliver": "delivers delivered delivering",
    "design": "designs designed designing",
    "examine": "examines examined examining",
    "replace": "replaces replaced replacing",
    "steal": "steals stole stealing",
    "wrap": "wraps wrapped wrapping",
    "load": "loads loaded loading",
}
VERBS = INTRANSITIVE | TRANSITIVE | HANDLING


def plural(noun: str) -> str:
    """Give the plural of a noun of this lexicon."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("man"):
        return noun[:-3] + "men"
    return noun + "s"


VOWEL_SOUND = r"(?:(?!use|uni|one|eu)[aeiou]|honest|hour)"


def article(phrase: str) -> str:
    """Put *a* or *an* before a phrase, by its first sound."""
    return ("an " if re.match(VOWEL_SOUND, phrase) else "a ") + phrase


def fix_articles(text: str) -> str:
    """Turn *a* into *an* wherever the next word begins with a vowel sound."""
    return re.sub(rf"\b([Aa]) (?={VOWEL_SOUND})", r"\1n ", text)


def third(verb: str) -> str:
    """Give the third person singular of a verb of this lexicon."""
    return VERBS[verb].split()[0]


def past(verb: str) -> str:
    """Give the past tense of a verb of this lexicon."""
    return VERBS[verb].split()[1]


def ing(verb: str) -> str:
    """Give the *-ing* form of a verb of this lexicon."""
    return VERBS[verb].split()[2]
