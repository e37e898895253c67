"""What the pocket world knows, facts and phrasings as plain tables. `words.CAPITALS["France"]`"""


def _table(text: str) -> dict[str, str]:
    """`a b, c d` becomes {"a": "b", "c": "d"}."""
    return dict(pair.split() for pair in text.split(","))


_ONE_WAY = _table("""hot cold, big small, day night, up down, left right, fast slow, old new, light dark, open closed,
happy sad, high low, wet dry, hard soft, early late, full empty, long short, loud quiet, rich poor, clean dirty,
strong weak, good bad, near far, first last, true false""")
OPPOSITES = {a: b for pair in _ONE_WAY.items() for a, b in (pair, pair[::-1])}

PLURALS = _table("""cat cats, dog dogs, tree trees, book books, car cars, hand hands, lamp lamps, box boxes, bus buses,
fox foxes, dish dishes, baby babies, city cities, story stories, leaf leaves, wolf wolves, knife knives, man men,
woman women, child children, foot feet, tooth teeth, mouse mice, goose geese, fish fish, sheep sheep, bird birds,
house houses, river rivers, apple apples""")

CAPITALS = _table("""France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Egypt Cairo,
Kenya Nairobi, Norway Oslo, Sweden Stockholm, Finland Helsinki, Greece Athens, Poland Warsaw, Portugal Lisbon,
Austria Vienna, Peru Lima, Cuba Havana, Canada Ottawa, Russia Moscow, Ireland Dublin""")

COLOURS = _table("""grass green, snow white, coal black, blood red, honey gold, chocolate brown, sky blue, salt white,
milk white, lemon yellow, tomato red, night black, gold yellow, ink blue""")

KINDS = {
    word: kind
    for kind, row in {
        "animal": "cat dog fox wolf mouse goose fish sheep bird horse",
        "fruit": "apple pear plum lemon cherry grape peach melon",
        "colour": "red blue green yellow white black brown pink",
        "tool": "hammer saw spade knife rake drill",
    }.items()
    for word in row.split()
}

ORDERS = [
    row.split()
    for row in (
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "January February March April May June July August September October November December",
        "one two three four five six seven eight nine ten eleven twelve",
        "spring summer autumn winter",
    )
]

_SPELLED = """cat dog sun map pen cup bed key lamp tree book moon fish bird door milk hand ship rain snow star wind
leaf apple bread chair house water stone table plant cloud green light river music paper train window garden winter
summer"""
SPELLED = _SPELLED.split()

PLACES = ["ones", "tens", "hundreds"]

# Phrasings of one question; the last of each list is the short form that follows an earlier question of its skill.
PHRASES = {
    "opposite": [
        "What is the opposite of {}?",
        "Tell me the opposite of {}.",
        "Give the opposite of the word {}.",
        "Which word means the opposite of {}?",
        "And of {}?",
    ],
    "plural": [
        "What is the plural of {}?",
        "Tell me the plural of {}.",
        "Give the plural form of the word {}.",
        "One {}, two what?",
        "And of {}?",
    ],
    "capital": [
        "What is the capital of {}?",
        "Tell me the capital of {}.",
        "Name the capital city of {}.",
        "Which city is the capital of {}?",
        "And of {}?",
    ],
    "colour": [
        "What colour is {}?",
        "Tell me the colour of {}.",
        "Which colour does {} have?",
        "Name the colour of {}.",
        "And {}?",
    ],
    "kind": [
        "Is {} an animal, a fruit, a colour or a tool?",
        "What kind of thing is {}?",
        "Tell me what kind of thing {} is.",
        "What sort of word is {}?",
        "And {}?",
    ],
    "next": [
        "What comes after {}?",
        "Tell me what comes after {}.",
        "Which one follows {}?",
        "What is next after {}?",
        "And after {}?",
    ],
    "copy": ["Repeat the word {}.", "Say the word {}.", "Please write {} once.", "Copy this word: {}", "Now {}."],
    "first_letter": [
        "What is the first letter of {}?",
        "Tell me the first letter of {}.",
        "Which letter does {} start with?",
        "With which letter does the word {} begin?",
        "And of {}?",
    ],
    "letters": [
        "How many letters are in {}?",
        "Count the letters of {}.",
        "How many letters does the word {} have?",
        "Tell me how many letters {} has.",
        "And in {}?",
    ],
    "spell": ["Spell {}.", "How do you spell {}?", "Please spell the word {}.", "Tell me how to spell {}.", "And {}?"],
    "words": [
        "How many words are here: {}",
        "Count these words: {}",
        "How many words do you see: {}",
        "Count the words in this list: {}",
        "And here: {}",
    ],
    "larger": [
        "Which is larger, {} or {}?",
        "Which number is larger: {} or {}?",
        "Tell me the larger number, {} or {}.",
        "Pick the larger one: {}, {}",
        "And {} or {}?",
    ],
    "digit": [
        "What is the {} digit of {}?",
        "Tell me the {} digit of {}.",
        "Which digit is in the {} place of {}?",
        "Name the {} digit of the number {}.",
        "And the {} digit of {}?",
    ],
    "columns": [
        "Write {} + {} in columns.",
        "Put {} and {} in columns.",
        "Line up {} + {}.",
        "Line up the digits of {} and {}.",
        "And {} + {}?",
    ],
    "sum": ["What is {} + {}?", "Compute {} + {}.", "Add {} and {}.", "{} + {} = ?", "And {} + {}?"],
}

# Questions with one fixed reply, and the short reflection before it in thinking mode.
SMALL_TALK = [
    (
        ["Hello!", "Hi!", "Hello", "Hi there", "Good morning!"],
        "The user greets me. I greet back.",
        "Hello! How can I help you?",
    ),
    (
        ["Who are you?", "What is your name?", "What are you?", "Introduce yourself."],
        "The user asks who I am.",
        "I am Pocket Qwen, a very small language model.",
    ),
    (["Thank you!", "Thanks!", "Thanks a lot."], "The user thanks me. I answer politely.", "You are welcome!"),
    (["Goodbye!", "Bye!", "See you later."], "The user says goodbye.", "Goodbye! See you soon."),
    (["How are you?", "How are you today?"], "The user asks how I am.", "I am fine, thank you."),
    (
        ["What can you do?", "How can you help me?"],
        "The user asks what I can do.",
        "I can add small numbers and answer simple questions.",
    ),
    (["你好", "你好！", "您好"], "用户向我问好。", "你好！有什么可以帮你？"),
    (["你是谁？", "你叫什么名字？", "介绍一下你自己"], "用户问我是谁。", "我是 Pocket Qwen，一个很小的语言模型。"),
    (["谢谢", "谢谢你"], "用户向我道谢。", "不客气！"),
    (["再见", "再见！"], "用户说再见。", "再见！"),
    (["法国的首都是哪里？"], "用户问法国的首都。", "巴黎"),
    (["中国的首都是哪里？"], "用户问中国的首都。", "北京"),
]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Pocket Qwen.",
    "Answer briefly.",
    "You are a friendly teacher.",
    "Be short and correct.",
    "You help with words and small numbers.",
]
