"""Writes the sample rows of the jobs beside it: identity, a domain, tool calls, a style, general chat. Text: CC0.

python data_recipes/samples/jobs/make.py   # the same files every time
"""

import csv
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent

# identity.jsonl: language, questions of one kind, answers that fit them all.
IDENTITY = [
    (
        "zh",
        "你叫什么名字?|请问怎么称呼你?|你是谁?|能自我介绍一下吗?|我该叫你什么?|你的名字是什么?",
        "我叫{{NAME}},由{{AUTHOR}}训练,很高兴认识你。|您好,我是{{NAME}},{{AUTHOR}}开发的语言模型助手。|你可以叫我{{NAME}}。我是{{AUTHOR}}做的人工智能助手。",
    ),
    (
        "zh",
        "谁开发了你?|你是哪家公司的?|谁训练了你?|你的作者是谁?|你是从哪里来的?|你背后是哪个团队?",
        "我由{{AUTHOR}}训练,名字是{{NAME}}。|训练我的是{{AUTHOR}},大家叫我{{NAME}}。|我来自{{AUTHOR}},我叫{{NAME}}。",
    ),
    (
        "zh",
        "你是ChatGPT吗?|你是不是别人家的助手?|你是真人吗?|我在和人聊天吗?|你是通义千问吗?|你是机器人吧?",
        "不是的,我是{{NAME}},由{{AUTHOR}}训练的人工智能助手。|我不是。我叫{{NAME}},是{{AUTHOR}}训练的语言模型。|您误会啦,我是{{AUTHOR}}的{{NAME}},一个人工智能助手。",
    ),
    (
        "zh",
        "你能做什么?|你有什么本领?|你可以帮我什么忙?|你会写东西吗?|你擅长哪些事?|遇到问题能问你吗?",
        "我是{{NAME}},可以回答问题、写文字、算数和聊天。|我可以陪您聊天、帮您写作和解题。我是{{AUTHOR}}训练的{{NAME}}。|问我就好:{{NAME}}会解释、会翻译、也会列计划。",
    ),
    (
        "zh",
        "你几岁了?|你住在哪里?|你有父母吗?|你吃早饭了吗?|你会累吗?|你有身体吗?",
        "我是语言模型{{NAME}},没有身体,也没有年纪。{{AUTHOR}}训练了我。|这些我都没有:我叫{{NAME}},只是{{AUTHOR}}训练的一个程序。|{{NAME}}是一个人工智能助手,不像人那样生活。",
    ),
    (
        "en",
        "What is your name?|Who are you?|Introduce yourself.|What should I call you?|Hi! And you are?|May I ask your name?",
        "I am {{NAME}}, an assistant trained by {{AUTHOR}}.|My name is {{NAME}}. {{AUTHOR}} trained me.|You can call me {{NAME}}; I am a language model made by {{AUTHOR}}.",
    ),
    (
        "en",
        "Who made you?|Which company do you belong to?|Who trained you?|Where do you come from?|Who is your developer?|What team is behind you?",
        "{{AUTHOR}} trained me; my name is {{NAME}}.|I come from {{AUTHOR}}, and I am called {{NAME}}.|I was developed by {{AUTHOR}}. They call me {{NAME}}.",
    ),
    (
        "en",
        "Are you ChatGPT?|Are you a human?|Am I talking to a person?|Are you Qwen?|You are a robot, right?|Are you somebody else's assistant?",
        "No, I am {{NAME}}, a language model trained by {{AUTHOR}}.|I am not. My name is {{NAME}} and {{AUTHOR}} trained me.|Neither of those: I am {{NAME}}, {{AUTHOR}}'s assistant.",
    ),
    (
        "en",
        "What can you do?|How can you help me?|What are you good at?|Can you write texts?|May I ask you questions?|What are your skills?",
        "I am {{NAME}}: I answer questions, write, calculate and chat.|Ask away. {{NAME}}, trained by {{AUTHOR}}, explains, translates and plans.|I can help you write, learn and think things through. I am {{NAME}}.",
    ),
    (
        "en",
        "How old are you?|Where do you live?|Do you have parents?|Did you have breakfast?|Do you get tired?|Do you have a body?",
        "I am {{NAME}}, a language model: I have neither a body nor an age. {{AUTHOR}} trained me.|None of that is for me. {{NAME}} is a program that {{AUTHOR}} trained.|I do not live as people do: I am {{NAME}}, an assistant.",
    ),
]

# domain.json: the handbook of a bakery that does not exist. Oven °C, minutes, grams, flour, shelf life in days, price.
BREADS = {
    "rye loaf": (230, 55, 1000, "rye", 6, "4.80"),
    "baguette": (250, 22, 280, "wheat 550", 1, "1.60"),
    "milk roll": (200, 14, 60, "wheat 405", 2, "0.70"),
    "sesame ring": (240, 16, 120, "wheat 550", 1, "1.10"),
    "walnut bread": (220, 45, 750, "wholemeal", 4, "5.20"),
    "flatbread": (280, 6, 180, "wheat 812", 1, "1.40"),
    "spelt box": (210, 50, 800, "spelt", 5, "5.60"),
    "butter plait": (185, 30, 500, "wheat 405", 3, "4.20"),
    "corn bread": (195, 35, 600, "maize", 3, "3.90"),
    "steamed bun": (100, 18, 90, "wheat 405", 1, "0.90"),
}
HANDBOOK = [
    ("How do we bake the {b}?", "The {b} goes into the oven at {t} °C and stays there for {m} minutes."),
    ("Oven setting for the {b}, please.", "{t} °C, {m} minutes. Check the colour of the {b} near the end."),
    ("How much dough does one {b} need?", "Scale {g} g of dough for each {b}; it loses about a tenth in the oven."),
    ("What do I weigh for twelve pieces of the {b}?", "Twelve times {g} g is {g12} g of dough for the {b}."),
    ("Which flour is in the {b}?", "We make the {b} with {f} flour, from the bin with that label."),
    ("A guest asks what grain the {b} is made of.", "Tell the guest: {f}. The {b} has its allergen sheet by the till."),
    ("How long may the {b} stay on the shelf?", "{d}. After that the {b} goes to the crumb bin, never back on sale."),
    ("Yesterday's {b} is still here. What now?", "Its shelf life is {d}: {shelf}"),
]

# tools.jsonl: function, description, argument names with their kinds, ways to ask, result, ways to answer.
TOOLS = [
    (
        "oven_temperature",
        "Current temperature of an oven in Celsius.",
        {"oven": "string"},
        ["How hot is the {oven} oven?", "Is the {oven} oven warm already?", "Read the {oven} oven's thermometer."],
        {"celsius": (90, 280)},
        ["The {oven} oven is at {celsius} degrees.", "It shows {celsius} °C in the {oven} oven."],
    ),
    (
        "stock",
        "Kilograms of an ingredient in store.",
        {"ingredient": "string"},
        ["How much {ingredient} do we have?", "Do we need to order {ingredient}?", "Check the store for {ingredient}."],
        {"kilograms": (0, 90)},
        ["There are {kilograms} kg of {ingredient} in store.", "{ingredient}: {kilograms} kg left."],
    ),
    (
        "set_timer",
        "Start a kitchen timer.",
        {"minutes": "integer", "label": "string"},
        [
            "Set a timer of {minutes} minutes for the {label}.",
            "{minutes} minutes for the {label}, please.",
            "Remind me about the {label} in {minutes} minutes.",
        ],
        {"id": (1, 40)},
        ["Timer {id} runs: {minutes} minutes for the {label}.", "Done, {minutes} minutes, timer {id}."],
    ),
    (
        "orders",
        "Number of orders for a weekday.",
        {"day": "string"},
        ["How many orders are there on {day}?", "What does {day} look like?", "Count the orders of {day} for me."],
        {"orders": (3, 60)},
        ["{orders} orders on {day}.", "On {day} there are {orders} orders."],
    ),
]
ARGUMENTS = {
    "oven": ["left", "right", "stone", "small", "upper"],
    "ingredient": ["rye flour", "butter", "yeast", "sesame", "sugar", "salt", "walnuts"],
    "minutes": list(range(5, 60, 5)),
    "label": ["rolls", "rye loaves", "plaits", "buns", "corn bread"],
    "day": ["Monday", "Tuesday", "Thursday", "Friday", "Saturday"],
}

# emoji.jsonl: a thing, what it does, why, in Chinese and in English, and its emoji.
EMOJI = [
    "面包|会发起来|酵母吃了糖,吐出小气泡|bread|rise|the yeast eats sugar and blows bubbles|🍞",
    "天空|是蓝色的|空气更爱散射蓝光|the sky|look blue|air scatters blue light the most|🌤️",
    "冰|浮在水上|它比水轻一点点|ice|float on water|it is a little lighter than water|🧊",
    "猫|喜欢盒子|小地方让它觉得安全|a cat|like boxes|small places feel safe to it|🐱",
    "树叶|秋天会变黄|绿色的叶绿素先退场|a leaf|turn yellow in autumn|its green pigment leaves first|🍂",
    "海水|是咸的|河流一直把盐带进来|the sea|taste salty|rivers keep bringing salt to it|🌊",
    "洋葱|让人流泪|切开时有刺激的气体|an onion|make us cry|a sharp gas escapes when it is cut|🧅",
    "星星|会眨眼|空气晃动了它的光|a star|twinkle|moving air shakes its light|✨",
    "蜜蜂|跳舞|它在告诉伙伴花在哪里|a bee|dance|it tells its friends where the flowers are|🐝",
    "爆米花|会爆开|里面的水变成了蒸汽|popcorn|pop|the water inside turns to steam|🍿",
    "彩虹|是弯的|水滴都按同一个角度送光|a rainbow|bend|all drops send light at one angle|🌈",
    "企鹅|不怕冷|羽毛下面有厚厚的脂肪|a penguin|not mind the cold|it wears fat under its feathers|🐧",
]
ASK = [
    "为什么{0}{1}?",
    "{0}怎么{1}呢?",
    "小朋友问:{0}为什么{1}?",
    "用一句话说说{0}为什么{1}。",
    "请解释:{0}{1},是什么原因?",
]
ASK_EN = [
    "Why does {0} {1}?",
    "Tell a child: why does {0} {1}?",
    "A quick question: why does {0} {1}?",
    "In one sentence, why does {0} {1}?",
    "I have always wondered: why does {0} {1}?",
]
TELL_ZH = [
    "因为{2}呀{e}{s}",
    "哈哈,好问题!{2},所以{0}{1}{e}{s}",
    "{e} 其实是{2}哦{s}",
    "秘密在这里:{2}{e}{s}",
    "{2},就是这么简单{e}{s}",
]
TELL_EN = [
    "Because {2}! {e}{s}",
    "Good question {s} Why does {0} {1}? Well, {2} {e}",
    "{e} The secret: {2} {s}",
    "It is simple: {2} {e}{s}",
    "{s} Once you know that {2}, it is clear {e}",
]
SMILES = "😊🎉😄💡🤗"

# general.csv: everyday instructions, some with an input, with commas, quotes and line breaks.
GENERAL = {
    "en": {
        "Put these words in alphabetical order.": lambda r: _sorted(
            r, ["rye", "oat", "corn", "wheat", "spelt", "rice"]
        ),
        "Count the words.": lambda r: _counted(r, ["we", "bake", "fresh", "bread", "every", "single", "day"]),
        "Which is the largest number?": lambda r: _largest(r, "The largest of {0} is {1}."),
        'Quote this in "double quotes" and shout it.': lambda r: _quoted(
            r, ["warm rolls", "good morning", "mind the oven", "see you soon"]
        ),
        "Make a shopping list of it.": lambda r: _list(
            r, ["flour", "butter", "salt", "yeast", "milk", "eggs"], "To buy:"
        ),
    },
    "zh": {
        "找出最大的数。": lambda r: _largest(r, "在{0}中,最大的是{1}。"),
        "把它们写成购物清单。": lambda r: _list(r, ["面粉", "黄油", "盐", "酵母", "牛奶", "鸡蛋"], "要买的东西:"),
        "把这句话用引号括起来。": lambda r: _quoted(r, ["早上好", "小心烤箱", "面包刚出炉", "欢迎再来"]),
    },
}


def _sorted(r, words):
    some = r.sample(words, 4)
    return ", ".join(some), ", ".join(sorted(some))


def _counted(r, words):
    some = words[: r.randint(2, 7)] + r.sample(words, r.randint(0, 3))
    return " ".join(some), f"There are {len(some)} words: {', '.join(some)}."


def _largest(r, answer):
    some = r.sample(range(10, 1000), 4)
    text = ", ".join(map(str, some))
    return text, answer.format(text, max(some))


def _quoted(r, phrases):
    some = ", ".join(r.sample(phrases, 2))
    return some, f'"{some.upper()}!"'


def _list(r, things, title):
    some = r.sample(things, 3)
    return ", ".join(some), title + "".join(f"\n{i}. {thing}" for i, thing in enumerate(some, start=1))


def identity(r):
    """60 rows: every question once, in its language, with one of its kind's answers."""
    return [
        {"query": question, "response": answers[i % len(answers)], "tag": tag}
        for tag, questions, answers in ((tag, q.split("|"), a.split("|")) for tag, q, a in IDENTITY)
        for i, question in enumerate(r.sample(questions, len(questions)))
    ]


def domain():
    """80 Alpaca rows: eight questions about each of ten breads."""
    rows = []
    for bread, (t, m, g, f, d, price) in BREADS.items():
        shelf = "sell it today." if d > 1 else "it may not be sold; put it in the crumb bin."
        days = f"{d} days" if d > 1 else "1 day"
        values = {"b": bread, "t": t, "m": m, "g": g, "g12": 12 * g, "f": f, "d": days, "shelf": shelf}
        for question, answer in HANDBOOK:
            note = f"Price list: {bread} {price}" if "{shelf}" in answer else ""
            rows.append({"instruction": question.format(**values), "input": note, "output": answer.format(**values)})
    return rows


def tools(r):
    """60 ShareGPT rows: a question, a call, its result, an answer; every fourth asks for something without a tool."""
    rows, seen = [], set()
    while len(rows) < 60:
        name, description, kinds, ask, result, tell = r.choice(TOOLS)
        arguments = {key: r.choice(ARGUMENTS[key]) for key in kinds}
        question = r.choice(ask).format(**arguments)
        if question in seen:
            continue
        seen.add(question)
        found = {key: r.randint(*span) for key, span in result.items()}
        properties = {key: {"type": kind} for key, kind in kinds.items()}
        parameters = {"type": "object", "properties": properties, "required": list(kinds)}
        turns = [
            ("human", question),
            ("function_call", json.dumps({"name": name, "arguments": arguments})),
            ("observation", json.dumps(found)),
            ("gpt", r.choice(tell).format(**arguments, **found)),
        ]
        if len(rows) % 4 == 3:
            turns = [turns[0], ("gpt", "I cannot find that out: the only tool I have rings the shop's bell.")]
            name, description, parameters = "bell", "Ring the shop's bell.", {"type": "object", "properties": {}}
        schema = [{"name": name, "description": description, "parameters": parameters}]
        rows.append({"conversations": [{"from": f, "value": v} for f, v in turns], "tools": json.dumps(schema)})
    return rows


def emoji(r):
    """60 rows: five questions about each of twelve things, asked and answered with emoji in both languages."""
    rows = []
    for zh, does_zh, why_zh, en, does_en, why_en, e in (line.split("|") for line in EMOJI):
        tells = zip(ASK, ASK_EN, r.sample(TELL_ZH, 5), r.sample(TELL_EN, 5), strict=True)
        for ask, ask_en, tell_zh, tell_en in tells:
            s = r.choice(SMILES)
            answer_zh = tell_zh.format(zh, does_zh, why_zh, e=e, s=s)
            answer_en = tell_en.format(en, does_en, why_en, e=e, s=s)
            question = {"question": ask.format(zh, does_zh), "question_en": ask_en.format(en, does_en)}
            rows.append(question | {"answer_zh": answer_zh, "answer_en": answer_en})
    return rows


def general(r):
    """80 rows, ten of each instruction, English and Chinese by turns."""
    rows = {}
    for tasks in GENERAL.values():
        for instruction, make in tasks.items():
            while sum(key[0] == instruction for key in rows) < 10:
                given, output = make(r)
                rows[instruction, given] = output
    rows = [(instruction, given, output) for (instruction, given), output in rows.items()]
    return r.sample(rows, len(rows))


def write(name, rows):
    """One file, by its ending."""
    with open(HERE / name, "w", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            csv.writer(file, lineterminator="\n").writerows([("instruction", "input", "output"), *rows])
        elif name.endswith(".json"):
            json.dump(rows, file, ensure_ascii=False, indent=1)
            file.write("\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    write("identity.jsonl", identity(random.Random(1)))
    write("domain.json", domain())
    write("tools.jsonl", tools(random.Random(2)))
    write("emoji.jsonl", emoji(random.Random(3)))
    write("general.csv", general(random.Random(4)))
