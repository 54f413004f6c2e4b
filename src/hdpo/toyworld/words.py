"""Every fixed phrase of the toy world, in one place: prompts, demonstrations, primitives and the tokenizer share them.

Each entry of `PHRASES` is one token of the toy tokenizer, which keeps a whole trajectory near a hundred tokens. None of
them occurs in an observation: what tools say is tokenised without such tokens (see `hdpo.agent.chat`), word by word.
"""
from __future__ import annotations

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
SIDE = 256            # pixels of a digit picture; a quadrant is half of it
LARGE_BOXES = ((0, 0, 128, 128), (128, 0, 256, 128), (0, 128, 128, 256), (128, 128, 256, 256))
TINY_BOXES = ((56, 56, 72, 72), (184, 56, 200, 72), (56, 184, 72, 200), (184, 184, 200, 200))

STEMS = (
    "Velmor", "Orlan", "Tashkel", "Brindor", "Quilla", "Mirabon", "Zenthar", "Kaldis", "Fenwick", "Ulsira", "Jorvale",
    "Pelmont", "Rastin", "Sovera", "Hadrun", "Ibolin", "Lyskar", "Nembury", "Otrano", "Wexley", "Arbeth", "Corvin",
    "Dunmere", "Elgast", "Gorland", "Havrin", "Istmor", "Jaskara", "Krellin", "Lunvale", "Marvost", "Norbek",
    "Ovrand", "Pirello", "Rothmar", "Selvane", "Trondel", "Urmina", "Vostrel", "Yarlow",
)
KINDS = ("Castle", "Bridge", "Harbor", "Tower", "Abbey", "Garden", "Museum", "Station", "Mill", "Gallery",
         "Temple", "Library", "Palace", "Market", "Theatre", "Chapel", "Fort", "Lodge", "Villa", "Manor")

SYSTEM = (
    "You solve problems and avoid needless tool calls. Your tools:\n"
    '<tool_call>{"name": "python", "arguments": {"code": "..."}}</tool_call>\n'
    '<tool_call>{"name": "text_search", "arguments": {"query": "..."}}</tool_call>\n'
    '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>\n'
    "Think inside <reason></reason>, then write one <tool_call></tool_call> or the <answer></answer>.")

PLAIN_SYSTEM = "You solve problems. Think inside <reason></reason>, then write the <answer></answer>."

ASK_DIGIT = "Which digit is at the {}?"
ASK_SUM = "What is {}?"
ASK_FACT = "What is the gate code of {}?"
FACT = "{} has the gate code {}."
ASK_BADGE = "What is the number of this badge?"
LINK = "toy.example"
BADGE_TITLE = "Badge {}"

# What an assistant turn says first. The choice among these is the choice to call a tool or not.
LOOK_CLOSER, COMPUTE, SEARCH, LOOK_UP = (
    "I look closer with Python.", "I compute it with Python.", "I search for it.", "I search for the image.")
SEE, KNOW, TOLD, READ = "I can see it.", "I know it.", "It is in the question.", "It is written there."
FOUND = "The tool shows it."

PYTHON_CALL = '<tool_call>{{"name": "python", "arguments": {{"code": "{}"}}}}</tool_call>'
TEXT_CALL = '<tool_call>{{"name": "text_search", "arguments": {{"query": "{}"}}}}</tool_call>'
IMAGE_CALL = '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>'


def crop_code(position: int, tiny: bool) -> str:
    box = (TINY_BOXES if tiny else LARGE_BOXES)[position]
    return f"image_1.crop(({','.join(map(str, box))}))"


TAGS = ("<tool_call>", "</tool_call>", "<reason>", "</reason>", "<answer>", "</answer>")
PHRASES = (
    '{"name": "python", "arguments": {"code": "', '{"name": "text_search", "arguments": {"query": "',
    '{"name": "image_search", "arguments": {}}', '"}}', "print(", "image_1.crop((", "))",
    "You solve problems and avoid needless tool calls. Your tools:\n", "Think inside ", ", then write one ", " or the ",
    "Which digit is at the ", *POSITIONS, "What is ", "What is the gate code of ", ASK_BADGE,
    LOOK_CLOSER, COMPUTE, SEARCH, LOOK_UP, SEE, KNOW, TOLD, READ, FOUND,
    # pretraining only
    "Which digit is this?", "How large are the digits?", "large", "tiny", "Crop the ", "Compute ", "Find ",
    "Find this image.", "Repeat ",
)
