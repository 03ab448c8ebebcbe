"""Layers of an image, put over one another in a folder: only what is below one of its folders.

Source: OCI Image Specification 1.1, "Image Layer Filesystem Changeset".
"""

from __future__ import annotations

import os
import posixpath
import shutil

from storage.unpacking.extraction import Extraction, quoted
from storage.unpacking.tar import Member, Source, Stream, extract_file, members

__all__ = ["Overlay"]

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_RESERVED = ".wh..wh."


class Overlay(Extraction):
    """A folder that layers go into, one after another, from the lowest to the topmost."""

    def apply(self, stream: Stream, root: tuple[str, ...]) -> None:
        """Put one layer over what is there.

        Args:
            stream: the decompressed tar.
            root: the parts of the path of the folder in the image that is wanted.

        Raises:
            DamageError: it is damaged.
            InvalidInput: it holds what is refused.
        """
        # Its digest tells whether it is whole.
        _Layer(self, root).apply(Source(stream, may_end=True))

    def folder(self, name: str) -> None:
        """Make a folder, in place of a file or link of a lower layer."""
        path = self.place(name)
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
            self.forget()
        super().folder(name)


class _Layer:
    """One layer on its way into an overlay."""

    def __init__(self, overlay: Overlay, root: tuple[str, ...]) -> None:
        self._overlay = overlay
        self._root = root
        # What this layer has made: a whiteout hides what is below it, never beside it, and comes
        # before or after that.
        self._own: set[str] = set()
        self._lowest = not os.listdir(overlay.place("."))

    def apply(self, source: Source) -> None:
        """Put all members where they belong."""
        overlay = self._overlay
        for member in members(source, overlay, specials=True):
            overlay.entry()
            parts = self._parts(member.name)
            if parts and parts[-1].startswith(_WHITEOUT):
                self._white_out(parts, member)
            elif len(parts) <= len(self._root) and parts == self._root[: len(parts)]:
                if not member.is_folder:
                    raise overlay.refusal(
                        f"has {quoted(member.name)}, which should be the folder of the model, and "
                        "is none"
                    )
            elif parts[: len(self._root)] == self._root:
                self._make("/".join(parts[len(self._root) :]), source, member)
                continue
            if member.has_content:
                source.skip(member.size, overlay)
        source.drain(overlay)

    def _parts(self, name: str) -> tuple[str, ...]:
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts or "\0" in name:
            raise self._overlay.refusal(f"holds the name {quoted(name)}, which leaves it")
        return parts

    def _make(self, path: str, source: Source, member: Member) -> None:
        overlay = self._overlay
        if member.is_special:
            raise overlay.refusal(f"holds {quoted(member.name)}, a device or pipe")
        if member.is_folder:
            overlay.folder(path)
            if member.has_content:
                source.skip(member.size, overlay)
        elif member.is_link:
            overlay.link(path, self._target_of_link(path, member))
        elif member.is_hard_link:
            target = self._parts(member.target)
            if len(target) <= len(self._root) or target[: len(self._root)] != self._root:
                raise overlay.refusal(
                    f"holds {quoted(member.name)}, another name of {quoted(member.target)}, which "
                    "is outside of the folder of the model"
                )
            overlay.hard_link(path, "/".join(target[len(self._root) :]))
        else:
            extract_file(source, member, overlay, path)
        if not self._lowest:
            self._own.add(_where(overlay.place(path)))

    def _target_of_link(self, path: str, member: Member) -> str:
        """Return where a link leads, from where it is; links know the whole image."""
        target, folder = member.target, posixpath.dirname(path)
        inside = posixpath.normpath(posixpath.join(folder, target))
        if target and not target.startswith("/") and inside.split("/")[0] != "..":
            return target
        root = "/" + "/".join(self._root)
        image = posixpath.normpath(posixpath.join(root, folder, target))
        if not target or (image != root and not image.startswith(root + "/")):
            raise self._overlay.refusal(
                f"holds the link {quoted(member.name)}, which leads out of the folder of the model"
            )
        return posixpath.relpath(image, posixpath.join(root, folder))

    def _white_out(self, parts: tuple[str, ...], member: Member) -> None:
        folder, name = parts[:-1], parts[-1]
        if name == _OPAQUE:
            hidden, itself = folder, False
        elif name.startswith(_RESERVED):
            return  # the books of a file system, which are of no use elsewhere
        else:
            hidden, itself = (*folder, name.removeprefix(_WHITEOUT)), True
            if hidden[-1] in ("", ".", ".."):
                raise self._overlay.refusal(f"holds the whiteout {quoted(member.name)} of nothing")
        depth = len(self._root)
        if self._lowest:
            return
        if hidden == self._root[: len(hidden)]:
            self._hide(self._overlay.place("."), itself=False)
        elif hidden[:depth] == self._root:
            self._hide(self._overlay.place("/".join(hidden[depth:])), itself=itself)

    def _hide(self, path: str, *, itself: bool) -> None:
        """Remove what lower layers have at ``path`` and below it."""
        self._overlay.forget()
        if not os.path.lexists(path):
            return
        if not os.path.isdir(path) or os.path.islink(path):
            if itself and _where(path) not in self._own:
                os.unlink(path)
            return
        if itself and not self._own:
            shutil.rmtree(path)
            return
        for child in os.listdir(path):
            self._hide(os.path.join(path, child), itself=True)
        if itself and _where(path) not in self._own and not os.listdir(path):
            os.rmdir(path)


def _where(path: str) -> str:
    """Return a path by which two names of one place are the same."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)
