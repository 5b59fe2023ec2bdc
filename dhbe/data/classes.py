"""Map folders and text labels to class indices: one rule for all user images."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dhbe.core.errors import DataError
from dhbe.core.folders import below, left_behind

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
Labelled = list[tuple[Path, int]]
"""Image files with their classes."""


def numbered(
    parts: Mapping[str, Iterable[str]],
    *,
    classes: int | None,
    listed: Sequence[str] | None,
    what: str = "sub-folder",
) -> dict[str, int]:
    """Names of classes -> their numbers.

    If there is a list, a name is its place in it; names that are numbers are those numbers; other
    names are counted in name order, over all parts together. Accents are compared as they look,
    not as they are written (macOS writes them as two characters).

    Args:
        parts: names that occur in each part (``train``, ``data.test=FOLDER`` ...), by its name.
        classes: how many there are; None does not ask.
        listed: all names in order.
        what: bears the names, for messages.

    Raises:
        DataError: the names cannot be these classes.
    """
    written = {n: unicodedata.normalize("NFC", n) for names in parts.values() for n in names}
    found = {part: sorted({written[n] for n in names}) for part, names in parts.items()}
    listed = None if listed is None else [unicodedata.normalize("NFC", n) for n in listed]
    numbers = _numbered(found, classes, listed, what)
    return {n: numbers[shown] for n, shown in written.items()}


def _numbered(
    found: Mapping[str, list[str]], classes: int | None, listed: list[str] | None, what: str
) -> dict[str, int]:
    names = sorted({n for own in found.values() for n in own})
    where = " and ".join(found)
    if listed is not None and not set(names) <= set(listed) and not all(map(_is_number, names)):
        strange = ", ".join(n for n in names if n not in set(listed))
        raise DataError(f"{where}: {strange} not in the list of classes; add or rename it")
    if listed is not None and set(names) <= set(listed):
        return {n: listed.index(n) for n in names}
    numeric = {part: all(map(_is_number, own)) for part, own in found.items() if own}
    if all(numeric.values()):
        for part, own in found.items():
            _once(part, own)
        return _numbers(names, f"{where}: {what}", classes)
    if any(numeric.values()):
        raise DataError(
            f"{where}: {next(p for p in numeric if numeric[p])} names its classes by numbers, "
            f"{next(p for p in numeric if not numeric[p])} does not; name them alike"
        )
    if classes is not None and len(names) != classes:
        raise DataError(
            f"{where}: {len(names)} {what}s for {classes} classes ({', '.join(names[:20])}"
            f"{' ...' if len(names) > 20 else ''}); name them by the numbers 0..{classes - 1}, "
            "have one for every class in some part, or list all names, in order, with "
            "data.class_names=[...] or in a classes.txt beside them"
        )
    if moved := [(i, n) for i, n in enumerate(names) if _is_number(n) and int(n) != i]:
        place, name = moved[0]
        raise DataError(
            f"{where}: {what} {name} would be class {place}, because not all names are numbers; "
            "name them alike, or list all names, in order, with data.class_names=[...]"
        )
    return {n: i for i, n in enumerate(names)}


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _once(part: str, names: Sequence[str]) -> None:
    """Refuse two names of one number, which are two classes or one by mistake."""
    first: dict[int, str] = {}
    for name in names:
        if first.setdefault(int(name), name) != name:
            raise DataError(
                f"{part}: {first[int(name)]} and {name} are the same number; rename one, or put "
                "both together"
            )


def _numbers(names: Sequence[str], where: str, classes: int | None) -> dict[str, int]:
    numbers = {n: int(n) for n in names}
    highest = max(numbers.values(), default=0)
    if classes is not None and highest >= classes:
        raise DataError(
            f"{where} {highest}, but the network has classes 0..{classes - 1} "
            f"(data.classes={classes}); number them from 0, or list the names, in order, with "
            "data.class_names=[...]"
        )
    return numbers


def class_list(
    given: Sequence[str] | str | None, files: Iterable[Path], classes: int | None
) -> list[str] | None:
    """All names in order: given ones, those in a given file, or in ``files`` if they are there.

    Raises:
        DataError: the file cannot be read, or the names are not as many as the classes.
    """
    if given is None:
        lists = {str(f): _lines(f) for f in files if f.is_file()}
        if not lists:
            return None
        where, names = next(iter(lists.items()))
        if any(other != names for other in lists.values()):
            raise DataError(f"{' and '.join(lists)} name different classes; delete one")
    else:
        where = f"data.class_names={given}"
        names = _lines(Path(given)) if isinstance(given, str) else list(given)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"{where}: {', '.join(twice)} more than once; name every class once")
    if classes is not None and len(names) != classes:
        raise DataError(
            f"{where}: {len(names)} names, expected {classes} (data.classes={classes}), one a line"
        )
    return names


def _lines(file: Path) -> list[str]:
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.class_names={file}: cannot be read ({error}); give a text file with one name a "
            "line, or the names themselves: data.class_names=[cat,dog]"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def labelled(
    parts: Mapping[str, Path],
    *,
    classes: int | None,
    listed: Sequence[str] | None,
    only: str | None = None,
) -> tuple[dict[str, Labelled], list[str]]:
    """Image files below ``<folder>/<class>/`` of all parts, and notes on classes that one lacks.

    Args:
        parts: folder of each part, by its name for messages; one that is not there has no files.
        classes, listed: see ``numbered``.
        only: the part whose files are wanted; the others have a say in the names. None: all.

    Raises:
        DataError: a folder cannot be read or leads back to itself, or see ``numbered``.
    """
    folders = {part: class_folders(top) for part, top in parts.items()}
    names = {part: [f.name for f in own] for part, own in folders.items()}
    numbers = numbered(names, classes=classes, listed=listed)
    held = {
        part: [(file, numbers[folder.name]) for folder in own for file in files_of(folder)]
        for part, own in folders.items()
        if only in (None, part)
    }
    found = {p: [(f, label) for f, label in own if _is_image(f)] for p, own in held.items()}
    every = range(max(numbers.values(), default=-1) + 1 if classes is None else classes)
    names_of = {number: name for name, number in numbers.items()}
    names_of |= dict(enumerate(listed or ()))
    notes: list[str] = []
    for part, files in found.items():
        notes += lacking(part, {label for _, label in files}, every, names_of)
        notes += _not_read(part, parts[part], [f for f, _ in held[part]])
    return found, notes


def _not_read(part: str, top: Path, files: Sequence[Path]) -> Iterator[str]:
    """The notes on files that are not named like images, or lie beside the folders of classes."""
    others = Counter(f.suffix.lower() or f.name for f in files if not _is_image(f))
    beside = [f for f in top.iterdir() if _is_image(f) and f.is_file()] if files else []
    if others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.most_common(8))
        yield f"{part} holds {sum(others.values())} files that are not read as images ({kinds})"
    if beside:
        yield f"{part} holds {len(beside)} images in no folder of a class, which are not read"


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not left_behind(file.name)


def lacking(
    part: str, there: set[int], classes: Iterable[int], names: Mapping[int, str]
) -> Iterator[str]:
    """The note on classes that a part has no image of, if it has any image."""
    missing = [c for c in classes if c not in there]
    if not missing or not there:
        return
    told = [_told(c, names.get(c, "")) for c in missing[:8]]
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    yield f"{part} has no image of class {', '.join(told)}{more}"


def _told(number: int, name: str) -> str:
    return str(number) if name in ("", str(number)) else f"{number} ({name})"


def class_folders(top: Path) -> list[Path]:
    """Folders in ``top``, linked ones too, in name order; none if it is not there.

    Raises:
        DataError: it cannot be read, or holds a broken link.
    """
    if not os.path.lexists(top):
        return []
    try:
        entries = sorted(e for e in top.iterdir() if not left_behind(e.name))
    except OSError as error:
        raise DataError(f"{top}: cannot be read ({error.strerror})") from error
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry):
            raise _broken(entry)
    return [e for e in entries if os.path.isdir(e)]


def files_of(folder: Path) -> list[Path]:
    """Files below the folder of a class, and what is named like an image.

    Raises:
        DataError: a folder cannot be read, a link in it leads back to a folder that contains it, or
            a link that is not named like an image, so that it may stand for many, is broken.
    """
    found = [f for f in below(folder, _refuse) if _is_image(f) or not os.path.isdir(f)]
    for entry in found:
        if not _is_image(entry) and not os.path.exists(entry):
            raise _broken(entry)
    return found


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); mend or delete it"
    ) from error


def _broken(link: Path) -> DataError:
    where = os.readlink(link)
    return DataError(f"{link}: a link to {where}, which is not there; mend or delete it")
