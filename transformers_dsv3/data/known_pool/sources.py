"""Where the clean text comes from: Debian packages, wheels of PyPI, and the standard library of the interpreter."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ..text_files import STDLIB_SKIPPED


MOST_BYTES = 16_384  # of a document; longer files are cut at lines
STANDARD_LIBRARY = "python"


@dataclass(frozen=True)
class Source:
    """Files of one package, and how much of them is what. Files are parted, so that no two parts have the same one.

    Attributes:
        domain: of its text.
        package: of Debian's, a wheel as `NAME==VERSION`, or `STANDARD_LIBRARY`.
        pattern: of its files.
        seed, pool, held_out: MB for the seed, for the pool, and to measure models on.
        language: as CLD2 names it.
    """

    domain: str
    package: str
    pattern: str
    seed: float = 0.0
    pool: float = 0.0
    held_out: float = 0.0
    language: str = "en"


_PAGES, _GUIDE, _FAQ = "gnome-user-docs", "installation-guide-amd64", "debian-faq"
# What is held out comes from files of the seed's sources, and from sources that neither seed nor pool have
SOURCES = (
    Source("code", STANDARD_LIBRARY, "**/*.py", 0.6, 2.0, 0.06),
    Source("code", "golang-1.19-src", "**/src/**/*.go", 0.3, 3.8, 0.06),
    Source("code", "perl-modules-5.36", "**/*.pm", 0.1, 0.7),
    Source("code", "django==5.2.19", "**/*.py", 0, 2.0),
    Source("code", "libruby3.1", "**/*.rb", 0, 1.5),
    Source("code", "nltk==3.10.4", "**/*.py", 0, 0, 0.06),
    Source("code", "node-lodash", "**/lodash/*.js", 0, 0, 0.06),
    Source("maths", "sympy==1.14.0", "**/*.py", 0.4, 1.6, 0.06),
    Source("maths", "maxima-share", "**/*.mac", 0.2, 0.9, 0.06),
    Source("maths", "libcoq-stdlib", "**/*.v", 0, 1.2),
    Source("maths", "singular-data", "**/*.lib", 0, 0.6),
    Source("maths", "mpmath==1.4.1", "**/*.py", 0, 0, 0.06),
    Source("maths", "pari-doc", "**/*.tex", 0, 0, 0.06),
    Source("prose", "python3.11-doc", "**/*.rst.txt", 0.6, 1.8, 0.06),
    Source("prose", "perl-doc", "**/*.pod", 0.2, 1.0),
    Source("prose", "linux-doc-6.1", "**/_sources/[a-s]*/**/*.rst.txt", 0, 2.6),
    Source("prose", _PAGES, "**/C/**/*.page", 0, 0.6),
    Source("prose", "dict-jargon", "**/*.dict.dz", 0, 0, 0.06),
    Source("prose", _FAQ, "**/*.en.txt.gz", 0, 0, 0.06),
    *(Source("languages", _PAGES, f"**/{code}/**/*.page", 0.12, 0.4, 0.06, code) for code in ("de", "fr", "ja", "ru")),
    *(
        Source("languages", _PAGES, f"**/{code}/**/*.page", 0, 0.4, language=code[:2])
        for code in ("cs", "es", "it", "ko", "pl", "zh_CN")
    ),
    *(
        Source("languages", _GUIDE, f"**/install.{code}.txt.gz", 0, 0.12, language=code[:2])
        for code in ("cs", "de", "es", "fr", "it", "ja", "ko", "ru", "zh_CN")
    ),
    *(
        Source("languages", f"{_FAQ}-{code}", f"**/*.{code}.txt.gz", 0, 0, 0.06, code[:2])
        for code in ("de", "fr", "it", "ja", "ru", "zh-cn")
    ),
)
# Of which only the junk is made: minified programs, pages, tables
JUNK_PACKAGES = ("jupyterlab==4.6.6", "libjs-mathjax", "postgresql-doc-15", "octave-doc", "rust-src")


def packages(sources: Sequence[Source] = SOURCES) -> list[str]:
    """The packages that are needed, the standard library left out."""
    named = dict.fromkeys([*(source.package for source in sources), *JUNK_PACKAGES])
    return [name for name in named if name != STANDARD_LIBRARY]


def missing(folder: Path, sources: Sequence[Source] = SOURCES) -> list[str]:
    """The packages that are not in a folder of [`download`]."""
    return [name for name in packages(sources) if not (folder / name).is_dir()]


def download(folder: Path, names: Sequence[str]) -> None:
    """Fetch packages by `apt-get download` and `pip download`, and unpack them, each into its folder of `folder`.

    Nothing is installed, and no rights are needed.

    Raises:
        RuntimeError: a program says that there is no such package, or is missing itself.
    """
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for name in names:
        wheel = "==" in name
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", name]
        _run(pip if wheel else ["apt-get", "-q", "download", name], archives)
        partial = folder / f".{name}.partial"
        for archive in _archives(archives, name.partition("==")[0], wheel):
            if wheel:
                with zipfile.ZipFile(archive) as file:
                    file.extractall(partial)
            else:
                _run(["dpkg-deb", "-x", str(archive), str(partial)], archives)
        partial.replace(folder / name)


def _archives(folder: Path, name: str, wheel: bool) -> list[Path]:
    return sorted(folder.glob(f"{name.replace('-', '_')}-*.whl" if wheel else f"{name}_*.deb"))


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is needed and not there: the text is made of Debian packages") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def documents(folder: Path, source: Source) -> Iterator[tuple[str, str]]:
    """Names and texts of a source's documents, files in an order that a seed decides."""
    root = Path(sysconfig.get_path("stdlib")) if source.package == STANDARD_LIBRARY else folder / source.package
    paths = sorted(path for path in root.glob(source.pattern) if path.is_file() and not path.is_symlink())
    if source.package == STANDARD_LIBRARY:
        paths = [path for path in paths if STDLIB_SKIPPED.isdisjoint(path.relative_to(root).parts)]
    random.Random(f"{source.package} {source.pattern}").shuffle(paths)
    for path in paths:
        for number, piece in enumerate(pieces(_text(path))):
            yield f"{source.package}/{path.relative_to(root)}#{number}", piece


def _text(path: Path) -> str:
    """A file's text, nothing where it is no UTF-8."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        text = data.decode("utf-8")
        if path.suffix == ".page":
            paragraphs = ("".join(p.itertext()).split() for p in ElementTree.fromstring(text).iter() if _is_text(p))
            text = "\n\n".join(" ".join(words) for words in paragraphs if words) + "\n"
    except (UnicodeDecodeError, ElementTree.ParseError):
        return ""
    return text


def _is_text(element: ElementTree.Element) -> bool:
    """Whether it is a title or a paragraph of a Mallard page, http://projectmallard.org/1.0/."""
    return element.tag.rpartition("}")[2] in ("title", "p")


def pieces(text: str) -> Iterator[str]:
    """A text in documents of at most `MOST_BYTES`, cut at lines."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        n_bytes = len(line.encode("utf-8"))
        if size and size + n_bytes > MOST_BYTES:
            yield "".join(lines)
            lines, size = [], 0
        if n_bytes <= MOST_BYTES:
            lines.append(line)
            size += n_bytes
    if "".join(lines).strip():
        yield "".join(lines)
