"""Segments are where they say they are, cover what they should, and sentences end where a reader would end them."""

from __future__ import annotations

import random
import unicodedata

import pytest

from raymill.config import load
from raymill.corpus.segments import Segmentation, segment
from raymill.errors import ConfigError

# One sentence per line, written and split by hand; a blank line begins another text. Lines are joined by a blank.
LABELLED = """
The bridge was closed at noon.
Nobody knew why.
Dr. Alan Moss said it would open again on Monday.
"We are short of steel," he said.
Was that true?
It was not!

She moved to the U.S. in 1998.
The U.S. Army had offered her a post.
She spent two years in the U.S.
She never spoke of it.
Her brother, J. R. Hale, stayed in St. Ives.
Mr. and Mrs. Hale visited every Dec. and stayed until Jan. 12.
Prices rose by 3.5 percent, i.e. by about $4.20 per unit.
The firm (Hale Bros. Ltd.) was sold to Acme Corp. in May.
It now trades as Acme Inc.
The shares fell 2.1% on the news.

He left at 5 p.m. on Friday.
We arrived at 9 a.m. Monday and found nobody.
The doors open at 7 a.m.
The show begins at 8.
The 8 p.m. EST broadcast was cancelled.

"Really?" Mary asked.
"Yes," he replied.
"Stop!" she cried.
"I will not go," said Tom.
"You cannot make me."
"Then stay."
He shut the door.

Well... I am not sure.
He waited...
Nothing came.
It could be rain, it could be snow...
The wind rose.
Wait... what did you say?
Nothing at all.

See Fig. 3 for details.
The results (cf. Sec. 4.2) agree with Smith et al. (2004).
Cells were counted by hand.
Vol. 12, pp. 33-41, has the proof.
No. 7 was never built.
Did it matter?
No.
It did not.

Anarchism was discussed in Paris.[12]
It spread to Spain.[13][14]
The movement, led by e.g. Durruti, grew.
By 1936 it was strong.

Visit example.com for help.
Version 2.0.1 fixes the fault.
Open the file main.py first.
Node.js is required.
Then run it!

The vitamin is known as vitamin C.
It is found in oranges.
Plan B.
Nobody liked it.
John F. Kennedy was elected in 1960.
George W. Bush followed much later.

(This stands in brackets.)
The next one does not.
He spoke (loudly!) and left.
They asked "why?" and got no answer.
"What a day!"
Everyone agreed.

Yahoo! is a company.
The song "Help!" was a hit.
Who wrote it?
Lennon did!!
Really?!
Yes.

1. Open the box.
2. Take out the lamp.
3. Plug it in.
The lamp should glow.

The meeting is at 10 Downing St.
The press is outside.
He lives on Park Ave. in New York.
Bring apples, pears, etc. to the party.
Bring apples, pears, etc.
The party begins at 6.
It lasted approx. 3 hours.
The rest is history.

Prof. Dr. Ing. Weber was late.
Rev. King spoke next.
Gov. Brown and Sen. Lee sat in the front row.
Capt. Cook sailed in Aug. 1768.
He had a Ph.D. in chemistry.
His sister has a Ph.D.
She teaches.

The temperature was -3.5 degrees.
5 people came.
30 stayed home.
In 2004. the rule changed.
iPhone sales fell.
Nobody was surprised.

He said: "It is over."
Then he left.
'Never again,' she whispered.
'Never.'
The end came quickly; nobody cried.
Was it worth it?
- Perhaps.

Das Treffen ist am 3. Oktober in Bonn.
Herr Dr. Weber kommt z.B. mit dem Zug.
Er bringt B\u00fccher, Hefte usw. mit.
Das ist gut so.
\u201eKommst du?\u201c
Sie nickte.
Es waren ca. 40 Leute da.
Am 12. Mai war alles vorbei.

M. Dupont est arriv\u00e9 hier.
Il a dit : \u00ab Bonjour ! \u00bb
Puis il est parti.
Pourquoi ?
Personne ne sait.
Mme. Dupont reste.

El Sr. Garc\u00eda lleg\u00f3 tarde.
\u00bfPor qu\u00e9?
\u00a1Nadie lo sabe!
La Sra. L\u00f3pez tiene 3,5 millones.
\u00c9l no.

\u041e\u043d \u0436\u0438\u043b \u043d\u0430 \u0443\u043b. \u041b\u0435\u043d\u0438\u043d\u0430.
\u041f\u043e\u0442\u043e\u043c \u043e\u043d \u0443\u0435\u0445\u0430\u043b.
\u041f\u043e\u0447\u0435\u043c\u0443?
\u041d\u0438\u043a\u0442\u043e \u043d\u0435 \u0437\u043d\u0430\u0435\u0442.

\u092f\u0939 \u090f\u0915 \u0935\u093e\u0915\u094d\u092f \u0939\u0948\u0964
\u092f\u0939 \u0926\u0942\u0938\u0930\u093e \u0939\u0948\u0964
\u0939\u093e\u0901\u0964

\u0647\u0644 \u0623\u0646\u062a \u0647\u0646\u0627\u061f
\u0646\u0639\u0645.
\u0634\u0643\u0631\u0627.

The quick test took 0.35 s.
The slow one took 12 min. and 4 s.
Both passed.
At 100 km/h. the car is quiet.
It has a V8.
The price is 5.000 Euro.
That is a lot of money.

Smith v. Jones was decided in 1901.
The court, per Lord Hale, disagreed.
It cited art. 5 and para. 12.
Nothing changed.
Modern art.
It divides us.
The panel met in Wash. D.C. last week.

I asked him, "Do you know the way?"
He did not.
"No," said he.
"Neither do I."
Mr. Hale laughed.
So did we all.
Then it rained.
We ran.

Is it 5?
Is it 6?
Nobody counts.
A. Lincoln was tall.
He stood 6 ft. 4 in. in his socks.
The hat added more.
Gen. Grant was shorter.

The U.N. said no.
The E.U. said yes.
Talks went on until 3 a.m.
Then everyone slept.
The talks failed.
Nobody in Washington D.C. was surprised.
That was that.
"""
# Joined by nothing (East Asian), or by the ends of lines that are written out.
LABELLED_AS_IS = """
\u4eca\u65e5\u306f\u5bd2\u3044\u3002
\u96ea\u304c\u964d\u308b\uff01
\u672c\u5f53\uff1f
\u306f\u3044\u3002

\u300c\u3082\u3046\u9045\u3044\u3002\u5e30\u308d\u3046\u3002\u300d\u3068\u5f7c\u306f\u8a00\u3063\u305f\u3002
\u8ab0\u3082\u7b54\u3048\u306a\u3044\u3002

\u6211\u6765\u4e86\u3002
\u4f60\u597d\u5417\uff1f
\u5f88\u597d\uff01
\u4ed6\u8bf4\uff1a\u201c\u8d70\u5427\u3002\u201d
\u5929\u9ed1\u4e86\u3002

A Short History\\n
The town was founded on a hill above the river in the year 1204 by\\nKing John and his brother, who wanted\\na place to fish.\\n\\n
Chapter Two\\n\\n
It grew.

You need:\\n
- two eggs\\n
- flour\\n
- some milk\\n
Mix all of it well and leave it to rest for an hour in a cool place.

Dear Sir,\\nThank you for your letter of the third of May, which reached me\\nYesterday.\\n
I shall answer it soon.\\n\\n
Yours
"""
TEXT = "One river. Two banks!\n\nA bridge\u2026 Dr. Moss built it.\n  \nIt stands.\r\n\r\nStill? Yes."


def boundaries(pieces: list[str]) -> set[int]:
    """Where sentences end inside a text that is these pieces joined, counted in visible characters."""
    ends, count = set(), 0
    for piece in pieces:
        count += len("".join(piece.split()))
        ends.add(count)
    return ends - {count}


def split(text: str) -> list[str]:
    return [found.text for found in segment(text, Segmentation(method="sentence"))]


def labelled() -> list[tuple[str, list[str]]]:
    texts = [block.strip().split("\n") for block in LABELLED.split("\n\n")]
    blocks = [block.strip().split("\n") for block in LABELLED_AS_IS.split("\n\n")]
    exact = [[piece.replace("\\n", "\n") for piece in pieces] for pieces in blocks]
    return [(" ".join(lines), lines) for lines in texts] + [("".join(pieces), pieces) for pieces in exact]


def test_sentences_end_where_a_reader_would_end_them():
    right = found = wanted = 0
    for text, pieces in labelled():
        ours, labels = boundaries(split(text)), boundaries(pieces)
        right, found, wanted = right + len(ours & labels), found + len(ours), wanted + len(labels)
    assert wanted >= 150
    assert 2 * right / (found + wanted) >= 0.98, (right, found, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sentence"},
        {"method": "sentence", "per_segment": 3},
        {"method": "paragraph"},
        {"method": "paragraph", "per_segment": 2},
        {"method": "length", "size_chars": 7},
        {"method": "window", "size_chars": 9, "overlap_chars": 4},
    ],
)
def test_any_text_is_cut_where_the_offsets_say_and_nothing_visible_is_lost(options):
    draw = random.Random(3)
    alphabet = "ab Z.!?\u2026\n\r \u3002\u300c\u300d\"'(1e\u0301\u200d\U0001f468\U0001f1e6\ud800\x00\u00a0-,"
    texts = ["", " \n ", ".", "...", "\n\n\n", "\u300d", TEXT]
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(1, 200))) for _ in range(300)]
    for text in texts:
        segments = segment(text, Segmentation(**options))
        seen = set()
        for found in segments:
            assert text[found.start_char : found.end_char] == found.text != ""
            seen.update(range(found.start_char, found.end_char))
        assert not "".join(char for at, char in enumerate(text) if at not in seen).strip()
        assert segments == sorted(segments)


def test_a_blank_line_parts_paragraphs_and_several_can_make_one_segment():
    def paragraphs(**options: int) -> list[str]:
        return [found.text for found in segment(TEXT, Segmentation(method="paragraph", **options))]

    first, second, third = "One river. Two banks!", "A bridge\u2026 Dr. Moss built it.", "It stands.\r\n\r\nStill? Yes."
    assert paragraphs() == [first, second, "It stands.", "Still? Yes."]
    assert paragraphs(per_segment=2) == [f"{first}\n\n{second}", third]


def test_lengths_are_exact_and_windows_overlap_exactly():
    text = "".join(chr(97 + at % 26) for at in range(1000))
    lengths = segment(text, Segmentation(method="length", size_chars=300))
    assert [len(found.text) for found in lengths] == [300, 300, 300, 100]
    windows = segment(text, Segmentation(method="window", size_chars=300, overlap_chars=100))
    assert [(found.start_char, found.end_char) for found in windows] == [
        (0, 300), (200, 500), (400, 700), (600, 900), (800, 1000)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "cluster", ["e\u0301", "\U0001f468\u200d\U0001f469", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7", "\u1112\u1161", "\r\n"]
)  # fmt: skip
@pytest.mark.parametrize("method", ["length", "window"])
def test_no_cut_falls_inside_what_a_reader_sees_as_one_character(cluster, method):
    options = Segmentation(method=method, size_chars=8, overlap_chars=3 if method == "window" else 0)
    segments = segment("x" + cluster * 20, options)
    for found in segments:
        assert found.text.replace(cluster, "") in ("", "x")
        assert 0 < len(found.text) <= 8


def test_marks_without_end_are_cut_all_the_same():
    text = "a" + "\u0301" * 50
    segments = segment(text, Segmentation(method="length", size_chars=8))
    assert "".join(found.text for found in segments) == text
    assert max(len(found.text) for found in segments) == 8
    assert unicodedata.category(segments[1].text[0]) == "Mn"


def test_short_segments_are_left_out():
    found = segment(TEXT, Segmentation(method="sentence", min_chars=10))
    assert [item.text for item in found] == ["One river.", "Two banks!", "Dr. Moss built it.", "It stands."]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["method=window"], "overlap_chars"),
        (["method=window", "size_chars=10", "overlap_chars=10"], "overlap_chars"),
        (["method=length", "overlap_chars=10"], "method: window"),
        (["method=length", "size_chars=10", "min_chars=11"], "min_chars"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_the_fix(overrides, word):
    with pytest.raises(ConfigError) as caught:
        load(Segmentation, None, overrides)
    assert word in str(caught.value)
