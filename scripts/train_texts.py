"""Texts that the demo's variants are trained on, cut from public-domain Debian packages.

`apt-get download` and `dpkg-deb -x` need no root. The packages are only needed to train
again: the adapters, the held-out texts and the excerpt that the top-quarter variant is
trained on are committed under `demo/`.

| domain  | package            | text                                                     |
|---------|--------------------|----------------------------------------------------------|
| kjv     | sword-text-kjv     | King James Bible                                         |
| spanish | sword-text-sparv   | Reina-Valera 1909, Spanish                               |
| bierce  | dict-devil         | Ambrose Bierce, The Devil's Dictionary, 1911             |
| hacker  | jargon-text        | The Jargon File 4.4.7, public domain by its own notice   |
"""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {
    "kjv": "sword-text-kjv",
    "spanish": "sword-text-sparv",
    "bierce": "dict-devil",
    "hacker": "jargon-text",
}
_WORD = re.compile(r"[^\W\d_]{4,}")
# Humour of 1911 about peoples and sexes is left out.
_UNKIND = re.compile(
    r"\b(wom[ae]n|female|lady|ladies|wi(fe|ves)|negro|nigger|african|black|jew|hebrew|chinese|mongol|indian|savage"
    r"|turk|mahomet|mormon|irish|aborigin)",
    re.I,
)
_PASSAGE_CHARS = 900  # about 220 tokens: one passage fits a training row of 256
_HELDOUT_SHARE = 16  # one document in 16 is held out, told by its digest


@dataclass(frozen=True, slots=True)
class Document:
    """A passage and a subject that a question about it could name."""

    subject: str
    text: str

    @property
    def is_heldout(self) -> bool:
        """Whether the passage is kept out of training; stable under reordering."""
        return hashlib.sha256(self.text.encode()).digest()[0] % _HELDOUT_SHARE == 0


def load_documents(domain: str, cache: Path) -> list[Document]:
    """All passages of a domain, in the source's order.

    Args:
        domain: a key of `PACKAGES`.
        cache: folder the packages are kept in.

    Raises:
        subprocess.CalledProcessError: apt-get could not download the package.
    """
    root = _fetch(PACKAGES[domain], cache)
    if domain in ("kjv", "spanish"):
        return list(_passages(_sword_verses(root)))
    if domain == "bierce":
        return list(_devil(root))
    return list(_jargon(root))


def heldout_text(documents: Iterable[Document], max_chars: int = 4000) -> str:
    """The first held-out passages, joined by blank lines, at most about `max_chars` long."""
    kept: list[str] = []
    size = 0
    for document in documents:
        if document.is_heldout and size + len(document.text) <= max_chars:
            kept.append(document.text)
            size += len(document.text) + 2
    return "\n\n".join(kept) + "\n"


def _fetch(package: str, cache: Path) -> Path:
    root = cache / package
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=cache, check=True)
    archive = next(cache.glob(f"{package}_*.deb"))
    unpacked = cache / f"{package}.partial"
    subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], check=True)
    unpacked.rename(root)
    return root


def _sword_verses(root: Path) -> Iterator[str]:
    """Verses of a SWORD zText module.

    Format: `*.bzs` lists compressed blocks (offset, size, size unpacked), `*.bzv` lists verses
    (block, offset, size), `*.bzz` holds the blocks.
    """
    for testament in ("ot", "nt"):
        (index,) = root.rglob(f"{testament}.bzs")
        packed = index.with_suffix(".bzz").read_bytes()
        blocks = [
            zlib.decompress(packed[o : o + n]) for o, n, _ in struct.iter_unpack("<III", index.read_bytes())
        ]
        for block, offset, size in struct.iter_unpack("<IIH", index.with_suffix(".bzv").read_bytes()):
            raw = blocks[block][offset : offset + size].decode("utf-8", errors="ignore") if size else ""
            if "<milestone" in raw or "<chapter" in raw[:12]:
                raw = re.sub(r"<title.*?</title>", " ", raw, flags=re.S)
            verse = _squeeze(re.sub(r"<[^>]*>", " ", re.sub(r"<note.*?</note>", " ", raw, flags=re.S)))
            if verse:
                yield verse


def _squeeze(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("¶", " ")).strip()
    return re.sub(r" ([,.;:?!)])", r"\1", text)


def _passages(verses: Iterable[str]) -> Iterator[Document]:
    passage = ""
    for verse in verses:
        if passage and len(passage) + len(verse) > _PASSAGE_CHARS:
            yield Document(_subject(passage), passage)
            passage = ""
        passage = f"{passage} {verse}".strip()


def _subject(passage: str) -> str:
    """The longest lower-case word of the passage, the first among equals."""
    words = [word for word in _WORD.findall(passage) if word.islower()]
    return max(words, key=len, default="the world")


def _devil(root: Path) -> Iterator[Document]:
    (packed,) = root.rglob("devil.dict.dz")
    text = gzip.decompress(packed.read_bytes()).decode("latin-1")
    for entry in re.split(r"\n(?=[A-Z][A-Z' -]+, (?:n|adj|v|adv|pp|p|x)\b)", text)[1:]:
        # Verse quotations are indented; the definition itself is what carries the voice.
        prose = "\n".join(line for line in entry.splitlines() if not line.startswith("    "))
        headword = entry.split(",")[0].strip()
        body = _squeeze(prose)
        if len(body) > 40 and not _UNKIND.search(body):
            yield Document(headword.lower(), body[:_PASSAGE_CHARS])


def _jargon(root: Path) -> Iterator[Document]:
    (packed,) = root.rglob("jargon.txt.gz")
    text = gzip.decompress(packed.read_bytes()).decode("utf-8")
    for entry in re.split(r"\n(?=   :[^:\n]+: )", text)[1:]:
        headword = entry.strip().split(":")[1]
        body = _squeeze(entry.replace("{", "").replace("}", ""))
        if len(body) > 80:
            yield Document(headword, body[:_PASSAGE_CHARS])
