"""The rules of `pii`: for each kind a pattern for what it looks like, and a test of what was found.

Every pattern is bounded or possessive, so that a place costs time in proportion to its length, whatever it holds.
What is kept although it looks alike: private, loopback, link-local, documentation and other addresses that name nobody
on the net, and dotted numbers whose four parts are all below 20 or that follow a word for version or section; numbers
with a wrong checksum; numbers after a word for another thing (ISBN, order, invoice); dates; placeholders for keys.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Literal, get_args

Kind = Literal["api_key", "email", "iban", "card", "ip", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which they are looked for: digits of a key are no phone number."""


def redact_kind(kind: Kind, text: str, found: Counter[str]) -> str:
    """The text with `<kind>` for every thing of this kind; the same object where there is none. Counts them in `found`."""
    pieces, done = [], 0
    for start, end in sorted(_FINDERS[kind](text)):
        if start >= done:
            pieces += [text[done:start], f"<{kind}>"]
            done = end
            found[kind] += 1
    return "".join([*pieces, text[done:]]) if pieces else text


def cut_private_keys(text: str, found: Counter[str]) -> str:
    """The text without PEM private keys; one that has no end goes as far as its base64 does."""
    pieces, done = [], 0
    begins = list(_PEM.finditer(text))
    for begin, limit in zip(begins, [*(each.start() for each in begins[1:]), len(text)], strict=True):
        end = _PEM_END.search(text, begin.end(), min(limit, begin.end() + _PEM_CHARS)) or _PEM_BODY.match(
            text, begin.end()
        )
        assert end is not None
        pieces += [text[done : begin.start()], "<api_key>"]
        done = end.end()
        found["api_key"] += 1
    return "".join([*pieces, text[done:]]) if pieces else text


_PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PEM_BODY = re.compile(r"(?:\s*+[A-Za-z0-9+/=]{20,}+)*+")
_PEM_CHARS = 20_000

Span = tuple[int, int]

# --- e-mail

_EMAIL = re.compile(
    r"(?<![\w.%+@/-])[A-Za-z0-9_](?:[\w.%+'-]{0,62}[\w+-])?+@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8})([A-Za-z]{2,24})(?![\w@]|-\w)",
)
_LONG_TLDS = (
    "com org net edu gov mil int info biz name pro museum aero coop jobs mobi travel asia post app dev page blog shop store"
    " online site tech xyz club cloud email agency digital media news live world today life group company solutions"
    " systems network services software studio design art academy health care legal law bank finance insurance"
    " berlin london paris nyc amsterdam wien hamburg koeln bayern swiss eus cat gal bzh scot quebec tokyo global social"
    " work team space website press host example test invalid wiki zone support center church house games science"
)
"""Endings longer than the two letters of a country that people's addresses have."""
_ENDINGS = frozenset(_LONG_TLDS.split())


def _find_emails(text: str) -> list[Span]:
    return [match.span() for match in _EMAIL.finditer(text) if _is_email(match)]


def _is_email(match: re.Match[str]) -> bool:
    ending = match[2].lower()
    if len(ending) > 2 and ending not in _ENDINGS:
        return False
    local, behind = match[0].partition("@")[0], match.string[match.end() : match.end() + 2]
    return ".." not in local and not (local == "git" and behind[:1] in (":", "/"))


# --- IP addresses

_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?!\w|[.-]\d)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])")
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|versions|release|rel|build|firmware|sections?|sect|sec|chapter|clause|article|figure|fig|table|"
    r"paragraph|para|rev|revision|update|kernel|driver|oid)\b\.?|\u00a7)[ :#=\"'(-]{0,3}\Z",
    re.IGNORECASE,
)
_LOW_PART = 20


def _find_ips(text: str) -> list[Span]:
    spans = [match.span() for match in _IPV4.finditer(text) if _is_ipv4(match)]
    return spans + [match.span() for match in _IPV6.finditer(text) if _is_ipv6(match[0])]


def _is_ipv4(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return False
    low = all(part < _LOW_PART for part in address.packed)
    return address.is_global and not address.is_multicast and not low and not _follows(_VERSION, match)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).is_global
    except ValueError:
        return False


def _follows(pattern: re.Pattern[str], match: re.Match[str], chars: int = 32) -> bool:
    """Whether the text before a match ends with a pattern."""
    return pattern.search(match.string[max(0, match.start() - chars) : match.start()]) is not None


# --- IBANs: ISO 13616, lengths of the SWIFT registry

_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}(?=[ -]?[A-Z0-9]{4})")
_IBAN_LENGTHS = (
    "15:NO 16:BE 18:DK,FI,FO,GL,NL,SD,FK 19:MK,SI 20:AT,BA,EE,KZ,LT,LU,XK,MN 21:CH,HR,LI,LV 22:BG,BH,CR,DE,GB,GE,IE,ME,RS,VA"
    " 23:AE,GI,IL,IQ,TL,OM,SO 24:AD,CZ,ES,MD,PK,RO,SA,SE,SK,TN,VG 25:LY,PT,ST 26:IS,TR 27:BI,DJ,FR,GR,IT,MC,MR,SM"
    " 28:AL,AZ,BY,CY,DO,GT,HU,LB,PL,SV,NI 29:BR,EG,PS,QA,UA 30:JO,KW,MU 31:MT,SC 32:LC 33:RU"
)
_IBAN_CHARS = {
    country: int(length)
    for length, _, countries in (part.partition(":") for part in _IBAN_LENGTHS.split())
    for country in countries.split(",")
}


def _find_ibans(text: str) -> list[Span]:
    return [(match.start(), end) for match in _IBAN.finditer(text) if (end := _iban_end(match))]


def _iban_end(match: re.Match[str]) -> int | None:
    """Where the IBAN that begins at a match ends, if it is one."""
    text, at, characters = match.string, match.start(), ""
    length = _IBAN_CHARS.get(match[1], 0)
    while at < len(text) and len(characters) < length:
        if text[at].isascii() and text[at].isalnum():
            characters += text[at]
        elif text[at] not in " -" or text[at - 1] in " -":
            return None
        at += 1
    if len(characters) < length or not length or (at < len(text) and text[at].isalnum()):
        return None
    moved = "".join(str(int(character, 36)) for character in characters[4:] + characters[:4])
    return at if int(moved) % 97 == 1 else None


# --- payment cards

_CARD = re.compile(
    r"(?<![\w.,+-])(?:\d{13,19}|\d{4}(?:([ -])\d{4})(?:\1\d{4}){2}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5})(?!\w|[.,-]\d)"
)
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)(?:\d{12}|\d{15})|3(?:0[0-5]|[689]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{12}"
)
_OTHER_NUMBER = re.compile(
    r"\b(?:isbn|issn|ean|upc|gtin|imei|sku|oclc|doi|pmid|arxiv|orcid|order|invoice|tracking|ticket|serial|reference|ref|case|patent|"
    r"article|part|model|item|batch|lot|id|uuid|hash|timestamp|account|acct|customer|member|vat|siren|siret|ein|nip)"
    r"(?:[ -](?:no|nr|num|number|id|code))?\b[ .:#=(]{0,4}\Z",
    re.IGNORECASE,
)


def _find_cards(text: str) -> list[Span]:
    return [match.span() for match in _CARD.finditer(text) if _is_card(match)]


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"[ -]", "", match[0])
    return _ISSUERS.fullmatch(digits) is not None and _has_luhn(digits) and not _follows(_OTHER_NUMBER, match)


def _has_luhn(digits: str) -> bool:
    """The check digit of ISO 7812."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


# --- phone numbers

_GAP = r"(?:[ .\u00a0\u2011\u2013-]|[ ]?/[ ]?|[ ]-[ ])"
_INTERNATIONAL = re.compile(
    rf"(?<![\w+.])(?:\+|00(?=[1-9]\d{{0,2}}{_GAP}))(?:\(\d{{1,3}}\)|[1-9]\d{{0,14}})"
    rf"(?:{_GAP}?(?:\(0?\d{{1,4}}\)[ ]?|\d{{1,12}})){{0,7}}(?!\w|[.,]\d)"
)
_AMERICAN = re.compile(
    r"(?<![\w.,+/-])(?:1[ .-])?(?:\([2-9]\d\d\)[ ]?[2-9]\d\d[ .-]|[2-9]\d\d([.-])[2-9]\d\d\1|[2-9]\d\d[ ][2-9]\d\d[ -])"
    r"\d{4}(?!\w|[.,-]\d|/\d)"
)
_NATIONAL = re.compile(
    rf"(?<![\w.,+/-])\(?0[1-9]\d{{0,4}}\)?{_GAP}\d{{2,8}}(?:{_GAP}\d{{2,6}}){{0,4}}(?!\w|[.,:-]\d|/\d)"
)
_NAMED = re.compile(r"(?<![\w.,+-])\(?\d{1,15}\)?(?:[ .\u00a0/-]{1,2}\(?\d{2,12}\)?){0,6}(?!\w|[.,:-]\d)")
_PHONE_WORD = re.compile(
    r"(?:\b(?:tele)?(?:phones?|fon|fono|foon|fone|f\u00f3n)\b|\bt(?:el|\u00e9l|elef)\b|\bt[e\u00e9]l[e\u00e9](?:phone|fono|foon|fon)\b|\bfax\b"
    r"|\b(?:mobile?|cell|cellular|handy|m\u00f3vil|celular|cellulare|portable|whatsapp|viber|sms|hotline|landline|voicemail)\b"
    r"|\b(?:call|ring|dial|text|phone|reach|appelez|llame|chiamate|anrufen)\b|\u260e|\U0001f4de|\U0001f4f1|\u0442\u0435\u043b)"
    r"(?:[ ](?:no|nr|num|number|us|me|at|on|him|her|them|is|today|now|under|al|au|unter|line)\.?){0,3}[ .:#=()\ufe0f-]{0,4}\Z",
    re.IGNORECASE,
)
_CALLING_CODES = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1234569]\d|3[578]\d|42\d|5[09]\d|6[789]\d|8[058]\d|9[679]\d"
)
_DATE = re.compile(
    r"(?:\d{1,2}[ ./-]\d{1,2}[ ./-](?:19|20)\d\d|(?:19|20)\d\d[ ./-]\d{1,2}[ ./-]\d{1,2})\b|\d\d([./-])\d\d\1\d\d "
)
_DECIMAL = re.compile(r"\+?\d+\.\d+(?:-\d{4})?")
_SPACED = re.compile(r"\d+(?: \d+)*")
_DIGIT_BEFORE, _DIGIT_BEHIND = re.compile(r"\d,? \Z"), re.compile(r",? \d")
_CLOCK_BEFORE = re.compile(r"\d:\Z")


def _find_phones(text: str) -> list[Span]:
    spans = [match.span() for match in _INTERNATIONAL.finditer(text) if _is_international(match[0])]
    for pattern in (_AMERICAN, _NATIONAL):
        spans += [match.span() for match in pattern.finditer(text) if _is_national(match)]
    return spans + [match.span() for match in _NAMED.finditer(text) if _is_named(match)]


def _digits(text: str) -> str:
    return "".join(character for character in text if "0" <= character <= "9")


def _is_international(text: str) -> bool:
    digits = _digits(text).removeprefix("00" if text[0] == "0" else "")
    if not 8 <= len(digits) <= 15 or _DECIMAL.fullmatch(text):
        return False
    return _CALLING_CODES.match(digits) is not None and len(set(digits)) > 2


def _is_national(match: re.Match[str]) -> bool:
    number = match[0]
    digits = _digits(number)
    if (
        not 9 <= len(digits) <= 12
        or len(set(digits)) < 3
        or number.count("/") > 1
        or _DATE.match(number)
        or _DECIMAL.fullmatch(number)
    ):
        return False
    if _SPACED.fullmatch(number) and (_follows(_DIGIT_BEFORE, match) or _DIGIT_BEHIND.match(match.string, match.end())):
        return False  # one of a row of numbers
    return not (_follows(_OTHER_NUMBER, match) or _follows(_VERSION, match) or _follows(_CLOCK_BEFORE, match))


def _is_named(match: re.Match[str]) -> bool:
    return 7 <= len(_digits(match[0])) <= 15 and not _DATE.match(match[0]) and _follows(_PHONE_WORD, match, 40)


# --- keys

_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA|ANVA|AIPA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[\w-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,255}|xapp-\d-[A-Za-z0-9-]{10,255}"  # Slack
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,512}|GOCSPX-[\w-]{20,64}"  # Google
    r"|sk-(?=[\w-]{0,80}\d)(?:[a-z]{2,8}-){0,2}[A-Za-z0-9_]{20,256}[\w-]{0,256}|(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{16,256}"
    r"|SG\.[\w-]{16,64}\.[\w-]{16,64}|(?:SK|AC)[0-9a-f]{32}|key-[0-9a-f]{32}"  # SendGrid, Twilio, Mailgun
    r"|npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,64}|pypi-[\w-]{50,512}|do[op]_v1_[0-9a-f]{64}|\d{8,10}:AA[\w-]{33}"
    r"|eyJ[\w-]{8,4096}\.eyJ[\w-]{8,8192}\.[\w-]{10,2048}"  # JSON web tokens
    r")(?![A-Za-z0-9])"
)
_NAMED_KEY = re.compile(
    r"(?:api[ _-]?key|apikey|access[ _-]?key(?:[ _-]?id)?|secret(?:[ _-]?(?:access[ _-]?)?key)?|account[ _-]?key|auth[ _-]?key"
    r"|(?:access|auth|refresh|bearer|session|api|bot|deploy)?[ _-]?token|client[ _-]?secret|passw(?:or)?d|pwd|private[ _-]?key|signature)"
    r"[\"'`]?(?:\s{0,4}(?::=|=>|[:=])\s{0,4}|\s+is\s+)[\"'`]?(?:Bearer\s)?([A-Za-z0-9_+/=.~-]{16,512})(?![A-Za-z0-9_(\[])"
    r"|\bBearer\s([A-Za-z0-9_+/=.~-]{20,512})",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"your|example|sample|dummy|placeholder|changeme|xxxx|\.\.\.|1234567890?abc|abcdef1?234|test[_-]?(?:key|token)|redacted",
    re.IGNORECASE,
)
_MIN_ENTROPY_BITS = 3.2


def _find_keys(text: str) -> list[Span]:
    spans = [match.span() for match in _KEY.finditer(text)]
    for match in _NAMED_KEY.finditer(text):
        group = 1 if match[1] else 2
        if _is_secret(match[group].rstrip(".")):
            spans.append((match.start(group), match.start(group) + len(match[group].rstrip("."))))
    return spans


def _is_secret(value: str) -> bool:
    """Whether a value is random rather than a word, a path or a name: by its characters and their entropy."""
    if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))) or _PLACEHOLDER.search(value):
        return False
    if len(value) < 16 or ("." in value.strip(".") and re.search(r"[A-Za-z]{3,}\.[A-Za-z]{3,}", value)):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= _MIN_ENTROPY_BITS


_FINDERS: dict[Kind, Callable[[str], list[Span]]] = {
    "api_key": _find_keys,
    "email": _find_emails,
    "iban": _find_ibans,
    "card": _find_cards,
    "ip": _find_ips,
    "phone": _find_phones,
}
