"""The beginning of an answer, up to where it would say what is asked for: what XL3M's certainty is measured after.

"Where does Anna keep her bike?" gives "Anna keeps her bike". By rules for the common forms of English and Chinese
questions; for the others the LLM is asked. No model in this file.
"""

from __future__ import annotations

import re
from functools import cache

from memory_os.lexical import language_of, query_terms, terms_of

__all__ = ["MAX_TOKENS", "PROMPTS", "VERSION", "by_rules", "prompt_for", "read_stem"]

VERSION = 1
"""Of rules and prompts: stems of older ones are not used."""
MAX_TOKENS = 40
MAX_CHARS = 500
"""Of a question that the rules read."""

PROMPTS = {
    "en": "Rewrite each question as the beginning of its answer, and stop before the answer itself.\n\n"
    "Question: Where did Tom leave his keys?\nBeginning: Tom left his keys\n\n"
    "Question: What would the neighbours like to grow?\nBeginning: The neighbours would like to grow\n\n"
    "Question: {question}\nBeginning:",
    "zh": "把问题改写成答案的开头，在答案之前停下。\n\n问题：小王把钥匙放在哪里了？\n开头：小王把钥匙放在了\n\n"
    "问题：{question}\n开头：",
}

# "please tell me", "do you remember": what follows is a question in the order of a statement
_WHS = "what|who|whom|whose|which|where|when|why|how"
_OPENING = r"(?:(?:please|hey|hi|hello|so|and|but|ok|okay|well|also)\b[\s,]*)"
_ASIDE = re.compile(
    rf"^{_OPENING}*(?:(?:(?:can|could|would) you |please )*(?:tell|remind) me(?: again)?"
    r"|do you (?:know|remember|recall)|i(?:'d like| want| would like) to know|i (?:wonder|forgot)|remember)"
    rf"[\s,]+(?=(?:{_WHS})\b)",
    re.IGNORECASE,
)
_IS = re.compile(rf"\b({_WHS})['’]s\b", re.IGNORECASE)
_PRONOUNS = frozenset("i you he she it we they there this that these those".split())
_FILLER = re.compile(rf"^{_OPENING}+", re.IGNORECASE)
_WH = re.compile(
    r"^(?:(?P<prep>in|on|at|to|from|with|for|of|by|about|into|since|during) )?"
    rf"(?P<wh>{_WHS})\b(?P<rest>.*)$",
    re.IGNORECASE | re.DOTALL,
)
_BE = r"(?:is|are|was|were)"
_DO = r"(?:do|does|did)"
_MODAL = r"(?:can|could|will|would|should|must|may|might|has|have|had)"
_AUX = re.compile(
    rf"^\s*(?P<noun>.*?)\s*(?:\b(?P<be>{_BE})|\b(?P<do>{_DO})|\b(?P<modal>{_MODAL}))\b\s*(?P<after>.*)$",
    re.IGNORECASE | re.DOTALL,
)
_LATER = re.compile(r"\s*\b(?:now|today|currently|these days|again|at the moment|nowadays)$", re.IGNORECASE)
_PREPOSITIONS = frozenset("to from with for of by about at in on into after against like".split())
_NO_VERB_AFTER = frozenset(
    "the a an his her their my your its to that has have had was were been for with of in".split()
)
_NOUNS = frozenset("during morning evening something anything nothing everything".split())
_DEGREES = frozenset(
    "old tall long far big large heavy high deep fast often late early expensive wide hot cold".split()
)

_PAST = {
    "be": "was", "become": "became", "begin": "began", "break": "broke", "bring": "brought", "build": "built",
    "buy": "bought", "catch": "caught", "choose": "chose", "come": "came", "do": "did", "draw": "drew",
    "drink": "drank", "drive": "drove", "eat": "ate", "fall": "fell", "feel": "felt", "fight": "fought",
    "find": "found", "fly": "flew", "forget": "forgot", "get": "got", "give": "gave", "go": "went", "grow": "grew",
    "have": "had", "hear": "heard", "hide": "hid", "hold": "held", "keep": "kept", "know": "knew", "lead": "led",
    "learn": "learned", "leave": "left", "lend": "lent", "lose": "lost", "make": "made", "mean": "meant",
    "meet": "met", "pay": "paid", "put": "put", "read": "read", "ride": "rode", "run": "ran", "say": "said",
    "see": "saw", "sell": "sold", "send": "sent", "set": "set", "sing": "sang", "sit": "sat", "sleep": "slept",
    "speak": "spoke", "spend": "spent", "stand": "stood", "swim": "swam", "take": "took", "teach": "taught",
    "tell": "told", "think": "thought", "throw": "threw", "understand": "understood", "wake": "woke",
    "wear": "wore", "win": "won", "write": "wrote",
}  # fmt: skip
_REGULAR = """accept achieve add adopt advise agree aim answer appear apply arrive ask attend bake believe belong borrow
bury call camp carry celebrate change charge check clean climb close collect combat complete contain continue cook cost
create dance decide decline describe design develop die discover discuss donate dream dress earn encourage enjoy enter
exercise expect experience explain explore express face fail feature finish fix focus follow gain happen hate help hike
hope host hunt identify imagine improve inspire intend invite join jog judge kick kill knit laugh like listen live look
love manage marry mention miss move name need note notice offer open order organize own pack paint participate pass
perform pick plan plant play post practice practise prefer prepare produce promise promote propose protect provide
pursue raise reach realize receive recommend refer relax remember rent repair replace reply research return save
schedule search seem serve share shop show sign skip smell smoke start stay stop store struggle study suffer suggest
support talk taste test thank train transfer transmit travel treat try turn use visit volunteer vote wait walk want
warn wash watch weigh whisper wish work worry volunteer""".split()
_PARTICIPLES = frozenset(_PAST.values()) | frozenset(
    """born kept held made sold built found lost sent put hidden given taken written known done seen eaten broken
    chosen driven drawn grown shown stolen thrown worn spoken set cut let called named hit""".split()
)

_CHINESE = re.compile(
    r"^(?P<before>.*?)(?P<wh>什么样的?|什么时候|为什么|怎么样|什么|哪里|哪儿|哪个|哪些|哪种|哪[一位天年条种所座间家只]"
    r"|何时|何地|多少|几|谁|怎样|怎么|多[大长高远久])(?P<after>.*)$"
)


def by_rules(question: str) -> str | None:
    """The beginning of the answer, if the question is of a form that the rules know; without white space at its end.

    >>> by_rules("What colour is the lever of the reactor?"), by_rules("Where did Priya buy the bike?")
    ('The colour of the lever of the reactor is', 'Priya bought the bike')
    >>> by_rules("Can you tell me where Anna lives now?"), by_rules("机器人管理员叫什么名字？")
    ('Anna lives', '机器人管理员叫')
    >>> by_rules("My cat is ill.") is None
    True
    """
    text = question.strip().splitlines()[-1].strip() if question.strip() else ""
    if len(text) > MAX_CHARS:
        text = text[-MAX_CHARS:]
        cut = re.search(r"[.!?。！？]\s*(?=\S)", text)
        if not cut:
            return None
        text = text[cut.end() :]
    if language_of(text) == "zh":
        return _chinese(text)
    text = _IS.sub(r"\1 is", text)
    asked = re.findall(r"[^.!?]+[?]", text)
    text = (asked[-1] if asked else text).strip().rstrip("?.! ").strip()
    embedded, n = _ASIDE.subn("", text, count=1)
    if n and (match := _WH.match(embedded)):
        made = _embedded(match["wh"].lower(), match["rest"].strip())
        if made:
            return _sentence(made)
    match = _WH.match(_FILLER.sub("", text, count=1))
    made = _direct(match["wh"].lower(), match["rest"].strip(), (match["prep"] or "").lower()) if match else None
    return _sentence(made) if made else None


def prompt_for(question: str) -> str:
    """What the LLM is asked for the beginning of its answer, in the question's language."""
    return PROMPTS[language_of(question)].format(question=" ".join(question.split()))


def read_stem(answer: str, question: str) -> str:
    """The beginning that an LLM gave, cut before the first word that neither the question nor grammar gave it.

    A model that goes on to answer invents: what it adds must not be taken for known.

    >>> read_stem("Anna was born in Paris in 1990.", "Where was Anna born?")
    'Anna was born in'
    """
    line = next((line.strip() for line in answer.strip().splitlines() if line.strip()), "")
    line = re.sub(r"^(?:beginning|开头)\s*[:：]\s*", "", line, flags=re.IGNORECASE).strip("\"'“”‘’ ")
    if language_of(line) == "zh":
        known = set(question) | set("是在了的叫有把被用于从到为因")
        end = next((n for n, letter in enumerate(line) if letter.isalnum() and letter not in known), len(line))
        return line[:end].rstrip(" 。，.…_")
    asked = set(query_terms(question)) | set(terms_of(question))
    end = len(line)
    for word in re.finditer(r"[\w'’-]+", line):
        new = set(query_terms(word[0])) - asked
        number = any(character.isdigit() for character in word[0])
        if word[0].lower() not in _GRAMMAR and (new or number) and not _inflected(word[0], asked):
            end = word.start()
            break
    stem = line[:end].rstrip(" .,…_:;-")
    return stem if re.search(r"\w", stem) else ""


_GRAMMAR = frozenset(
    """a an the is are was were be been has have had did does do will would can could should to of in on at for from
    with by as that which who where when because it its his her their they he she there than and or not name time place
    date day number reason person way amount""".split()
)


def _inflected(word: str, asked: set[str]) -> bool:
    """Whether the word is an irregular past of a verb that was asked with."""
    return any(past == word.lower() and set(terms_of(verb)) & asked for verb, past in _PAST.items())


# -- English -----------------------------------------------------------------------------------------------------------


def _sentence(text: str) -> str | None:
    text = _LATER.sub("", " ".join(text.split())).strip(" ,")
    text = _OTHER_PERSON.sub(lambda word: _turned(word[0].lower(), text[: word.start()]), text)
    for said, right in (("you am", "you are"), ("you was", "you were"), ("I are", "I am"), ("I were", "I was")):
        text = re.sub(rf"\b{said}\b", right, text)
    return text[:1].upper() + text[1:] if re.search(r"\w", text) else None


_OTHER_PERSON = re.compile(r"\b(?:i|me|my|mine|myself|you|your|yours|yourself)\b", re.IGNORECASE)
_TURNED = {
    "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself", "your": "my", "yours": "mine",
    "yourself": "myself",
}  # fmt: skip


def _turned(word: str, before: str) -> str:
    """The person as the one who answers says it."""
    if word == "you":
        return "I" if not before.strip() or before.endswith((" that ", " than ")) else "me"
    return _TURNED[word]


def _embedded(wh: str, rest: str) -> str | None:
    """``where Anna lives now``: the statement stands there already."""
    rest = _LATER.sub("", rest)
    if wh == "how":
        rest = re.sub(r"^(?:much|many|\w+)\s+", "", rest)
    if match := re.match(rf"^({_BE})\s+(.*)$", rest, re.I):  # "what is X", as people do say
        return f"{match[2]} {match[1]}"
    if wh in ("who", "what") and _is_finite(rest.partition(" ")[0]):
        return _of_subject(wh, rest)
    if re.search(rf"\b{_BE}$", rest) or wh in ("where", "when", "what", "who"):
        return rest
    return None


def _direct(wh: str, rest: str, prep: str) -> str | None:
    match = _AUX.match(rest)
    if wh == "whose":
        return None
    if not match or (wh == "how" and not match["noun"] and not match["after"]):
        return _of_subject(wh, rest)
    noun, after = match["noun"].strip(), _LATER.sub("", match["after"].strip())
    if len(noun.split()) > 4 or not after:
        return None
    if match["be"]:
        return _with_be(wh, noun, match["be"].lower(), after, prep)
    if match["modal"]:
        return _with_modal(wh, noun, match["modal"].lower(), after, prep)
    return _with_do(wh, noun, match["do"].lower(), after, prep)


def _of_subject(wh: str, rest: str) -> str | None:
    """``who painted the lever``, ``which town won``: the subject is asked for."""
    if wh == "who":
        return f"the one who {rest} is" if rest else None
    words = rest.split()
    at = next((n for n, word in enumerate(words) if _is_finite(word)), None)
    if wh not in ("what", "which") or at is None or at > 3 or words[0].lower() in _PREPOSITIONS:
        return None
    return f"the {' '.join(words[:at])} that {' '.join(words[at:])} is" if at else f"what {rest} is"


def _is_finite(word: str) -> bool:
    """Whether the word is a verb in the past or of a third person."""
    return word in _PAST.values() or word.endswith("ed") or any(_third(verb) == word for verb in _verbs())


def _with_be(wh: str, noun: str, be: str, after: str, prep: str) -> str | None:
    words = after.split()
    if words[0].lower() in _PRONOUNS:  # "what are you doing", "where is it"
        return None if noun or wh == "who" else " ".join([words[0], be, *words[1:]])
    if words[-1].lower() == "like" or (not noun and words[0].lower() == "of"):
        return None
    quantity = wh == "how" and noun.split()[:1] in (["many"], ["much"])
    if quantity:
        thing = " ".join(noun.split()[1:])
        return f"the number of {thing} {re.sub(r'^there ', '', after)} is" if thing else None
    if _is_participle(words[0]) and wh in ("what", "which", "who"):
        subject = f"the {noun} that" if noun else {"who": "the one who"}.get(wh, "what")
        return f"{subject} {be} {after} is"
    if wh in ("what", "which") and noun and words[-1].lower() not in _PREPOSITIONS:
        inside = _aux_inside(words, be)
        return f"the {noun} that {inside} {_be_of(noun)}" if inside else f"the {noun} of {after} {be}"
    if wh == "how" and noun and noun.split()[-1].lower() not in _DEGREES:
        return None
    if wh == "why":
        inside = _aux_inside(words, be)
        return f"{inside} because" if inside else None
    if wh == "when":
        return f"{_aux_inside(words, be) or f'{after} {be}'} on" if _splits(words) else f"the date of {after} {be}"
    inside = _aux_inside(words, be)
    tail = f" {prep}" if prep else ""
    return f"{inside or f'{after} {be}'}{tail}"


def _splits(words: list[str]) -> int:
    """Where the auxiliary goes back to: before a participle or an adjective with its preposition; 0 at the end."""
    for at in range(1, len(words)):
        before = words[at - 1].lower()
        if _is_participle(words[at]) and before not in _NO_VERB_AFTER and not before.endswith(("'s", "’s")):
            return at
    if words[-1].lower() in _PREPOSITIONS and len(words) > 1:
        described = len(words) > 2 and words[-2][0].islower()
        return len(words) - 2 if described else len(words) - 1
    return 0


def _is_participle(word: str) -> bool:
    regular = len(word) > 5 and word[0].islower() and re.search(r"(?:[^e]ed|ing)$", word) is not None
    return word in _PARTICIPLES or (regular and word not in _NOUNS)


def _aux_inside(words: list[str], aux: str) -> str | None:
    at = _splits(words)
    return " ".join([*words[:at], aux, *words[at:]]) if at else None


def _verb_at(words: list[str]) -> int:
    """Where the verb stands in ``Anna keep her bike``: the first known one after the subject; 0 if there is none."""
    verbs = _verbs()
    for at, word in enumerate(words):
        if at and word in verbs and words[at - 1].lower() not in _NO_VERB_AFTER:
            return at
    return 0


@cache
def _verbs() -> frozenset[str]:
    return frozenset(_PAST) | frozenset(_REGULAR)


def _with_modal(wh: str, noun: str, modal: str, after: str, prep: str) -> str | None:
    words = after.split()
    if wh == "who" and not noun and words[0] in _verbs() | _PARTICIPLES:
        return f"the one who {modal} {after} is"
    at = _verb_at(words)
    if not at and modal in ("has", "have", "had"):
        at = next(
            (n for n, w in enumerate(words) if n and (w in _PARTICIPLES or (w.endswith("ed") and w[0].islower()))), 0
        )
        at = at or next((n for n, w in enumerate(words) if n and w == "been"), 0)
    if not at:
        return None
    return _finished(wh, noun, " ".join([*words[:at], modal, *words[at:]]), prep)


def _with_do(wh: str, noun: str, do: str, after: str, prep: str) -> str | None:
    words = after.split()
    at = _verb_at(words)
    if not at:
        return None
    verb = words[at]
    said = {"do": verb, "does": _third(verb), "did": _past(verb)}[do]
    statement = " ".join([*words[:at], said, *words[at + 1 :]])
    if wh == "when" and do != "did":  # at five, on Mondays
        return statement
    return _finished(wh, noun, statement, prep)


def _finished(wh: str, noun: str, statement: str, prep: str) -> str:
    tail = f" {prep}" if prep else ""
    if wh == "how" and noun.split()[:1] in (["many"], ["much"]) and len(noun.split()) > 1:
        return f"the number of {' '.join(noun.split()[1:])} that {statement} is"
    if wh == "why":
        return f"{statement} because"
    if wh == "when":
        return f"{statement} on"
    if wh in ("what", "which") and noun:
        return f"the {re.sub(r'^of the ', '', noun)} that {statement}{tail} {_be_of(noun)}"
    if wh == "how" and noun in ("", "long"):
        return f"{statement} {'for' if noun else 'by'}"
    return f"{statement}{tail}"


def _be_of(noun: str) -> str:
    """``is`` or ``are``, as far as an ending tells."""
    head = noun.split(" of ")[0]
    return "are" if re.search(r"[^s]s$", head) else "is"


def _third(verb: str) -> str:
    if verb in ("have", "be"):
        return {"have": "has", "be": "is"}[verb]
    if re.search(r"(?:s|sh|ch|x|z|o)$", verb):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"


def _past(verb: str) -> str:
    if verb in _PAST:
        return _PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ied"
    doubled = re.search(r"^[^aeiou]*[aeiou][bdgklmnprt]$", verb)
    return f"{verb}{verb[-1]}ed" if doubled else verb + "ed"


# -- Chinese -----------------------------------------------------------------------------------------------------------


def _chinese(text: str) -> str | None:
    """The statement up to the question word, which stands where the answer will."""
    text = re.split(r"[。！!]", text.rstrip("？?吗呢啊 "))[-1]
    match = _CHINESE.match(text)
    if not match:
        return None
    before, wh, after = match["before"].strip("，, "), match["wh"], match["after"]
    if not before:
        return f"{after}的人是" if wh == "谁" and after else None
    if wh in ("什么时候", "何时") and after:
        return f"{before}{after}的时间是"
    if wh == "为什么":
        return f"{before}{after}，因为"
    return before
