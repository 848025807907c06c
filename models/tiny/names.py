"""Makes invented names, and decides which of them training may see.

Knows nothing about documents. A name is one word or two. The hash of a word decides its split, so no list is needed to
check it: words of the test split never occur in training, and reserved words occur in neither split.
"""

import random
import zlib
from typing import Literal

__all__ = ["RESERVED", "Split", "allowed", "make_name"]

Split = Literal["train", "test"]

TEST_SHARE = 10
"""One word in this many belongs to the test split."""

_RESERVED_WORDS = """
aistonia flubarg zorbin zorbia belmora quenlow tarvish mirelda brannock thessily drumlow skaveth ondrell fennwick
jorvale pelluria yastrid khemmet luthria grenvald isquander wolmere cravenna dortha ezmere hulvane kestria marrowin
rhovane silvenna trellick umbrosia xanthor yveline zemblin arkelow birsk corvane dellamor ebrith falkirra gosterin
harrowmont ilvane jassik kolvarra lindrith morvane orlavik quorra rastovan selkirn tolvane urskela vandrin wexmoor
ystoria zhalindra blorvik snarbel gribble plonk kisen plomeeth daisreeth skourkard quinimo dreinara dreirkane
gostoll neitheth zathdeulo mirpeor slendoll kearard troick skeistune stestnaara tosesk dithick zisick sterope
borkjaum mairoll feandor noundope lethor gemis keiriimo drarkwoey pearn tuthara plamulo krindulo plaleth troseth
gaithia nearane dogaova peirkesk treamara mourtearn falarn trouley beasttiint womguulo greirmior tathulo mailulo
plathey quarulo quondulo zundova volope naint fuleth tesara slolulo laskeane bandia landulo demis dunthiick thisick
lindard menen trueth duoll quenor pleamara plonara bandova plomis slousimo vendgooll bestick miveulo slurkjaarn
flinick kridoick ploumthaen helor langreard plistey breandulo faindia vourketh dakreope slothneulo teathdueth
tomarn peune tharkova seilbroick slemune stainarn joarn hemova deipluane feistis stamesk lulope kerthaope droune
haard dasor heune skimint plamint zastimo quotearn sistesk brailmaune paistara skizoimo grorarn minddioll zasulo
genbroick ralulo skogreope skosia fasesk veastarn daifoard brounick plousis drenard paimia meastboesk zoustick
grouseth parane dothune thomick thuesk simor teoll gistarn brustane
"""

RESERVED = frozenset(_RESERVED_WORDS.split())
"""Words of the sample documents and the tests, in lower case. They never occur in a generated document."""

# An empty string between two spaces is a choice too: a word may start with a vowel, a syllable may end in one.
_ONSETS = """ b bl br c ch cl cr d dr dw f fl fr g gl gr gn gw h j k kh kl kn kr l ll m mn n p ph pl pr ps q qu r rh
s sc sch sh sk sl sm sn sp spl st str sv sw t th tl tr ts tw v vl vr w wh wr x y z zh zl zw"""
_NUCLEI = """a a a e e e i i i o o o u u u y aa ae ai au ay ea ee ei eo eu ia ie io iu oa oe oi oo ou ow ua ue ui uo"""
_CODAS = """           b ck d ff g k l l ld lf lk ll lm ln lt lv m m mb mp n n nd ng nk nn nt p ps r r rb rd rg rk rl rm
rn rp rr rs rt rv rz s sh sk sp ss st t th tt tz v x z zz"""
_ENDINGS = """ia ia ia a o us is on en in an or ar el il um ora ina ena ania onia eria avia burg berg barg borg grad
land lund stan heim holm ham ton dale mere more fell ford gate wick wich shire mouth polis ville vik bin bar tan dor
mar lin"""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _choices(words: str) -> tuple[str, ...]:
    return tuple(words.replace("\n", " ").split(" "))


_ONSET, _NUCLEUS, _CODA, _ENDING = map(_choices, (_ONSETS, _NUCLEI, _CODAS, _ENDINGS))


def allowed(word: str, split: Split) -> bool:
    """Whether one word of a name may occur in documents of `split`. The case does not matter."""
    lower = word.lower()
    if lower in RESERVED:
        return False
    return (zlib.crc32(lower.encode()) % TEST_SHARE == 0) == (split == "test")


def _syllables(rng: random.Random, most: int) -> str:
    count = rng.randint(1, most)
    return "".join(rng.choice(_ONSET) + rng.choice(_NUCLEUS) + rng.choice(_CODA) for _ in range(count))


def _invent(rng: random.Random) -> str:
    style = rng.random()
    if style < 0.06:
        word = "".join(rng.choices(_LETTERS, k=rng.randint(3, 8)))
    elif style < 0.5:
        word = _syllables(rng, 3)
    else:
        word = _syllables(rng, 2) + rng.choice(_ENDING)
    return word.capitalize()


def _word(rng: random.Random, split: Split) -> str:
    while True:
        word = _invent(rng)
        if 3 <= len(word) <= 11 and allowed(word, split):
            return word


def make_name(rng: random.Random, split: Split, *, two_words: float = 0.06) -> str:
    """An invented name: one capitalised word, or two of them with probability `two_words`."""
    if rng.random() < two_words:
        return f"{_word(rng, split)} {_word(rng, split)}"
    return _word(rng, split)
