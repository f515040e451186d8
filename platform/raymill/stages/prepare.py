"""Prepare: raw text in, clean documents out.

Ray Data makes two passes, one row = one input shard. The first reads, cleans, judges and signs; then this process compares
the signatures; the second writes the documents that stay to train and val. What is done is kept: a run that was killed
goes on with the shards that are missing, and the result is the same to the byte.

The artifact: train-*.parquet and val-*.parquet (columns: corpus/table.py), card.json and card.html (the data card: counts,
figures, files, lineage), rejected.jsonl (a few dropped documents per reason), quarantine.jsonl (every record that could
not be read).
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from raymill import __version__
from raymill.artifact import Artifact, Kind, discard, sha256_file, sweep_asides, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.config import digest
from raymill.corpus.augment import Augmentation
from raymill.corpus.bad_words import BUILTIN, BadWords
from raymill.corpus.blocks import Unit
from raymill.corpus.decontaminate import Decontamination
from raymill.corpus.filters import RuleSet
from raymill.corpus.languages import Languages
from raymill.corpus.limits import Extractor
from raymill.corpus.normalize import Normalization
from raymill.corpus.pii import Pii
from raymill.corpus.segments import Segmentation
from raymill.corpus.sources import (
    BUILTIN_PYTHON,
    InputShard,
    Source,
    SourceFile,
    fingerprint,
    group,
    list_files,
    name_sources,
)
from raymill.errors import DataError
from raymill.stages.contract import Demand, Inputs

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster
    from raymill.corpus.accounting import Account
    from raymill.corpus.clean_pass import Recipe
    from raymill.corpus.decision import Decision
    from raymill.corpus.split_pass import Finish, SplitReport

TAKES: tuple[Kind, ...] = ()
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "corpus"
ROLE: RoleName = "data"
LIVE = False

_JUDGES = ("ftfy", "py3langid", "resiliparse", "trafilatura")
"""Libraries that a document's text and fate depend on: another version makes another corpus."""
_LIBRARIES = (*_JUDGES, "numba", "numpy", "orjson", "pyarrow", "ray")
_REDACTED = "redacted_"


class Config(Settings):
    """Where the text comes from and what is good enough to learn from."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = (Source(path=BUILTIN_PYTHON),)
    """`builtin:python`, or files, folders, globs and addresses (s3, gs, abfs, hf); a path, or path with its settings."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of documents held out for validation; at least one document is."""
    segment_kib: Annotated[int, Field(ge=1, le=16384)] = 64
    """A txt or md file longer than this is cut at blank lines into documents of about this size, KiB."""
    max_document_mib: Annotated[float, Field(gt=0, le=256)] = 16
    """A longer record is quarantined, MiB."""
    html: Extractor = "resiliparse"
    """What finds the main content of a web page; trafilatura is slower and stricter, and an extra to install."""
    repair: bool = True
    """Mend broken encodings (ftfy), in documents that show signs of one."""
    normalization: Normalization = Normalization()
    """Changes of spelling by choice; line ends and composed characters (NFC) always."""
    languages: Languages | None = None
    """Keep these languages only."""
    rules: tuple[RuleSet, ...] = ("gopher_repetition", "gopher_quality", "c4_page")
    """Quality rules for prose; with none, only empty documents are dropped, code too."""
    min_words: Annotated[int, Field(ge=0, le=100_000)] = 50
    """Prose with fewer words is dropped as too_short (gopher_quality)."""
    min_sentences: Annotated[int, Field(ge=0, le=1000)] = 3
    """Prose with fewer sentences is dropped as few_sentences (c4_page)."""
    min_letter_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Prose with a smaller share of words that hold a letter is few_letters; marks count as words (gopher_quality)."""
    min_stop_words: Annotated[int, Field(ge=0, le=8)] = 2
    """Prose with fewer of the, be, to, of, and, that, have, with is few_stop_words; 0 where `languages` tells another one."""
    cut_notices: bool = False
    """Cut lines of prose that ask for JavaScript or speak of cookies, terms of use and privacy policies."""
    require_terminal_punctuation: bool = False
    """Cut lines of prose that end in no . ? ! or quotation mark (c4_lines)."""
    drop_curly_brackets: bool = False
    """Drop prose that holds a curly bracket, C4's sign of code in a web page (c4_page)."""
    bad_words: BadWords | None = None
    """Drop documents by a list of words."""
    decontamination: Decontamination | None = None
    """Drop documents that hold text of these evaluation files."""
    pii: Pii | None = None
    """Replace personal data and secrets by their kind."""
    segmentation: Segmentation | None = None
    """Cut documents into segments that become documents."""
    near_duplicates: bool = True
    """Drop plain documents that share about three of four word 5-grams with an earlier one; chats and tasks: never."""
    cut_repeats: Unit | None = None
    """Cut lines or paragraphs of prose that stood in an earlier document."""
    augmentation: Augmentation | None = None
    """Add changed copies of documents to the train split."""
    shard_mib: Annotated[float, Field(ge=0.001, le=1024)] | None = None
    """What one task reads, MiB on disk; without it 2 to 64, by the size of the input. A larger file is cut."""

    @model_validator(mode="after")
    def _segment_fits(self) -> Config:
        if 2 * self.segment_kib / 1024 > self.max_document_mib:
            raise ValueError(
                f"max_document_mib {self.max_document_mib:g} is under two segments of {self.segment_kib} KiB; "
                f"fix: raise it to at least {2 * self.segment_kib / 1024:g}"
            )
        return self


def demand(config: Config) -> Demand:
    """One worker is enough; it uses all the cluster has, and the result is the same."""
    return Demand(1)


def source_state(config: Config) -> str:
    """Changes when an input file does, or a list or evaluation file that the settings name."""
    named = [] if config.decontamination is None else list(config.decontamination.against)
    if config.bad_words is not None and config.bad_words.words != BUILTIN:
        named.append(Path(config.bad_words.words))
    hashes = "".join(sha256_file(path) for path in named if path.is_file())
    return digest([fingerprint(list_files(config.sources)), hashes, _library_versions(_JUDGES)])


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Reads the sources and publishes the corpus."""
    from raymill.corpus.card import write_page
    from raymill.corpus.decision import decide
    from raymill.corpus.split_pass import join_quarantine, read_split_reports

    state = source_state(config)
    listed = list_files(config.sources)
    shards = group(listed, _shard_bytes(config, sum(file.size_bytes for file in listed)))
    goal, work = inputs.draft.path, inputs.draft.work
    _take_up(work, goal, state)
    _clean(shards, _recipe(config, work), inputs, cluster)
    decision = decide(len(shards), config.val_fraction, work)
    _check_enough(decision.account)
    _split(len(shards), _finish(config), inputs, cluster)
    if source_state(config) != state:
        raise DataError("the sources changed while they were read", where="prepare", fix="run again")

    made = read_split_reports(len(shards), work)
    written = sum(file["documents"] - file["copies"] for file in made.files)
    assert written == decision.account.kept, f"{written} documents written, {decision.account.kept} were to be kept"
    join_quarantine(len(shards), work, goal / "quarantine.jsonl")
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in decision.samples]
    write_atomic(goal / "rejected.jsonl", "".join(lines))
    figures = _figures(decision.account, made.files)
    write_atomic(goal / "index.json", json.dumps({"files": made.files}, indent=1) + "\n")
    card = _card(config, listed, decision, made)
    write_atomic(goal / "card.json", json.dumps(card, indent=1) + "\n")
    write_page(goal)
    return inputs.publish("prepare", GIVES, config, _summary(decision.account, figures), figures)


def _shard_bytes(config: Config, total_bytes: int) -> int:
    """A task costs Ray about 40 ms on two cores, so they are few; a terabyte still makes 16,384 of them."""
    mib = config.shard_mib or min(64.0, max(2.0, total_bytes / 2**20 / 24))
    return int(mib * 2**20)


def _take_up(work: Path, goal: Path, state: str) -> None:
    """Keeps what an earlier attempt left if it read the same sources, else forgets it."""
    mark = work / "sources"
    sweep_asides(goal)
    if not (mark.exists() and mark.read_text() == state):
        for made in [path for path in goal.iterdir() if path != work]:
            made.unlink()  # shards that these sources may not have
        discard(work)
        work.mkdir(mode=0o700)
        write_atomic(mark, state)


def _recipe(config: Config, work: Path) -> Recipe:
    """What the first pass does. Evaluation text is read here, once."""
    from raymill.corpus.clean_pass import Recipe
    from raymill.corpus.cleaning import Evaluation, Steps
    from raymill.corpus.decontaminate import build_index, save_index
    from raymill.corpus.filters import Rules
    from raymill.corpus.limits import ReadLimits

    evaluation = None
    if config.decontamination is not None:
        evaluation = Evaluation(work.absolute() / "evaluation.npy", config.decontamination.min_hits)
        save_index(build_index(config.decontamination.against, config.decontamination.ngram), evaluation.index)
    steps = Steps(
        repair=config.repair,
        normalization=config.normalization,
        languages=config.languages,
        rules=Rules(
            sets=frozenset(config.rules),
            min_words=config.min_words,
            min_sentences=config.min_sentences,
            min_letter_share=config.min_letter_share,
            min_stop_words=config.min_stop_words,
            cut_notices=config.cut_notices,
            drop_curly_brackets=config.drop_curly_brackets,
            require_terminal_punctuation=config.require_terminal_punctuation,
        ),
        bad_words=config.bad_words,
        evaluation=evaluation,
        pii=config.pii,
    )
    return Recipe(
        ReadLimits(config.segment_kib * 1024, int(config.max_document_mib * 2**20), config.html),
        steps,
        config.segmentation,
        config.near_duplicates,
        config.cut_repeats,
        tuple(dict.fromkeys(name for source in config.sources for name in source.keep)),
    )


def _clean(shards: list[InputShard], recipe: Recipe, inputs: Inputs, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.corpus.clean_pass import is_clean

    work = inputs.draft.work
    missing = [shard for shard in shards if not is_clean(shard.index, work)]
    total_mb = sum(shard.size_bytes for shard in shards) / 1e6
    done_mb = total_mb - sum(shard.size_bytes for shard in missing) / 1e6
    # The largest first: a shard that is one large file would else be worked on alone at the end.
    missing.sort(key=lambda shard: (-shard.size_bytes, shard.index))
    for size_bytes in map_items(cluster, partial(_clean_one, recipe=recipe, work=work.absolute()), missing):
        done_mb += size_bytes / 1e6
        inputs.progress.update(done_mb, total_mb, "MB")
        inputs.draft.checkpoint_clock()


def _clean_one(shard: InputShard, recipe: Recipe, work: Path) -> int:
    from raymill.corpus.clean_pass import clean_shard

    clean_shard(shard, recipe, work)
    return shard.size_bytes


def _finish(config: Config) -> Finish:
    from raymill.corpus.split_pass import Finish

    return Finish(config.cut_repeats, config.augmentation)


def _split(shards: int, finish: Finish, inputs: Inputs, cluster: Cluster) -> None:
    from raymill.cluster.data import map_items
    from raymill.corpus.split_pass import is_split, split_shard

    work, goal = inputs.draft.work, inputs.draft.path.absolute()
    missing = [index for index in range(shards) if not is_split(index, work)]
    for _ in map_items(cluster, partial(split_shard, finish=finish, folder=work.absolute(), goal=goal), missing):
        inputs.draft.checkpoint_clock()


def _card(config: Config, files: list[SourceFile], decision: Decision, made: SplitReport) -> dict[str, Any]:
    from raymill.corpus.card import Findings, InputFile, Lineage, build_card
    from raymill.corpus.reasons import MEANINGS

    account = decision.account.to_json()
    changed = account["changed"]
    redacted = {name: changed.pop(name) for name in list(changed) if name.startswith(_REDACTED)}
    changed["augmented_copies"] = sum(file["copies"] for file in made.files)
    findings = Findings(
        samples=decision.samples,
        groups=made.volumes(),
        lengths_before=decision.lengths,
        lengths_after=made.lengths,
        cluster_sizes=decision.cluster_sizes,
        pii={name.removeprefix(_REDACTED): count for name, count in redacted.items()},
    )
    values = config.model_dump(mode="json")
    lineage = Lineage(
        files=[InputFile(file.name, file.size_bytes, decision.inputs[file.name]) for file in files],
        config=values,
        config_digest=digest(values),
        code_version=__version__,
        library_versions=_library_versions(_LIBRARIES),
    )
    return build_card(", ".join(name_sources(config.sources)), account, MEANINGS, findings, lineage)


def _library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed; trafilatura need not be."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _check_enough(account: Account) -> None:
    if account.kept >= 2:
        return
    what = "no document is left" if account.kept == 0 else "one document is left; train and val need one each"
    raise DataError(what, where="prepare", why=f"of {account.records:,} records: {account.losses()}", fix=_fix(account))


def _fix(account: Account) -> str:
    """What most likely helps, by what took most of the records."""
    if not account.dropped and not account.quarantined:
        return "give more text; a text file becomes several documents when prepare.segment_kib is smaller"
    reason, _ = (account.dropped + account.quarantined).most_common(1)[0]
    own_rules = "leave its rule set out of prepare.rules, or lower its threshold"
    return {
        "language": "add the language to prepare.languages.keep, or lower its min_score",
        "few_stop_words": "set prepare.min_stop_words: 0 for text that is not English",
        "few_letters": "lower prepare.min_letter_share",
        "missing_column": "correct the columns that the source's template names",
        "unknown_label": "name every value in the template's labels",
        "bad_json": "mend the records; quarantine.jsonl names file and byte of each",
        "ragged_row": "mend the rows; quarantine.jsonl names file and byte of each",
        "near_duplicate": "give other text, or set prepare.near_duplicates: false",
        "frequent_phrase": own_rules,
        "repeated_phrases": own_rules,
        "few_sentences": "lower prepare.min_sentences",
        "no_text_field": "set text_field of its source in prepare.sources: {path: ..., text_field: ...}",
        "not_utf8": "save the files as UTF-8",
        "too_short": "lower prepare.min_words, or give longer documents",
        "too_long": "raise prepare.max_document_mib, or cut the documents",
        "empty": "give files that hold text",
    }.get(reason, "give other text, or keep everything with prepare.rules: [] and near_duplicates: false")


def _figures(account: Account, files: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = {
        f"{split}_{name}": sum(file[name] for file in files if file["split"] == split)
        for split in ("train", "val")
        for name in ("documents", "text_bytes")
    }
    return {**account.to_json(), **sizes}


def _summary(account: Account, figures: dict[str, Any]) -> str:
    size_mb = (figures["train_text_bytes"] + figures["val_text_bytes"]) / 1e6
    if account.pieces:
        cut = f"{account.kept:,} documents out of {account.records + account.pieces:,} segments of {account.records:,} records"
        return f"{cut} ({size_mb:.1f} MB); {account.losses()}"
    return f"{account.kept:,} of {account.records:,} documents kept ({size_mb:.1f} MB); {account.losses()}"
